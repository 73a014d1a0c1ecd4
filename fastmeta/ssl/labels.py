"""What becomes of labels, how far predictions are from them, and when they count."""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Finish = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From labels, imputed or refined ``[N, C]``, to those that are learned and a mask ``[N]``."""


def as_they_are(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Soft labels ``[N, C]``, and a mask ``[N]`` of ones: every example counts."""
    return labels, labels.new_ones(len(labels))


def harden(labels: Tensor, threshold: float | Tensor) -> tuple[Tensor, Tensor]:
    """One-hot labels ``[N, C]``, and a mask ``[N]`` that is 1 where the largest probability reaches ``threshold``.

    Args:
        labels: ``[N, C]``.
        threshold: of all classes, or of each ``[C]``.

    >>> harden(torch.tensor([[0.9, 0.1], [0.4, 0.6]]), 0.8)[1]
    tensor([1., 0.])
    """
    confidence, place = labels.max(dim=1)
    hard = torch.zeros_like(labels).scatter_(1, place.unsqueeze(1), 1.0)
    threshold = threshold[place] if isinstance(threshold, Tensor) else threshold
    return hard, (confidence >= threshold).to(labels.dtype)


def sharpen(labels: Tensor, temperature: float) -> Tensor:
    """``p_c^(1/T) / sum_c' p_c'^(1/T)`` (MixMatch, Eq. (7)); of a softmax, that of its logits divided by T.

    An entry below 0, as a step on labels that is not projected may leave it, counts as 0.

    >>> sharpen(torch.tensor([[0.5, 0.25, 0.25]]), 0.5)
    tensor([[0.6667, 0.1667, 0.1667]])
    """
    if temperature == 1:
        return labels
    labels = labels.clamp_min(0)
    largest = labels.amax(dim=1, keepdim=True).clamp_min(torch.finfo(labels.dtype).tiny)
    powers = (labels / largest).pow(1 / temperature)
    return powers / powers.sum(dim=1, keepdim=True).clamp_min(1)  # 1 and more, but for a row of zeros


def kl_divergence(logits: Tensor, targets: Tensor) -> Tensor:
    """``mean_i KL(y_i || softmax f_i)``, at least in float32.

    Args:
        logits: f ``[N, C]``.
        targets: probabilities y ``[N, C]``, constants. An entry below 0, as a step on labels that is not projected may
            leave it, counts in the cross-entropy and not in the entropy, which has no gradient.

    >>> kl_divergence(torch.zeros(1, 4), torch.tensor([[0.5, 0.5, 0.0, 0.0]]))
    tensor(0.6931)
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    fixed = targets.detach().to(wide)
    entropy = torch.special.entr(fixed.clamp_min(0)).sum(dim=1)
    return (-(fixed * logits.to(wide).log_softmax(dim=1)).sum(dim=1) - entropy).mean()


def conditional_entropy(logits: Tensor) -> Tensor:
    """``mean_i H(softmax f_i)`` of logits ``[N, C]``, in nats.

    >>> conditional_entropy(torch.zeros(2, 4))
    tensor(1.3863)
    """
    logarithms = logits.log_softmax(dim=1)
    return -(logarithms.exp() * logarithms).sum(dim=1).mean()


Ramp = Literal["sigmoid", "linear"]


def ramp_up(progress: float, length: float, shape: Ramp = "sigmoid") -> float:
    """``exp(-5 (1 - t)^2)``, ``t = min(1, progress / length)`` (Laine and Aila, 2017), from 0.007 to 1; linear: ``t``.

    >>> ramp_up(1.0, 0.4), ramp_up(0.1, 0.4, "linear")
    (1.0, 0.25)
    """
    done = 1.0 if length == 0 else min(1.0, progress / length)
    return done if shape == "linear" else math.exp(-5 * (1 - done) ** 2)
