"""fastmeta.graph without a GPU: a tape of operations takes the graph's place, and forbids what a capture forbids."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import DEVICE
from device_tensors import Tape, on_device
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
from fastmeta.graph import describe
from fastmeta.ops.solve import conjugate_gradient as device
from fastmeta.problem import Direction, LastLayerProblem
from fastmeta.updates import LabelLogitStep, LabelStep, LabelTable, PullBack, WeightTable

M, C = 20, 4
SOLVER = {"inverse_hessian": "cg", "tol": 1e-3, "max_iter": 20}
METHODS: dict[str, Callable[[], Method]] = {
    "L2I V1": lambda: L2I("V1"),
    "L2I V2": lambda: L2I("V2", look_ahead=True),
    "L2I Eq. (6)": lambda: L2I("V1", derivative="eq6"),
    "L2I regression": lambda: L2I("V2", inner_loss="mse", outer_loss="mse"),
    "MetaGradient": lambda: MetaGradient(),
    "MetaGradient differences": lambda: MetaGradient(how="last_layer_difference", radius=1.0),
    "ExampleWeights": lambda: ExampleWeights(M, lr=0.1, **SOLVER),
    "ExampleWeights identity": lambda: ExampleWeights(M, lr=0.1, inverse_hessian="identity", read="before"),
    "ExampleWeights shared": lambda: ExampleWeights(M, lr=0.1, shared=True, **SOLVER),
    "ExampleWeights last of each": lambda: ExampleWeights(M, lr=0.1, duplicates="last", **SOLVER),
    "LabelGradientAlignment": lambda: LabelGradientAlignment(M, C, lr=0.1),
    "LabelGradientAlignment plain Adam": lambda: LabelGradientAlignment(M, C, lr=0.1, optimizer="adam"),
    "ExampleWeights SGD": lambda: ExampleWeights(M, lr=0.1, optimizer="sgd", inverse_hessian="identity"),
    "LabelGradientAlignment before": lambda: LabelGradientAlignment(M, C, lr=0.1, include_current=False),
    "LabelGradientAlignment scheduled": lambda: LabelGradientAlignment(M, C, labeled_weight=lambda i: 1 + 0.5 * i),
    "AlignedImputation": lambda: AlignedImputation(),
    "ImplicitImputation V1": lambda: ImplicitImputation("V1", max_iter=9, label_step=9.0),
    "ImplicitImputation V2": lambda: ImplicitImputation(max_iter=9),
    "ImputeAndWeight": lambda: ImputeAndWeight(M, lr=0.1, inner_loss="mse_probs"),
    "LearningToReweight": lambda: LearningToReweight(),
    "MetaWeightNet": lambda: MetaWeightNet(lr=0.1),
    "weights from the look-ahead": lambda: Method(
        LookAhead(HoldoutGradient(), rate=0.1, labeled_weight=0.5), ExampleWeightGradient("mse_probs"), WeightTable(M)
    ),
    "pull-back of the gap": lambda: Method(NormalizedGap(), LabelGradient("cross_entropy"), PullBack(weight=0.1)),
    "gap without a table": lambda: Method(UnitLength(NormalizedGap()), LabelGradient(), LabelLogitStep(step=1.0)),
    "inverse Hessian": lambda: Method(InverseHessian(damping=1.0, max_iter=9), LabelGradient(), LabelStep(step=0.5)),
    "label table": lambda: Method(HoldoutGradient(), LabelGradient("cross_entropy"), LabelTable(M, C)),
}
all_methods = pytest.mark.parametrize("make", METHODS.values(), ids=METHODS)


@pytest.fixture
def tape(monkeypatch: pytest.MonkeyPatch) -> Tape:
    if DEVICE != "cpu":
        pytest.skip("takes the CPU for a GPU")
    tape = Tape()
    monkeypatch.setattr(device, "capturing", lambda tensor: tape.recording)
    return tape


@pytest.fixture
def model(generator: torch.Generator) -> nn.Module:
    torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, C))


def batch_of(model: nn.Module, seed: int = 0, n: int = 7, **more: Any) -> dict[str, Any]:
    """As on a GPU; the logits are on the graph."""
    draw = torch.Generator().manual_seed(seed)
    x_l, x_u = torch.randn(5, 6, generator=draw), torch.randn(n, 6, generator=draw)
    with fastmeta.capture_features(model) as tape:
        logits_l, logits_u = model(x_l), model(x_u)
    batch = {
        "unlabeled": tape.outputs(logits_u),
        "holdout": tape.outputs(logits_l),
        "targets": torch.randint(C, (5,), generator=draw),
        "index": torch.randperm(M, generator=draw)[:n],
        **more,
    }
    return {name: on_device(value) for name, value in batch.items()}


def on_gpu(method: Method) -> Method:
    """Its table too."""
    table = getattr(method.update, "table", None)
    for name in () if table is None else ("values", "exp_avg", "exp_avg_sq", "steps"):
        setattr(table, name, on_device(getattr(table, name)))
    return method


def pair(make: Callable[[], Method], tape: Tape, **options: Any) -> tuple[Method, Method]:
    """The method as it is, and with graphs."""
    return on_gpu(make()), fastmeta.graph(on_gpu(make()), recorder=tape, **options)


def tensors_of(state: Any) -> list[Tensor]:
    """Of a solver's state a replay keeps the tensors; the iterations the host does not see."""
    return [tensor for name, tensor in state.items() if not name.endswith("solver.numbers")]


