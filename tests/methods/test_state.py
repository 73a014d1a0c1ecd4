"""A method is a module: its state is buffers, and travels as that of any other module."""

import copy
import io
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastmeta
from fastmeta import (
    L2I,
    AlignedImputation,
    ExampleWeights,
    ImplicitImputation,
    ImputeAndWeight,
    LabelGradientAlignment,
    MetaGradient,
    Method,
)
from fastmeta.derivatives import LabelGradient
from fastmeta.directions import HoldoutGradient, InverseHessian, LookAhead, NormalizedGap, UnitLength
from fastmeta.state import TensorList
from fastmeta.updates import LabelStep, PullBack

M, C = 20, 4
STATEFUL: dict[str, Callable[[], Method]] = {
    "ExampleWeights": lambda: ExampleWeights(M, interval=2),
    "ExampleWeights pcg": lambda: ExampleWeights(M, inverse_hessian="pcg"),
    "ExampleWeights shared": lambda: ExampleWeights(M, shared=True),
    "LabelGradientAlignment": lambda: LabelGradientAlignment(M, C),
    "AlignedImputation": lambda: AlignedImputation(),
    "ImputeAndWeight": lambda: ImputeAndWeight(M),
    "averages inside": lambda: Method(
        LookAhead(UnitLength(NormalizedGap()), rate=0.1), LabelGradient(), PullBack(weight=1.0)
    ),
}
METHODS: dict[str, Callable[[], Method]] = {
    **STATEFUL,
    "L2I V1": lambda: L2I("V1"),
    "L2I V2": lambda: L2I(look_ahead=True),
    "MetaGradient": lambda: MetaGradient(),
    "ImplicitImputation": lambda: ImplicitImputation(),
}
all_methods = pytest.mark.parametrize("make", METHODS.values(), ids=METHODS)
stateful = pytest.mark.parametrize("make", STATEFUL.values(), ids=STATEFUL)


class Net(nn.Module):
    """A network that has a method as one of its modules."""

    def __init__(self, method: Method) -> None:
        super().__init__()
        self.fc = nn.Linear(6, C)
        self.method = method

    def step(self, seed: int) -> fastmeta.Refined:
        draw = torch.Generator().manual_seed(seed)
        x_l, x_u = torch.randn(5, 6, generator=draw), torch.randn(7, 6, generator=draw)
        with fastmeta.capture_features(self.fc) as tape:
            logits_l, weak, strong = self.fc(x_l), self.fc(x_u), self.fc(x_u + 0.1)
        return self.method(
            unlabeled=tape.outputs(strong),
            labels=weak.softmax(-1),
            holdout=tape.outputs(logits_l),
            targets=torch.randint(C, (5,), generator=draw),
            index=torch.randperm(M, generator=draw)[:7],
        )


def net(make: Callable[[], Method], steps: int = 0) -> Net:
    torch.manual_seed(0)
    made = Net(make())
    for seed in range(steps):
        made.step(seed)
    return made


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@all_methods
def test_buffers_and_no_parameters(make: Callable[[], Method]) -> None:
    made = net(make, steps=2)
    method = made.method
    assert not list(method.parameters())
    assert all(isinstance(value, Tensor) and value.is_contiguous() for value in method.state_dict().values())
    held = {name for name, _ in method.named_buffers()}
    extra = {"calls", "count", "numbers", "basis", "output", "output_vectors"}
    assert {name for name in method.state_dict() if name.rsplit(".", 1)[-1] not in extra} == held


@all_methods
def test_an_enclosing_module_saves_and_resumes(make: Callable[[], Method]) -> None:
    """Through a file that holds tensors alone; a fresh method has no averages yet."""
    first, fresh = net(make, steps=3), net(make)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    others = [fresh, copy.deepcopy(first), pickle.loads(pickle.dumps(first))]
    for seed in (3, 4):
        expected = first.step(seed)
        for other in others:
            assert all(map(torch.equal, expected, other.step(seed)))
    assert all(same(first.state_dict(), other.state_dict()) for other in others)


@stateful
def test_a_state_does_not_move_on_with_the_method(make: Callable[[], Method]) -> None:
    made = net(make, steps=1)
    state, kept = made.method.state_dict(), snapshot(made.method)
    made.step(1)
    made.step(2)
    assert same(state, kept)
    assert not same(state, made.method.state_dict())
    made.method.load_state_dict(state)
    assert same(state, made.method.state_dict())


