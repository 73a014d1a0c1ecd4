"""solve_hessian against the dense autograd Hessian of the definition, and what its solvers promise of each other."""

import math
import warnings
from collections.abc import Iterator

import hessian_problems
import pytest
import torch
from cases import Draw
from hessian_problems import ITERATIVE, SOLVERS, dense_hessian, flat, make, power_law, solve, targets_of, true_residual
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastmeta
from fastmeta import losses
from fastmeta.losses import LOSSES
from fastmeta.ops import NotConvergedWarning, SolverState, hessian_vector_product, solve_hessian
from fastmeta.ops.solve import kronecker, system
from fastmeta.ops.solve.kronecker import trial_iterations
from fastmeta.ops.solve_hessian import solve_hessian_reference

SIZES = {"n > D": (23, 5, 4), "n < D": (6, 9, 3), "n = D + 1": (6, 5, 3), "C = 1": (7, 4, 1), "n = 1": (1, 4, 3)}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """The systems are small: a second thread only waits for the first."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("loss", LOSSES)
def test_every_solver_inverts_the_autograd_hessian(
    draw: Draw, loss: str, size: str, bias: bool, weighted: bool
) -> None:
    problem = make(draw, *SIZES[size])
    damping = 0.3
    hessian = dense_hessian(problem, loss, bias, weighted)
    rhs = flat((problem[2], problem[3] if bias else None))
    expected = torch.linalg.solve(hessian + damping * torch.eye(len(rhs), dtype=rhs.dtype, device=rhs.device), rhs)
    for solver in SOLVERS:
        solution = solve(problem, bias, weighted, loss=loss, damping=damping, solver=solver, tol=1e-11, max_iter=500)
        torch.testing.assert_close(flat(solution), expected, rtol=1e-7, atol=1e-8)
        assert solution.residual <= 1e-11
        assert (solution.bias is None) is not bias
    arguments = (*problem[:3], problem[3] if bias else None, problem[4] if weighted else None)
    torch.testing.assert_close(
        flat(solve_hessian_reference(*arguments, loss, damping, targets_of(problem[1]))), expected
    )


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(0, 12),
    d=st.integers(0, 9),
    c=st.integers(1, 5),
    loss=st.sampled_from(list(LOSSES)),
    solver=st.sampled_from(SOLVERS),
    bias=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_any_shape(n: int, d: int, c: int, loss: str, solver: str, bias: bool, seed: int) -> None:
    problem = make(Draw(torch.Generator().manual_seed(seed)), n, d, c)
    solution = solve(problem, bias, True, loss=loss, damping=0.5, solver=solver, tol=1e-10, max_iter=500)
    assert solution.weight.shape == (c, d)
    if flat(solution).numel():
        true = true_residual(problem, solution, True, loss, 0.5)
        assert true <= 1e-9
        assert solution.residual == pytest.approx(true, rel=1e-3, abs=1e-14)


@pytest.mark.parametrize("loss", LOSSES)
def test_output_curvature_is_the_curvature_row_function(draw: Draw, loss: str) -> None:
    f, w = draw.normal(6, 4), draw.uniform(6)
    columns = [
        losses.curvature(f, torch.eye(4, dtype=f.dtype, device=f.device)[k].expand(6, 4), loss, targets_of(f))
        for k in range(4)
    ]
    expected = torch.einsum("n,nck->ck", w, torch.stack(columns, dim=2)) / w.sum()
    of_outputs = losses.of(loss).output_curvature(f, targets_of(f))
    torch.testing.assert_close(kronecker.mean_curvature(of_outputs, w), expected)
    torch.testing.assert_close(kronecker.mean_diagonal(of_outputs, w), expected.diagonal())


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_the_preconditioner_is_the_inverse_of_its_factors(draw: Draw, loss: str, softmax: bool) -> None:
    f, w, e, r = draw.normal(9, 4), draw.uniform(9), draw.normal(9, 5), draw.normal(4, 5)
    of_outputs = losses.of(loss).output_curvature(f, targets_of(f))
    output = kronecker.output_factor(of_outputs, w, softmax=softmax)
    b = torch.diag(output.b)
    if output.softmax:
        b = b - output.b.outer(output.b) / output.b.sum()
        exact = kronecker.mean_curvature(of_outputs, w)
        torch.testing.assert_close(b.diagonal(), exact.diagonal(), rtol=0.05, atol=0)
        torch.testing.assert_close(b.sum(0), exact.sum(0), rtol=0, atol=1e-12)
    elif output.vectors is not None:
        b = output.vectors @ b @ output.vectors.T
        torch.testing.assert_close(b, kronecker.mean_curvature(of_outputs, w))
    dense = torch.kron(b, torch.diag(e.square().sum(0))) + 0.3 * torch.eye(20, dtype=e.dtype, device=e.device)
    expected = torch.linalg.solve(dense, r.reshape(-1)).view(4, 5)
    torch.testing.assert_close(kronecker.KroneckerPreconditioner(e, output, 0.3)(r), expected)


def test_span_coordinates_are_the_same_problem(draw: Draw) -> None:
    g = draw.normal(6, 15)
    g[3] = g[2]  # a rank below N
    inside = kronecker.eigenbasis(system.span(g))
    assert inside.basis is not None
    torch.testing.assert_close(inside.basis @ inside.basis.T, torch.eye(6, dtype=g.dtype, device=g.device))
    torch.testing.assert_close(inside.features @ inside.basis, g)
    moment = inside.features.T @ inside.features
    torch.testing.assert_close(moment, torch.diag(moment.diagonal()), rtol=0, atol=1e-12)


@pytest.mark.parametrize("solver", ["cholesky", "pcg"])
def test_a_right_hand_side_outside_the_span_is_divided_by_the_damping(draw: Draw, solver: str) -> None:
    h, f, rhs, *_ = make(draw, 4, 9, 3)
    outside = rhs - rhs @ torch.linalg.pinv(h) @ h
    solution = solve_hessian(h, f, outside, damping=0.02, solver=solver, tol=1e-10)
    torch.testing.assert_close(solution.weight, outside / 0.02)


@pytest.mark.parametrize("solver", ITERATIVE)
# The curvature of huber is 0 in some rows: refused, or solved, below.
@pytest.mark.parametrize("loss", [loss for loss in LOSSES if loss != "huber"])
def test_no_damping_leaves_what_cannot_be_solved_in_the_residual(draw: Draw, loss: str, solver: str) -> None:
    h, f, rhs, *_ = make(draw, 4, 9, 3)
    of_loss = {"loss": loss, "targets": targets_of(f)}
    with pytest.warns(NotConvergedWarning):
        solution = solve_hessian(h, f, rhs, **of_loss, damping=0.0, solver=solver, tol=1e-9, max_iter=200)
    inside = rhs @ torch.linalg.pinv(h) @ h
    torch.testing.assert_close(solution.weight @ torch.linalg.pinv(h) @ h, solution.weight)
    assert solution.residual >= 0.99 * float((rhs - inside).norm() / rhs.norm())
    # What a solution meets is solved: least squares, whose residual H cannot see.
    missed = rhs - hessian_vector_product(h, f, solution.weight, **of_loss)[0]
    met = hessian_vector_product(h, f, rhs, **of_loss)[0]
    assert float(hessian_vector_product(h, f, missed, **of_loss)[0].norm()) <= 1e-6 * float(met.norm())
    assert solve_hessian(h, f, met, **of_loss, damping=0.0, solver=solver, tol=1e-7, max_iter=200).residual <= 1e-7
    with pytest.raises(torch.linalg.LinAlgError, match=r"not positive definite.*damping"):
        solve_hessian(h[:, :1].expand(4, 9), f, rhs, **of_loss, damping=0.0, solver="cholesky")


@pytest.mark.parametrize("solver", ITERATIVE)
@pytest.mark.parametrize("size", [(4, 9, 3), (12, 9, 3)])
def test_without_damping_a_row_of_weight_zero_is_none(draw: Draw, size: tuple[int, int, int], solver: str) -> None:
    h, f, rhs, bias, w = make(draw, *size)
    h[:, 1] = h[:, 0]  # and more rows than dimensions that they span
    w[2] = 0
    options = {"loss": "mse", "damping": 0.0, "solver": solver, "tol": 1e-10, "max_iter": 200}
    others = w > 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotConvergedWarning)
        solution = solve_hessian(h, f, rhs, bias, w, **options)
        expected = solve_hessian(h[others], f[others], rhs, bias, w[others], **options)
    torch.testing.assert_close(flat(solution), flat(expected), rtol=1e-6, atol=1e-6)


def test_the_kronecker_factors_are_exact_for_squared_error(draw: Draw) -> None:
    problem = make(draw, 40, 6, 5)
    assert solve(problem, True, True, loss="mse", damping=0.1, solver="pcg", tol=1e-10).iterations == 1


@pytest.mark.parametrize("size", [(256, 128, 10), (100, 128, 10), (96, 64, 48)])
def test_the_preconditioner_saves_iterations_on_power_law_features(size: tuple[int, int, int]) -> None:
    problem = power_law(*size)
    counts = {
        s: solve(problem, True, False, damping=1e-2, solver=s, tol=1e-2, max_iter=300).iterations for s in ITERATIVE
    }
    assert counts["pcg"] <= (10 if size[0] == 256 else 16)
    assert 3 * counts["pcg"] <= counts["cg"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("solver", SOLVERS)
def test_the_residual_is_the_true_one(solver: str, dtype: torch.dtype) -> None:
    problem = power_law(80, 30, 5, dtype=dtype)
    solution = solve(problem, True, True, damping=0.1, solver=solver, tol=1e-4, max_iter=300)
    assert solution.weight.dtype == dtype
    assert solution.residual <= 1e-4
    # What is returned in a narrow dtype carries its rounding on top.
    slack = 0.05 if dtype == torch.float32 else 400 * torch.finfo(dtype).eps
    assert true_residual(problem, solution, True, "cross_entropy", 0.1) == pytest.approx(
        solution.residual, abs=slack * 1e-3 if dtype == torch.float32 else slack
    )


def test_float32_gets_as_far_as_its_precision() -> None:
    problem = power_law(300, 60, 6, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotConvergedWarning)
        for solver in SOLVERS:
            solution = solve(problem, True, False, damping=1e-2, solver=solver, tol=1e-12, max_iter=2000)
            assert solution.residual < 2e-5, solver
            true = true_residual(problem, solution, False, "cross_entropy", 1e-2)
            assert true < 2e-5, solver


def test_auto_turns_to_pcg_where_cg_is_slow_and_remembers_it() -> None:
    for size in ((256, 128, 10), (60, 100, 8)):
        problem, state = power_law(*size), SolverState()
        options = {"damping": 1e-2, "tol": 1e-4, "max_iter": 400}
        alone = {solver: solve(problem, True, False, solver=solver, **options).iterations for solver in ITERATIVE}
        trial = trial_iterations(size[0], size[2], size[1] + 1, in_row_space=False, solves=state.refresh_every)
        assert alone["pcg"] < trial < alone["cg"]
        solution = solve(problem, True, False, state=state, **options)
        assert solution.residual <= 1e-4
        assert trial < solution.iterations <= trial + alone["pcg"] + 2
        assert state.solver == "pcg"
        state.solution = None
        assert solve(problem, True, False, state=state, **options).iterations <= alone["pcg"] + 1
        few = options | {"max_iter": 2 * alone["pcg"] + 4, "state": SolverState()}
        assert solve(problem, True, False, **few).residual <= 1e-4, "half of the iterations are left for pcg"


def test_auto_stays_with_cg_where_that_is_fast() -> None:
    """Confident predictions, as of a net that has learned something: their mean curvature tells little of each."""
    h, f, *rest = power_law(256, 128, 10)
    state = SolverState()
    for _ in range(2):
        solution = solve((h, 8 * f, *rest), True, False, damping=1.0, tol=1e-2, state=state)
        assert state.solver == "cg"
        assert state.output is None
        assert 0 < solution.iterations < trial_iterations(256, 10, 129, in_row_space=False, solves=10)
        state.solution = None


@pytest.mark.parametrize("solver", SOLVERS)
def test_nothing_to_solve(draw: Draw, solver: str) -> None:
    h, f, rhs, bias, _ = make(draw, 5, 4, 3)
    solution = solve_hessian(h, f, 0 * rhs, 0 * bias, damping=0.1, solver=solver)
    assert (solution.iterations, solution.residual, float(flat(solution).abs().sum())) == (0, 0.0, 0.0)
    empty = solve_hessian(h[:0], f[:0], rhs, bias, damping=0.1, solver=solver)
    assert (empty.iterations, empty.residual) == (0, 0.0)
    torch.testing.assert_close(empty.weight, rhs / 0.1)


@pytest.mark.parametrize("solver", ITERATIVE)
def test_not_converged_warns_with_residual_and_damping(solver: str) -> None:
    problem = power_law(100, 30, 5)
    with pytest.warns(NotConvergedWarning, match=r"residual \d.*2 iterations.*tol=1e-06.*damping=0.001") as caught:
        solution = solve(problem, True, False, damping=1e-3, solver=solver, tol=1e-6, max_iter=2)
    assert solution.iterations == 2
    assert f"{solution.residual:.2e}" in str(caught[0].message)
    assert caught[0].filename == hessian_problems.__file__, "the warning points at the caller"


@pytest.mark.parametrize("solver", SOLVERS)
def test_indefinite_systems_raise(draw: Draw, solver: str) -> None:
    h, f, rhs, bias, w = make(draw, 30, 5, 4)
    with pytest.raises(torch.linalg.LinAlgError, match=r"not positive definite.*weights are negative; raise damping"):
        solve_hessian(h, f, rhs, bias, -1 - w, damping=1e-3, solver=solver, max_iter=200)
    definite = solve_hessian(h, f, rhs, bias, w - 0.1, damping=50.0, solver=solver, tol=1e-9)
    assert true_residual((h, f, rhs, bias, w - 0.1), definite, True, "cross_entropy", 50.0) <= 1e-9


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["features", "logits", "rhs_weight", "rhs_bias", "weights"])
def test_input_that_is_not_finite_is_named(draw: Draw, name: str, value: float) -> None:
    names = ("features", "logits", "rhs_weight", "rhs_bias", "weights")
    arguments = dict(zip(names, make(draw, 5, 4, 3), strict=True))
    arguments[name].view(-1)[2] = value
    with pytest.raises(ValueError, match=f"{name} must be finite, got {value}"):
        solve_hessian(**arguments, damping=0.1)


def test_finite_numbers_whose_sum_overflows_are_finite(draw: Draw) -> None:
    h, f, rhs, bias, _ = (tensor.half() for tensor in make(draw, 8, 4, 3))
    rhs[:] = 6e4
    assert solve_hessian(h, f, rhs, bias, damping=10.0).residual <= 1e-4
    with pytest.raises(ValueError, match="features must be small enough"):
        solve_hessian(h.float() * 1e25, f.float(), rhs.float(), damping=1.0, solver="pcg")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"damping": -1.0}, ValueError, "damping must be >= 0"),
        ({"damping": math.nan}, ValueError, "damping must be finite"),
        ({"solver": "lu"}, ValueError, "solver must be one of auto, cholesky, cg, pcg, got 'lu'"),
        ({"loss": "hinge"}, ValueError, "loss must be one of"),
        ({"tol": 0.0}, ValueError, "tol must be > 0"),
        ({"max_iter": -1}, ValueError, "max_iter must be an integer >= 0"),
        ({"impl": "opencl"}, ValueError, "impl must be one of"),
        ({"features": torch.ones(5, 4, dtype=torch.int64)}, TypeError, "features must be float32"),
        ({"logits": torch.ones(6, 3, dtype=torch.float64)}, ValueError, "logits must be"),
        ({"logits": torch.ones(5, 3)}, TypeError, "logits must be float64 like features"),
        ({"rhs_weight": torch.ones(3, 5, dtype=torch.float64)}, ValueError, r"rhs_weight must be \[C, D\]"),
        ({"rhs_bias": torch.ones(4, dtype=torch.float64)}, ValueError, r"rhs_bias must be \[C\]"),
        ({"weights": torch.ones(4, dtype=torch.float64)}, ValueError, r"weights must be \[N\]"),
        ({"logits": fastmeta.Head(torch.ones(3, 4), None)}, TypeError, "logits must be a tensor, got Head"),
    ],
)
def test_bad_arguments(draw: Draw, change: dict, error: type[Exception], message: str) -> None:
    names = ("features", "logits", "rhs_weight", "rhs_bias", "weights")
    arguments = dict(zip(names, make(draw, 5, 4, 3), strict=True)) | {"damping": 0.1} | change
    with pytest.raises(error, match=message):
        solve_hessian(**arguments)


def test_a_dense_hessian_that_does_not_fit_is_refused() -> None:
    h, f, rhs = torch.ones(400, 300), torch.zeros(400, 200), torch.ones(200, 300)
    with pytest.raises(ValueError, match=r"60000 x 60000 float64 .27 GiB.*use solver='pcg'"):
        solve_hessian(h, f, rhs, damping=1.0, solver="cholesky")


@pytest.mark.parametrize("solver", ["cholesky", "pcg"])
@pytest.mark.parametrize("loss", LOSSES)
def test_the_derivative_is_that_of_the_exact_solution(draw: Draw, loss: str, solver: str) -> None:
    problem = make(draw, 4, 3, 3)
    inputs = [tensor.requires_grad_() for tensor in (*problem, targets_of(problem[1]))]

    def solution(*arguments: Tensor) -> Tensor:
        h, f, rhs, bias, w, y = arguments
        options = {"loss": loss, "damping": 0.5, "solver": solver, "tol": 1e-12}
        return flat(solve_hessian(h, f, rhs, bias, w.exp(), targets=y, **options))

    assert torch.autograd.gradcheck(solution, inputs, atol=1e-5)


def test_derivatives_that_are_not_there_raise(draw: Draw) -> None:
    h, f, rhs, *_ = make(draw, 5, 4, 3)

    def solution(x: Tensor) -> Tensor:
        return solve_hessian(x, f, rhs, damping=0.5, tol=1e-10).weight

    with pytest.raises(RuntimeError):
        torch.func.jvp(solution, (h,), (h,))
    with pytest.raises(RuntimeError):
        torch.func.vmap(solution)(h.expand(2, 5, 4))
    x = h.clone().requires_grad_()
    (reverse,) = torch.autograd.grad(solution(x).sum(), x)
    torch.testing.assert_close(torch.func.grad(lambda t: solution(t).sum())(h), reverse)
    (first,) = torch.autograd.grad(solution(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        first.sum().backward()


def test_autocast_does_not_narrow_the_solver(draw: Draw) -> None:
    problem = tuple(tensor.float() for tensor in make(draw, 30, 6, 4))
    expected = solve(problem, True, True, damping=0.1, solver="pcg", tol=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = solve(problem, True, True, damping=0.1, solver="pcg", tol=1e-4)
    assert torch.equal(flat(expected), flat(inside))


def test_reference_implementation_gives_the_same(draw: Draw) -> None:
    problem = make(draw, 30, 6, 4)
    with fastmeta.use_impl("reference"):
        expected = solve(problem, True, True, damping=0.1, solver="cg", tol=1e-10)
    torch.testing.assert_close(flat(solve(problem, True, True, damping=0.1, solver="cg", tol=1e-10)), flat(expected))


@pytest.mark.parametrize("solver", ITERATIVE)
@pytest.mark.parametrize("loss", LOSSES)
def test_singular_factors_without_damping_are_refused_or_solved(draw: Draw, loss: str, solver: str) -> None:
    """Outputs that no row ever has, or predictions as good as certain: not what rounding makes of them."""
    for scale, dead in ((1.0, True), (15.0, False)):
        h, f, rhs, bias, w = make(draw, 12, 5, 4)
        f = scale * f
        f[:, 0] -= 100.0 * dead
        order = torch.randperm(12, generator=draw.generator)
        options = {"loss": loss, "damping": 0.0, "solver": solver, "tol": 1e-8, "max_iter": 300}
        found, refused = [], []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotConvergedWarning)
            for rows in (slice(None), order):
                try:
                    found.append(
                        solve_hessian(h[rows], f[rows], rhs, bias, w[rows], targets=targets_of(f)[rows], **options)
                    )
                except torch.linalg.LinAlgError as error:
                    refused.append(str(error))
        assert all(f"without damping solver='{solver}' diverges" in message for message in refused)
        assert all(solution.residual <= 10 for solution in found)
        if len(found) == 2 and max(solution.residual for solution in found) <= 1e-8:
            torch.testing.assert_close(
                flat(found[0]), flat(found[1]), rtol=1e-2, atol=1e-2 * float(flat(found[0]).norm())
            )
