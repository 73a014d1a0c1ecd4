"""One short program for each method: a loop of one's own with it. ``python -m fastmeta.examples.l2i``.

They show the loop, and measure nothing: some settings were chosen by the images that they print the accuracy of.
"""
