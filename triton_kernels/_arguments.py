"""What planners ask of the arguments of the last-layer operators, once for each layout of the tensors."""

import torch
from torch import Tensor

from fastmeta import checks
from fastmeta.losses import LOSSES

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def supported(features: Tensor) -> None:
    """A dtype that the kernels take."""
    if features.dtype not in DTYPES:
        raise TypeError(f"the Triton kernels take float32, bfloat16 and float16, got {features.dtype}")


def outputs(
    features: Tensor, logits: Tensor | None, head_weight: Tensor | None, head_bias: Tensor | None
) -> tuple[int, int, int]:
    """Features ``[N, D]``, and logits ``[N, C]`` or a head ``[C, D]``, ``[C]``; returns N, D and C."""
    n, d = checks.matrix(features, "features", "[N, D]").shape
    supported(features)
    if (logits is None) == (head_weight is None):
        raise ValueError(f"either logits or a head must be given, got {'none' if logits is None else 'both'}")
    if logits is not None:
        c = checks.matrix(logits, "logits", "[N, C]").shape[1]
        checks.shaped(logits, "logits", "[N, C]", (n, c))
    else:
        c = checks.matrix(head_weight, "head weight", "[C, D]").shape[0]
        checks.shaped(head_weight, "head weight", "[C, D]", (c, d))
        if head_bias is not None:
            checks.shaped(head_bias, "head bias", "[C]", (c,))
    checks.like(features, "features", **{"logits": logits, "head weight": head_weight, "head bias": head_bias})
    return n, d, c


def direction(features: Tensor, num_classes: int, weight: Tensor, bias: Tensor | None) -> None:
    """Direction ``[C, D]`` and ``[C]`` or None."""
    checks.shaped(weight, "direction_weight", "[C, D]", (num_classes, features.shape[1]))
    if bias is not None:
        checks.shaped(bias, "direction_bias", "[C]", (num_classes,))
    checks.like(features, "features", direction_weight=weight, direction_bias=bias)


def weights(features: Tensor, example_weights: Tensor | None) -> None:
    """Example weights ``[N]`` or None."""
    if example_weights is not None:
        checks.like(features, "features", weights=checks.shaped(example_weights, "weights", "[N]", features.shape[:1]))


def loss(code: int) -> None:
    """The kernels' number of a loss."""
    if not 0 <= code < len(LOSSES):
        raise ValueError(f"loss must be in [0, {len(LOSSES)}), got {code}")


def precision(features: Tensor) -> str:
    """Of float32 products: TF32 where torch's own setting for CUDA allows it, else ``ieee``."""
    tf32 = features.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"
