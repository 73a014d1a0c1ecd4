"""What both versions of Learning to Impute share: the method's settings."""

from typing import Any

APPROXIMATE: dict[str, Any] = {"how": "last_layer", "derivative": "eq6"}
"""Eq. (6) of the journal version, which Tiny-ImageNet in the first one has, too."""
LEARNABLE: dict[str, Any] = {"variant": "V1", "rate": 0.2}
"""V1, or "L": labels are learnable; the published inner rate is 100 times Adam's."""


def method(**settings: Any) -> dict[str, Any]:
    """Algorithm 1 as the published code has it, as fields of a RunConfig.

    Two views, a second batch of the labeled images held out, one inner step at 50 times Adam's rate on the summed
    squared error of the predictions, then an update of its own.
    """
    return {"method": "l2i-published", "method_settings": settings}
