"""Label gradients by central differences of the predictions, as Meta-Gradient takes them."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fastmeta import ops, vectors
from fastmeta.derivatives.derivative import Derivative, check_how, step_scale, weighted
from fastmeta.model_problem import AnyProblem, full_precision
from fastmeta.ops.perturbed import perturbed
from fastmeta.problem import AnyDirection, Problem, Reduction


@dataclass(frozen=True)
class FiniteDifference(Derivative):
    """``dG/dz_i = (rate w_i / (B epsilon)) (p(theta + epsilon v) - p(theta - epsilon v))``, a central difference.

    ``epsilon = radius / ||v||``: Meta-Gradient, Eq. (16), for the squared error on probabilities. At the published
    radius of 0.01 this is a finite probe, not the derivative.

    Args:
        radius: length of the perturbation.
        rate: alpha, the step size of the inner SGD.
        reduction: of the inner loss over its examples.
        how: ``last_layer`` perturbs the last layer alone, ``finite_difference`` the whole model, in place, and
            ``forward_difference`` to one side only: ``2 (p(theta + epsilon v) - p(theta)) / epsilon``.
    """

    radius: float = 0.01
    rate: float = 1.0
    reduction: Reduction = "mean"
    how: Literal["last_layer", "finite_difference", "forward_difference"] = "last_layer"

    def __post_init__(self) -> None:
        if self.how not in ("last_layer", "finite_difference", "forward_difference"):
            raise ValueError(f"how must be one of last_layer, finite_difference, forward_difference, got {self.how!r}")
        check_how(self.how, self.radius)

    def at(self, problem: AnyProblem, direction: AnyDirection) -> Tensor:
        """``[N, C]``."""
        plus, minus, epsilon = self.probes(problem, direction)
        zero = plus.new_zeros(plus.shape)
        step, epsilon = self.step_over(epsilon, problem, -1.0)
        gradient = ops.finite_difference_labels(plus, minus, zero, epsilon, step=step, project=False)
        return weighted(problem, gradient)

    def step_over(self, epsilon: Tensor, problem: AnyProblem, step: float) -> tuple[float, Tensor]:
        """``step rate / B`` (``step rate`` for a sum) and epsilon, as :func:`ops.finite_difference_labels` takes them.

        Where ``rate / B`` is on the device it divides epsilon.
        """
        scale = step_scale(problem, self.rate, self.reduction, len(problem.labels))
        return (step, epsilon / scale.to(epsilon)) if isinstance(scale, Tensor) else (step * scale, epsilon)

    def probes(self, problem: AnyProblem, direction: AnyDirection) -> tuple[Tensor, Tensor, Tensor]:
        """Logits at ``theta + epsilon v`` and at ``theta - epsilon v``, and epsilon, which stays on the device.

        The last layer is linear in its parameters, so its perturbed logits are ``f +- epsilon z``. Of the one-sided
        difference they are those at ``theta + epsilon v`` and at theta, half an epsilon to each side of their middle.
        """
        if not isinstance(problem, Problem):
            assert isinstance(direction, dict), "of a whole model"
            theta = problem.parameters
            one_sided = self.how == "forward_difference"
            minus = problem.logits if one_sided else None  # run before anything is moved
            with torch.no_grad(), perturbed({n: theta[n] for n in direction}, direction, self.radius) as perturbation:
                plus = full_precision(problem.function.logits(problem.unlabeled, theta))
                if minus is None:
                    perturbation.flip()
                    minus = full_precision(problem.function.logits(problem.unlabeled, theta))
            return plus, minus, perturbation.epsilon / 2 if one_sided else perturbation.epsilon
        assert not isinstance(direction, dict), "of a last layer"
        rows, v = problem.unlabeled, direction.dense()
        z = rows.features @ v.weight.T
        if v.bias is not None:
            z = z + v.bias
        epsilon = self.radius / vectors.norm(v)
        return rows.logits + epsilon * z, rows.logits - epsilon * z, epsilon
