"""fastmeta: meta-gradient semi-supervised learning, fast enough to be always on."""

from fastmeta import ops
from fastmeta.capture import FeatureTape, Head, Outputs, capture_features
from fastmeta.dispatch import use_impl
from fastmeta.graph import graph
from fastmeta.methods import (
    L2I,
    AlignedImputation,
    ExampleWeights,
    ImplicitImputation,
    ImputeAndWeight,
    LabelGradientAlignment,
    LearningToReweight,
    MetaGradient,
    MetaPseudoLabels,
    MetaWeightNet,
    Method,
    Refined,
)
from fastmeta.problem.of_model import example_weight_gradient, label_gradient
from fastmeta.verification import verify

__version__ = "0.1.0"
__all__ = [
    "L2I",
    "AlignedImputation",
    "ExampleWeights",
    "FeatureTape",
    "Head",
    "ImplicitImputation",
    "ImputeAndWeight",
    "LabelGradientAlignment",
    "LearningToReweight",
    "MetaGradient",
    "MetaPseudoLabels",
    "MetaWeightNet",
    "Method",
    "Outputs",
    "Refined",
    "capture_features",
    "example_weight_gradient",
    "graph",
    "label_gradient",
    "ops",
    "use_impl",
    "verify",
]
