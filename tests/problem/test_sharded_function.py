"""Differences of a model that is spread over processes by ``fully_shard`` are those of one process."""

from typing import Any

import forked
import pytest
import torch
from cases import Draw
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from fastmeta import L2I, AlignedImputation, ImplicitImputation, ImputeAndWeight, MetaGradient, Method
from fastmeta.ops.process_group import Group

N, HELD_OUT, CLASSES = 8, 5, 3
METHODS: dict[str, Any] = {
    "probes": lambda **o: MetaGradient(how="finite_difference", statistics="running", step=50.0, project=False, **o),
    "one-sided": lambda **o: MetaGradient(how="forward_difference", inner_loss="cross_entropy", **o),
    "steps on labels": lambda **o: L2I("V1", how="finite_difference", label_step=30.0, **o),
    "look-ahead": lambda **o: L2I(how="finite_difference", look_ahead=True, labeled_weight=0.5, **o),
    "labels and weights": lambda **o: ImputeAndWeight(N, how="finite_difference", **o),
}
REFUSED: dict[str, Any] = {
    "whole parameters for a Hessian-vector product": lambda **o: L2I(
        how="finite_difference", look_ahead=True, steps=2, **o
    ),
    "whole parameters for a Hessian": lambda **o: ImplicitImputation(how="finite_difference", **o),
    "whole parameters for NormalizedGap": lambda **o: AlignedImputation(how="finite_difference", **o),
    "must have whole parameters, but those": lambda **o: L2I(how="jvp", **o),
}


class Net(nn.Module):
    """With batch statistics, dropout and a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        first, norm = nn.Linear(4, 6), nn.BatchNorm1d(6)
        self.body = nn.Sequential(first, norm, nn.Tanh(), nn.Linear(6, 7), nn.Tanh(), nn.Dropout(0.5))
        self.fc = nn.Linear(7, CLASSES)
        self.body[3].bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(x))


def examples(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x_u, labels = (torch.randn(N, n, dtype=torch.float64, generator=generator) for n in (4, CLASSES))
    x_l = torch.randn(HELD_OUT, 4, dtype=torch.float64, generator=generator)
    return x_u, labels.softmax(1), x_l, torch.randint(CLASSES, (HELD_OUT,), generator=generator)


def net(seed: int) -> Net:
    torch.manual_seed(seed)
    model = Net().double().eval()
    model.body[1].running_var.uniform_(0.5, 2.0)
    return model


def refined(method: Method, model: nn.Module, batch: tuple[Tensor, ...], index: Tensor) -> list[Tensor]:
    """Labels, weights and the gradient of the loss by the labels, for rows of the batch."""
    x_u, labels, x_l, targets = batch
    labels = labels.clone().requires_grad_()
    found = method.refine(model=model, unlabeled=x_u, labels=labels, holdout=x_l, targets=targets, index=index)
    pulled = torch.zeros_like(labels)
    if found.loss.requires_grad:
        found.loss.backward()
        assert labels.grad is not None
        pulled = labels.grad
    return [found.labels, found.weights, pulled]


def parts(model: nn.Module) -> list[Tensor]:
    state = [parameter.detach() for parameter in model.parameters()]
    return [getattr(value, "_local_tensor", value).clone() for value in [*state, *model.buffers()]]


def spread(group: Group, seed: int) -> dict[str, Any]:
    """Every method on this process's rows, in the midst of a step of the model's own."""
    assert group is not None
    rank, world = group.rank(), group.size()
    mesh = DeviceMesh.from_group(group, "cpu")
    model = net(seed)
    fully_shard(model.body, mesh=mesh)
    fully_shard(model, mesh=mesh)
    x_u, labels, x_l, targets = examples(seed)
    batch = x_u[rank::world], labels[rank::world], x_l[rank::world], targets[rank::world]
    index = torch.arange(N)[rank::world]
    found: dict[str, Any] = {}
    for name, make in METHODS.items():
        model.zero_grad()
        own = model(batch[0]).square().sum()
        model.reshard()
        before = parts(model)
        found[name] = refined(make(process_group=group), model, batch, index)
        assert all(map(torch.equal, before, parts(model))), name
        assert all(parameter.grad is None for parameter in model.parameters()), name
        own.backward()
        found[f"{name}, own"] = [
            parameter.grad.full_tensor() for parameter in model.parameters() if parameter.requires_grad
        ]
    for words, make in REFUSED.items():
        with pytest.raises(ValueError, match=words):
            refined(make(process_group=group), model, batch, index)
    method = METHODS["probes"]
    alone = [torch.distributed.new_group([place]) for place in range(world)][rank]
    model.set_requires_gradient_sync(False)
    with pytest.raises(ValueError, match="model must reduce its gradients"):
        refined(method(process_group=group), model, batch, index)
    model.set_requires_gradient_sync(True)
    with pytest.raises(ValueError, match=r"processes of the mesh that the model is sharded over, \[2\], got 1"):
        refined(method(process_group=alone), model, batch, index)
    model.set_gradient_divide_factor(4.0)
    with pytest.raises(ValueError, match=r"but divides by 4\.0"):
        refined(method(process_group=group), model, batch, index)
    return found


def test_differences_of_a_spread_model(draw: Draw) -> None:
    seed = draw.integer(0, 2**31)
    every = forked.run(spread, 2, seed)
    model, batch = net(seed), examples(seed)
    own = model(batch[0]).square().sum()
    gradients = torch.autograd.grad(own, [parameter for parameter in model.parameters() if parameter.requires_grad])
    for name, make in METHODS.items():
        wanted = refined(make(), model, batch, torch.arange(N))
        for rank, found in enumerate(every):
            for number, (got, expected) in enumerate(zip(found[name], wanted, strict=True)):
                factor = 2 if name in ("look-ahead", "labels and weights") and number == 2 else 1  # as DDP averages it
                torch.testing.assert_close(got, factor * expected[rank::2], rtol=1e-10, atol=1e-12, msg=name)
            for got, expected in zip(found[f"{name}, own"], gradients, strict=True):
                torch.testing.assert_close(got, expected / 2, rtol=1e-10, atol=1e-12)
        assert not torch.equal(wanted[0], batch[1]) or wanted[2].abs().max() > 1e-6
