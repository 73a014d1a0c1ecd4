"""The solvers on a GPU, and in a CUDA graph, against the exact solution."""

import pytest
import torch
from hessian_problems import ITERATIVE, flat, power_law, solve

from fastmeta.ops import SolverState
from fastmeta.ops.solve import few_rows


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("solver", ITERATIVE)
@pytest.mark.parametrize("size", [(256, 128, 10), (300, 100, 40), (40, 129, 3), (96, 512, 100)])
def test_on_a_gpu(size: tuple[int, int, int], solver: str) -> None:
    assert few_rows.pays(96, 100, 513)
    problem = power_law(*size)
    expected = flat(solve(tuple(t.double() for t in problem), True, True, damping=0.05, solver="cholesky"))  # type: ignore[arg-type]
    on_gpu = tuple(tensor.cuda() for tensor in problem)
    state = SolverState()
    options = {"damping": 0.05, "solver": solver, "tol": 1e-5, "max_iter": 400, "state": state}
    solution = solve(on_gpu, True, True, **options)  # type: ignore[arg-type]
    assert solution.residual <= 1.5e-5
    torch.testing.assert_close(
        flat(solution).double().cpu(), expected.cpu(), rtol=0, atol=1e-3 * float(expected.norm())
    )
    if solver == "pcg" and size[0] < size[1]:
        return  # its basis is of the rows, and made anew
    if state.solution is not None:
        state.solution.zero_()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        captured = solve(on_gpu, True, True, **options)  # type: ignore[arg-type]
    graph.replay()
    assert captured.residual <= 1.5e-5
    assert 0 < captured.iterations < 400
    torch.testing.assert_close(flat(captured), flat(solution), rtol=0, atol=1e-3 * float(expected.norm()))
    graph.replay()
    assert captured.iterations <= 1, "the replay began with the solution of the one before"
    for tensor in on_gpu[2:4]:
        tensor.mul_(-3)
    graph.replay()
    assert captured.residual <= 1.5e-5, "another right-hand side"
