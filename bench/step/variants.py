"""Every step that is measured: method, how, schedule, and the plain step it is divided by."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import fastmeta
from bench.step import alignment, bases, example_weights, l2i, meta_gradient, published
from bench.step.task import Images, Network, Step
from fastmeta.derivatives import How

Make = Callable[[Network, Images], Step]

EXACT = ("jvp", "double_backward")
WHOLE_MODEL: tuple[How, ...] = ("jvp", "finite_difference", "double_backward")
EVERY = 100  # steps from one update of the example weights to the next, as published
PLAIN: dict[str, Make] = {
    "Mean Teacher": bases.MeanTeacher,
    "FixMatch": bases.FixMatch,
    "FixMatch, separate passes": bases.SeparateFixMatch,
    "pseudo-labels": bases.PseudoLabel,
    "table labels": bases.TableLabels,
}


@dataclass(frozen=True)
class StepVariant:
    """One step with a method."""

    method: str  # with what distinguishes it
    how: How  # of the derivative
    schedule: str  # `published`, `alternating` or `fused`
    plain: str  # name of the plain step that it extends
    make: Make
    same_as: str | None = None  # name of the published form that it must agree with; None: there is none
    graph: bool = False  # whether the method's part is replayed from a CUDA graph

    @property
    def name(self) -> str:
        return f"{self.method}, {self.how}, {self.schedule}{', graph' * self.graph}"


def variants() -> list[StepVariant]:
    return [*_l2i("V2", WHOLE_MODEL), *_l2i("V1", ("jvp",)), *_meta_gradient(), *_example_weights(), *_alignment()]


def for_gpu(network: Network, *, quick: bool = False) -> list[StepVariant]:
    """Last layers, also in graphs; then the whole model: in every way where time allows, else fused by jvp."""
    last = [v for v in variants() if v.how == "last_layer" and v.schedule == "fused"]
    small = network.pixels <= 32 and not quick
    names = {v.name for v in last}
    whole = [v for v in variants() if v.name not in names and (small or (v.how == "jvp" and v.schedule == "fused"))]
    graphs = [replace(v, make=partial(_in_graph, v.make), graph=True) for v in last if "look-ahead" not in v.method]
    return [*last, *graphs, *whole]


def _in_graph(make: Make, network: Network, batch: Images) -> Step:
    step = make(network, batch)
    step.method = fastmeta.graph(step.method)
    return step


def _l2i(variant: l2i.Version, hows: tuple[How, ...]) -> Iterator[StepVariant]:
    name, plain = f"L2I {variant}", "Mean Teacher"
    yield StepVariant(name, "last_layer", "fused", plain, partial(l2i.FusedLastLayer, variant=variant))
    ahead = partial(l2i.FusedLastLayer, variant=variant, look_ahead=True)
    yield StepVariant(f"{name}, look-ahead", "last_layer", "fused", plain, ahead)
    for how in hows:
        yield StepVariant(name, how, "fused", plain, partial(l2i.FusedWholeModel, variant=variant, how=how))
    form = published.PublishedL2I if variant == "V2" else published.PublishedL2IV1
    for two_views in (False, True):
        name = f"L2I {variant}" + ", two views" * two_views
        original = StepVariant(name, "double_backward", "published", plain, partial(form, two_views=two_views))
        yield original
        for how in ("last_layer", *hows):
            cls = l2i.AlternatingLastLayer if how == "last_layer" else l2i.AlternatingWholeModel
            make = partial(cls, variant=variant, how=how, two_views=two_views)
            same = original.name if how in EXACT else None
            yield StepVariant(name, how, "alternating", plain, make, same)
    if variant == "V2":
        yield StepVariant("L2I V2 on FixMatch", "last_layer", "fused", "FixMatch", l2i.FixMatchLastLayer)


def _meta_gradient() -> Iterator[StepVariant]:
    name, plain = "MetaGradient", "pseudo-labels"
    probe = StepVariant(name, "finite_difference", "published", plain, published.PublishedMetaGradient)
    exact = StepVariant(name, "double_backward", "published", plain, published.DoubleBackwardMetaGradient)
    yield from (probe, exact)
    yield StepVariant(name, "last_layer", "fused", plain, meta_gradient.FusedLastLayer)
    yield StepVariant(name, "last_layer", "alternating", plain, partial(meta_gradient.Alternating, how="last_layer"))
    for how in WHOLE_MODEL:
        same = probe if how == "finite_difference" else exact
        if how != "double_backward":
            yield StepVariant(name, how, "fused", plain, partial(meta_gradient.FusedWholeModel, how=how))
        yield StepVariant(name, how, "alternating", plain, partial(meta_gradient.Alternating, how=how), same.name)


def _example_weights() -> Iterator[StepVariant]:
    name, plain, separate = "ExampleWeights", "FixMatch", "FixMatch, separate passes"
    between = partial(example_weights.FusedLastLayer, update=False)
    yield StepVariant(name, "last_layer", "fused", plain, example_weights.FusedLastLayer)
    yield StepVariant(f"{name}, between updates", "last_layer", "fused", plain, between)
    yield StepVariant(name, "last_layer", "alternating", plain, example_weights.AlternatingLastLayer)
    identity, alternating = f"{name}, identity", partial(example_weights.AlternatingWholeModel, how="jvp")
    yield StepVariant(identity, "jvp", "fused", separate, partial(example_weights.FusedWholeModel, how="jvp"))
    yield StepVariant(identity, "jvp", "alternating", separate, alternating)


def _alignment() -> Iterator[StepVariant]:
    name, plain = "LabelGradientAlignment", "table labels"
    exact = StepVariant(name, "double_backward", "published", plain, published.PublishedLabelGradientAlignment)
    yield exact
    yield StepVariant(name, "last_layer", "fused", plain, alignment.FusedLastLayer)
    for schedule, cls in (("fused", alignment.FusedWholeModel), ("alternating", alignment.AlternatingWholeModel)):
        yield StepVariant(name, "jvp", schedule, plain, partial(cls, how="jvp"), exact.name)
