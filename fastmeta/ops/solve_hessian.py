"""Solution of a linear system with the damped Hessian of the last layer."""

import math
import warnings
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from fastmeta import checks, losses
from fastmeta.dispatch import in_own_dtype
from fastmeta.ops import _last_layer
from fastmeta.ops.hvp import hessian_vector_product_reference
from fastmeta.ops.process_group import Group
from fastmeta.ops.process_group import check as check_group
from fastmeta.ops.solve import conjugate_gradient, system
from fastmeta.ops.solve.kronecker import SolverState
from fastmeta.ops.solve.solve import Answer, Solve, indefinite_error, refuse_capture, singular_error

SOLVERS = ("auto", "cholesky", "cg", "pcg")


class _Fields(NamedTuple):
    weight: Tensor
    bias: Tensor | None
    iterations: int | Tensor
    residual: float | Tensor


class HessianSolution(_Fields):
    """Solution of :func:`solve_hessian`: the tuple ``(weight, bias, iterations, residual)``.

    ``weight`` is ``[C, D]``; ``bias`` is ``[C]``, or None if the right-hand side has none. Of a solve inside a CUDA
    graph the last two items of the tuple are scalar tensors, which tell of the last replay; the attributes
    :attr:`iterations` and :attr:`residual` are numbers, and wait for it.
    """

    indefinite: Tensor | None = None
    """scalar: negative curvature stopped the solve; where the host has not looked, reading a number raises"""

    @property
    def iterations(self) -> int:  # type: ignore[override]
        """Products with the Hessian inside the solver; 1 for a direct solve, 0 if there was nothing to solve."""
        self._raise_if_indefinite()
        return int(self[2])

    @property
    def residual(self) -> float:  # type: ignore[override]
        """``||rhs - (H + damping I) x|| / ||rhs||`` of the returned ``x``, computed from its definition."""
        self._raise_if_indefinite()
        return float(self[3])

    def _raise_if_indefinite(self) -> None:
        if self.indefinite is not None and bool(self.indefinite):
            raise indefinite_error(int(self[2]))


class NotConvergedWarning(UserWarning):
    """The residual of :func:`solve_hessian` stayed above ``tol``."""


@dataclass(frozen=True)
class _Problem:
    """Everything but the tensors."""

    loss: str
    damping: float
    solver: str
    tol: float
    max_iter: int
    impl: str | None
    state: SolverState | None = None
    group: Group = None


class _Report:
    """Carries the answer out of an autograd function; torch.func copies lists and dicts."""

    answer: Answer | None = None


def solve_hessian_reference(
    features: Tensor,  # [N, D]
    logits: Tensor,  # [N, C]
    rhs_weight: Tensor,  # [C, D]
    rhs_bias: Tensor | None,  # [C]
    weights: Tensor | None,  # [N]
    loss: str,
    damping: float,
    targets: Tensor | None = None,  # [N, C]
) -> tuple[Tensor, Tensor | None]:  # [C, D], [C]
    """Column by column from the Hessian-vector product: the definition, for small heads."""
    shape = rhs_weight.shape
    columns = []
    rhs = torch.cat([rhs_weight.reshape(-1), *([] if rhs_bias is None else [rhs_bias])])
    for unit in torch.eye(rhs.numel(), dtype=rhs.dtype, device=rhs.device):
        weight, bias = unit[: shape.numel()].view(shape), None if rhs_bias is None else unit[shape.numel() :]
        image = hessian_vector_product_reference(features, logits, weight, bias, weights, loss, damping, targets)
        columns.append(torch.cat([part.reshape(-1) for part in image if part is not None]))
    x = torch.linalg.solve(torch.stack(columns, dim=1), rhs)
    return x[: shape.numel()].view(shape), None if rhs_bias is None else x[shape.numel() :]


