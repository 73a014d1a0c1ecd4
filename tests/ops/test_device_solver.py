"""The solvers of a GPU, run on the CPU: the same answers, no wait for the device, nothing after they have stopped."""

import math
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import Draw
from device_tensors import DeviceTensor, no_wait, pretends_a_gpu
from device_tensors import on_device as on_gpu
from hessian_problems import ITERATIVE, dense_hessian, flat, make, power_law, solve, true_residual
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastmeta import _extension
from fastmeta.losses import LOSSES
from fastmeta.ops import NotConvergedWarning, SolverState, solve_hessian
from fastmeta.ops.solve import conjugate_gradient as device
from fastmeta.ops.solve import conjugate_gradient as scalars
from fastmeta.ops.solve.conjugate_gradient import LOOK_EVERY, TorchUpdates, Updates, conjugate_gradient, updates_for

pytestmark = pretends_a_gpu
needs_interpreter = pytest.mark.skipif(
    not _extension.INTERPRETED or _extension.TRITON_REASON is not None,
    reason=f"needs Triton's interpreter ({_extension.TRITON_REASON})",
)
UPDATES = ["torch", pytest.param("triton", marks=needs_interpreter)]
SIZES = {"n > D": (23, 5, 4), "n < D": (6, 9, 3)}


def updates(name: str) -> Updates:
    found = TorchUpdates() if name == "torch" else updates_for(torch.zeros(1), "triton")
    assert found is not None
    return found


@pytest.fixture(params=UPDATES)
def on_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The CPU is taken for a GPU."""
    monkeypatch.setattr(device, "serves", lambda tensor: True)
    monkeypatch.setattr(device, "updates_for", lambda vector, impl: updates(request.param))
    return request.param


@pytest.fixture
def torch_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU is taken for a GPU without Triton; its interpreter takes some milliseconds a launch."""
    monkeypatch.setattr(device, "serves", lambda tensor: True)
    monkeypatch.setattr(device, "updates_for", lambda vector, impl: TorchUpdates())


