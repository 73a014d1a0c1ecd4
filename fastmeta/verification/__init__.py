"""``fastmeta.verify`` and what it is made of."""

from fastmeta.verification.model import verify
from fastmeta.verification.report import Report, Row

__all__ = ["Report", "Row", "verify"]
