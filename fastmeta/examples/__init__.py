"""One short program for each method: a loop of one's own with it. ``python -m fastmeta.examples.l2i``."""