@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.bfloat16, nn.Module.double, lambda m: m.to(torch.float16)])
@stateful
def test_casts_leave_the_state_as_it_is(make: Callable[[], Method], cast: Callable[[nn.Module], Any]) -> None:
    made = net(make, steps=2)
    before = snapshot(made.method)
    cast(made)
    assert made.fc.weight.dtype != torch.float32
    assert same(before, made.method.state_dict())
    cast(made.method)
    cast(made.method.update)
    assert same(before, made.method.state_dict())


@stateful
def test_buffers_move_to_another_device(make: Callable[[], Method]) -> None:
    made = net(make, steps=1).to("meta")
    assert {tensor.device.type for tensor in made.buffers()} <= {"meta"}
    assert all(
        tensor.dtype == kept.dtype for tensor, kept in zip(made.buffers(), net(make, steps=1).buffers(), strict=True)
    )


def broken(state: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """States that do not fit."""
    found = {"one more": {**state, "update.table.rows": torch.zeros(3)}}
    for name, tensor in state.items():
        rest = {other: value for other, value in state.items() if other != name}
        found[f"without {name}"] = rest
        found[f"no tensor {name}"] = {**state, name: None}
        found[f"another shape of {name}"] = {**state, name: torch.cat([tensor.reshape(-1)] * 2)}
    return found


@stateful
def test_a_state_that_does_not_fit_changes_nothing(make: Callable[[], Method]) -> None:
    """Neither the method's own loading does, nor that of an enclosing module, strict or not."""
    state = net(make, steps=3).method.state_dict()
    for name, wrong in broken(state).items():
        if name.startswith("another shape of direction.") and not name.endswith(("count", "numbers")):
            continue  # it is that of the model
        for strict in (True, False):
            made = net(make, steps=1)
            before = snapshot(made)
            with pytest.raises(ValueError, match=r"must (have|be)"):
                made.method.load_state_dict(wrong, strict=strict)
            assert same(before, made.state_dict()), name
            with pytest.raises(ValueError, match=r"must (have|be)"):
                made.load_state_dict({f"method.{key}": value for key, value in wrong.items()}, strict=strict)
            assert same(before, made.state_dict()), name


@stateful
def test_an_empty_state(make: Callable[[], Method]) -> None:
    made = net(make, steps=1)
    before = snapshot(made)
    with pytest.raises(ValueError, match=r"state must have a tensor '[\w.]+' for \w+, got \[\]"):
        made.method.load_state_dict({})
    with pytest.raises(RuntimeError, match=r"(?s)Missing key\(s\) in state_dict: .*method\."):
        made.load_state_dict({name: before[name] for name in ("fc.weight", "fc.bias")})
    made.load_state_dict({"fc.weight": before["fc.weight"]}, strict=False)  # a checkpoint of the model alone
    made.method.load_state_dict({}, strict=False)
    assert same(before, made.state_dict())


def test_the_state_of_another_method() -> None:
    names = ("ExampleWeights", "ExampleWeights shared", "LabelGradientAlignment", "AlignedImputation")
    for one in (*names, "ImputeAndWeight"):
        for other in (*names, "ImputeAndWeight", "L2I V1"):
            if one == other:
                continue
            made = net(METHODS[other], steps=1)
            before = snapshot(made)
            with pytest.raises(ValueError, match=r"must (have|be)"):
                made.method.load_state_dict(net(METHODS[one], steps=1).method.state_dict())
            assert same(before, made.state_dict()), (one, other)


def test_a_state_of_before_the_first_step() -> None:
    """Averages that did not exist then are gone again."""
    make = METHODS["LabelGradientAlignment"]
    made, fresh = net(make, steps=2), net(make)
    made.load_state_dict(fresh.state_dict())
    assert all(map(torch.equal, made.step(5), fresh.step(5)))
    assert same(made.state_dict(), fresh.state_dict())


def test_averages_must_fit_each_other() -> None:
    made = net(METHODS["AlignedImputation"], steps=1)
    state = made.method.state_dict()
    state["direction.of.ema_fourth.0"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"ema_fourth must have the shapes of ema_labeled, .*, got"):
        made.method.load_state_dict(state)


def test_assign_is_refused() -> None:
    method = ExampleWeights(M)
    with pytest.raises(ValueError, match="assign must be False"):
        method.load_state_dict(method.state_dict(), assign=True)


def test_loading_keeps_the_tensors() -> None:
    """A CUDA graph works on them."""
    made = net(METHODS["LabelGradientAlignment"], steps=2)
    before = list(made.method.buffers())
    made.load_state_dict(snapshot(made))
    assert all(one is other for one, other in zip(before, made.method.buffers(), strict=True))


@all_methods
def test_initialization_of_an_enclosing_module(make: Callable[[], Method]) -> None:
    """``module.apply(function)`` visits every module, and so do ``train`` and ``requires_grad_``."""
    made, seen = net(make, steps=1), []
    before = snapshot(made.method)
    made.apply(seen.append).train().eval().requires_grad_(False)
    assert made.method in seen
    assert same(before, made.method.state_dict())


def test_the_settings_are_shown() -> None:
    shown = repr(ExampleWeights(M, interval=3, lr=0.25, damping=0.5))
    assert all(text in shown for text in ("ExampleWeights(", "interval=3", "lr=0.25", "damping=0.5", "read='after'"))
    assert "training" not in shown
    averages = TensorList()
    averages.replace([torch.zeros(2, 3), torch.zeros(4)])
    assert repr(averages) == "TensorList([2, 3], [4])"


NUMBERS: list[tuple[str, Callable[..., Method]]] = [
    ("rate", lambda **number: L2I(look_ahead=True, **number)),
    ("weight", lambda **number: L2I(**number)),
    ("label_step", lambda **number: L2I("V1", **number)),
    ("rate", lambda **number: MetaGradient(**{"rate": 0.5, **number})),
    ("step", lambda **number: MetaGradient(**number)),
    ("lr", lambda **number: ExampleWeights(M, **number)),
    ("damping", lambda **number: ExampleWeights(M, **number)),
    ("lr", lambda **number: LabelGradientAlignment(M, C, **number)),
    ("weight", lambda **number: AlignedImputation(**number)),
    ("weight", lambda **number: ImplicitImputation(**number)),
    ("damping", lambda **number: ImplicitImputation(**number)),
    ("label_step", lambda **number: ImplicitImputation("V1", unit_length=False, **number)),
    ("rate", lambda **number: ImputeAndWeight(M, look_ahead=True, **number)),
    ("weight", lambda **number: ImputeAndWeight(M, **number)),
    ("lr", lambda **number: ImputeAndWeight(M, **number)),
]


@pytest.mark.parametrize(("name", "make"), NUMBERS, ids=[f"{type(make()).__name__} {name}" for name, make in NUMBERS])
def test_a_schedule_may_set_the_numbers(make: Callable[..., Method], name: str) -> None:
    """The method then steps as one that was made with that number; a bad value is refused and changes nothing."""
    made, expected = net(make), net(lambda: make(**{name: 0.375}))
    before = getattr(made.method, name)
    with pytest.raises(ValueError, match="must be finite, got nan"):
        setattr(made.method, name, float("nan"))
    with pytest.raises(TypeError, match="must be a number, got str"):
        setattr(made.method, name, "0.1")
    assert getattr(made.method, name) == before != 0.375
    setattr(made.method, name, 0.375)
    assert getattr(made.method, name) == getattr(expected.method, name) == 0.375
    for seed in range(2):
        assert all(map(torch.equal, made.step(seed), expected.step(seed)))


def test_numbers_that_a_method_lacks() -> None:
    method = ExampleWeights(M, inverse_hessian="identity")
    assert not hasattr(method, "damping")
    with pytest.raises(AttributeError, match="a ExampleWeights with these options has no damping"):
        method.damping = 0.1
    with pytest.raises(ValueError, match="damping must be >= 0"):
        ExampleWeights(M).damping = -1.0
    with pytest.raises(ValueError, match="lr must be >= 0"):
        LabelGradientAlignment(M, C).lr = -1.0


def test_rules_are_modules_that_pass_the_state_on() -> None:
    rule = InverseHessian(UnitLength(NormalizedGap()))
    method = Method(rule, LabelGradient(), LabelStep(step=0.1))
    assert "direction.of.of.ema_labeled.count" in method.state_dict()
    assert not Method(LookAhead(HoldoutGradient()), LabelGradient(), LabelStep(step=0.1)).state_dict()


class MovingAverage(nn.Module):
    """A rule of somebody else's, with a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(C, 6))

    def forward(self, problem: Any) -> Any:
        direction = HoldoutGradient()(problem).dense()
        self.average.mul_(0.9).add_(direction.weight)
        return direction._replace(weight=self.average.clone())


def test_a_rule_that_is_any_module() -> None:
    def make() -> Method:
        return Method(MovingAverage(), LabelGradient(), LabelStep(step=0.1))

    made, fresh = net(make, steps=2), net(make)
    fresh.load_state_dict(made.state_dict())
    assert all(map(torch.equal, made.step(2), fresh.step(2)))
    with pytest.raises(ValueError, match=r"direction\.average must be \[4, 6\] like that of Method, got \[3\]"):
        made.method.load_state_dict({"direction.average": torch.zeros(3)})
