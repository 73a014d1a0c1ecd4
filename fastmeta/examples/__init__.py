"""One short program for each method: what somebody's own loop looks like with it. ``python -m fastmeta.examples.l2i``."""
