"""A direction after inner steps of training, brought back through them."""

from fastmeta import checks
from fastmeta.directions.holdout_gradient import HoldoutGradient
from fastmeta.directions.rule import DirectionRule
from fastmeta.problem import AnyDirection, InnerLoss, Problem, Reduction, Trajectory, single, vectors
from fastmeta.state import Number, Stateful


class LookAhead(Stateful):
    r"""Another direction, taken after K inner steps of SGD on ``C^U + labeled_weight C^T``, and brought back.

    Learning to Impute, Eq. (3), for one step and more. With ``g_k`` the inner gradient at ``theta_k`` and momentum mu::

        m_{k+1} = mu m_k + g_k,    theta_{k+1} = theta_k - rate m_{k+1},    m_0 = 0

    and v the direction of ``of`` at ``theta_K``, the adjoints run back through the steps by Hessian-vector products::

        u_k = v_{k+1} + mu u_{k+1},    v_k = v_{k+1} - rate H(theta_k) u_k,    v_K = v, u_K = 0

    The derivative of the outer loss is the sum over k of the derivatives at ``theta_k`` along ``u_k``. What is kept of
    the K steps are the parameters and the directions of each: the graph of one Hessian-vector product lives at a time.
    (C^T does not enter ``d theta* / dz`` of one step but moves theta*.)

    Args:
        of: the rule evaluated at theta_K.
        rate: eta.
        loss: the inner loss.
        reduction: of C^U and C^T over their examples.
        labeled_weight: 0 leaves C^T out.
        labeled_loss: the loss of C^T.
        steps: K.
        momentum: mu.

    Raises:
        ValueError: a number is out of its range.

    Regression to 1 by steps of half the way, judged by the distance to 0:

    >>> import torch
    >>> from fastmeta.problem import LastLayerProblem, Rows
    >>> rows = Rows(torch.ones(1, 1), torch.zeros(1, 1))
    >>> problem = LastLayerProblem(rows, torch.ones(1, 1), rows, torch.zeros(1, 1), has_bias=False)
    >>> rule = LookAhead(HoldoutGradient("mse"), rate=0.25, loss="mse", steps=2)
    >>> [v.weight.item() for _, v in rule(problem).steps]
    [0.75, 1.5]
    """

    rate = Number(low=None)
    labeled_weight = Number(low=None)
    momentum = Number()

    def __init__(
        self,
        of: DirectionRule | None = None,
        rate: float = 1.0,
        loss: str = "mse_probs",
        reduction: Reduction = "mean",
        labeled_weight: float = 0.0,
        labeled_loss: str = "cross_entropy",
        steps: int = 1,
        momentum: float = 0.0,
    ) -> None:
        super().__init__()
        checks.loss_code(loss)
        checks.loss_code(labeled_loss, "labeled_loss")
        if steps < 1:
            raise ValueError(f"steps must be >= 1, got {steps}")
        self.of: DirectionRule = HoldoutGradient() if of is None else of
        self.rate = rate
        self.loss = loss
        self.reduction: Reduction = reduction
        self.labeled_weight = labeled_weight
        self.labeled_loss = labeled_loss
        self.steps = steps
        self.momentum = momentum

    @property
    def inner(self) -> InnerLoss:
        """What the steps descend."""
        return InnerLoss(self.loss, self.reduction, self.labeled_weight, self.labeled_loss)

    def forward(self, problem: Problem) -> AnyDirection | Trajectory:
        """The direction of ``of`` at theta*; for K > 1 the K directions, each with the problem it belongs to.

        Raises:
            TypeError: ``of`` gives the directions of several inner steps itself.
        """
        points, ahead = self._forward(problem)
        direction = single(self.of(ahead), "; use LookAhead(steps=K)")
        if self.steps == 1:
            return direction
        adjoint, buffer = vectors.dense(direction), None
        steps: list[tuple[Problem, AnyDirection]] = []
        for point in reversed(points):
            buffer = adjoint if buffer is None else vectors.combined(adjoint, self.momentum, buffer)
            steps.append((point, buffer))
            if point is not problem:
                adjoint = vectors.combined(adjoint, -self.rate, point.hessian_vector_product(self.inner, buffer))
        return Trajectory(tuple(reversed(steps)))

    def inner_gradient(self, problem: Problem) -> AnyDirection:
        """``grad (C^U + labeled_weight C^T)`` at theta."""
        total: AnyDirection | None = None
        for part, loss, factor in self.inner.terms():
            gradient = problem.gradient(part, loss=loss, reduction=self.reduction)
            total = gradient if total is None else vectors.combined(total, factor, gradient)
        assert total is not None, "C^U is always there"
        return total

    def _forward(self, problem: Problem) -> tuple[list[Problem], Problem]:
        points: list[Problem] = []
        here, buffer = problem, None
        for _ in range(self.steps):
            points.append(here)
            gradient = self.inner_gradient(here)
            buffer = gradient if buffer is None else vectors.combined(gradient, self.momentum, buffer)
            here = here.moved(buffer, self.rate)
        return points, here
