"""Inverse Hessians of whole models and of layers, against dense linear algebra."""

import dataclasses
from typing import Any

import pytest
import torch
from brute_force import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from inner_problems import (
    LAYERS,
    MODELS,
    dense_gauss_newton,
    dense_solution,
    identity_like,
    last_layer_of,
    make,
    names_of,
    problem_of,
    rhs_of,
)
from torch import Tensor, nn
from whole_model_brute_force import (
    INNER_LOSSES,
    brute_force_influence,
    dense_hessian,
    trainable,
)
from whole_model_nets import NETS, NetCase, batch_size, net_cases

import fastmeta
from fastmeta.derivatives import ExampleWeightGradient, LabelGradient
from fastmeta.directions import HoldoutGradient, InverseHessian, LookAhead
from fastmeta.graph import describe
from fastmeta.losses import LOSSES
from fastmeta.methods import Method
from fastmeta.ops import NotConvergedWarning
from fastmeta.problem import Direction, WholeModelProblem, vectors
from fastmeta.problem.model_function import ModelFunction
from fastmeta.updates import LabelStep

EXACT: dict[str, Any] = {"tol": 1e-13, "max_iter": 3000}


@pytest.fixture(autouse=True)
def _reference():
    """The vector updates in PyTorch: Triton's interpreter takes its time for each."""
    with fastmeta.use_impl("reference"):
        yield


@pytest.mark.parametrize("loss", INNER_LOSSES)
@pytest.mark.parametrize(("net", "mode"), MODELS)
def test_gauss_newton_by_conjugate_gradients(generator, net, mode, loss):
    brute = make(generator, net, mode, loss)
    for layers in (None, LAYERS[net]):
        names = names_of(brute, layers)
        rule = InverseHessian(damping=0.3, loss=loss, layers=layers, **EXACT)
        got = rule(problem_of(brute))
        assert tuple(got) == names
        assert_close(vectors.flat(got), dense_solution(brute, dense_gauss_newton(brute, names), 0.3, names))


# The dense Hessian of the attention block takes seconds.
@pytest.mark.parametrize(
    ("net", "mode", "loss"),
    [(*model, loss) for model in MODELS for loss in INNER_LOSSES if model[0] != "text" or loss == "mse_probs"],
)
def test_exact_hessian_by_conjugate_gradients(generator, net, mode, loss):
    """Damped so that it is positive definite: what it is at a minimum."""
    brute = make(generator, net, mode, loss)
    everything = names_of(brute, None)
    matrix = dense_hessian(brute)
    damping = 1.0 - min(float(torch.linalg.eigvalsh(matrix)[0]), 0.0)
    rule = InverseHessian(damping=damping, loss=loss, curvature="hessian", **EXACT)
    direction = rule(problem_of(brute))
    assert tuple(direction) == everything
    assert_close(vectors.flat(direction), dense_solution(brute, matrix, damping, everything))


@pytest.mark.parametrize("loss", list(LOSSES))
@pytest.mark.parametrize(("net", "mode"), MODELS)
def test_influence_through_some_layers(generator, net, mode, loss):
    brute = make(generator, net, mode, loss)
    names = names_of(brute, LAYERS[net])
    damping = 0.3 - min(float(torch.linalg.eigvalsh(dense_hessian(brute, names))[0]), 0.0)
    rule = InverseHessian(damping=damping, loss=loss, layers=LAYERS[net], curvature="hessian", **EXACT)
    direction = rule(problem_of(brute))
    assert tuple(direction) == names
    influence = ExampleWeightGradient(loss, how="jvp")(problem_of(brute), direction)
    assert_close(influence, brute_force_influence(brute, damping, names))


@settings(max_examples=10, deadline=None)
@given(case=net_cases(), loss=st.sampled_from(INNER_LOSSES), damping=st.sampled_from([0.1, 1.0]))
def test_any_shape(case: NetCase, loss: str, damping: float):
    """``(H + damping I) x`` gives back v, with products that are checked above."""
    n, holdout = batch_size(case.inputs), batch_size(case.holdout)
    labels = torch.rand(n, case.classes, generator=case.generator, dtype=torch.float64)
    targets = torch.randint(case.classes, (holdout,), generator=case.generator)
    problem = WholeModelProblem(ModelFunction(case.model), case.inputs, labels, case.holdout, targets)
    rule = InverseHessian(damping=damping, loss=loss, **EXACT)
    x = rule(problem)
    image = vectors.combined(problem.hessian(rule.inner, "gauss_newton")(x), damping, x)
    v = vectors.flat(problem.gradient("holdout", loss="cross_entropy"))
    assert float((vectors.flat(image) - v).norm()) <= 1e-9 * float(v.norm()) + 1e-13


