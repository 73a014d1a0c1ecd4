"""The logits in what a model returns."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

_NAMED = "return the logits alone, or an object or dict that names them logits"


def logits_of(output: Any) -> Tensor:
    """The logits ``[N, C]`` in what a model returns; those of tokens, ``[B, T, C]``, as rows.

    Raises:
        TypeError: there are none, or several tensors that they could be.
        ValueError: they are not ``[N, C]`` or ``[B, T, C]``.
    """
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    if isinstance(logits, (tuple, list)):  # (loss, logits, ...), without a loss the logits come first
        possible = [part for part in logits if isinstance(part, Tensor) and part.is_floating_point() and part.dim() > 1]
        if len(possible) > 1:
            shapes = " and ".join(str(list(part.shape)) for part in possible)
            raise TypeError(f"model must give logits alone, got {type(output).__name__} of {shapes}; {_NAMED}")
        logits = possible[0] if possible else None
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        raise TypeError(f"model must give logits, got {type(output).__name__}; {_NAMED}")
    if logits.dim() > 3:
        raise ValueError(
            f"model must give logits [N, C] or [B, T, C], got {list(logits.shape)}; give those of pixels as rows: "
            "logits.permute(0, 2, 3, 1).flatten(0, -2) of [B, C, H, W]"
        )
    if logits.dim() < 2:
        hint = "; give those of one output as logits.unsqueeze(-1)" if logits.dim() == 1 else ""
        raise ValueError(f"model must give logits [N, C], got {list(logits.shape)}{hint}")
    return logits.flatten(0, -2)
