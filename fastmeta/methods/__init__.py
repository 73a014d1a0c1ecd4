"""The methods at the last layer, ready for anyone's training loop."""

from fastmeta.methods.base import Method
from fastmeta.methods.example_weights import ExampleWeights
from fastmeta.methods.l2i import L2I
from fastmeta.methods.label_gradient_alignment import LabelGradientAlignment
from fastmeta.methods.meta_gradient import MetaGradient
from fastmeta.problem import Refined

__all__ = ["L2I", "ExampleWeights", "LabelGradientAlignment", "MetaGradient", "Method", "Refined"]