@pytest.mark.parametrize("level", ["last layer", "whole model", "layers"])
@pytest.mark.parametrize("curvature", ["gauss_newton", "hessian"])
def test_neumann_series_term_by_term(generator, level, curvature):
    """J products make the terms 0 to J, and its residual is that of the terms before the last."""
    brute = make(generator, "mlp", loss="mse_probs")
    layers = {"last layer": ("fc",), "whole model": None, "layers": ("2", "fc")}[level]
    names = names_of(brute, layers)
    matrix = dense_gauss_newton(brute, names) if curvature == "gauss_newton" else dense_hessian(brute, names)
    lowest, *_, highest = torch.linalg.eigvalsh(matrix).tolist()
    damping = 0.5 - min(lowest, 0.0)
    step = 1.5 / (highest + damping)
    damped = matrix + damping * identity_like(matrix)
    options = {"damping": damping, "solver": "neumann", "loss": "mse_probs", "curvature": curvature, "step": step}
    power = rhs_of(brute, names)
    total = step * power
    for count in range(1, 6):
        power = power - step * damped @ power
        total = total + step * power
        rule = InverseHessian(**options, max_iter=count, layers=None if level == "last layer" else layers)
        got = rule(last_layer_of(brute) if level == "last layer" else problem_of(brute))
        assert_close(vectors.flat(got), total)
        assert rule.last_solution.iterations == count
        residual = float(power.norm() / rhs_of(brute, names).norm())
        assert rule.last_solution.residual == pytest.approx(residual, rel=1e-9)


@pytest.mark.parametrize("step", [None, "half", "largest"])
@pytest.mark.parametrize("net", ["mlp", "tied"])
def test_neumann_series_goes_to_the_inverse(generator, net, step):
    brute = make(generator, net)
    names = names_of(brute, None)
    matrix = dense_gauss_newton(brute, names)
    largest = float(torch.linalg.eigvalsh(matrix)[-1])
    damping = 0.1 * largest
    largest += damping
    alpha = {None: None, "half": 1 / largest, "largest": 1.8 / largest}[step]
    rule = InverseHessian(damping=damping, solver="neumann", tol=1e-11, max_iter=1000, step=alpha)
    assert_close(vectors.flat(rule(problem_of(brute))), dense_solution(brute, matrix, damping, names))
    assert rule.last_solution.iterations < 1000
    assert rule.last_solution.residual <= 1e-11


def test_neumann_series_ends_at_its_tolerance(generator):
    brute = make(generator, "mlp")
    counts = []
    for tol in (1e-1, 1e-3, 1e-6):
        rule = InverseHessian(damping=1.0, solver="neumann", tol=tol, max_iter=500)
        rule(problem_of(brute))
        assert rule.last_solution.residual <= tol
        counts.append(rule.last_solution.iterations)
    assert counts == sorted(set(counts))


def test_a_neumann_series_that_diverges_raises(generator):
    brute = make(generator, "mlp")
    rule = InverseHessian(damping=1.0, solver="neumann", max_iter=200, step=3.0)
    with pytest.raises(torch.linalg.LinAlgError, match=r"the Neumann series diverges .*: lower step"):
        rule(problem_of(brute))


@pytest.mark.parametrize("solver", ["cg", "neumann"])
def test_an_indefinite_hessian_raises_and_gauss_newton_does_not(generator, solver):
    """Labels far from what the model says: squared errors curve down."""
    brute = dataclasses.replace(make(generator, "mlp", loss="mse"), labels=torch.full((4, 3), 20.0).double())
    lowest = float(torch.linalg.eigvalsh(dense_hessian(brute))[0])
    assert lowest < -0.1
    options = {"damping": 0.05, "solver": solver, "loss": "mse", "max_iter": 400}
    with pytest.raises(torch.linalg.LinAlgError, match="raise damping or take curvature='gauss_newton'"):
        InverseHessian(curvature="hessian", **options)(problem_of(brute))
    rule = InverseHessian(curvature="gauss_newton", **options | {"max_iter": 1000 if solver == "cg" else 10})
    assert bool(vectors.flat(rule(problem_of(brute))).isfinite().all())


