"""The closed forms against plain autograd of the definitions, in float64.

Nothing here uses fastmeta's own loss functions: each loss is written out, each derivative comes from autograd.
"""

import pytest
import torch
from brute_force import per_example as definition
from cases import CASES, Draw
from torch import Tensor
from torch.nn import functional

from fastmeta import Head, losses, ops
from fastmeta.losses import LOSSES
from fastmeta.ops.feature_similarity import gram_is_cheaper

SHAPES = [(5, 4, 3), (1, 3, 2), (4, 1, 5), (6, 7, 1), (2, 3, 9)]
EXACT = {"rtol": 1e-10, "atol": 1e-12}

loss_names = pytest.mark.parametrize("loss", list(LOSSES))
exact_losses = pytest.mark.parametrize("loss", [loss for loss in LOSSES if losses.of(loss).exact])
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
biases = pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
weightings = pytest.mark.parametrize("weighted", [True, False], ids=["weights", "no-weights"])
target_kinds = pytest.mark.parametrize("kind", ["probabilities", "unnormalized", "classes"])


def make_targets(draw: Draw, rows: int, columns: int, kind: str) -> tuple[Tensor, Tensor]:
    """As the operator takes them, and as ``[N, C]``."""
    if kind == "classes":
        classes = draw.classes(rows, columns)
        return classes, torch.eye(columns, dtype=torch.float64)[classes]
    y = draw.probabilities(rows, columns) if kind == "probabilities" else 2 * draw.uniform(rows, columns) - 0.3
    return y, y