@torch.compiler.disable
def solve_hessian(
    features: Tensor,
    logits: Tensor,
    rhs_weight: Tensor,
    rhs_bias: Tensor | None = None,
    weights: Tensor | None = None,
    *,
    loss: str = "cross_entropy",
    damping: float,
    solver: str = "auto",
    tol: float = 1e-4,
    max_iter: int = 100,
    targets: Tensor | None = None,
    impl: str | None = None,
    state: SolverState | None = None,
    process_group: Group = None,
) -> HessianSolution:
    r"""Solve ``(H + damping I) x = rhs`` for the Hessian ``H`` of ``sum_i w_i l(f_i, y_i)`` in the last layer.

    .. math:: H = \sum_i w_i\, \frac{\partial^2 l_i}{\partial f_i^2} \otimes \tilde h_i \tilde h_i^T, \qquad
        \tilde h_i = [h_i, 1]

    The inverse Hessian of the influence function, Not All Unlabeled Data Are Equal, Eq. (6). For cross-entropy the
    targets sum to one; for ``mse_probs`` and ``mse_tanh`` it is the Gauss-Newton matrix.

    ``cholesky`` factors the dense Hessian in float64; ``cg`` needs one product with it for each iteration; ``pcg`` is
    preconditioned by its Kronecker factors, the second moment of the features and the mean curvature of the outputs,
    with the damping split in their eigenbases (exact for ``mse``: one iteration). With fewer examples than features
    ``cholesky`` and ``pcg`` work in N coordinates for each output, and ``cg`` in the logit tangents of the examples
    where that halves its flops: same iterations, same residual. float16 and bfloat16 are solved in float32.

    ``auto`` is ``cholesky`` for the smallest systems and ``pcg`` without damping, else ``cg``: no eigenbases, and once
    a net has learned something no more iterations. Where it takes longer than they would, ``pcg`` goes on from there
    and serves the next solves of a ``state`` (not on a GPU, where an eigendecomposition waits for the host).

    On a GPU the iterations of ``cg`` and ``pcg`` wait for nothing; the host looks every 5 of them whether to go on, and
    at the residual in the end. Those of ``cg`` in float32 for at most 32 outputs are one launch; else a CUDA graph
    holds ``max_iter``, or twice those of the last solve of ``state``, and those after convergence change nothing. In a
    graph the numbers of the result stay on the device, nothing warns or names an input that is not finite, ``damping``
    must be > 0, ``cholesky`` raises, and ``pcg`` needs the factors of a ``state``, whose solution changes in place.

    The derivative is that of the exact solution, by the implicit function theorem: a second solve in backward, to
    ``tol``. Forward mode and a second derivative raise.

    With a ``process_group`` the sum is over the rows of all its processes, and ``N`` is their number: each passes rows
    of its own, perhaps none, and the same of everything else. The iterates are those of one process with all the rows
    up to rounding, which grows with the iterations (after 25 of ``cg`` it may reach the tolerance), for one all-reduce
    of a ``[C, D]`` a product. The host waits at the start and while they run, also on a GPU; no derivative, no graph.

    Args:
        features: input of the last layer, ``[N, D]``.
        logits: its output, ``[N, C]``.
        rhs_weight: weight part of the right-hand side, ``[C, D]``.
        rhs_bias: bias part, ``[C]``; None restricts the Hessian to the weight.
        weights: example weights ``[N]``; None means 1. With negative ones ``H + damping I`` may be indefinite.
        loss: one of :data:`fastmeta.losses.LOSSES`.
        damping: added multiple of the identity, >= 0. With 0, ``cholesky`` raises if the Hessian is singular (that of a
            softmax is); the others leave in ``residual`` what lies outside the span of the rows or along (1, ..., 1),
            and raise where the Hessian is so nearly singular that they diverge.
        solver: ``auto``, ``cholesky``, ``cg`` or ``pcg``.
        tol: relative residual to reach, > 0.
        max_iter: most iterations, >= 0.
        targets: values ``[N, C]`` or int64 classes ``[N]``, where the curvature of the loss reads them
            (:mod:`fastmeta.losses`); else they are not looked at.
        impl: implementation of the Hessian-vector product; see :func:`fastmeta.use_impl`.
        state: carrier of a warm start from call to call.
        process_group: processes whose rows make up the Hessian; None: this one's are all.

    Returns:
        Weight ``[C, D]``, bias ``[C]`` or None, iterations, and the relative residual that was reached.

    Raises:
        ValueError: a shape, loss or solver does not fit, the loss needs targets, ``damping < 0``, or an input is not
            finite.
        TypeError: dtypes are not floating or not the same.
        RuntimeError: the named ``impl`` is not available; or a ``process_group`` with tensors that require a
            derivative, inside a CUDA graph, or without torch.distributed.
        torch.linalg.LinAlgError: not positive definite.

    Warns:
        NotConvergedWarning: the residual is above ``tol`` after ``max_iter`` iterations or at the dtype's precision.

    >>> import torch
    >>> solution = solve_hessian(torch.ones(1, 1), torch.zeros(1, 2), torch.ones(2, 1), loss="mse", damping=2.0)
    >>> solution.weight.tolist(), solution.residual
    ([[0.25], [0.25]], 0.0)
    """
    _check(features, logits, rhs_weight, rhs_bias, weights, loss)
    y = losses.curvature_targets(targets, loss)
    if y is not None:
        y = losses.as_probabilities(checks.targets(y, features, logits.shape[1]), logits.shape[1], logits.dtype)
    damping, tol = checks.number(damping, "damping", low=0.0), checks.number(tol, "tol")
    problem = _Problem(loss, damping, solver, tol, max_iter, impl, state, process_group)
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, got {solver!r}")
    if problem.tol <= 0:
        raise ValueError(f"tol must be > 0, got {tol}")
    if isinstance(max_iter, bool) or not isinstance(max_iter, int) or max_iter < 0:
        raise ValueError(f"max_iter must be an integer >= 0, got {max_iter!r}")
    check_group(process_group)
    if process_group is not None and _tracked(features, logits, rhs_weight, rhs_bias, weights, y):
        raise RuntimeError("solve_hessian has no derivative with a process_group; detach its arguments")
    report = _Report()
    solve = _Solution.apply if _tracked(features, logits, rhs_weight, rhs_bias, weights, y) else _Solution.forward
    weight, bias = solve(features, logits, rhs_weight, rhs_bias, weights, y, problem, report)
    answer = report.answer
    assert answer is not None
    if not isinstance(answer.residual, Tensor) and not answer.residual <= problem.tol:
        _warn(problem, answer, answer.residual, rhs_weight.dtype)
    solution = HessianSolution(weight, bias, answer.iterations, answer.residual)
    solution.indefinite = answer.indefinite
    return solution


