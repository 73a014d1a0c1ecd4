"""A model that changes parameters as it runs, or reads what was computed from them before, is found out."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp

from fastmeta import L2I, label_gradient
from fastmeta.problem import How

RECORDED: list[How] = ["jvp", "double_backward"]
HOWS: list[How] = [*RECORDED, "finite_difference", "forward_difference"]


def by_assignment(target: Tensor, source: Tensor) -> None:
    target.data = 0.9 * target.data + 0.1 * source.data


def by_data(target: Tensor, source: Tensor) -> None:
    target.data.mul_(0.9).add_(source.data, alpha=0.1)


def in_place(target: Tensor, source: Tensor) -> None:
    target.mul_(0.9).add_(source, alpha=0.1)


class MomentumEncoder(nn.Module):
    """Has a frozen copy of its encoder, which follows it at every forward."""

    def __init__(self, update: Callable[[Tensor, Tensor], None]) -> None:
        super().__init__()
        self.encoder, self.fc = nn.Linear(5, 4), nn.Linear(4, 3)
        self.follower = nn.Linear(5, 4).requires_grad_(False)
        self.update = update

    def forward(self, inputs: Tensor) -> Tensor:
        with torch.no_grad():
            for source, target in zip(self.encoder.parameters(), self.follower.parameters(), strict=True):
                self.update(target, source)
        return self.fc(self.encoder(inputs).tanh() + self.follower(inputs))


class MaxNorm(nn.Linear):
    """Its weights are brought back to a norm when it runs, by an assignment or in place."""

    def __init__(self, *sizes: int, assigns: bool) -> None:
        super().__init__(*sizes)
        self.assigns = assigns

    def forward(self, input: Tensor) -> Tensor:
        if self.assigns:
            self.weight.data = torch.renorm(self.weight.data, p=2, dim=0, maxnorm=0.5)
        else:
            self.weight.data.clamp_(min=-0.1)
        return super().forward(input)


class View(nn.Module):
    """Keeps a part of a parameter as an attribute; autograd knows where it comes from."""

    def __init__(self, *, detaches: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 5))
        self.first = self.weight[:4]
        self.detaches = detaches
        self.fc = nn.Linear(4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        first = self.first.detach() if self.detaches else self.first
        return self.fc((inputs @ first.T).tanh() * (inputs @ self.weight[4:].T))


@pytest.fixture
def inputs(generator: torch.Generator) -> Tensor:
    torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
    return torch.randn(6, 5, dtype=torch.float64)


def brute_force(plain: nn.Module, inputs: Tensor, v: dict[str, Tensor]) -> Tensor:
    """``D_v log p`` of a model that changes nothing."""
    theta = {name: value.detach() for name, value in plain.named_parameters() if name in v}
    return jvp(lambda moved: functional_call(plain, moved, inputs).log_softmax(1), (theta,), (v,))[1]


def direction_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: torch.randn_like(value) for name, value in model.named_parameters() if value.requires_grad}


@pytest.mark.parametrize("how", RECORDED)
def test_a_frozen_parameter_may_be_given_other_memory(how: How, inputs: Tensor) -> None:
    model = MomentumEncoder(by_assignment).double()
    before, v = {name: value.clone() for name, value in model.state_dict().items()}, direction_of(model)
    got = label_gradient(model, inputs, v, how=how)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model(inputs)
    model.update = lambda target, source: None
    torch.testing.assert_close(got, brute_force(model, inputs, v))


@pytest.mark.parametrize(("how", "update"), [*((how, in_place) for how in HOWS), *((how, by_data) for how in RECORDED)])
def test_a_frozen_parameter_must_not_change(how: How, update: Callable[..., None], inputs: Tensor) -> None:
    model = MomentumEncoder(update).double()
    with pytest.raises(ValueError, match=r"must not change its parameters as it runs, but it .*change[sd] follower\."):
        label_gradient(model, inputs, direction_of(model), how=how)


@pytest.mark.parametrize("how", HOWS)
def test_a_parameter_must_not_change_by_its_data(how: How, inputs: Tensor) -> None:
    """Which the hold-out gradient tells also where the derivative is a difference."""
    model = nn.Sequential(MaxNorm(5, 4, assigns=False), nn.Tanh(), nn.Linear(4, 3)).double()
    targets = torch.tensor([0, 1, 2, 0, 1, 2])
    with pytest.raises(ValueError, match=r"it changes 0\.weight by its \.data; do that after optimizer\.step"):
        L2I(how=how).refine(model=model, unlabeled=inputs, holdout=inputs, targets=targets)


@pytest.mark.parametrize("how", HOWS)
def test_a_parameter_that_is_given_other_memory(how: How, inputs: Tensor) -> None:
    """Its tangent stays, differences move it, and it is put back bit for bit."""
    model = nn.Sequential(MaxNorm(5, 4, assigns=True), nn.Tanh(), nn.Linear(4, 3)).double()
    model(inputs)
    before, v = {name: value.clone() for name, value in model.state_dict().items()}, direction_of(model)
    got = label_gradient(model, inputs, v, how=how)
    if how in RECORDED:
        plain = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
        plain.load_state_dict(model.state_dict())
        torch.testing.assert_close(got, brute_force(plain, inputs, v))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("how", RECORDED)
def test_an_attribute_computed_from_a_parameter(how: How, inputs: Tensor) -> None:
    with pytest.raises(ValueError, match="an attribute computed from a parameter before"):
        label_gradient(model := View(), inputs.float(), direction_of(model), how=how)
    model = View(detaches=True)
    got = label_gradient(model, inputs.float(), direction_of(model), how=how)
    assert bool(got.isfinite().all()), "what it takes as a constant is one"
