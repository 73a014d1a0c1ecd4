"""What the last-layer operators share: their arguments and their checks."""

from torch import Tensor

from fastmeta import checks
from fastmeta.capture import Head


def split(logits: Tensor | Head) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """``logits``, head weight and head bias, as the kernels take them."""
    if isinstance(logits, Head):
        return None, logits.weight, logits.bias
    return logits, None, None


def check_outputs(features: object, logits: object) -> tuple[Tensor, int]:
    """Features ``[N, D]`` and logits ``[N, C]`` or a head ``[C, D]``; returns the features and C."""
    h = checks.matrix(features, "features", "[N, D]")
    if isinstance(logits, Head):
        weight = checks.matrix(logits.weight, "head weight", "[C, D]")
        if weight.shape[1] != h.shape[1]:
            raise ValueError(f"head weight must be [C, D] with D = {h.shape[1]}, got {list(weight.shape)}")
        if logits.bias is not None:
            checks.shaped(logits.bias, "head bias", "[C]", weight.shape[:1])
        checks.like(h, "features", **{"head weight": weight, "head bias": logits.bias})
        return h, weight.shape[0]
    f = checks.matrix(logits, "logits", "[N, C]")
    if f.shape[0] != h.shape[0]:
        raise ValueError(f"logits must be [N, C] with N = {h.shape[0]} like features, got {list(f.shape)}")
    checks.like(h, "features", logits=f)
    return h, f.shape[1]


def check_direction(features: Tensor, num_classes: int, weight: object, bias: object, name: str = "direction") -> None:
    """A direction ``V [C, D]``, ``b [C]`` or None."""
    checked = checks.shaped(weight, f"{name}_weight", "[C, D]", (num_classes, features.shape[1]))
    checks.like(features, "features", **{f"{name}_weight": checked})
    if bias is not None:
        checks.like(
            features, "features", **{f"{name}_bias": checks.shaped(bias, f"{name}_bias", "[C]", (num_classes,))}
        )


def check_weights(features: Tensor, weights: object) -> None:
    """Example weights ``[N]`` or None."""
    if weights is not None:
        checks.like(features, "features", weights=checks.shaped(weights, "weights", "[N]", features.shape[:1]))


def logit_tangent(features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``z = h V^T + b``. ``[N, C]``."""
    z = features @ weight.T
    return z if bias is None else z + bias
