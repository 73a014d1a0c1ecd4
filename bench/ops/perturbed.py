"""Parameters to theta + eps v, to theta - eps v, and back."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fastmeta
from bench.case import Case, Cost, Variant, Workload, bytes_of, distance_to, flat
from bench.inputs import NETWORKS, random_lists

OPERATOR = "perturbed"
RADIUS = 0.01
WEIGHT_SIZE = 0.02  # standard deviation, about that of a trained network's weights
# torch.norm of one tensor of 25 million float32 numbers is wrong in the third digit, so the usual loop's step is too.
NORM_ERROR = 5e-3
Lists = list[Tensor]
Look = Callable[[], None]  # called at each of the three places


def nothing() -> None:
    pass


def ours(params: Lists, v: Lists, look: Look) -> None:
    with fastmeta.ops.perturbed(params, v, RADIUS) as perturbation:
        look()
        perturbation.flip()
        look()
    look()


def loop(params: Lists, v: Lists, look: Look) -> None:
    """The usual code: a norm on the host, then steps of eps, -2 eps and eps, which do not restore every bit."""
    epsilon = RADIUS / torch.cat([t.reshape(-1) for t in v]).norm().item()
    for alpha in (epsilon, -2 * epsilon, epsilon):
        for p, t in zip(params, v, strict=True):
            p.add_(t, alpha=alpha)
        look()


def foreach(params: Lists, v: Lists, look: Look) -> None:
    epsilon = RADIUS / torch.stack(torch._foreach_norm(v)).norm().item()
    for alpha in (epsilon, -2 * epsilon, epsilon):
        torch._foreach_add_(params, v, alpha=alpha)
        look()


def foreach_on_device(params: Lists, v: Lists, look: Look) -> None:
    """No number on the host: the step needs a temporary, since no add takes a tensor as alpha."""
    step = torch._foreach_mul(v, RADIUS / torch.stack(torch._foreach_norm(v)).norm())
    for alpha in (1, -2, 1):
        torch._foreach_add_(params, step, alpha=alpha)
        look()


def foreach_bitwise(params: Lists, v: Lists, look: Look) -> None:
    """Keeps a copy, so that the parameters come back bit for bit as with fastmeta."""
    epsilon = RADIUS / torch.stack(torch._foreach_norm(v)).norm().item()
    saved = [p.clone() for p in params]
    torch._foreach_add_(params, v, alpha=epsilon)
    look()
    torch._foreach_add_(params, v, alpha=-2 * epsilon)
    look()
    torch._foreach_copy_(params, saved)
    look()


def build(network: str, dtype: torch.dtype, device: str) -> Workload:
    weights, v = random_lists(network, 2, device)
    start = [(WEIGHT_SIZE * t).to(dtype) for t in weights]
    v = [t.to(dtype) for t in v]
    params = [t.clone() for t in start]  # every variant restores them

    def variant(name: str, function: Callable[[Lists, Lists, Look], None], note: str = "", **options: Any) -> Variant:
        def check() -> Lists:
            seen: Lists = []
            function(params, v, lambda: seen.extend(t - s for t, s in zip(params, start, strict=True)))
            return seen

        options |= {"prepare": partial(torch._foreach_copy_, params, start), "check": check, "note": note}
        return Variant(name, partial(function, params, v, nothing), **options)

    drifts = "does not restore every bit"
    variants = [
        variant("fastmeta", ours, role="fastmeta"),
        variant("torch._foreach, copy kept", foreach_bitwise, role="eager", graph=False),
        variant("torch._foreach", foreach, drifts, role="eager", graph=False),
        variant("torch._foreach, on device", foreach_on_device, drifts, role="eager"),
        variant("loop", loop, drifts, role="eager", graph=False),
    ]
    moved = RADIUS / flat(v).norm() * flat(v)
    rounding = float(torch.finfo(dtype).eps * flat(start).norm() / moved.norm())
    return Workload(
        variants,
        distance_to((moved, -moved, torch.zeros_like(moved))),
        # The norm reads v; in: v and theta read, theta and a copy written; across: 2 reads, 1 write; back: 1 and 1.
        Cost(0, 10 * bytes_of(*params)),
        max(2 * rounding, NORM_ERROR),
    )


def cases(device: str) -> list[Case]:
    return [
        Case(OPERATOR, network, partial(build, network), dtypes=(torch.float32,), note="In, across and back.")
        for network in NETWORKS
    ]
