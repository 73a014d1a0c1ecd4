"""A step that is not finite, which a loss scaler skips, leaves a method as if it had never been."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastmeta
from fastmeta import (
    AlignedImputation,
    ExampleWeights,
    ImplicitImputation,
    ImputeAndWeight,
    LabelGradientAlignment,
    MetaWeightNet,
    Method,
)
from fastmeta.derivatives import LabelGradient
from fastmeta.directions import InverseHessian, NormalizedGap
from fastmeta.updates import LabelTable

M, C = 20, 3
METHODS: dict[str, Callable[[str], Method]] = {
    "weights": lambda how: ExampleWeights(M, how=how),
    "weights, pcg": lambda how: ExampleWeights(M, how=how, inverse_hessian="pcg" if how == "last_layer" else "cg"),
    "weights, neumann": lambda how: ExampleWeights(M, how=how, inverse_hessian="neumann", neumann_step=0.1),
    "weights, identity, read before": lambda how: ExampleWeights(
        M, how=how, inverse_hessian="identity", masked=False, read="before", duplicates="last"
    ),
    "shared weight": lambda how: ExampleWeights(M, how=how, shared=True, inverse_hessian="identity"),
    "labels, plain adam": lambda how: LabelGradientAlignment(M, C, how=how, optimizer="adam"),
    "weights, sgd": lambda how: ExampleWeights(M, how=how, optimizer="sgd"),
    "labels": lambda how: LabelGradientAlignment(M, C, how=how),
    "labels, averages before": lambda how: LabelGradientAlignment(M, C, how=how, include_current=False),
    "averages": lambda how: AlignedImputation(how=how),
    "both": lambda how: ImputeAndWeight(M, how=how),
    "weight net": lambda how: MetaWeightNet(how=how, lr=0.1),
    "solver": lambda how: ImplicitImputation(how=how, solver="pcg" if how == "last_layer" else "cg"),
    "averages in a solver": lambda how: Method(
        InverseHessian(NormalizedGap()), LabelGradient("cross_entropy", how=how), LabelTable(M, C)
    ),
}
methods = pytest.mark.parametrize("make", METHODS.values(), ids=METHODS)


@pytest.fixture
def model(generator: torch.Generator) -> nn.Sequential:
    torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, C))


def batch_of(seed: int, n: int = 7) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {
        "unlabeled": torch.randn(n, 6, generator=draw),
        "holdout": torch.randn(4, 6, generator=draw),
        "labels": torch.randn(n, C, generator=draw).softmax(-1),
        "targets": torch.randint(C, (4,), generator=draw),
        "index": torch.randint(M, (n,), generator=draw),
    }


def step(method: Method, model: nn.Sequential, batch: dict[str, Tensor]) -> fastmeta.Refined:
    rest = {name: tensor for name, tensor in batch.items() if name not in ("unlabeled", "holdout", "labels")}
    labels = batch["labels"].clone().requires_grad_() * 1
    if method.derivative.how != "last_layer":
        return method.refine(model=model, unlabeled=batch["unlabeled"], holdout=batch["holdout"], labels=labels, **rest)
    with fastmeta.capture_features(model) as tape:
        logits_l, logits_u = model(batch["holdout"]), model(batch["unlabeled"])
    return method.refine(unlabeled=tape.outputs(logits_u), holdout=tape.outputs(logits_l), labels=labels, **rest)


def broken(name: str, value: float, seed: int) -> dict[str, Tensor]:
    batch = batch_of(seed)
    if name == "masked":
        batch["mask"] = torch.ones(7)
        batch["mask"][2] = 0
        batch["unlabeled"][2, 1] = value
    else:
        batch[name][2, 1] = value
    return batch


def state_of(method: Method) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in method.state_dict().items() if name != "calls"}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.filterwarnings("ignore::fastmeta.ops.NotConvergedWarning")
@pytest.mark.parametrize("how", ["last_layer", "jvp"])
@methods
def test_it_leaves_everything_as_it_was(make: Callable[[str], Method], how: str, model: nn.Sequential) -> None:
    """With a bad row that is masked as well, and as the very first step."""
    method, clean = make(how), make(how)
    kinds = [("unlabeled", torch.nan), ("masked", torch.nan), ("holdout", torch.nan), ("labels", torch.inf)]
    if how == "last_layer":
        with torch.no_grad():
            model[0] = nn.Identity()
            model[1] = nn.Identity()
            model[2] = nn.Linear(6, C)
        kinds += [("unlabeled", torch.inf), ("masked", -torch.inf), ("holdout", torch.inf)]
    for seed, (name, value) in enumerate(kinds):
        if name == "labels" and not isinstance(method, AlignedImputation | LabelGradientAlignment | ImputeAndWeight):
            continue  # of the others, classes are made of them or none is used
        if name == "labels" and isinstance(method, LabelGradientAlignment):
            continue
        before = state_of(method)
        bad = step(method, model, broken(name, value, seed + 100))
        assert same(before, state_of(method)), (name, value)
        assert bool(bad.weights.isfinite().all())
        if method.update.needs_index and method.update.takes == "labels":
            assert bool(bad.labels.isfinite().all())
        got, expected = (step(each, model, batch_of(seed)) for each in (method, clean))
        assert torch.equal(got.weights, expected.weights), (name, value)
        assert torch.equal(got.labels, expected.labels), (name, value)
        assert same(state_of(method), state_of(clean)), (name, value)
    if method.state_dict().keys() - {"direction.of.solver.numbers"}:
        assert not same(state_of(method), state_of(make(how))), "the clean steps learn"


def test_calls_are_counted(model: nn.Sequential) -> None:
    method = ExampleWeights(M, interval=2)
    step(method, model, broken("unlabeled", torch.nan, 0))
    assert method.calls == 1
    assert method.learns()


def test_what_would_overflow_a_moment_is_not_finite_either() -> None:
    """The square of 1e20, and the fourth power of 1e10, are infinite in float32."""
    table = fastmeta.updates.MaskedAdamTable(torch.ones(3), lr=0.1)
    before = {name: value.clone() for name, value in table.state_dict().items()}
    table.step_(torch.tensor([0, 1]), torch.tensor([1.0, 1e20]))
    assert same(before, table.state_dict())
    table.step_(torch.tensor([0, 1]), torch.tensor([1.0, 1e18]))
    assert table.steps.tolist() == [1, 1, 0]

    class Gradients:
        sharded = False

        def __init__(self, size: float) -> None:
            self.size = size

        def gradient(self, part: str, **options: Any) -> dict[str, Tensor]:
            return {"weight": torch.tensor([1.0, self.size if part == "labeled" else 0.0])}

    rule = NormalizedGap()
    rule(Gradients(2.0))
    kept = state_of(rule)
    assert bool(rule(Gradients(1e10))["weight"].isnan().all())
    assert same(kept, state_of(rule))
