"""Warm starts of solve_hessian: a state changes the number of iterations, never the solution."""

import pytest
import torch
from cases import Draw
from hessian_problems import ITERATIVE, flat, make, power_law, solve, true_residual

from fastmeta.ops import SolverState


@pytest.mark.parametrize("solver", ITERATIVE)
def test_warm_start_saves_iterations(draw: Draw, solver: str) -> None:
    problem = power_law(200, 40, 5, dtype=torch.float64)
    state = SolverState(refresh_every=3)
    options = {"damping": 0.05, "solver": solver, "tol": 1e-6, "max_iter": 400}
    cold = solve(problem, True, False, state=state, **options)
    assert solve(problem, True, False, state=state, **options).iterations == 0
    moved = (problem[0] + 1e-3 * draw.normal(200, 40), *problem[1:])
    warm = solve(moved, True, False, state=state, **options)
    assert 0 < warm.iterations < 0.8 * cold.iterations
    assert warm.residual <= 1e-6
    torch.testing.assert_close(flat(warm), flat(solve(moved, True, False, **options)), rtol=1e-3, atol=1e-4)


def test_kept_factors_fit_rows_of_another_scale(draw: Draw) -> None:
    state = SolverState()
    options = {"solver": "pcg", "tol": 1e-8, "max_iter": 400}
    problem = power_law(200, 40, 5, dtype=torch.float64)
    solve(problem, False, True, damping=0.05, state=state, **options)
    output = state.output
    drifted = 30 * (problem[0] + 1e-3 * draw.normal(200, 40))  # kept eigenvalues would be out by a factor of 900
    other = (drifted, *problem[1:])
    state.solution = None
    kept = solve(other, False, True, damping=45.0, state=state, **options)
    fresh = solve(other, False, True, damping=45.0, **options)
    torch.testing.assert_close(flat(kept), flat(fresh), rtol=1e-5, atol=1e-6)
    assert state.output is output
    assert kept.iterations <= fresh.iterations + 3


@pytest.mark.parametrize("size", [(200, 40, 5), (30, 40, 5)])
def test_kept_factors_never_change_the_solution(size: tuple[int, int, int]) -> None:
    state = SolverState()
    options = {"damping": 0.05, "solver": "pcg", "tol": 1e-8, "max_iter": 400}
    solve(power_law(*size, dtype=torch.float64), True, True, state=state, **options)
    other = power_law(*size, seed=1, dtype=torch.float64)  # nothing in common with the rows before
    kept, fresh = solve(other, True, True, state=state, **options), solve(other, True, True, **options)
    torch.testing.assert_close(flat(kept), flat(fresh), rtol=1e-5, atol=1e-6)
    if size[0] > size[1]:
        assert kept.iterations > fresh.iterations
        assert state.output is None, "factors that cost more than twice the iterations are given up"


def test_factors_are_refreshed_every_so_many_solves() -> None:
    problem = power_law(60, 12, 3)
    state = SolverState(refresh_every=2)
    outputs = []
    for scale in (1.0, -1.0, 2.0, -2.0):
        moved = (*problem[:2], scale * problem[2], scale * problem[3], problem[4])
        state.solution = None
        solve(moved, True, False, damping=0.1, solver="pcg", state=state)
        outputs.append(state.output)
    assert outputs[0] is outputs[1] is not outputs[2]
    assert outputs[2] is outputs[3]


def test_the_span_is_kept_for_the_same_rows_only() -> None:
    problem = power_law(10, 30, 4)
    state = SolverState()
    options = {"damping": 0.1, "solver": "pcg", "state": state}
    solve(problem, True, True, **options)
    span = state._span
    assert span is not None
    state.solution = None
    solve(problem, True, True, **options)
    assert state._span is span
    assert solve(problem, False, True, **options).residual <= 1e-4
    solve(problem, True, True, **options)
    span = state._span
    problem[0].mul_(2.0)
    changed = solve(problem, True, True, **options)
    assert state._span is not span
    assert true_residual(problem, changed, True, "cross_entropy", 0.1) <= 1e-4


def test_a_restored_state_goes_on_bit_for_bit() -> None:
    problem = power_law(60, 12, 3)
    other = power_law(60, 12, 3, seed=1)
    state, restored = SolverState(), SolverState()
    solve(problem, True, True, damping=0.1, solver="pcg", state=state)
    restored.load_state_dict(state.state_dict())
    first = solve(other, True, True, damping=0.1, solver="pcg", state=state)
    second = solve(other, True, True, damping=0.1, solver="pcg", state=restored)
    assert torch.equal(flat(first), flat(second))
    assert first.iterations == second.iterations


def test_a_state_of_another_shape_is_not_used(draw: Draw) -> None:
    state = SolverState()
    solve(make(draw, 20, 5, 4), True, True, damping=0.1, state=state, solver="pcg")
    solution = solve(make(draw, 20, 6, 3), True, True, damping=0.1, state=state, solver="pcg")
    assert solution.residual <= 1e-4


def test_auto_takes_the_preconditioner_when_its_factors_are_kept() -> None:
    problem, state = power_law(256, 64, 10), SolverState()
    first = solve(problem, True, False, damping=1e-2, state=state)
    assert state.solver == "pcg"
    state.solution = None
    kept = solve(problem, True, False, damping=1e-2, state=state)
    assert state.solver == "pcg"
    assert kept.iterations <= first.iterations
