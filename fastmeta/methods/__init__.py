"""The methods, published and new combinations, ready for anyone's training loop."""

from fastmeta.methods.aligned_imputation import AlignedImputation
from fastmeta.methods.base import Method
from fastmeta.methods.example_weights import ExampleWeights
from fastmeta.methods.implicit_imputation import ImplicitImputation
from fastmeta.methods.impute_and_weight import ImputeAndWeight
from fastmeta.methods.l2i import L2I
from fastmeta.methods.label_gradient_alignment import LabelGradientAlignment
from fastmeta.methods.meta_gradient import MetaGradient
from fastmeta.updates import Refined

__all__ = [
    "L2I",
    "AlignedImputation",
    "ExampleWeights",
    "ImplicitImputation",
    "ImputeAndWeight",
    "LabelGradientAlignment",
    "MetaGradient",
    "Method",
    "Refined",
]