def assert_same(model: nn.Module, one: Refined, other: Refined) -> None:
    for first, second in zip(one, other, strict=True):
        assert torch.equal(first, second)
    assert one.loss.requires_grad == other.loss.requires_grad
    if one.loss.requires_grad:
        weights = list(model.parameters())
        grads = [torch.autograd.grad(refined.loss, weights, retain_graph=True) for refined in (one, other)]
        for first, second in zip(*grads, strict=True):
            assert torch.equal(first, second)


def assert_steps_alike(model: nn.Module, plain: Method, graphed: Method, batches: list[dict[str, Any]]) -> None:
    for batch in batches:
        assert_same(model, graphed.refine(**batch), plain.refine(**batch))
        for first, second in zip(tensors_of(graphed.state_dict()), tensors_of(plain.state_dict()), strict=True):
            assert torch.equal(first, second)


@all_methods
def test_replays_are_the_steps(model: nn.Module, tape: Tape, make: Callable[[], Method]) -> None:
    """Bit for bit, tables and averages after every step included."""
    plain, graphed = pair(make, tape)
    assert_steps_alike(model, plain, graphed, [batch_of(model, seed) for seed in range(5)])
    assert (tape.recorded, tape.replayed) == (1, 4)


def test_every_argument_goes_into_the_buffers(model: nn.Module, tape: Tape) -> None:
    def full(seed: int) -> dict[str, Any]:
        other = batch_of(model, seed + 100)
        draw = torch.Generator().manual_seed(seed)
        more = {
            "mask": torch.randint(2, (7,), generator=draw).float(),
            "labels": torch.rand(7, C, generator=draw).softmax(-1),
            "labeled": other["holdout"],
            "labeled_targets": torch.rand(5, C, generator=draw).softmax(-1),
            "strong": other["unlabeled"],
            "pseudo_labels": torch.randint(C, (7,), generator=draw),
        }
        return batch_of(model, seed, **more)

    make = METHODS["ExampleWeights"]
    assert_steps_alike(model, *pair(make, tape), [full(seed) for seed in range(4)])
    assert tape.recorded == 1


def test_another_shape_has_another_graph(model: nn.Module, tape: Tape) -> None:
    make = METHODS["LabelGradientAlignment"]
    sizes = [7, 7, 5, 7, 5, 5, 3, 7]
    batches = [batch_of(model, seed, n) for seed, n in enumerate(sizes)]
    assert_steps_alike(model, *pair(make, tape), batches)
    assert tape.recorded == 2, "a shape that came once is not captured"


def test_optional_arguments_are_part_of_the_signature(model: nn.Module, tape: Tape) -> None:
    masked = {"mask": torch.tensor([0.0, 1, 0, 1, 0, 1, 1])}
    batches = [batch_of(model, seed, **(masked if seed % 2 else {})) for seed in range(6)]
    assert_steps_alike(model, *pair(MetaGradient, tape), batches)
    assert tape.recorded == 2


