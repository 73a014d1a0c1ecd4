"""Features and logits of the last linear layer, out of any model and with no change to it."""

from fastmeta.capture.outputs import Head, Outputs
from fastmeta.capture.tape import FeatureTape, capture_features, last_linear

__all__ = ["FeatureTape", "Head", "Outputs", "capture_features", "last_linear"]
