"""What all methods share: the three-line drop-in, autocast, checks, state; and combinations that nobody published."""

import io
from collections.abc import Callable

import pytest
import torch
from brute_force import Layer, assert_close, make_layer
from torch import Tensor, nn
from torch.nn import functional

import fastmeta
from fastmeta import (
    L2I,
    AlignedImputation,
    ExampleWeights,
    ImplicitImputation,
    ImputeAndWeight,
    LabelGradientAlignment,
    LearningToReweight,
    MetaGradient,
    MetaWeightNet,
    Method,
    Outputs,
    Refined,
)
from fastmeta.derivatives import ExampleWeightGradient, LabelGradient
from fastmeta.directions import HoldoutGradient, InverseHessian, LookAhead, NormalizedGap, UnitLength
from fastmeta.updates import LabelLogitStep, LabelStep, LabelTable, PullBack, WeightTable

M, C = 20, 4
METHODS: dict[str, Callable[[], Method]] = {
    "L2I V1": lambda: L2I("V1"),
    "L2I V2": lambda: L2I("V2"),
    "L2I Eq. (6)": lambda: L2I(derivative="eq6", look_ahead=True),
    "L2I paper": lambda: L2I.from_preset("paper", how="last_layer"),
    "L2I official code": lambda: L2I.from_preset("official_code", "V1", how="last_layer"),
    "MetaGradient": lambda: MetaGradient(),
    "MetaGradient differences": lambda: MetaGradient(how="last_layer_difference", radius=1.0),
    "MetaGradient official code": lambda: MetaGradient.from_preset("official_code", how="last_layer_difference"),
    "ExampleWeights": lambda: ExampleWeights(M),
    "ExampleWeights paper": lambda: ExampleWeights.from_preset("paper", M, interval=2),
    "ExampleWeights shared": lambda: ExampleWeights(M, shared=True),
    "LabelGradientAlignment": lambda: LabelGradientAlignment(M, C),
    "AlignedImputation": lambda: AlignedImputation(),
    "ImplicitImputation V1": lambda: ImplicitImputation("V1"),
    "ImplicitImputation V2": lambda: ImplicitImputation(),
    "ImputeAndWeight": lambda: ImputeAndWeight(M),
    "LearningToReweight": lambda: LearningToReweight(),
    "MetaWeightNet": lambda: MetaWeightNet(),
}
all_methods = pytest.mark.parametrize("make", METHODS.values(), ids=METHODS)
with_tables = pytest.mark.parametrize(
    "make",
    [METHODS[name] for name in ("ExampleWeights", "LabelGradientAlignment", "ImputeAndWeight")],
    ids=["weights", "labels", "both"],
)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(6, 8)
        self.fc = nn.Linear(8, C)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.fc(self.body(inputs).relu())


@pytest.fixture
def model(generator) -> Net:
    torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
    return Net()


