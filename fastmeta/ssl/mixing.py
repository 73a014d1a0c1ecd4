"""Mix-up (Zhang et al., 2018) of two batches."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastmeta import checks
from fastmeta.data.random_numbers import KeyedRandom
from fastmeta.ops.process_group import Group, joined_rows, rank_in


class Mixed(NamedTuple):
    """Convex combinations of examples and of their targets."""

    inputs: Tensor  # [N, ...]
    targets: Tensor  # [N, C]


def mix_up(
    first: Tensor,
    first_targets: Tensor,
    second: Tensor,
    second_targets: Tensor,
    *,
    alpha: float,
    favors_first: bool = False,
    generator: torch.Generator | None = None,
    random: KeyedRandom | None = None,
) -> Mixed:
    r"""Each example of one batch mixed with its partner in the other, as in Eq. (17) of the Meta-Gradient slides.

    .. math:: x_i = \lambda_i x_i^{(1)} + (1 - \lambda_i) x_i^{(2)}, \quad
        y_i = \lambda_i y_i^{(1)} + (1 - \lambda_i) y_i^{(2)}, \quad \lambda_i \sim \mathrm{Beta}(\alpha, \alpha)

    independently for every i. Both batches count alike, unless ``favors_first``. Algorithm 2 mixes
    labeled with unlabeled images, alpha = 1 (0.1 on SVHN), and learns from
    :func:`fastmeta.ssl.kl_divergence` to the mixed targets.

    Args:
        first: one batch ``[N, ...]``.
        first_targets: its probabilities ``[N, C]``.
        second: the other batch ``[N, ...]``.
        second_targets: its probabilities ``[N, C]``.
        alpha: above 0; the smaller, the closer to unmixed.
        favors_first: ``max(lambda, 1 - lambda)`` in place of lambda, as in MixMatch (Eq. (9)).
        generator: source of randomness; None: the default one of the inputs' device.
        random: draws for each example by its number instead, so that it mixes alike whatever batch it is in.

    Raises:
        ValueError: the batches differ in shape, or ``alpha`` is not above 0.
        TypeError: a tensor is not floating, or differs in dtype from its partner.

    >>> images, labels = torch.zeros(3, 1, 8, 8), torch.eye(10)[:3]
    >>> mixed = mix_up(images, labels, images + 1, labels.flip(0), alpha=1.0)
    >>> bool((mixed.inputs[:, 0, 0, 0] + mixed.targets[:, 0])[0] == 1)
    True
    """
    checks.floating(first, "first")
    if first.dim() == 0:
        raise ValueError("first must be [N, ...], got a single number")
    checks.shaped(second, "second", "[N, ...]", first.shape)
    checks.matrix(first_targets, "first_targets", "[N, C]")
    checks.shaped(first_targets, "first_targets", "[N, C]", (len(first), first_targets.shape[1]))
    checks.shaped(second_targets, "second_targets", "[N, C]", first_targets.shape)
    checks.like(first, "first", second=second)
    checks.like(first_targets, "first_targets", second_targets=second_targets)
    if not checks.number(alpha, "alpha") > 0:
        raise ValueError(f"alpha must be above 0, got {alpha}")
    share = _beta(len(first), alpha, generator, first.device) if random is None else _keyed_beta(random, alpha)
    share = torch.maximum(share, 1 - share) if favors_first else share
    return Mixed(_mixed(first, second, share), _mixed(first_targets, second_targets, share))


def shuffled_partners(
    parts: Sequence[Mixed], randoms: Sequence[KeyedRandom | None], group: Group = None
) -> list[Mixed]:
    """A partner for every example: the examples of all parts and processes in one random order.

    The order is that of a number which each example draws, so it is the same on any number of processes, which send
    each other their examples.

    Args:
        parts: examples of this process, without a graph.
        randoms: for each part, what its examples draw from; None: they draw from torch's own.
        group: the processes.

    Returns:
        The partners of each part, in its order.

    >>> part = Mixed(torch.arange(4.0), torch.eye(4))
    >>> (partners,) = shuffled_partners([part], [None])
    >>> partners.inputs.sort().values
    tensor([0., 1., 2., 3.])
    """
    rank, whole, draws, mine, before = rank_in(group), [], [], [], 0
    for part, random in zip(parts, randoms, strict=True):
        drawn = torch.rand(len(part.inputs), device=part.inputs.device) if random is None else random.uniform(1)[:, 0]
        (inputs, targets, numbers), counts = joined_rows([part.inputs, part.targets, drawn], group)
        whole.append(Mixed(inputs, targets))
        draws.append(numbers)
        first = before + sum(counts[:rank])
        mine.append(slice(first, first + counts[rank]))
        before += sum(counts)
    order = torch.cat(draws).argsort(stable=True)
    inputs, targets = (torch.cat(each) for each in zip(*whole, strict=True))
    return [Mixed(inputs[order[place]], targets[order[place]]) for place in mine]


def _beta(count: int, alpha: float, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """``[count]`` draws of Beta(alpha, alpha) in float64.

    Two Gamma variables in the proportion lambda : 1 - lambda. For small alpha both would underflow to 0, so their
    logarithms are drawn: Gamma(alpha) is Gamma(alpha + 1) times ``u^(1 / alpha)`` with u uniform.
    """
    source = device if generator is None else generator.device
    above = torch.full((2, count), alpha + 1.0, dtype=torch.float64, device=source)
    uniform = torch.rand(2, count, dtype=torch.float64, device=source, generator=generator)
    logarithms = torch._standard_gamma(above, generator=generator).log() + uniform.log() / alpha
    return (logarithms[0] - logarithms[1]).sigmoid().to(device)


def _keyed_beta(random: KeyedRandom, alpha: float) -> Tensor:
    """``[n]`` draws of Beta(alpha, alpha) in float64 from two uniform numbers each (Devroye, 1996).

    Student's t with 2 alpha degrees of freedom by Bailey's polar method, squeezed into [0, 1].
    """
    uniform = random.uniform(2).double()
    cosine = (2 * math.pi * uniform[:, 1]).cos()
    square = torch.expm1((1 - uniform[:, 0]).log() / -alpha) * cosine.square()  # t^2 / (2 alpha)
    return 0.5 + 0.5 * cosine.sign() / (1 + 1 / square).sqrt()


def _mixed(first: Tensor, second: Tensor, share: Tensor) -> Tensor:
    part = share.to(first.dtype).view(-1, *[1] * (first.dim() - 1))
    return part * first + (1 - part) * second
