"""Conjugate gradients in the logit tangents of the rows, where these are few: the same system, the same tolerance."""

import pytest
import torch
from cases import DEVICE, Draw
from device_tensors import pretends_a_gpu
from hessian_problems import dense_hessian, flat, make, power_law, solve, targets_of, true_residual

from fastmeta import losses
from fastmeta.losses import LOSSES
from fastmeta.ops import SolverState
from fastmeta.ops.solve import conjugate_gradient as device
from fastmeta.ops.solve import few_rows
from fastmeta.ops.solve import solve as driver

SIZES = {"n < D": (6, 9, 3), "n > D": (23, 5, 4), "n = 1": (1, 4, 3), "C = 1": (7, 12, 1)}


@pytest.fixture(params=["host", "device", "captured"])
def mode(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every size is taken for one of few rows; the CPU for a GPU, and a CUDA graph for being captured."""
    monkeypatch.setattr(few_rows, "pays", lambda n, c, k: True)
    if request.param != "host" and DEVICE != "cpu":
        pytest.skip("takes the CPU for a GPU")
    if request.param != "host":
        monkeypatch.setattr(device, "serves", lambda tensor: True)
        monkeypatch.setattr(device, "updates_for", lambda vector, impl: device.TorchUpdates())
    if request.param == "captured":
        monkeypatch.setattr(device, "capturing", lambda tensor: True)
    return request.param


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("loss", LOSSES)
def test_the_answer_is_the_dense_one(draw: Draw, mode: str, loss: str, size: str, bias: bool, weighted: bool) -> None:
    problem = make(draw, *SIZES[size])
    hessian = dense_hessian(problem, loss, bias, weighted)
    rhs = flat((problem[2], problem[3] if bias else None))
    expected = torch.linalg.solve(hessian + 0.3 * torch.eye(len(rhs), dtype=rhs.dtype, device=rhs.device), rhs)
    solution = solve(problem, bias, weighted, loss=loss, damping=0.3, solver="cg", tol=1e-11, max_iter=300)
    torch.testing.assert_close(flat(solution), expected, rtol=1e-7, atol=1e-8)
    assert solution.residual <= 1e-11
    true = true_residual(problem, solution, weighted, loss, 0.3)
    assert solution.residual == pytest.approx(true, rel=1e-2, abs=1e-13)


def test_negative_weights(draw: Draw, mode: str) -> None:
    """The form asks nothing of their signs, as long as the damped Hessian is positive definite."""
    h, f, rhs, bias, w = make(draw, 6, 9, 3)
    problem = h, f, rhs, bias, w - 0.5
    damping = 1.0 - float(torch.linalg.eigvalsh(dense_hessian(problem, "cross_entropy", True, True))[0])
    solution = solve(problem, True, True, damping=damping, solver="cg", tol=1e-10, max_iter=100)
    assert true_residual(problem, solution, True, "cross_entropy", damping) <= 1e-10
    indefinite = h, f, rhs, bias, -50 - w
    with pytest.raises(torch.linalg.LinAlgError, match=r"not positive definite.*weights are negative"):
        _ = solve(indefinite, True, True, damping=0.1, solver="cg").residual


@pytest.mark.parametrize("loss", LOSSES)
def test_curvature_of_a_known_prediction(draw: Draw, loss: str) -> None:
    """It is the row function of the loss, in float64 to rounding."""
    g, f, z, w = draw.normal(5, 7), draw.normal(5, 4, scale=2.0), draw.normal(5, 4), draw.normal(5)
    y = targets_of(f)
    space = few_rows.RowSpace(g, f, w, loss, 0.1, y)
    torch.testing.assert_close(space.curved(z), w.unsqueeze(1) * losses.curvature(f, z, loss, y))
    torch.testing.assert_close(few_rows.RowSpace(g, f, None, loss, 0.1, y).curved(z), losses.curvature(f, z, loss, y))


@pytest.mark.parametrize("tol", [1e-2, 1e-4, 1e-8])
def test_as_many_iterations_as_with_all_unknowns(monkeypatch: pytest.MonkeyPatch, tol: float) -> None:
    """It stops on the residual of X, so ``tol`` means the same."""
    problem = power_law(40, 200, 12, dtype=torch.float64)
    counts = []
    for few in (False, True):
        monkeypatch.setattr(few_rows, "pays", lambda n, c, k, few=few: few)
        solution = solve(problem, True, False, damping=0.1, solver="cg", tol=tol, max_iter=300)
        assert true_residual(problem, solution, False, "cross_entropy", 0.1) <= tol
        counts.append(solution.iterations)
    assert abs(counts[0] - counts[1]) <= 2 + counts[0] // 10


def test_float32_restarts_until_the_true_residual_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """``X = B / damping + Y^T G`` cancels where the Hessian is far above the damping; another pass mends it."""
    monkeypatch.setattr(few_rows, "pays", lambda n, c, k: True)
    problem = power_law(60, 100, 8)
    solution = solve(problem, True, False, damping=1e-3, solver="cg", tol=1e-4, max_iter=2000)
    assert solution.residual <= 1e-4
    assert true_residual(problem, solution, False, "cross_entropy", 1e-3) <= 1.1e-4


def test_rows_of_weight_zero_and_rows_twice(draw: Draw, mode: str) -> None:
    h, f, rhs, bias, w = make(draw, 8, 12, 3)
    h[3], h[5], w[6] = h[2], 0.0, 0.0
    problem = h, f, rhs, bias, w
    solution = solve(problem, True, True, damping=0.2, solver="cg", tol=1e-10, max_iter=100)
    assert true_residual(problem, solution, True, "cross_entropy", 0.2) <= 1e-10


def test_a_warm_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(few_rows, "pays", lambda n, c, k: True)
    problem, state = power_law(40, 60, 5, dtype=torch.float64), SolverState()
    options = {"damping": 0.1, "solver": "cg", "tol": 1e-6, "max_iter": 200, "state": state}
    cold = solve(problem, True, False, **options)
    assert solve(problem, True, False, **options).iterations == 0
    moved = (problem[0], problem[1], problem[2] + 1e-3, problem[3], problem[4])
    assert 0 < solve(moved, True, False, **options).iterations < cold.iterations


@pretends_a_gpu
def test_a_captured_solve_holds_twice_the_iterations_of_the_last_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    problem, state = power_law(60, 12, 3, dtype=torch.float64), SolverState()
    options = {"damping": 0.3, "solver": "cg", "tol": 1e-6, "max_iter": 90, "state": state}
    monkeypatch.setattr(device, "serves", lambda tensor: True)
    monkeypatch.setattr(device, "updates_for", lambda vector, impl: device.TorchUpdates())
    products = []
    product = driver.DampedHessian.__call__
    monkeypatch.setattr(driver.DampedHessian, "__call__", lambda self, v: (products.append(0), product(self, v))[1])
    took = solve(problem, True, True, **options).iterations
    assert took < 40
    for known, most in ((took, 2 * took + 2), (0, 90)):
        state.solution, state.iterations = None, known
        products.clear()
        with monkeypatch.context() as patch:
            patch.setattr(device, "capturing", lambda tensor: True)
            captured = solve(problem, True, True, **options)
        assert len(products) == most + 1, "and one for the true residual"
        assert captured.iterations == took
        assert captured.residual <= 1e-6