@pytest.fixture
def captured(torch_only: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a CUDA graph is being captured."""
    monkeypatch.setattr(device, "capturing", lambda tensor: True)


class Count(TorchDispatchMode):
    """Counts the calls of an operation."""

    def __init__(self, operation: Any) -> None:
        super().__init__()
        self.operation, self.calls = operation, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += func is self.operation
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("loss", LOSSES)
def test_the_answer_is_the_dense_one(draw: Draw, torch_only: None, loss: str, size: str, bias: bool) -> None:
    problem = make(draw, *SIZES[size])
    hessian = dense_hessian(problem, loss, bias, True)
    rhs = flat((problem[2], problem[3] if bias else None))
    expected = torch.linalg.solve(hessian + 0.3 * torch.eye(len(rhs), dtype=rhs.dtype), rhs)
    for solver in (*ITERATIVE, "auto"):
        solution = solve(problem, bias, True, loss=loss, damping=0.3, solver=solver, tol=1e-11, max_iter=500)
        torch.testing.assert_close(flat(solution), expected, rtol=1e-7, atol=1e-8)
        assert solution.residual <= 1e-11
        assert solution.residual == pytest.approx(
            true_residual(problem, solution, True, loss, 0.3), rel=1e-2, abs=1e-14
        )


@pytest.mark.parametrize("solver", ITERATIVE)
def test_as_many_iterations_as_on_the_host(on_device: str, monkeypatch: pytest.MonkeyPatch, solver: str) -> None:
    problem = power_law(60, 12, 3, dtype=torch.float64)
    options = {"damping": 0.3, "solver": solver, "tol": 1e-3, "max_iter": 300}
    got = solve(problem, True, True, **options)
    monkeypatch.setattr(device, "serves", lambda tensor: False)
    assert got.iterations == solve(problem, True, True, **options).iterations


@pytest.mark.parametrize("solver", ITERATIVE)
def test_the_host_looks_every_few_iterations(torch_only: None, solver: str) -> None:
    """Items read inside the iterations; what is read around them is a constant."""
    problem = power_law(100, 20, 5, dtype=torch.float64)

    def looks(max_iter: int) -> int:
        with Count(torch.ops.aten._local_scalar_dense.default) as count, warnings.catch_warnings():
            warnings.simplefilter("ignore", NotConvergedWarning)
            solve(problem, True, True, damping=1e-3, solver=solver, tol=1e-14, max_iter=max_iter)
        return count.calls

    assert looks(4 * LOOK_EVERY) == looks(LOOK_EVERY) + 3


@pytest.mark.parametrize("solver", [*ITERATIVE, "auto"])
def test_nothing_is_read_inside_a_cuda_graph(monkeypatch: pytest.MonkeyPatch, solver: str) -> None:
    problem, state = on_gpu(power_law(60, 12, 3)), SolverState()
    options = {"damping": 0.3, "solver": solver, "tol": 1e-3, "max_iter": 60, "state": state}
    monkeypatch.setattr(device, "capturing", lambda tensor: False)
    solve(problem, True, True, **options)
    eager = solve(problem, True, True, **options)
    monkeypatch.setattr(device, "capturing", lambda tensor: True)
    with no_wait():
        solution = solve(problem, True, True, **options)
        with pytest.raises(AssertionError, match="waits for the device"):
            _ = solution.residual
    assert isinstance(solution.weight, DeviceTensor)
    # Each starts from the solution of the one before, scaled by a quotient that is 1 but for rounding.
    torch.testing.assert_close(flat(solution), flat(eager))


@pytest.mark.parametrize("solver", ITERATIVE)
def test_iterations_after_convergence_change_nothing(
    on_device: str, monkeypatch: pytest.MonkeyPatch, solver: str
) -> None:
    problem = power_law(60, 12, 3)
    state, options = SolverState(), {"damping": 0.3, "solver": solver, "tol": 1e-3}
    solve(problem, True, True, max_iter=300, state=state, **options)
    state.solution = None
    monkeypatch.setattr(device, "capturing", lambda tensor: True)
    short = solve(problem, True, True, max_iter=24, state=state, **options)
    long = solve(problem, True, True, max_iter=30, state=state, **options)
    assert torch.equal(flat(short), flat(long))
    assert 0 < short.iterations == long.iterations < 24
    assert short.residual == long.residual <= 1e-3


def test_a_result_twice_has_the_same_bits(on_device: str) -> None:
    problem = power_law(40, 300, 8)
    once, again = (solve(problem, True, True, damping=1.0, solver="cg", tol=1e-1) for _ in range(2))
    assert torch.equal(flat(once), flat(again))


@needs_interpreter
def test_triton_all_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hessian-vector product too, as on a GPU."""
    monkeypatch.setattr(device, "serves", lambda tensor: True)
    problem = power_law(40, 12, 5)
    options = {"damping": 0.3, "solver": "cg", "tol": 1e-4}
    got, expected = (solve(problem, True, True, impl=impl, **options) for impl in ("triton", "reference"))
    torch.testing.assert_close(flat(got), flat(expected), rtol=1e-3, atol=1e-4)
    assert got.residual <= 1e-4


def test_iterations_and_residual_are_numbers_that_wait_until_read(captured: None) -> None:
    solution = solve(power_law(60, 12, 3), True, True, damping=0.3, solver="cg", tol=1e-3)
    _, _, iterations, residual = solution
    assert isinstance(iterations, Tensor)
    assert isinstance(residual, Tensor)
    assert isinstance(solution.iterations, int)
    assert isinstance(solution.residual, float)
    assert (solution.iterations, solution.residual) == (int(iterations), float(residual))


def test_no_warning_inside_a_cuda_graph(torch_only: None, monkeypatch: pytest.MonkeyPatch) -> None:
    problem, options = power_law(60, 12, 3), {"damping": 1e-3, "solver": "cg", "tol": 1e-6, "max_iter": 3}
    with pytest.warns(NotConvergedWarning, match=r"residual \d.*3 iterations.*tol=1e-06"):
        eager = solve(problem, True, True, **options)
    monkeypatch.setattr(device, "capturing", lambda tensor: True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solution = solve(problem, True, True, **options)
    assert solution.iterations == eager.iterations == 3
    assert solution.residual == eager.residual > 1e-6


def test_an_indefinite_system_is_told_of_when_it_is_read(
    draw: Draw, torch_only: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    h, f, rhs, bias, w = make(draw, 30, 5, 4)
    arguments = (h, f, rhs, bias, -1 - w)
    with pytest.raises(torch.linalg.LinAlgError, match=r"not positive definite.*weights are negative"):
        solve_hessian(*arguments, damping=1e-3, solver="cg")
    monkeypatch.setattr(device, "capturing", lambda tensor: True)
    solution = solve_hessian(*arguments, damping=1e-3, solver="cg")
    assert bool(solution.weight.isfinite().all())
    for read in (lambda: solution.iterations, lambda: solution.residual):
        with pytest.raises(torch.linalg.LinAlgError, match=r"not positive definite.*weights are negative"):
            read()


@pytest.mark.parametrize("name", ["features", "logits", "rhs_weight", "rhs_bias", "weights"])
def test_nan_is_named_or_comes_out(draw: Draw, torch_only: None, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    names = ("features", "logits", "rhs_weight", "rhs_bias", "weights")
    arguments = dict(zip(names, make(draw, 5, 4, 3), strict=True))
    arguments[name].view(-1)[2] = math.nan
    with pytest.raises(ValueError, match=f"{name} must be finite, got nan"):
        solve_hessian(**arguments, damping=0.1, solver="cg")
    monkeypatch.setattr(device, "capturing", lambda tensor: True)
    solution = solve_hessian(**arguments, damping=0.1, solver="cg")
    assert bool(solution.weight.isnan().any())
    assert math.isnan(solution.residual)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "cholesky"}, "cholesky.*cannot be captured"),
        ({"solver": "cg", "damping": 0.0}, "damping=0 cannot be captured"),
        ({"solver": "pcg"}, "pcg.*cannot compute its eigenbases"),
        ({"solver": "pcg", "state": SolverState()}, "pcg.*cannot compute its eigenbases"),
    ],
)
def test_what_a_cuda_graph_cannot_hold_is_refused(captured: None, options: dict, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        solve(power_law(30, 5, 3), True, True, **({"damping": 0.1} | options))


@pytest.mark.parametrize("has_factors", [False, True])
def test_a_replay_starts_from_the_last_solution(
    torch_only: None, monkeypatch: pytest.MonkeyPatch, has_factors: bool
) -> None:
    problem, state = power_law(60, 12, 3, dtype=torch.float64), SolverState()
    options = {"damping": 0.3, "solver": "auto", "tol": 1e-6, "max_iter": 60, "state": state}
    first = solve(problem, True, True, **options)
    assert state.solver == "cg"
    if has_factors:
        solve(problem, True, True, **options | {"solver": "pcg"})
    kept = state.solution
    monkeypatch.setattr(device, "capturing", lambda tensor: True)
    assert solve(problem, True, True, **options).iterations == 0
    moved = (*problem[:2], 2 * problem[2], problem[3] + 1, problem[4])
    second = solve(moved, True, True, **options)
    assert second.iterations > 0
    assert first.residual <= 1e-6 >= second.residual
    assert state.solution is kept, "written in place"
    count = moved[0].shape[1]
    assert kept is not None
    torch.testing.assert_close(kept[:, :count], second.weight)
    torch.testing.assert_close(kept[:, count], second.bias)
    state.reset()
    assert any(tensor is kept for tensors in state.in_graphs for tensor in tensors), "a graph still writes here"


def test_auto_without_a_state_needs_no_factorization(captured: None) -> None:
    with Count(torch.ops.aten._linalg_eigh.default) as count:
        solution = solve(power_law(60, 12, 3), True, True, damping=0.3, tol=1e-4, max_iter=60)
    assert count.calls == 0
    assert solution.residual <= 1e-4


def test_empty_systems(torch_only: None, draw: Draw) -> None:
    h, f, rhs, bias, _ = make(draw, 5, 4, 3)
    nothing = solve_hessian(h, f, 0 * rhs, 0 * bias, damping=0.1, solver="cg")
    assert (nothing.iterations, nothing.residual, float(flat(nothing).abs().sum())) == (0, 0.0, 0.0)
    empty = solve_hessian(h[:0], f[:0], rhs, bias, damping=0.1, solver="cg")
    assert (empty.iterations, empty.residual) == (0, 0.0)
    torch.testing.assert_close(empty.weight, rhs / 0.1)
    assert solve_hessian(h[:0], f[:0], rhs, bias, damping=0.0, solver="cg", max_iter=0).residual == 1.0


@pytest.fixture(params=UPDATES)
def implementation(request: pytest.FixtureRequest) -> Iterator[Updates]:
    return updates(request.param)


STOPS: dict[str, tuple[Callable[[Tensor], Tensor], int, int]] = {
    "negative curvature": (lambda p: p * torch.tensor([1.0, 2.0, -8.0]), scalars.NEGATIVE, 1),
    "no curvature": (lambda p: 0 * p, scalars.FLAT, 1),
    "not a number": (lambda p: math.nan * p, scalars.NOT_FINITE, 1),
    "solved": (lambda p: 2 * p, scalars.CONVERGED, 1),
    "still running": (lambda p: p * torch.tensor([1.0, 2.0, 8.0]), scalars.RUNNING, 2),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("matmul", "status", "count"), STOPS.values(), ids=STOPS)
def test_why_it_stops(
    implementation: Updates, matmul: Callable[[Tensor], Tensor], status: int, count: int, dtype: torch.dtype
) -> None:
    rhs = torch.tensor([[1.0, 1.0, 1.0]], dtype=dtype)
    target = torch.tensor(1e-6, dtype=torch.float64)
    for max_iter in (2, 5) if status != scalars.RUNNING else (2,):
        outcome = conjugate_gradient(
            lambda p: matmul(p).to(dtype), rhs, target=target, max_iter=max_iter, updates=implementation
        )
        assert (outcome.row[scalars.STATUS], outcome.row[scalars.COUNT]) == (status, count)
        if status in (scalars.NEGATIVE, scalars.FLAT):
            assert torch.equal(outcome.solution, 0 * rhs)
        assert bool(outcome.solution.isnan().all()) is (status == scalars.NOT_FINITE)


def test_a_right_hand_side_that_is_not_finite(implementation: Updates) -> None:
    target = torch.tensor(1e-6, dtype=torch.float64)
    for value in (math.nan, math.inf):
        outcome = conjugate_gradient(
            lambda p: 2 * p, torch.tensor([[1.0, value]]), target=target, max_iter=3, updates=implementation
        )
        assert (outcome.row[scalars.STATUS], outcome.row[scalars.COUNT]) == (scalars.NOT_FINITE, 0)
        assert bool(outcome.solution.isnan().all())


@needs_interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 1023, 1025, 2 * 2 * 1024 + 3])
def test_triton_updates_any_number_of_entries(
    draw: Draw, monkeypatch: pytest.MonkeyPatch, size: int, dtype: torch.dtype
) -> None:
    """One iteration; the last size gives each of two programs three blocks."""
    kernels = pytest.importorskip("fastmeta.triton_kernels.conjugate_gradient")
    monkeypatch.setattr(kernels, "_MOST_PROGRAMS", 2)
    monkeypatch.setattr(kernels, "_PLANS", type(kernels._PLANS)())
    start = [draw.normal(1, size).to(dtype) for _ in range(3)]
    curvature = 0.5 + draw.uniform(1, size).to(dtype)
    z = draw.normal(1, size).to(dtype)
    results = []
    for name in ("torch", "triton"):
        given = updates(name)
        x, r, p = (vector.clone() for vector in start)
        now, following = torch.zeros(2, scalars.ROW, dtype=torch.float64)
        now[scalars.SLOPE], now[scalars.COUNT] = 0.7 * size, 3
        sums = [torch.full((given.num_partials(x),), math.nan, dtype=torch.float64) for _ in range(3)]
        q = curvature * p
        given.dot(p, q, sums[0], now)
        given.advance(x, r, p, q, sums[0], sums[1], now)
        given.dot(z, z, sums[2], now)
        given.turn(p, z, sums[0], sums[1], sums[2], now, following)
        results.append((x, r, p, following, torch.stack([part.sum() for part in sums])))
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=1e-5)
    assert results[0][3][scalars.COUNT] == 4


