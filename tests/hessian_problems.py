"""Systems for the tests of solve_hessian, and what they are compared with."""

import torch
from brute_force import per_example
from cases import Draw
from torch import Tensor

from fastmeta import losses
from fastmeta.ops import HessianSolution, hessian_vector_product, solve_hessian

ITERATIVE = ("cg", "pcg")
SOLVERS = ("cholesky", "cg", "pcg", "auto")
Problem = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def targets_of(logits: Tensor) -> Tensor:
    """Some of every row that sum to one, made of its logits: near to them and far. ``[N, C]``."""
    return (3 * logits).sin().softmax(-1)


def make(draw: Draw, n: int, d: int, c: int) -> Problem:
    """Features, logits, right-hand side, example weights with a zero among them."""
    weights = 2 * draw.uniform(n)
    weights[n // 2 :][:1] *= n < 3
    return draw.normal(n, d), draw.normal(n, c, scale=2.0), draw.normal(c, d), draw.normal(c), weights


def power_law(n: int, d: int, c: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Problem:
    """Features with standard deviations k^-0.75 in rotated axes, the setting of the iteration counts."""
    draw = Draw(torch.Generator().manual_seed(seed))
    rotation = torch.linalg.qr(draw.normal(d, d)).Q
    deviations = torch.arange(1, d + 1, dtype=torch.float64, device=rotation.device) ** -0.75
    h = draw.normal(n, d) * deviations @ rotation.T
    f = h @ draw.normal(d, c)
    f = f / f.std()
    r = f.softmax(-1) - torch.nn.functional.one_hot(draw.classes(n, c), c)
    return tuple(t.to(dtype) for t in (h, f, r.T @ h / n, r.mean(0), torch.ones(n, device=h.device)))  # type: ignore[return-value]


def dense_hessian(problem: Problem, loss: str, bias: bool, weighted: bool) -> Tensor:
    """Hessian of ``sum_i w_i l_i`` in the flat ``[C, D]`` weight then bias, by autograd of the definition."""
    h, f, _, _, w = problem
    w = w if weighted else torch.ones_like(w)
    d, c = h.shape[1], f.shape[1]

    def logits(theta: Tensor) -> Tensor:
        moved = f + h @ theta[: c * d].view(c, d).T
        return moved + theta[c * d :] if bias else moved

    theta = torch.zeros(c * d + (c if bias else 0), dtype=h.dtype, device=h.device)
    if not losses.of(loss).exact:  # Gauss-Newton: the Jacobian of the prediction, 2 J^T J
        predicted = {"mse_probs": lambda f: f.softmax(-1), "mse_tanh": torch.tanh}[loss]
        jacobian = torch.func.jacrev(lambda t: predicted(logits(t)))(theta)
        return 2 * torch.einsum("n,nca,ncb->ab", w, jacobian, jacobian)
    return torch.func.hessian(lambda t: (w * per_example(logits(t), targets_of(f), loss)).sum())(theta)


def solve(problem: Problem, bias: bool, weighted: bool, **options: object) -> HessianSolution:
    h, f, rhs_weight, rhs_bias, w = problem
    options.setdefault("targets", targets_of(f))
    return solve_hessian(h, f, rhs_weight, rhs_bias if bias else None, w if weighted else None, **options)


def flat(solution: tuple) -> Tensor:
    return torch.cat([part.reshape(-1) for part in solution[:2] if part is not None])


def true_residual(problem: Problem, solution: HessianSolution, weighted: bool, loss: str, damping: float) -> float:
    """In float64, from the public Hessian-vector product."""
    h, f, rhs_weight, rhs_bias, w = (tensor.double() for tensor in problem)
    bias = None if solution.bias is None else solution.bias.double()
    image = hessian_vector_product(
        h,
        f,
        solution.weight.double(),
        bias,
        w if weighted else None,
        loss=loss,
        damping=damping,
        targets=targets_of(f),
        impl="reference",
    )
    rhs = flat((rhs_weight, None if bias is None else rhs_bias))
    return float((rhs - flat(image)).norm() / rhs.norm())
