"""fastmeta: meta-gradient semi-supervised learning, fast enough to be always on."""

from fastmeta import _registration as _registration
from fastmeta import ops
from fastmeta.dispatch import use_impl
from fastmeta.head import Head

__version__ = "0.1.0"
__all__ = ["Head", "ops", "use_impl"]