COMPILE = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fastmeta.triton_kernels import conjugate_gradient as kernels
from fastmeta.triton_kernels._program import recording

for size in (1290, 2064000):
    x, partials, row = torch.zeros(1, size), torch.zeros(512).double(), torch.zeros(8).double()
    with recording() as launches:
        kernels.dot(x, x, partials, row)
        kernels.advance(x, x, x, x, partials, partials, row)
        kernels.turn(x, x, partials, partials, partials, row, row)
    for launch in launches:
        names, given = launch.kernel.arg_names, launch.arguments
        kinds = ["i32" if isinstance(a, int) else "*fp64" if a.dtype == torch.float64 else "*fp32" for a in given]
        signature = dict(zip(names, kinds + ["constexpr"] * len(launch.constants)))
        constants = {(names.index(name),): value for name, value in launch.constants.items()}
        multiples = [i for i, a in enumerate(given) if not isinstance(a, int) or a % 16 == 0]
        source = ASTSource(launch.kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in multiples})
        ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=launch.options).asm["ptx"]
        assert "atom.global" not in ptx and "red.global" not in ptx
        assert ("ld.global.v4.b32" in ptx) == (size % 16 == 0), "16 bytes at a time"
        print("compiled", launch.kernel.__name__, size)
"""


@needs_interpreter
def test_no_atomics_and_whole_words() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("compiled") == 6
