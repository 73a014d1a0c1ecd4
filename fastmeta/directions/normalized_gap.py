"""The normalized gap between two gradients."""

from typing import Any

from torch import Tensor

from fastmeta import ops, vectors
from fastmeta.problem import AnyDirection, AnyProblem


class NormalizedGap:
    """The gap between labeled and unlabeled gradient, each coordinate divided by its own scale.

    ``2 v / (epsilon + sqrt(EMA(v^4)))`` with ``v = EMA(g_l) - g_u``: minus the gradient of the objective of Label
    Gradient Alignment (Algorithm 1, Eq. (2)) with respect to ``g_u``, averages held constant. The averages include
    the current batch and start from the first one.

    Args:
        decay: of the average of ``g_l``.
        decay_norm: of the average of ``v^4``.
        epsilon: added to the scale.
        loss: of both gradients, means over their examples.
    """

    def __init__(
        self, *, decay: float = 0.99, decay_norm: float = 0.99, epsilon: float = 1e-3, loss: str = "cross_entropy"
    ) -> None:
        self.decay = decay
        self.decay_norm = decay_norm
        self.epsilon = epsilon
        self.loss = loss
        self.ema_labeled: list[Tensor] = []
        self.ema_fourth: list[Tensor] = []

    def __call__(self, problem: AnyProblem) -> AnyDirection:
        """Update the averages with this batch and return the direction."""
        labeled = problem.gradient("labeled", loss=self.loss)
        g_l, g_u = vectors.tensors(labeled), vectors.tensors(problem.gradient("unlabeled", loss=self.loss))
        if not self.ema_labeled:
            self.ema_labeled = [g.clone() for g in g_l]
            self.ema_fourth = [(first - second) ** 4 for first, second in zip(g_l, g_u, strict=True)]
        shapes = [[list(tensor.shape) for tensor in tensors] for tensors in (self.ema_labeled, g_l)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"the averages of {shapes[0]} do not fit gradients of {shapes[1]}; use one rule a layer")
        self.ema_labeled = [ema.to(g) for ema, g in zip(self.ema_labeled, g_l, strict=True)]
        self.ema_fourth = [ema.to(g) for ema, g in zip(self.ema_fourth, g_l, strict=True)]
        direction = ops.alignment_direction(
            g_l,
            g_u,
            self.ema_labeled,
            self.ema_fourth,
            decay=self.decay,
            decay_norm=self.decay_norm,
            epsilon=self.epsilon,
        )
        return vectors.rebuilt(labeled, direction)

    def state_dict(self) -> dict[str, Any]:
        """The averages."""
        return {
            "ema_labeled": [ema.clone() for ema in self.ema_labeled],
            "ema_fourth": [ema.clone() for ema in self.ema_fourth],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the averages of :meth:`state_dict`."""
        self.ema_labeled = [ema.clone() for ema in state["ema_labeled"]]
        self.ema_fourth = [ema.clone() for ema in state["ema_fourth"]]