def test_phases_of_an_interval(model: nn.Module, tape: Tape) -> None:
    def make() -> Method:
        return ExampleWeights(M, interval=3, lr=0.1, **SOLVER)

    plain, graphed = pair(make, tape)
    assert_steps_alike(model, plain, graphed, [batch_of(model, seed) for seed in range(9)])
    assert tape.recorded == 2
    assert isinstance(graphed, ExampleWeights)
    assert graphed.calls == 9
    assert not torch.equal(graphed.weights, torch.ones(M))


def test_a_changed_setting_is_captured_anew(model: nn.Module, tape: Tape) -> None:
    plain, graphed = pair(MetaGradient, tape)
    for step in (0.1, 0.4, 0.1):
        plain.step = graphed.step = step
        assert_steps_alike(model, plain, graphed, [batch_of(model, seed) for seed in range(3)])
    assert tape.recorded == 2, "the first graph was kept"


def test_a_loaded_state_is_captured_anew(model: nn.Module, tape: Tape) -> None:
    make = METHODS["LabelGradientAlignment"]
    plain, graphed = pair(make, tape)
    batches = [batch_of(model, seed) for seed in range(9)]
    assert_steps_alike(model, plain, graphed, batches[:3])
    state = graphed.state_dict()
    assert_steps_alike(model, plain, graphed, batches[3:6])
    for method in (plain, graphed):
        method.load_state_dict(state)
        on_gpu(method)
    assert_steps_alike(model, plain, graphed, batches[6:])
    assert tape.recorded == 2


def test_results_are_copies_unless_asked_otherwise(model: nn.Module, tape: Tape) -> None:
    for copied in (True, False):
        method = fastmeta.graph(L2I("V1"), copy=copied, recorder=tape)
        results = [method.refine(**batch_of(model, seed)) for seed in range(3)]
        assert torch.equal(results[1].labels, results[2].labels) is not copied


def test_backward_reaches_the_model_of_this_step(model: nn.Module, tape: Tape) -> None:
    """The surrogate of V2 hangs on the batch that was given, not on the graph's buffers."""
    method = fastmeta.graph(L2I("V2"), recorder=tape)
    for seed in range(3):
        refined = method.refine(**batch_of(model, seed))
        grads = torch.autograd.grad(refined.loss, list(model.parameters()))
        assert all(bool(grad.abs().sum() > 0) for grad in grads[-2:])


def test_only_so_many_are_kept(model: nn.Module, tape: Tape) -> None:
    make = METHODS["ExampleWeights"]
    plain, graphed = pair(make, tape, keep=2)
    batches = [batch_of(model, seed, n) for seed, n in enumerate([3, 3, 4, 4, 3, 5, 5])]
    with pytest.warns(RuntimeWarning, match=r"ExampleWeights has come in more than keep=2") as caught:
        assert_steps_alike(model, plain, graphed, batches)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert tape.recorded == 3
    assert len(graphed._graphs._steps) == 2
    graphed.refine(**batch_of(model, 0, 3))
    assert tape.recorded == 3, "the shape used last but one was kept"


def test_a_copy_of_a_method_captures_its_own(model: nn.Module, tape: Tape) -> None:
    make = METHODS["LabelGradientAlignment"]
    _, first = pair(make, tape)
    batches = [batch_of(model, seed) for seed in range(6)]
    for batch in batches[:3]:
        first.refine(**batch)
    second = on_gpu(copy.deepcopy(first))
    for batch in batches[3:]:
        assert_same(model, second.refine(**batch), first.refine(**batch))


def test_the_cpu_has_no_graphs(model: nn.Module) -> None:
    method = fastmeta.graph(MetaGradient())
    with pytest.raises(RuntimeError, match=r"fastmeta\.graph captures CUDA graphs, got tensors on cpu"):
        method.refine(**batch_of(model))
    with pytest.raises(ValueError, match="keep must be >= 1, got 0"):
        fastmeta.graph(method, keep=0)


class Replaces:
    """A direction that keeps an average in the way a CUDA graph cannot."""

    def __init__(self) -> None:
        self.average = torch.zeros(C, 8)

    def __call__(self, problem: LastLayerProblem) -> Direction:
        direction = HoldoutGradient()(problem).dense()
        self.average = 0.9 * self.average + direction.weight
        return direction


class Counts:
    """A direction whose Python number changes with every step."""

    def __init__(self) -> None:
        self.steps = 0

    def __call__(self, problem: LastLayerProblem) -> Direction:
        self.steps = min(self.steps + 1, 2)
        return HoldoutGradient()(problem).dense()


