"""The methods as the main job uses them: settings for small images with very few labels."""

from collections.abc import Callable
from dataclasses import dataclass

from fastmeta.methods import L2I, ExampleWeights, LabelGradientAlignment, MetaGradient
from fastmeta.ssl import BASES, Algorithm, FixMatch, Refiner


@dataclass(frozen=True)
class Recipe:
    """How to build a method for a data set.

    Args:
        build: from the number of unlabeled images and of classes; None for the base alone.
        uses_holdout: its outer loss reads the hold-out part of the split and not the labeled batch.
    """

    build: Callable[[int, int], Refiner | None]
    uses_holdout: bool = False


def make_base(name: str) -> Algorithm:
    """The base algorithm of this name with the main job's settings.

    >>> make_base("fixmatch").threshold
    0.8
    """
    return FixMatch(threshold=0.8) if name == "fixmatch" else BASES[name]()


def _base_alone(num_unlabeled: int, num_classes: int) -> None:
    return None


def _l2i(num_unlabeled: int, num_classes: int) -> Refiner:
    return Refiner(L2I(variant="V2", unit_length=True, weight=0.5))


def _meta_gradient(num_unlabeled: int, num_classes: int) -> Refiner:
    return Refiner(MetaGradient(step=0.1))


def _example_weights(num_unlabeled: int, num_classes: int) -> Refiner:
    method = ExampleWeights(num_unlabeled, inverse_hessian="cg", damping=0.1, lr=0.05)
    return Refiner(method, view="learned", hard=True)


def _label_gradient_alignment(num_unlabeled: int, num_classes: int) -> Refiner:
    return Refiner(LabelGradientAlignment(num_unlabeled, num_classes, lr=0.1), view="learned")


METHODS: dict[str, Recipe] = {
    "none": Recipe(_base_alone),
    "l2i": Recipe(_l2i),
    "meta-gradient": Recipe(_meta_gradient),
    "example-weights": Recipe(_example_weights, uses_holdout=True),
    "label-gradient-alignment": Recipe(_label_gradient_alignment),
}