def test_gauss_newton_is_positive_semi_definite_for_every_loss(generator):
    for loss in INNER_LOSSES:
        brute = dataclasses.replace(make(generator, "mlp", loss=loss), labels=torch.full((4, 3), 3.0).double())
        rule = InverseHessian(loss=loss)
        problem = problem_of(brute)
        product = problem.hessian(rule.inner, "gauss_newton")
        v = {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in problem.parameters.items()}
        assert float((vectors.flat(product(v)) * vectors.flat(v)).sum()) > 0


@pytest.mark.parametrize("loss", ["cross_entropy", "binary_cross_entropy", "mse", "mse_probs"])
@pytest.mark.parametrize("net", NETS)
def test_last_layer_in_closed_form_is_the_model_restricted_to_it(generator, net, loss):
    brute = make(generator, net, loss=loss)
    exact = InverseHessian(damping=0.3, solver="cholesky", loss=loss)(last_layer_of(brute))
    assert isinstance(exact, Direction)
    got = InverseHessian(damping=0.3, loss=loss, layers=("fc",), **EXACT)(problem_of(brute))
    assert_close(got["fc.weight"], exact.weight)
    assert_close(got["fc.bias"], exact.bias)
    assert set(got) == {"fc.weight", "fc.bias"}


def test_labels_of_any_sum_at_the_last_layer(generator):
    """The curvature of a cross-entropy grows with the sum of its labels, in every solver."""
    brute = make(generator, "mlp")
    brute = dataclasses.replace(brute, labels=brute.labels * torch.tensor([0.3, 1.0, 2.0, 5.0]).double().unsqueeze(1))
    expected = dense_solution(brute, dense_hessian(brute, ("fc.weight", "fc.bias")), 0.3, ("fc.weight", "fc.bias"))
    for solver, limit in (("cholesky", 1), ("neumann", 3000)):
        rule = InverseHessian(damping=0.3, solver=solver, tol=1e-13, max_iter=limit)
        assert_close(vectors.flat(rule(last_layer_of(brute))), expected)


def test_layers_of_a_look_ahead_inside(generator):
    """Everything inside sees the layers alone: the inner step moves no others."""
    brute = make(generator, "mlp")
    ahead = LookAhead(rate=0.2, loss="cross_entropy")
    got = InverseHessian(ahead, damping=0.3, layers=("fc",), **EXACT)(problem_of(brute))
    expected = InverseHessian(ahead, damping=0.3, solver="cholesky")(last_layer_of(brute))
    assert_close(vectors.flat(got), vectors.flat(expected))


def test_label_gradient_along_some_layers(generator):
    """Implicit differentiation of the labels through the chosen layers, equal at both levels."""
    brute = make(generator, "conv", "train")
    direction = InverseHessian(damping=0.3, layers=("fc",), **EXACT)(problem_of(brute))
    exact = InverseHessian(damping=0.3, solver="cholesky")(last_layer_of(brute))
    whole = LabelGradient("cross_entropy", how="jvp")(problem_of(brute), direction)
    assert_close(whole, LabelGradient("cross_entropy")(last_layer_of(brute), exact))


def test_iterations_and_residual_are_told(generator):
    brute = make(generator, "mlp")
    problem, names = problem_of(brute), names_of(brute, None)
    damped = dense_gauss_newton(brute, names) + 0.1 * identity_like(dense_gauss_newton(brute, names))
    rule = InverseHessian(tol=1e-6)
    assert rule.last_solution is None
    x = vectors.flat(rule(problem))
    true = float((damped @ x - rhs_of(brute, names)).norm() / rhs_of(brute, names).norm())
    assert rule.last_solution.residual == pytest.approx(true, rel=1e-6)
    assert 0 < rule.last_solution.residual <= 1e-6
    assert 1 < rule.last_solution.iterations < 100
    rule(last_layer_of(brute))
    assert rule.last_solution.residual <= 1e-6


def test_vector_updates_of_the_kernels(generator):
    """Triton's, interpreted here, take a model's parameters as one row."""
    brute = make(generator, "mlp")
    # To the end: on the way there conjugate gradients amplify rounding.
    rule = InverseHessian(damping=1.0, tol=1e-12)
    expected = rule(problem_of(brute))
    with fastmeta.use_impl("triton"):
        got = rule(problem_of(brute))
    assert_close(vectors.flat(got), vectors.flat(expected))


def test_what_is_told_is_no_state_of_a_method(generator):
    """fastmeta.graph refuses a step that replaces state."""
    rule = InverseHessian()
    method = Method(rule, LabelGradient(), LabelStep(step=0.1))
    before = describe(method)
    rule(last_layer_of(make(generator, "mlp")))
    assert describe(method) == before
    assert repr(rule) == repr(InverseHessian())


