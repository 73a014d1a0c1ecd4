"""The methods, published and new combinations, ready for anyone's training loop."""

from fastmeta.methods.aligned_imputation import AlignedImputation
from fastmeta.methods.base import Method
from fastmeta.methods.example_weights import ExampleWeights
from fastmeta.methods.implicit_imputation import ImplicitImputation
from fastmeta.methods.impute_and_weight import ImputeAndWeight
from fastmeta.methods.l2i import L2I
from fastmeta.methods.label_gradient_alignment import LabelGradientAlignment
from fastmeta.methods.learning_to_reweight import LearningToReweight
from fastmeta.methods.meta_gradient import MetaGradient
from fastmeta.methods.meta_pseudo_labels import MetaPseudoLabels
from fastmeta.methods.meta_weight_net import MetaWeightNet
from fastmeta.updates import Refined

__all__ = [
    "L2I",
    "AlignedImputation",
    "ExampleWeights",
    "ImplicitImputation",
    "ImputeAndWeight",
    "LabelGradientAlignment",
    "LearningToReweight",
    "MetaGradient",
    "MetaPseudoLabels",
    "MetaWeightNet",
    "Method",
    "Refined",
]