def consistency(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(logits, labels, reduction="none")


@all_methods
def test_three_lines_in_a_training_loop(model, make):
    """Separate forwards of a labeled, a weak and a strong view; the documentation has one."""
    meta = make()
    x_l, x_u_weak, y_l = torch.randn(5, 6), torch.randn(7, 6), torch.randint(C, (5,))
    x_u_strong, index_u = x_u_weak + 0.1, torch.randperm(M)[:7]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        with fastmeta.capture_features(model.fc) as tape:
            logits_l, logits_w, logits_s = model(x_l), model(x_u_weak), model(x_u_strong)
        refined = meta.refine(
            unlabeled=tape.outputs(logits_s),
            labels=logits_w.softmax(1),
            holdout=tape.outputs(logits_l),
            targets=y_l,
            index=index_u,
        )
        unlabeled = (refined.weights * consistency(logits_s, refined.labels)).mean()
        loss = functional.cross_entropy(logits_l, y_l) + unlabeled + refined.loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert refined.labels.shape == (7, C)
        assert refined.weights.shape == (7,)
        assert refined.loss.shape == ()
        assert not refined.labels.requires_grad
        assert not refined.weights.requires_grad
        assert bool(loss.isfinite())


def batch_of(model: nn.Module, seed: int = 0) -> dict[str, Outputs | Tensor]:
    torch.manual_seed(seed)
    x_l, x_u = torch.randn(5, 6), torch.randn(7, 6)
    with fastmeta.capture_features(model) as tape:
        logits_l, logits_u = model(x_l), model(x_u)
    return {
        "unlabeled": tape.outputs(logits_u),
        "labels": model(x_u + 0.5).softmax(-1),  # of another view
        "holdout": tape.outputs(logits_l),
        "targets": torch.tensor([0, 1, 2, 3, 0]),
        "index": torch.tensor([0, 3, 5, 7, 11, 13, M - 1]),
    }


@all_methods
def test_autocast(model, make):
    """Half-precision outputs are refined in float32, inside the autocast block as well as after it."""
    inside, after = make(), make()
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            batch = batch_of(model)
            first = inside.refine(**batch)
        second = after.refine(**batch)
        for one, other in zip(first, second, strict=True):
            assert one.dtype == torch.float32
            assert torch.equal(one, other)
    wide = {
        name: value._replace(features=value.features.double(), logits=value.logits.double())
        for name, value in batch.items()
        if isinstance(value, Outputs)
    }
    # The same numbers in float64: nothing inside was rounded to half precision.
    exact, got = make().refine(**(batch | wide)), make().refine(**batch)
    torch.testing.assert_close(got.labels.double(), exact.labels, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(got.loss.double(), exact.loss, rtol=1e-4, atol=1e-6)


@all_methods
def test_concatenated_forward_gives_the_same(model, make):
    """One forward for both parts, then split: the same rows of features."""
    model.double()
    torch.manual_seed(1)
    inputs = torch.randn(12, 6, dtype=torch.float64)
    results = []
    for joined in (True, False):
        with fastmeta.capture_features(model) as tape:
            logits_l, logits_u = model(inputs).split([5, 7]) if joined else (model(inputs[:5]), model(inputs[5:]))
        targets, index = torch.tensor([0, 1, 2, 3, 0]), torch.arange(7)
        batch = {
            "targets": targets,
            "index": index,
            "unlabeled": tape.outputs(logits_u),
            "holdout": tape.outputs(logits_l),
        }
        results.append(make().refine(**batch))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@all_methods
def test_inputs_are_left_as_they_were(model, make):
    batch = batch_of(model)
    before = {name: [t.clone() for t in v] if isinstance(v, Outputs) else v.clone() for name, v in batch.items()}
    make().refine(**batch)
    for name, value in batch.items():
        for t, old in zip(value, before[name], strict=True):
            assert torch.equal(t, old)


@pytest.mark.parametrize("given", [True, False], ids=["labels", "no labels"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@all_methods
def test_without_gradients_around_it(model, make, mode, given):
    """Where loops make their pseudo-labels: what is on a graph stays there, and tables are as ever."""
    outside, inside = make(), make()
    for seed in range(2):
        batch = batch_of(model, seed)
        if not given:
            del batch["labels"]
        expected = outside.refine(**batch)
        with mode():
            got = inside.refine(**batch)
        for one, other in zip(expected, got, strict=True):
            assert torch.equal(one, other)
            assert one.requires_grad == other.requires_grad
        if got.loss.requires_grad:
            grads = [torch.autograd.grad(r.loss, model.fc.weight, retain_graph=True)[0] for r in (expected, got)]
            assert torch.equal(*grads)
    for name, value in outside.state_dict().items():
        assert torch.equal(value, inside.state_dict()[name])
        assert not inside.state_dict()[name].is_inference()


@all_methods
def test_outputs_without_a_graph(model, make):
    """A method that pulls back says what made them and what to do; every other works."""
    method = make()
    with torch.no_grad():
        batch = batch_of(model)
    if method.update.needs_graph:
        with pytest.raises(ValueError, match=r"labels must be on the graph, got .*torch\.no_grad.*L2I\('V1'\)"):
            method.refine(**batch)
        del batch["labels"]
        with pytest.raises(ValueError, match=r"unlabeled\.logits must be on the graph, got .*torch\.no_grad"):
            method.refine(**batch)
    else:
        assert method.refine(**batch).labels.shape == (7, C)


@all_methods
def test_empty_batches(model, make):
    batch = batch_of(model)
    empty = batch["unlabeled"]._replace(features=batch["unlabeled"].features[:0], logits=batch["unlabeled"].logits[:0])
    none = {"unlabeled": empty, "labels": batch["labels"][:0], "index": torch.zeros(0, dtype=torch.int64)}
    refined = make().refine(**(batch | none))
    assert refined.labels.shape == (0, C)
    assert refined.weights.shape == (0,)
    assert refined.loss.item() == 0


@all_methods
def test_state_goes_through_a_file_and_resumes_bit_for_bit(model, make):
    batches = [batch_of(model, seed) for seed in range(6)]
    straight, interrupted = make(), make()
    for batch in batches[:3]:
        straight.refine(**batch)
        interrupted.refine(**batch)
    file = io.BytesIO()
    torch.save(interrupted.state_dict(), file)
    file.seek(0)
    resumed = make()
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for batch in batches[3:]:
        for one, other in zip(straight.refine(**batch), resumed.refine(**batch), strict=True):
            assert torch.equal(one, other)


@with_tables
def test_state_of_another_size_is_refused(make):
    state = make().state_dict()
    state["update.table.values"] = state["update.table.values"][:-1]
    with pytest.raises(ValueError, match=r"update\.table\.values must be \[20.*\] like that of \w+, got \[19"):
        make().load_state_dict(state)
    with pytest.raises(ValueError, match=r"state must have a tensor '[\w.]+' for \w+, got \[\]"):
        make().load_state_dict({})


@with_tables
def test_index_is_checked(model, make):
    batch = batch_of(model)
    del batch["index"]
    with pytest.raises(ValueError, match=r"index is needed by (ExampleWeights|LabelGradientAlignment|ImputeAndWeight)"):
        make().refine(**batch)
    with pytest.raises(IndexError, match=r"index must be places in the unlabeled set, in \[0, 20\), got 20"):
        make().refine(**batch, index=torch.arange(M - 6, M + 1))
    with pytest.raises(ValueError, match=r"index must be \[N\] = \[7\] like unlabeled, got \[6\]"):
        make().refine(**batch, index=torch.arange(6))
    with pytest.raises(TypeError, match=r"index must be an int64 tensor, got torch\.int32"):
        make().refine(**batch, index=torch.arange(7, dtype=torch.int32))


def narrower(outputs: Outputs) -> Outputs:
    return outputs._replace(features=outputs.features[:, 1:])


WRONG: dict[str, tuple[Callable[[dict], dict], type[Exception], str]] = {
    "raw logits": (
        lambda b: {"unlabeled": b["unlabeled"].logits},
        TypeError,
        r"unlabeled must be Outputs.*model=.*got Tensor",
    ),
    "features of another size": (
        lambda b: {"holdout": narrower(b["holdout"])},
        ValueError,
        r"holdout must have D, C = \(8, 4\) like unlabeled, got \(7, 4\)",
    ),
    "rows that do not match": (
        lambda b: {"holdout": b["holdout"]._replace(features=b["holdout"].features[1:])},
        ValueError,
        r"holdout\.features must be \[N, D\] with N = 5 like its logits, got \[4, 8\]",
    ),
    "too few targets": (lambda b: {"targets": b["targets"][1:]}, ValueError, r"targets of int64 classes must be \[N\]"),
    "class out of range": (lambda b: {"targets": b["targets"] + 1}, ValueError, r"targets must be classes in \[0, 4\)"),
    "targets of int32": (lambda b: {"targets": b["targets"].int()}, TypeError, "targets must be"),
    "labels of another shape": (lambda b: {"labels": torch.ones(7, 3)}, ValueError, r"labels must be \[N, C\]"),
    "mask of another shape": (
        lambda b: {"mask": torch.ones(6)},
        ValueError,
        r"mask must be \[N\] = \[7\] like un.*, got \[6\]",
    ),
    "labeled without targets": (
        lambda b: {"labeled": b["holdout"]},
        ValueError,
        "labeled and labeled_targets must be given together",
    ),
    "wrong labeled_targets": (
        lambda b: {"labeled": b["holdout"], "labeled_targets": b["targets"][1:]},
        ValueError,
        r"labeled_targets of int64 classes must be",
    ),
}


@pytest.mark.parametrize(("change", "error", "message"), WRONG.values(), ids=WRONG)
@all_methods
def test_arguments_are_checked(model, make, change, error, message):
    batch = batch_of(model)
    meta = make()
    meta.interval = 1
    with pytest.raises(error, match=message):
        meta.refine(**(batch | change(batch)))


def test_soft_targets_of_another_precision(model):
    batch = batch_of(model)
    soft = functional.one_hot(batch["targets"], C).double()
    one, other = MetaGradient().refine(**batch), MetaGradient().refine(**(batch | {"targets": soft}))
    assert_close(one.labels, other.labels, 1e-6)


UNPUBLISHED: dict[str, Callable[[], Method]] = {
    "label gradient alignment without a table": lambda: Method(
        UnitLength(NormalizedGap()), LabelGradient("cross_entropy"), LabelLogitStep(step=1.0)
    ),
    "labels stepped along the inverse Hessian": lambda: Method(
        InverseHessian(HoldoutGradient(), damping=1.0), LabelGradient("mse_probs"), LabelStep(step=0.5)
    ),
    "weights from the look-ahead gradient": lambda: Method(
        LookAhead(HoldoutGradient(), rate=0.1), ExampleWeightGradient("mse_probs"), WeightTable(M)
    ),
    "label table along the hold-out gradient": lambda: Method(
        HoldoutGradient(), LabelGradient("cross_entropy"), LabelTable(M, C)
    ),
    "pull-back of the gap": lambda: Method(NormalizedGap(), LabelGradient("cross_entropy"), PullBack(weight=0.1)),
}


@pytest.mark.parametrize("make", UNPUBLISHED.values(), ids=UNPUBLISHED)
def test_unpublished_combinations_run_and_resume(model, make):
    test_three_lines_in_a_training_loop(model, make)
    test_state_goes_through_a_file_and_resumes_bit_for_bit(model, make)


@pytest.mark.parametrize(
    ("derivative", "update", "message"),
    [
        (ExampleWeightGradient(), LabelStep(step=1.0), r"LabelStep takes the gradient of labels, .* gives \[4\]"),
        (LabelGradient(), WeightTable(M), r"WeightTable takes the gradient of weights, .* gives \[4, 4\]"),
    ],
)
def test_a_derivative_that_does_not_fit_the_update(draw, derivative, update, message):
    layer = make_layer(draw, (C, 5, C))
    with pytest.raises(ValueError, match=message):
        Method(HoldoutGradient(), derivative, update).refine(**layer.batch(), index=torch.arange(C))


@pytest.fixture
def layer(draw) -> Layer:
    return make_layer(draw)


def test_an_unpublished_combination_against_brute_force(draw, layer):
    """Pull-back along the damped inverse Hessian: every factor by autograd."""
    method = Method(
        InverseHessian(HoldoutGradient(), damping=0.3, solver="cholesky"),
        LabelGradient("cross_entropy", rate=0.2),
        PullBack(weight=1.0),
    )
    refined: Refined = method.refine(**layer.batch())
    got = torch.autograd.grad(refined.loss, layer.weight)[0]

    c, d = layer.weight.shape
    flat = torch.cat([layer.weight.flatten(), layer.bias]).detach().requires_grad_()

    def forward(parameters: Tensor, x: Tensor) -> Tensor:
        return functional.linear(x, parameters[: c * d].view(c, d), parameters[c * d :])

    imputed = layer.unlabeled.logits.softmax(-1)

    def training_loss(parameters: Tensor) -> Tensor:
        unlabeled = functional.cross_entropy(forward(parameters, layer.features_u), imputed.detach())
        return functional.cross_entropy(forward(parameters, layer.features_h), layer.classes) + unlabeled

    h = torch.autograd.functional.hessian(training_loss, flat)
    outer = functional.cross_entropy(forward(flat, layer.features_h), layer.classes)
    v = torch.linalg.solve(h + 0.3 * torch.eye(len(flat), dtype=torch.float64), torch.autograd.grad(outer, flat)[0])
    z = imputed.detach().requires_grad_()
    inner = -(z * forward(flat, layer.features_u).log_softmax(-1)).sum(-1).mean()
    ahead = flat - 0.2 * torch.autograd.grad(inner, flat, create_graph=True)[0]
    dz = torch.autograd.grad(ahead, z, v)[0]
    assert_close(got, torch.autograd.grad(imputed, layer.weight, dz)[0])