def _warn(problem: _Problem, answer: Answer, reached: float, dtype: torch.dtype) -> None:
    assert not isinstance(answer.iterations, Tensor), "the host knows where it stopped"
    if answer.iterations >= problem.max_iter:
        advice = "raise max_iter, tol or damping"
    else:
        advice = f"no solver gets further in {torch.promote_types(dtype, torch.float32)}: raise tol or damping"
    warnings.warn(
        f"solve_hessian ({answer.solver}) stopped at relative residual {reached:.2e} after {answer.iterations} "
        f"iterations, above tol={problem.tol:g}, with damping={problem.damping:g}; {advice}".replace("torch.", ""),
        NotConvergedWarning,
        stacklevel=4,  # past torch.compiler.disable
    )


@in_own_dtype
def _solve(
    features: Tensor,
    logits: Tensor,
    rhs_weight: Tensor,
    rhs_bias: Tensor | None,
    weights: Tensor | None,
    targets: Tensor | None,
    problem: _Problem,
) -> tuple[Tensor, Tensor | None, Answer]:
    given = {"features": features, "logits": logits, "rhs_weight": rhs_weight, "rhs_bias": rhs_bias, "weights": weights}
    given["targets"] = targets
    refuse_capture(features, problem.solver, problem.damping, grouped=problem.group is not None)
    on_device = conjugate_gradient.serves(features) and problem.solver != "cholesky"
    fault = None if on_device and problem.group is None else _not_finite(given)
    if fault is not None and problem.group is None:
        raise fault
    dtype = torch.promote_types(features.dtype, torch.float32)
    rhs = system.fold(rhs_weight, rhs_bias, padded=on_device).to(dtype)
    others = None if problem.group is None else _meet(problem, features, weights, rhs, fault)
    num_rows = features.shape[0] if others is None else others.count
    if num_rows == 0 and problem.damping > 0:
        answer = Answer(rhs / problem.damping, 0, 0.0, problem.solver)
    elif num_rows == 0:
        answer = Answer(torch.zeros_like(rhs), 0, float(rhs.any()), problem.solver)
    else:
        h, w = features.to(dtype), None if weights is None else weights.to(dtype)
        y = None if targets is None else targets.to(dtype)
        rows, signs = system.rows(h, w, rhs_bias is not None, on_device=on_device)
        hessian = system.DampedHessian(
            rows, logits.to(dtype), signs, problem.loss, problem.damping, problem.impl, others, y
        )
        identity = (features,) if weights is None else (features, weights)
        answer = Solve(hessian, rhs, identity, problem.tol, problem.max_iter, problem.state).run(problem.solver)
        if not isinstance(answer.residual, Tensor) and math.isnan(answer.residual):
            fault = _not_finite(given)
            if fault is not None:
                raise fault
            if problem.damping == 0:
                raise singular_error(answer.solver, answer.residual)
    x = answer.solution.to(features.dtype)
    if rhs_bias is None:
        return x, None, answer
    count = rhs_weight.shape[1]
    return x[:, :count].contiguous(), x[:, count].contiguous(), answer