def head(draw: Draw, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Features and the parameters of the last layer, which require grad."""
    n, d, c = shape
    return draw.normal(n, d), draw.normal(c, d).requires_grad_(), draw.normal(c).requires_grad_()


@loss_names
@shapes
@weightings
@target_kinds
def test_last_layer_gradient(draw, loss, shape, weighted, kind):
    h, weight, bias = head(draw, shape)
    given, y = make_targets(draw, shape[0], shape[2], kind)
    w = draw.normal(shape[0]) if weighted else None
    f = functional.linear(h, weight, bias)
    per_example = definition(f, y, loss)
    expected = torch.autograd.grad((per_example if w is None else w * per_example).sum(), (weight, bias))
    for logits in (f.detach(), Head(weight.detach(), bias.detach())):
        got = ops.last_layer_gradient(h, logits, given, w, loss=loss, impl="reference")
        torch.testing.assert_close(got, expected, **EXACT)


@loss_names
@shapes
@biases
@target_kinds
def test_per_example_dot(draw, loss, shape, bias, kind):
    h, weight, head_bias = head(draw, shape)
    given, y = make_targets(draw, shape[0], shape[2], kind)
    direction, direction_bias = draw.normal(*weight.shape), draw.normal(shape[2]) if bias else None
    f = functional.linear(h, weight, head_bias)
    expected = []
    for row in definition(f, y, loss):
        grad_weight, grad_bias = torch.autograd.grad(row, (weight, head_bias), retain_graph=True)
        moved = (grad_weight * direction).sum()
        expected.append(moved if direction_bias is None else moved + (grad_bias * direction_bias).sum())
    for logits in (f.detach(), Head(weight.detach(), head_bias.detach())):
        got = ops.per_example_dot(h, logits, given, direction, direction_bias, loss=loss, impl="reference")
        torch.testing.assert_close(got, torch.stack(expected), **EXACT)


def inner_step(h, weight, bias, y, w, rate, loss):
    """``theta - (rate / B) grad sum_i w_i l_i``, to be differentiated through."""
    parameters = (weight, bias) if bias is not None else (weight,)
    total = (w * definition(functional.linear(h, weight, bias), y, loss)).sum() / len(h)
    grads = torch.autograd.grad(total, parameters, create_graph=True)
    moved = [p - rate * g for p, g in zip(parameters, grads, strict=True)]
    return moved[0], moved[1] if bias is not None else None


def outer(weight: Tensor, bias: Tensor | None, h: Tensor, y: Tensor) -> Tensor:
    """The hold-out loss G; its own loss need not be the inner one."""
    return definition(functional.linear(h, weight, bias), y, "cross_entropy").mean()


@loss_names
@shapes
@biases
def test_label_gradient_is_that_of_an_inner_step(draw, loss, shape, bias):
    n, d, c = shape
    h, weight, head_bias = head(draw, shape)
    head_bias = head_bias if bias else None
    y = (2 * draw.uniform(n, c) - 0.3).requires_grad_()  # not normalized
    w, rate, (held_out, held_out_y) = draw.normal(n), 0.3, (draw.normal(4, d), draw.probabilities(4, c))
    moved = inner_step(h, weight, head_bias, y, w, rate, loss)
    value = outer(*moved, held_out, held_out_y)
    expected = torch.autograd.grad(value, y, retain_graph=True)[0]
    parts = [part for part in moved if part is not None]
    direction = torch.autograd.grad(value, parts)
    f = functional.linear(h, weight, head_bias).detach()
    logits_or_head = (f, Head(weight.detach(), None if head_bias is None else head_bias.detach()))
    for logits in logits_or_head:
        got = ops.label_gradient(h, logits, *direction, loss=loss, scale=rate / n, targets=y.detach(), impl="reference")
        torch.testing.assert_close(w.unsqueeze(-1) * got, expected, **EXACT)


@loss_names
def test_example_weight_gradient_is_that_of_an_inner_step(draw, loss):
    n, d, c = 5, 4, 3
    h, weight, bias = head(draw, (n, d, c))
    y, w, rate = draw.probabilities(n, c), draw.normal(n).requires_grad_(), 0.3
    moved = inner_step(h, weight, bias, y, w, rate, loss)
    value = outer(*moved, draw.normal(4, d), draw.probabilities(4, c))
    expected = torch.autograd.grad(value, w, retain_graph=True)[0]
    direction = torch.autograd.grad(value, moved)
    dots = ops.per_example_dot(h, functional.linear(h, weight, bias).detach(), y, *direction, loss=loss)
    torch.testing.assert_close(-rate / n * dots, expected, **EXACT)


@exact_losses
def test_several_inner_steps(draw, loss):
    """``v_k = v_{k+1} - eta H(theta_k) v_{k+1}``, and the label gradients of the steps add up."""
    n, d, c, rate, steps = 5, 4, 3, 0.3, 3
    h, weight, bias = head(draw, (n, d, c))
    y, w = draw.probabilities(n, c).requires_grad_(), draw.uniform(n)
    path = [(weight, bias)]
    for _ in range(steps):
        path.append(inner_step(h, *path[-1], y, w, rate, loss))
    value = outer(*path[-1], draw.normal(4, d), draw.probabilities(4, c))
    expected = torch.autograd.grad(value, y, retain_graph=True)[0]
    v = torch.autograd.grad(value, path[-1])
    total = torch.zeros(n, c, dtype=torch.float64)
    for theta in reversed(path[:-1]):
        f = functional.linear(h, *theta).detach()
        total += w.unsqueeze(-1) * ops.label_gradient(h, f, *v, loss=loss, scale=rate / n, targets=y.detach())
        product = ops.hessian_vector_product(h, f, *v, w, loss=loss, targets=y.detach())
        v = [part - rate / n * hv for part, hv in zip(v, product, strict=True)]
    torch.testing.assert_close(total, expected, **EXACT)


@exact_losses
@shapes
@biases
@weightings
def test_hessian_vector_product(draw, loss, shape, bias, weighted):
    n, d, c = shape
    h, weight, head_bias = (t.detach() for t in head(draw, shape))
    y, w, damping = draw.probabilities(n, c), draw.normal(n) if weighted else None, 0.2
    direction, direction_bias = draw.normal(c, d), draw.normal(c) if bias else None

    def total(flat: Tensor) -> Tensor:
        b = flat[c * d :] if bias else head_bias
        per_example = definition(functional.linear(h, flat[: c * d].reshape(c, d), b), y, loss)
        return (per_example if w is None else w * per_example).sum()

    theta = torch.cat([weight.flatten(), head_bias]) if bias else weight.flatten()
    v = torch.cat([direction.flatten(), direction_bias]) if bias else direction.flatten()
    expected = torch.func.hessian(total)(theta) @ v + damping * v
    f = functional.linear(h, weight, head_bias)
    got_weight, got_bias = ops.hessian_vector_product(
        h, f, direction, direction_bias, w, loss=loss, damping=damping, targets=y, impl="reference"
    )
    assert (got_bias is None) == (not bias)
    got = got_weight.flatten() if got_bias is None else torch.cat([got_weight.flatten(), got_bias])
    torch.testing.assert_close(got, expected, **EXACT)


@pytest.mark.parametrize("loss", ["mse_probs", "mse_tanh"])
@shapes
@biases
@weightings
def test_curvature_is_gauss_newton(draw, loss, shape, bias, weighted):
    """``sum_i w_i J_i^T (2 I) J_i`` with ``J_i = d softmax(f_i) / d theta``, or of tanh, built as a matrix."""
    n, d, c = shape
    h, weight, head_bias = (t.detach() for t in head(draw, shape))
    w = draw.uniform(n) if weighted else None
    direction, direction_bias = draw.normal(c, d), draw.normal(c) if bias else None

    def predicted(flat: Tensor) -> Tensor:
        b = flat[c * d :] if bias else head_bias
        f = functional.linear(h, flat[: c * d].reshape(c, d), b)
        return f.softmax(-1) if loss == "mse_probs" else f.tanh()

    theta = torch.cat([weight.flatten(), head_bias]) if bias else weight.flatten()
    v = torch.cat([direction.flatten(), direction_bias]) if bias else direction.flatten()
    jacobian = torch.func.jacrev(predicted)(theta)  # [N, C, P]
    expected = torch.einsum("ncp,n,ncq,q->p", jacobian, 2 * (torch.ones(n).double() if w is None else w), jacobian, v)
    got_weight, got_bias = ops.hessian_vector_product(
        h, functional.linear(h, weight, head_bias), direction, direction_bias, w, loss=loss, impl="reference"
    )
    got = got_weight.flatten() if got_bias is None else torch.cat([got_weight.flatten(), got_bias])
    torch.testing.assert_close(got, expected, **EXACT)
    if w is not None:
        assert (v * got).sum() >= 0


@shapes
@biases
def test_feature_similarity_is_the_sum_it_says(draw, shape, bias):
    (n, d, c), held_out = shape, 4
    h_u, h_h, r = draw.normal(n, d), draw.normal(held_out, d), draw.normal(held_out, c)
    expected = torch.zeros(n, c, dtype=torch.float64)
    for u in range(n):
        for i in range(held_out):
            expected[u] += 0.7 * (h_u[u] @ h_h[i] + (1 if bias else 0)) * r[i]
    torch.testing.assert_close(
        ops.feature_similarity(h_u, h_h, r, scale=0.7, bias=bias, impl="reference"), expected, **EXACT
    )


@pytest.mark.parametrize("sizes", [(3, 4, 50, 60), (40, 30, 3, 2)], ids=["gram", "product"])
@biases
def test_feature_similarity_in_both_orders(draw, sizes, bias):
    count_u, count_h, d, c = sizes
    assert gram_is_cheaper(*sizes) == (d > 3)
    h_u, h_h, r = draw.normal(count_u, d), draw.normal(count_h, d), draw.normal(count_h, c)
    expected = torch.einsum("ud,hd,hc->uc", h_u, h_h, r) + (r.sum(0) if bias else 0)
    torch.testing.assert_close(ops.feature_similarity(h_u, h_h, r, bias=bias, impl="reference"), expected, **EXACT)


def test_feature_similarity_is_the_label_gradient_up_to_a_constant_in_each_row(draw):
    n, d, c = 5, 4, 3
    h_h, weight, bias = head(draw, (6, d, c))
    f_h, y_h, h_u = functional.linear(h_h, weight, bias), draw.probabilities(6, c), draw.normal(n, d)
    direction = torch.autograd.grad(definition(f_h, y_h, "cross_entropy").sum(), (weight, bias))
    exact = ops.label_gradient(h_u, functional.linear(h_u, weight, bias).detach(), *direction)
    similar = ops.feature_similarity(h_u, h_h, (f_h.softmax(-1) - y_h).detach())
    difference = similar - exact
    torch.testing.assert_close(difference, difference[:, :1].expand(-1, c), **EXACT)
    assert difference.abs().max() > 1e-3, "the constant is not zero, or the test shows nothing"


@pytest.mark.parametrize("project", [True, False])
@pytest.mark.parametrize("epsilon", [0.25, torch.tensor(0.25), torch.tensor([0.25]).double()], ids=str)
def test_finite_difference_labels_formula(draw, project, epsilon):
    plus, minus, y = draw.normal(6, 4), draw.normal(6, 4), draw.probabilities(6, 4)
    got = ops.finite_difference_labels(plus, minus, y, epsilon, step=0.5, project=project, impl="reference")
    e = torch.exp(plus) / torch.exp(plus).sum(-1, keepdim=True) - torch.exp(minus) / torch.exp(minus).sum(
        -1, keepdim=True
    )
    expected = y - 0.5 * e / 0.25
    if project:
        assert (expected < 0).any(), "nothing is clipped: the test shows nothing"
        expected = torch.where(expected > 0, expected, 0)
        expected /= expected.sum(-1, keepdim=True)
    torch.testing.assert_close(got, expected, **EXACT)


def test_finite_difference_labels_of_a_row_left_empty_are_uniform(draw):
    f = draw.normal(3, 4)
    y = torch.tensor([[-1.0, -1, -1, -1], [0, 0, 0, 0], [0.0, 3, 0, 1]]).double()
    got = ops.finite_difference_labels(f, f, y, 1.0, step=1.0, impl="reference")
    torch.testing.assert_close(got, torch.tensor([[0.25] * 4, [0.25] * 4, [0, 0.75, 0, 0.25]]).double(), **EXACT)


def test_finite_differences_converge_to_the_label_gradient(draw):
    """The quotient is ``2 D_v p + O(epsilon^2)``: four times closer at half the radius."""
    n, d, c = 5, 4, 3
    h, weight, bias = (t.detach() for t in head(draw, (n, d, c)))
    direction, y = draw.normal(c, d), draw.probabilities(n, c)
    f = functional.linear(h, weight, bias)
    derivative = torch.func.jvp(lambda w: functional.linear(h, w, bias).softmax(-1), (weight,), (direction,))[1]
    torch.testing.assert_close(ops.label_gradient(h, f, direction, loss="mse_probs"), 2 * derivative, **EXACT)
    errors = []
    for epsilon in (1e-2, 5e-3):
        plus, minus = (functional.linear(h, weight + sign * epsilon * direction, bias) for sign in (1, -1))
        moved = ops.finite_difference_labels(plus, minus, y, epsilon, step=1.0, project=False, impl="reference")
        errors.append(((y - moved) - 2 * derivative).norm() / derivative.norm())
    assert errors[0] < 1e-2
    assert 3.5 < errors[0] / errors[1] < 4.5


@pytest.mark.parametrize("reduction_weight", [1.0, 2.0])
def test_classes_are_torch_cross_entropy(draw, reduction_weight):
    h, weight, bias = head(draw, (5, 4, 3))
    classes = draw.classes(5, 3)
    loss = reduction_weight * functional.cross_entropy(functional.linear(h, weight, bias), classes, reduction="sum")
    expected = torch.autograd.grad(loss, (weight, bias))
    w = torch.full((5,), reduction_weight, dtype=torch.float64)
    got = ops.last_layer_gradient(h, functional.linear(h, weight, bias).detach(), classes, w, impl="reference")
    torch.testing.assert_close(got, expected, **EXACT)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_autocast_does_not_change_the_reference(case, dtype, generator):
    """An operator computes in the dtype of its arguments, within an autocast region as well."""
    for variant in case.variants:
        arguments = case.arguments(Draw(generator, dtype), (5, 4, 3), case.losses[0], variant)
        expected = case.call(arguments, "reference")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = case.call(arguments, "reference")
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