class Waits:
    """A direction that reads a number off the device."""

    def __call__(self, problem: LastLayerProblem) -> Direction:
        direction = HoldoutGradient()(problem).dense()
        return direction if float(direction.weight.sum()) != 0.5 else Direction(-direction.weight, None)


class Late(Counts):
    """A direction whose number changes while it is captured alone."""

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self._recording = lambda: tape.recording

    def __call__(self, problem: LastLayerProblem) -> Direction:
        self.steps += self._recording()
        return HoldoutGradient()(problem).dense()


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (lambda tape: Replaces(), r"it replaces direction\.average; .* updated in place"),
        (Late, r"it changes direction\.steps, which a replay would not"),
        (lambda tape: Waits(), r"cannot be captured in a CUDA graph: .*_local_scalar_dense.* waits for the device"),
        (lambda tape: InverseHessian(solver="cholesky"), r"cannot be captured in a CUDA graph: solver='cholesky'"),
        (lambda tape: InverseHessian(solver="pcg"), r"cannot be captured .*solver='pcg' cannot compute its eigenbases"),
    ],
    ids=["replaces", "counts", "waits", "cholesky", "pcg"],
)
def test_what_cannot_be_captured_says_so(
    model: nn.Module, tape: Tape, rule: Callable[[Tape], Any], message: str
) -> None:
    method = fastmeta.graph(Method(rule(tape), LabelGradient(), LabelStep(step=0.1)), recorder=tape)
    method.refine(**batch_of(model))
    with pytest.raises(RuntimeError, match=message):
        method.refine(**batch_of(model, 1))


def test_a_number_that_counts_is_part_of_the_key(model: nn.Module, tape: Tape) -> None:
    method = fastmeta.graph(Method(Counts(), LabelGradient(), LabelStep(step=0.1)), recorder=tape)
    for seed in range(4):
        method.refine(**batch_of(model, seed))
    assert tape.recorded == 1, "once the number had stopped"


def test_the_description_of_a_method_names_its_parts() -> None:
    tensors, settings = describe(ExampleWeights(M, lr=0.25))
    assert set(tensors) == {f"update.table.{name}" for name in ("values", "exp_avg", "exp_avg_sq", "steps")}
    assert settings["update.table.lr"] == 0.25
    assert settings["direction.damping"] == 0.1
    assert "calls" not in settings


def test_the_buffers_are_contiguous_and_detached(model: nn.Module, tape: Tape) -> None:
    method = fastmeta.graph(MetaGradient(), recorder=tape)
    batch = batch_of(model)
    wide = torch.randn(7, 16)[:, ::2]
    strided = batch["unlabeled"]._replace(features=on_device(wide))
    for _ in range(2):
        refined = method.refine(**(batch | {"unlabeled": strided}))
        torch.testing.assert_close(refined.labels, MetaGradient().refine(**(batch | {"unlabeled": strided})).labels)
    (step,) = method._graphs._steps.values()
    buffers = step._batch.unlabeled
    assert isinstance(buffers, Outputs)
    assert buffers.features.is_contiguous()
    assert not buffers.logits.requires_grad


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@all_methods
def test_on_a_gpu(model: nn.Module, make: Callable[[], Method]) -> None:
    """The graph itself against plain steps on the same device."""
    model.cuda()
    plain, graphed = make(), fastmeta.graph(make())
    for seed in range(5):
        draw = torch.Generator().manual_seed(seed)
        x_l, x_u = torch.randn(5, 6, generator=draw).cuda(), torch.randn(7, 6, generator=draw).cuda()
        with fastmeta.capture_features(model) as features:
            logits_l, logits_u = model(x_l), model(x_u)
        batch = {
            "unlabeled": features.outputs(logits_u),
            "holdout": features.outputs(logits_l),
            "targets": torch.randint(C, (5,), generator=draw).cuda(),
            "index": torch.randperm(M, generator=draw)[:7].cuda(),
        }
        expected, got = plain.refine(**batch), graphed.refine(**batch)
        for first, second in zip(got, expected, strict=True):
            torch.testing.assert_close(first, second)
        loss = functional.cross_entropy(logits_l, batch["targets"]) + got.loss
        loss.backward()
    for first, second in zip(tensors_of(graphed.state_dict()), tensors_of(plain.state_dict()), strict=True):
        torch.testing.assert_close(first, second)