def _meet(
    problem: _Problem, features: Tensor, weights: Tensor | None, rhs: Tensor, fault: ValueError | None
) -> system.Joined:
    assert problem.group is not None
    state = problem.state
    settings: dict[str, float] = {
        "loss": checks.loss_code(problem.loss),
        "damping": problem.damping,
        "solver": SOLVERS.index(problem.solver),
        "tol": problem.tol,
        "max_iter": problem.max_iter,
        "the number of classes": rhs.shape[0],
        "the number of features, with 1 for a bias,": rhs.shape[1],
        "the dtype": checks.FLOATING.index(features.dtype),
        "the warm start of state": state is not None and state.solution is not None,
        "the age of state": 0 if state is None or state.output is None else 1 + state.age,
        "refresh_every of state": 0 if state is None else state.refresh_every,
    }
    return system.meet(problem.group, features, weights, rhs, settings, fault)


class _Solution(torch.autograd.Function):
    """``x = (H + damping I)^-1 rhs``, with ``dx = (H + damping I)^-1 (d rhs - dH x)``."""

    @staticmethod
    def forward(
        features: Tensor,
        logits: Tensor,
        rhs_weight: Tensor,
        rhs_bias: Tensor | None,
        weights: Tensor | None,
        targets: Tensor | None,
        problem: _Problem,
        report: _Report,
    ) -> tuple[Tensor, Tensor | None]:
        weight, bias, report.answer = _solve(features, logits, rhs_weight, rhs_bias, weights, targets, problem)
        return weight, bias

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor | None]) -> None:
        features, logits, _, _, weights, targets, ctx.problem, _ = inputs
        ctx.save_for_backward(features, logits, weights, targets, *output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_weight: Tensor, grad_bias: Tensor | None) -> tuple[Tensor | None, ...]:
        features, logits, weights, targets, _, x_bias = ctx.saved_tensors
        problem = ctx.problem
        cotangent = None if x_bias is None else grad_bias
        u_weight, u_bias = solve_hessian(
            features,
            logits,
            grad_weight,
            cotangent,
            weights,
            loss=problem.loss,
            damping=problem.damping,
            solver=problem.solver,
            tol=problem.tol,
            max_iter=problem.max_iter,
            targets=targets,
            impl=problem.impl,
        )[:2]
        needed = [index for index in (0, 1, 4, 5) if ctx.needs_input_grad[index]]
        grads: dict[int, Tensor | None] = {2: u_weight, 3: u_bias}
        if needed:
            grads |= dict(zip(needed, _hessian_gradient(ctx, needed, (u_weight, u_bias)), strict=True))
        return tuple(grads.get(index) for index in range(8))


def _hessian_gradient(ctx: Any, needed: list[int], u: tuple[Tensor, Tensor | None]) -> tuple[Tensor, ...]:
    """Gradient of ``-<u, H x>`` in features, logits, weights and targets, with ``u`` and ``x`` constant."""
    features, logits, weights, targets, x_weight, x_bias = ctx.saved_tensors
    given = {0: features, 1: logits, 4: weights, 5: targets}
    dtype = torch.promote_types(features.dtype, torch.float32)
    x_weight = x_weight.to(dtype)
    x_bias = None if x_bias is None else x_bias.to(dtype)

    def pairing(*moving: Tensor) -> Tensor:
        inputs = given | dict(zip(needed, moving, strict=True))
        h, f = inputs[0].to(dtype), inputs[1].to(dtype)
        w, y = (None if inputs[index] is None else inputs[index].to(dtype) for index in (4, 5))
        image = hessian_vector_product_reference(h, f, x_weight, x_bias, w, ctx.problem.loss, 0.0, y)
        products = [(a * b).sum() for a, b in zip(u, image, strict=True) if a is not None and b is not None]
        return -torch.stack(products).sum()

    _, pull, *_ = torch.func.vjp(pairing, *(given[index] for index in needed))
    return pull(features.new_ones((), dtype=dtype))


def _tracked(*tensors: Tensor | None) -> bool:
    """Whether a derivative of the solution may be asked for."""
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _check(
    features: object, logits: object, rhs_weight: object, rhs_bias: object, weights: object, loss: object
) -> None:
    checks.loss_code(loss)
    checks.matrix(logits, "logits", "[N, C]")
    h, num_classes = _last_layer.check_outputs(features, logits)
    _last_layer.check_direction(h, num_classes, rhs_weight, rhs_bias, name="rhs")
    _last_layer.check_weights(h, weights)


def _not_finite(tensors: dict[str, Tensor | None]) -> ValueError | None:
    """What is wrong with the first one that is not finite."""
    for name, tensor in tensors.items():
        # The sum of finite numbers may overflow, but one that is not finite never sums to a finite number.
        if tensor is None or math.isfinite(tensor.sum().item()):
            continue
        bad = tensor.isfinite().logical_not()
        if bool(bad.any()):
            at = bad.nonzero()[0].tolist()
            return system.NotFiniteError(f"{name} must be finite, got {tensor[tuple(at)].item()} at {at}")
    return None
