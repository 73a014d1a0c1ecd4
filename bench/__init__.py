"""Benchmarks of fastmeta: ``python -m bench ops`` and ``pytest bench``."""

import os

# torch's profiler announces every start and stop on stderr below this level; it is read when torch is imported.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")
