"""The inverse Hessian in the logit tangents of few examples, and what a rule keeps from step to step."""

import copy
import pickle
from typing import Any

import pytest
import torch
from brute_force import Layer, assert_close, make_layer
from cases import Draw
from device_tensors import Tape, on_device, pretends_a_gpu
from hessian_problems import power_law
from torch import Tensor

import fastmeta
from fastmeta import ExampleWeights
from fastmeta.capture import Outputs
from fastmeta.directions import HoldoutGradient, InverseHessian, NormalizedGap, UnitLength, inverse_hessian
from fastmeta.losses import LOSSES
from fastmeta.methods import Method
from fastmeta.ops import NotConvergedWarning, SolverState
from fastmeta.ops.solve import conjugate_gradient as device
from fastmeta.ops.solve import few_rows, solve
from fastmeta.problem import Direction, Factors, LastLayerProblem, Rows, vectors

pytestmark = pretends_a_gpu
EXACT: dict[str, Any] = {"tol": 1e-11, "max_iter": 500}  # at 1e-12 rounding may stop it first, which it says


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every problem is taken for one of few rows."""
    monkeypatch.setattr(few_rows, "pays", lambda n, c, k: True)


def rows(draw: Draw, n: int) -> Rows:
    return Rows(draw.normal(n, 5), draw.normal(n, 3))


def make_problem(draw: Draw, *, labeled: bool, has_bias: bool, n: int = 6) -> LastLayerProblem:
    weights = 2 * draw.uniform(n)
    weights[1] = 0.0
    return LastLayerProblem(
        rows(draw, n),
        2 * draw.probabilities(n, 3),
        rows(draw, 4),
        draw.classes(4, 3),
        weights=weights,
        mask=(draw.uniform(n) > 0.3).to(weights),
        labeled=rows(draw, 3) if labeled else None,
        labeled_targets=draw.classes(3, 3) if labeled else None,
        has_bias=has_bias,
    )


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("labeled", [True, False])
@pytest.mark.parametrize("loss", LOSSES)
def test_the_direction_is_that_of_the_dense_hessian(
    draw: Draw, always: None, loss: str, labeled: bool, has_bias: bool, bias: bool
) -> None:
    problem = make_problem(draw, labeled=labeled, has_bias=has_bias)
    rule = InverseHessian(HoldoutGradient(bias=bias), damping=0.3, loss=loss, solver="cg", **EXACT)
    got = rule(problem)
    assert isinstance(got, Factors)
    exact = InverseHessian(HoldoutGradient(bias=bias), damping=0.3, loss=loss, solver="cholesky")(problem)
    assert isinstance(exact, Direction)
    assert (got.dense().bias is None) == (exact.bias is None) == (not (bias and has_bias))
    assert_close(vectors.flat(got), vectors.flat(exact))
    tangent = problem.unlabeled.features @ exact.weight.T + (0 if exact.bias is None else exact.bias)
    assert_close(got.tangent, tangent)
    assert rule.last_solution is not None
    assert rule.last_solution.residual <= EXACT["tol"]
    assert 0 < rule.last_solution.iterations < 60
    scaled = UnitLength(rule)(problem)
    assert_close(vectors.flat(scaled), vectors.flat(exact) / vectors.flat(exact).norm())


def test_its_residual_is_the_true_one(draw: Draw, always: None) -> None:
    problem = make_problem(draw, labeled=True, has_bias=True)
    rule = InverseHessian(damping=0.3, solver="cg", tol=1e-2)
    direction = rule(problem).dense()
    image = vectors.combined(problem.hessian(rule.inner)(direction), 0.3, direction)
    v = problem.gradient("holdout", loss="cross_entropy")
    true = float((vectors.flat(image) - vectors.flat(v)).norm() / vectors.flat(v).norm())
    assert rule.last_solution is not None
    assert rule.last_solution.residual == pytest.approx(true, rel=1e-6)
    assert true <= 1e-2


def test_negative_weights_are_judged(draw: Draw, always: None) -> None:
    problem = make_problem(draw, labeled=False, has_bias=True)
    assert problem.weights is not None
    problem.weights.sub_(80)
    with pytest.raises(torch.linalg.LinAlgError, match="not positive definite"):
        InverseHessian(damping=0.01, solver="cg")(problem)
    with pytest.warns(NotConvergedWarning, match=r"relative residual .* > tol 1e-12 after 1 iterations"):
        InverseHessian(damping=100.0, solver="cg", tol=1e-12, max_iter=1)(problem)
    problem.unlabeled.features[2, 1] = torch.nan
    assert bool(vectors.flat(InverseHessian(damping=0.01, solver="cg")(problem)).isnan().all())


def test_nothing_to_solve(draw: Draw, always: None) -> None:
    problem = make_problem(draw, labeled=False, has_bias=True)
    problem.holdout.logits.fill_(0.0)
    targets = torch.full((4, 3), 1 / 3, dtype=torch.float64)
    rule = InverseHessian(damping=0.3, solver="cg")
    got = rule(LastLayerProblem(problem.unlabeled, problem.labels, problem.holdout, targets.to(problem.labels)))
    assert rule.last_solution is not None
    assert rule.last_solution.residual == 0
    assert float(vectors.flat(got).abs().max()) < 1e-12


@pytest.mark.parametrize("how", ["cg", "auto"])
def test_influence_without_the_direction(draw: Draw, always: None, how: str) -> None:
    """The same gradient of the weights as by the exact solve, with and without a strong view."""
    layer = make_layer(draw)
    for more in ({}, {"strong": layer.outputs(draw.normal(6, 5))}):
        gradients = []
        for solver in (how, "cholesky"):
            method = ExampleWeights(6, inverse_hessian=solver, dtype=torch.float64, **EXACT)
            method.refine(**layer.batch(), index=torch.arange(6), **more)
            gradients.append(method.state_dict()["update.table.exp_avg"])
        assert_close(*gradients)


def learned(method: ExampleWeights, batch: dict[str, Any], n: int) -> Tensor:
    method.refine(**batch, index=torch.arange(n))
    return method.state_dict()["update.table.exp_avg"].double()


@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize("solver", ["cg", "pcg", "auto"])
def test_the_gradient_of_the_weights_is_right_to_the_tolerance(
    monkeypatch: pytest.MonkeyPatch, solver: str, few: bool
) -> None:
    """At the default: 2e-2 of its length on features with a power-law spectrum, in float32."""
    monkeypatch.setattr(few_rows, "pays", lambda n, c, k: few)
    n, held = 60, 20
    h, f, *_ = power_law(n + held, 40, 5)
    weight, bias = torch.zeros(5, 40), torch.zeros(5)
    unlabeled, holdout = (Outputs(h[rows], f[rows], weight, bias) for rows in (slice(0, n), slice(n, None)))
    batch = {"unlabeled": unlabeled, "holdout": holdout, "targets": f[n:].argmin(-1)}
    exact = learned(ExampleWeights(n, inverse_hessian="cholesky"), batch, n)
    got = learned(ExampleWeights(n, inverse_hessian=solver), batch, n)
    assert float((got - exact).norm() / exact.norm()) <= 2e-2


def test_auto_turns_to_pcg_where_the_rows_take_long(draw: Draw, always: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """And comes back to them when the eigenbases of pcg have had their time."""
    monkeypatch.setattr(inverse_hessian, "trial_iterations", lambda n, c, k, in_row_space: 2)
    monkeypatch.setattr(solve, "MOST_DENSE", 0)
    problem, tried = make_problem(draw, labeled=True, has_bias=True), 0
    exact = InverseHessian(damping=0.3, solver="cholesky")(problem)
    rule = InverseHessian(damping=0.3, **EXACT)
    for step in range(2 * inverse_hessian.REFRESH_EVERY):
        before = rule._last.state.solver
        direction = rule(problem)
        assert isinstance(direction, Direction)
        assert_close(vectors.flat(direction), vectors.flat(exact))
        assert rule._last.state.solver == "pcg"
        tried += rule._last.state.age == 1
        assert before == ("pcg" if step else None)
    assert tried == 2


def layers(draw: Draw, count: int) -> list[Layer]:
    return [make_layer(draw, (40, 5, 4), holdout=8) for _ in range(count)]


def test_the_factors_of_a_preconditioner_are_kept(draw: Draw) -> None:
    method = ExampleWeights(40, inverse_hessian="pcg", dtype=torch.float64)
    rule = method.direction
    assert isinstance(rule, InverseHessian)
    state, bases = rule._last.state, []
    for layer in layers(draw, 12):
        method.refine(**layer.batch(), index=torch.arange(40))
        bases.append(state.basis)
        assert state.solution is None, "of another batch"
    assert all(basis is bases[0] for basis in bases[:10])
    assert bases[10] is not bases[0], "made anew after 10 solves"
    wider = make_layer(draw, (40, 7, 4), holdout=8)
    method.refine(**wider.batch(), index=torch.arange(40))
    assert state.basis is not None
    assert state.basis.shape == (8, 8), "another shape has its own"


def test_a_resumed_method_goes_on_bit_for_bit(draw: Draw) -> None:
    first = ExampleWeights(40, inverse_hessian="pcg", dtype=torch.float64)
    batches = [layer.batch() | {"index": torch.arange(40)} for layer in layers(draw, 5)]
    for batch in batches[:3]:
        first.refine(**batch)
    resumed = ExampleWeights(40, inverse_hessian="pcg", dtype=torch.float64)
    resumed.load_state_dict(copy.deepcopy(first.state_dict()))
    for other in (resumed, copy.deepcopy(first), pickle.loads(pickle.dumps(first))):
        assert isinstance(other.direction, InverseHessian)
        assert other.direction._last.state.age == 3
    for batch in batches[3:]:
        assert torch.equal(first.refine(**batch).weights, resumed.refine(**batch).weights)


def test_the_state_of_the_direction_inside_is_saved() -> None:
    rule = InverseHessian(NormalizedGap())
    state = rule.state_dict()
    assert set(state) == {"solver.numbers", "of.ema_labeled.count", "of.ema_fourth.count"}
    rule.load_state_dict(state)
    assert set(InverseHessian().state_dict()) == {"solver.numbers"}


def test_a_state_in_a_file() -> None:
    state = SolverState(refresh_every=4)
    state.iterations = 17
    assert pickle.loads(pickle.dumps(state)).state_dict() == state.state_dict()


def test_replays_are_the_steps_with_few_rows(draw: Draw, always: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph of twice the iterations of the step before; what is left of them has no effect."""
    tape = Tape()
    monkeypatch.setattr(device, "capturing", lambda tensor: tape.recording)

    def make() -> Method:
        method = ExampleWeights(8, lr=0.1, dtype=torch.float64)
        for name in ("values", "exp_avg", "exp_avg_sq", "steps"):
            setattr(method.update.table, name, on_device(getattr(method.update.table, name)))
        return method

    plain, graphed = make(), fastmeta.graph(make(), recorder=tape)
    layer = make_layer(draw, (8, 5, 4))
    for _ in range(5):
        views = {"unlabeled": layer.outputs(draw.normal(8, 5)), "holdout": layer.outputs(draw.normal(8, 5))}
        given = {**views, "targets": draw.classes(8, 4), "index": torch.arange(8)}
        batch = {name: on_device(value) for name, value in given.items()}
        assert torch.equal(graphed.refine(**batch).weights, plain.refine(**batch).weights)
    assert (tape.recorded, tape.replayed) == (1, 4)
    assert isinstance(graphed.direction, InverseHessian)
    assert graphed.direction.last_solution is not None
    assert graphed.direction.last_solution.residual <= 1e-2
