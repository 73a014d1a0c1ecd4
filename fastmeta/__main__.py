"""``python -m fastmeta``."""

import sys

from fastmeta.cli import main

if __name__ == "__main__":
    sys.exit(main())
