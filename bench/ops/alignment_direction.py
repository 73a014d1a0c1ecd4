"""Direction of label gradient alignment over all parameters of a network."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fastmeta
from bench.case import TOLERANCE, Case, Cost, Variant, Workload, bytes_of, compiled, distance_to
from bench.inputs import NETWORKS, random_lists

OPERATOR = "alignment_direction"
DECAY, DECAY_NORM, EPSILON = 0.9, 0.99, 1e-3
Lists = list[Tensor]


def ours(g_l: Lists, g_u: Lists, m: Lists, q: Lists, out: Lists | None = None) -> Lists:
    return fastmeta.ops.alignment_direction(
        g_l, g_u, m, q, decay=DECAY, decay_norm=DECAY_NORM, epsilon=EPSILON, out=out
    )


def one(g_l: Tensor, g_u: Tensor, m: Tensor, q: Tensor) -> Tensor:
    m.lerp_(g_l, 1 - DECAY)
    v = m - g_u
    square = v * v
    q.mul_(DECAY_NORM).addcmul_(square, square, value=1 - DECAY_NORM)
    return v.mul_(2).div_(q.sqrt().add_(EPSILON))


def loop(g_l: Lists, g_u: Lists, m: Lists, q: Lists) -> Lists:
    return [one(*tensors) for tensors in zip(g_l, g_u, m, q, strict=True)]


def foreach(g_l: Lists, g_u: Lists, m: Lists, q: Lists) -> Lists:
    torch._foreach_lerp_(m, g_l, 1 - DECAY)
    v = torch._foreach_sub(m, g_u)
    square = torch._foreach_mul(v, v)
    torch._foreach_mul_(q, DECAY_NORM)
    torch._foreach_addcmul_(q, square, square, 1 - DECAY_NORM)
    denominator = torch._foreach_sqrt(q)
    torch._foreach_add_(denominator, EPSILON)
    torch._foreach_mul_(v, 2)
    torch._foreach_div_(v, denominator)
    return list(v)


def build(network: str, dtype: torch.dtype, device: str) -> Workload:
    g_l, g_u, m0, q0 = ([t.to(dtype) for t in tensors] for tensors in random_lists(network, 4, device))
    q0 = [t.abs() for t in q0]
    flat_l, flat_u, flat_m0, flat_q0 = (torch.cat([t.reshape(-1) for t in tensors]) for tensors in (g_l, g_u, m0, q0))

    def on_lists(name: str, function: Callable[..., Any], **options: Any) -> Variant:
        m, q = [t.clone() for t in m0], [t.clone() for t in q0]
        prepare = partial(torch._foreach_copy_, [*m, *q], [*m0, *q0])
        return Variant(name, partial(function, g_l, g_u, m, q), prepare=prepare, **options)

    def on_one_buffer(name: str, **options: Any) -> Variant:
        m, q = flat_m0.clone(), flat_q0.clone()
        prepare = partial(torch._foreach_copy_, [m, q], [flat_m0, flat_q0])
        function = compiled(one) if options.get("role") == "compile" else one
        call = partial(function, flat_l, flat_u, m, q)
        return Variant(name, call, prepare=prepare, note="all parameters in one buffer", **options)

    into = partial(ours, out=[torch.empty_like(t) for t in m0])
    variants = [on_lists("fastmeta", ours, role="fastmeta"), on_lists("fastmeta, out given", into, role="fastmeta")]
    variants += [on_lists("torch._foreach", foreach, role="eager")]
    if dtype == torch.float32:
        variants += [
            on_lists("loop", loop, role="eager"),
            on_one_buffer("flat eager", role="eager"),
            on_one_buffer("flat torch.compile", role="compile"),
        ]
    # The truth in float64, from the same rounded inputs.
    exact = one(*(t.double() for t in (flat_l, flat_u, flat_m0, flat_q0)))
    return Workload(variants, distance_to(exact), Cost(0, 7 * bytes_of(*m0)), TOLERANCE[dtype])


def cases(device: str) -> list[Case]:
    return [Case(OPERATOR, network, partial(build, network)) for network in NETWORKS]