def test_not_converged_warns(generator):
    brute = make(generator, "mlp")
    with pytest.warns(NotConvergedWarning, match=r"relative residual .* > tol 1e-10 after 2 iterations; raise damping"):
        InverseHessian(tol=1e-10, max_iter=2)(problem_of(brute))


def test_no_direction_to_solve_for(generator):
    brute = make(generator, "mlp")
    zero = {name: torch.zeros_like(value) for name, value in trainable(brute.model).items()}
    for solver in ("cg", "neumann"):
        rule = InverseHessian(lambda problem: zero, solver=solver)
        assert float(vectors.flat(rule(problem_of(brute))).norm()) == 0
        assert rule.last_solution.residual == 0


def test_parameters_of_several_dtypes(generator):
    """The solver works in the widest of them and no less than float32."""
    brute = make(generator, "mlp")
    expected = InverseHessian(damping=0.5, tol=1e-7)(problem_of(brute))
    for module in brute.model.float().children():
        module.float()
    brute = dataclasses.replace(
        brute,
        unlabeled=brute.unlabeled.float(),
        holdout=brute.holdout.float(),
        labels=brute.labels.float(),
        weights=brute.weights.float(),
        mask=brute.mask.float(),
    )
    got = InverseHessian(damping=0.5, tol=1e-5)(problem_of(brute))
    assert all(value.dtype == torch.float32 for value in got.values())
    assert_close(vectors.flat(got).double(), vectors.flat(expected), 1e-3)


class Reverse(torch.autograd.Function):
    """An activation with derivatives of every order but no forward mode."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.sin()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * x.cos()


class Sine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Reverse.apply(x)


def test_a_model_without_forward_mode(generator):
    brute = make(generator, "mlp")
    brute.model[1] = Sine()
    with pytest.raises(NotImplementedError, match=r"needs forward mode .* use curvature=.hessian.; You must"):
        InverseHessian()(problem_of(brute))
    names, matrix = names_of(brute, None), dense_hessian(brute)
    damping = 1.0 - min(float(torch.linalg.eigvalsh(matrix)[0]), 0.0)
    got = InverseHessian(damping=damping, curvature="hessian", **EXACT)(problem_of(brute))
    assert_close(vectors.flat(got), dense_solution(brute, matrix, damping, names))


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"damping": -1.0}, ValueError, "damping must be >= 0.0, got -1.0"),
    ({"solver": "lu"}, ValueError, "solver must be one of auto, cholesky, cg, pcg, neumann, got 'lu'"),
    ({"curvature": "fisher"}, ValueError, "curvature must be gauss_newton or hessian, got 'fisher'"),
    ({"tol": 0.0}, ValueError, "tol must be > 0, got 0.0"),
    ({"max_iter": 0}, ValueError, "max_iter must be >= 1, got 0"),
    ({"loss": "hinge"}, ValueError, "loss must be one of"),
    ({"step": 0.1}, ValueError, "step must be > 0 and for solver='neumann', got 0.1 for 'auto'"),
    ({"step": 0.0, "solver": "neumann"}, ValueError, "step must be > 0"),
    ({"layers": "fc"}, TypeError, "layers must be a tuple of names, got the string 'fc'"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD, ids=[next(iter(case[0])) for case in BAD])
def test_bad_settings(options, error, message):
    with pytest.raises(error, match=message):
        InverseHessian(**options)


def test_settings_of_the_other_level(generator):
    brute = make(generator, "mlp")
    for options, message in (
        ({"solver": "cholesky"}, "solver must be cg or neumann for a whole model, got 'cholesky'"),
        ({"solver": "pcg"}, "solver must be cg or neumann for a whole model, got 'pcg'"),
        ({"layers": ("fc", "head")}, "layers must name parts of the model that require grad, got 'head'"),
        ({"layers": ("f",)}, "layers must name parts of the model that require grad, got 'f'"),
        ({"layers": ()}, "layers must name at least one part of the model, got none"),
    ):
        with pytest.raises(ValueError, match=message):
            InverseHessian(**options)(problem_of(brute))
    for options, message in (
        ({"layers": ("fc",)}, "layers must be None where only the last layer moves"),
        ({"loss": "mse_tanh", "curvature": "hessian"}, "curvature must be gauss_newton for mse_tanh"),
        ({"loss": "mse_probs", "curvature": "hessian"}, "curvature must be gauss_newton for mse_probs"),
    ):
        with pytest.raises(ValueError, match=message):
            InverseHessian(HoldoutGradient(), **options)(last_layer_of(brute))
