"""Derivatives: how do the outputs on the unlabeled examples move along a direction?

A derivative maps a problem and a direction to the gradient of the outer loss G after an inner step of SGD at ``rate``,
with respect to the labels ``[N, C]`` or to the example weights ``[N]``. Where only the last layer moves it has a closed
form: no double backward, no gradient for each example. Where the whole model moves, ``how`` says which way it is taken.
"""

from fastmeta.derivatives.derivative import HOWS, Derivative, How
from fastmeta.derivatives.example_weight_gradient import ExampleWeightGradient
from fastmeta.derivatives.feature_similarity import FeatureSimilarity
from fastmeta.derivatives.finite_difference import FiniteDifference
from fastmeta.derivatives.label_and_weight_gradient import LabelAndWeightGradient
from fastmeta.derivatives.label_gradient import LabelGradient

__all__ = [
    "HOWS",
    "Derivative",
    "ExampleWeightGradient",
    "FeatureSimilarity",
    "FiniteDifference",
    "How",
    "LabelAndWeightGradient",
    "LabelGradient",
]
