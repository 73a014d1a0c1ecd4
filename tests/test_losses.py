"""The table of losses, and every row function against autograd of the definition, in float64."""

import re
from pathlib import Path

import pytest
import torch
from brute_force import per_example as definition
from torch import Tensor
from torch.nn import functional

from fastmeta import _extension, losses, ops
from fastmeta.losses import BY_CODE, LOSSES

EXACT = {"rtol": 1e-10, "atol": 1e-12}
loss_names = pytest.mark.parametrize("loss", list(LOSSES))


def table() -> list[tuple[str, bool, bool, bool]]:
    """Name, has a softmax, label tangent and curvature read the targets."""
    return [
        (name, of.has_softmax, of.label_tangent_reads_targets, of.curvature_reads_targets)
        for name, of in zip(LOSSES, BY_CODE, strict=True)
    ]


def test_the_table_of_the_kernels_is_that_of_python():
    """csrc/loss.h as it is, and as it was compiled."""
    source = (Path(__file__).parent.parent / "csrc" / "loss.h").read_text()
    lines = re.findall(r"^  LOSS\((\w+), *(true|false), *(true|false), *(true|false)\)", source, re.MULTILINE)
    assert [(name, *(flag == "true" for flag in flags)) for name, *flags in lines] == table()
    if _extension._C is not None:
        assert _extension._C.build_info()["losses"] == table(), "build again"


def test_the_documented_table_has_every_loss():
    assert losses.__doc__ is not None
    documented = re.findall(r"^(\w+) +``", losses.__doc__, re.MULTILINE)
    assert documented == list(LOSSES)


def gauss_newton(f: Tensor, z: Tensor, loss: str) -> Tensor:
    """``2 J^T J z`` of one row, J the derivative of the prediction by the logits."""
    predicted = {"mse_probs": lambda f: f.softmax(-1), "mse_tanh": torch.tanh}[loss]
    jacobian = torch.func.jacrev(predicted)(f)
    return 2 * jacobian.T @ (jacobian @ z)


@loss_names
@pytest.mark.parametrize("targets", ["probabilities", "beyond"])
def test_row_functions(draw, loss, targets):
    """Residual, label tangent and curvature against derivatives of the definition, row by row."""
    f, z = draw.normal(5, 4, scale=2.0), draw.normal(5, 4)
    # Some that sum to one but leave [0, 1].
    y = draw.probabilities(5, 4)
    y = y if targets == "probabilities" else 6 * y - 5 / 4
    torch.testing.assert_close(losses.loss_per_example(f, y, loss), definition(f, y, loss), **EXACT)

    def row(f: Tensor, y: Tensor) -> Tensor:
        return definition(f[None], y[None], loss)[0]

    for i in range(len(f)):
        residual = torch.func.grad(row)(f[i], y[i])
        pull = lambda f, i=i: -torch.func.grad(row, argnums=1)(f, y[i])  # noqa: E731
        tangent = torch.func.jvp(pull, (f[i],), (z[i],))[1]
        one = slice(i, i + 1)
        torch.testing.assert_close(losses.residual(f[one], y[one], loss)[0], residual, **EXACT)
        torch.testing.assert_close(losses.label_tangent(f[one], z[one], loss, y[one])[0], tangent, **EXACT)
        moved = torch.func.jvp(lambda f, i=i: losses.label_pull(f[None], loss, y[i][None])[0], (f[i],), (z[i],))[1]
        torch.testing.assert_close(moved, tangent, **EXACT)
        exact = torch.func.hessian(row)(f[i], y[i]) @ z[i]
        torch.testing.assert_close(losses.residual_tangent(f[one], y[one], z[one], loss)[0], exact, **EXACT)
        expected = exact if losses.of(loss).exact else gauss_newton(f[i], z[i], loss)
        torch.testing.assert_close(losses.curvature(f[one], z[one], loss, y[one])[0], expected, **EXACT)
        torch.testing.assert_close(losses.gauss_newton(f[one], y[one], z[one], loss)[0], expected, **EXACT)


@loss_names
def test_forms_of_the_curvature(draw, loss):
    """As a diagonal and a matrix of low rank, at logits that stay, as a number: all are the row function."""
    f, y, z, w, of = (
        draw.normal(5, 4, scale=2.0),
        draw.uniform(5, 4),
        draw.normal(5, 4),
        draw.normal(5),
        losses.of(loss),
    )
    expected = losses.curvature(f, z, loss, y)
    d, s, p = of.output_curvature(f, y)
    image = d * z
    if s is not None and p is not None:
        image = image - s * (p * z).sum(-1, keepdim=True) - p * (s * z).sum(-1, keepdim=True)
    assert (s is None) == (not of.has_softmax)
    torch.testing.assert_close(image, expected, **EXACT)
    torch.testing.assert_close(of.fixed_curvature(f, y, None)(z), expected, **EXACT)
    torch.testing.assert_close(of.fixed_curvature(f, y, w)(z), w.unsqueeze(1) * expected, **EXACT)
    assert (expected * z).sum() >= 0, "positive semi-definite"
    if of.curvature_slope is not None:
        torch.testing.assert_close(of.curvature_slope * z, expected, **EXACT)
    if of.label_slope is not None:
        torch.testing.assert_close(of.label_slope * z, losses.label_tangent(f, z, loss, y), **EXACT)


@loss_names
@pytest.mark.parametrize("size", [1e4, 1e300, float("inf")])
def test_extreme_logits_without_a_softmax_are_finite(loss, size):
    """Saturated, not NaN: the residual of an error that grows is as large as the error."""
    if losses.of(loss).has_softmax and size == float("inf"):
        pytest.skip("a softmax of +inf is NaN")
    f = size * torch.tensor([[1.0, -1.0, 1.0]]).double()
    y, z = torch.tensor([[0.5, -1e4, 1e4]]).double(), torch.ones(1, 3).double()
    assert not losses.residual(f, y, loss).isnan().any()
    assert losses.label_tangent(f, z, loss, y).isfinite().all()
    assert losses.curvature(f, z, loss, y).isfinite().all()


@pytest.mark.parametrize(
    ("call", "reads"),
    [
        (lambda h, v, **given: ops.label_gradient(h, h, v, **given), lambda of: of.label_tangent_reads_targets),
        (lambda h, v, **given: ops.hessian_vector_product(h, h, v, **given), lambda of: of.curvature_reads_targets),
        (lambda h, v, **given: ops.solve_hessian(h, h, v, damping=1.0, **given), lambda of: of.curvature_reads_targets),
    ],
    ids=["label_gradient", "hessian_vector_product", "solve_hessian"],
)
@loss_names
def test_targets_are_needed_where_they_are_read(draw, call, reads, loss):
    h, v, y = draw.normal(4, 3), draw.normal(3, 3), draw.uniform(4, 3)
    if not reads(losses.of(loss)):  # not looked at
        tracked = y.clone().requires_grad_()
        for unread in (y.fill_(float("nan")), y.mT, torch.full((4,), 99), tracked, y.to("meta"), "no tensor"):
            for impl in (None, "cpp", "reference"):
                found = call(h, v, loss=loss, targets=unread, impl=impl)[0]
                assert torch.equal(found, call(h, v, loss=loss, impl=impl)[0])
                assert not found.requires_grad
        return
    with pytest.raises(ValueError, match=f"targets are needed by {loss}, got None"):
        call(h, v, loss=loss)
    with pytest.raises(ValueError, match=r"targets must be \[N, C\] = \[4, 3\], got \[3, 3\]"):
        call(h, v, loss=loss, targets=y[:3])
    classes = draw.classes(4, 3)
    by_class, by_row = (call(h, v, loss=loss, targets=t)[0] for t in (classes, torch.eye(3).to(y)[classes]))
    torch.testing.assert_close(by_class, by_row)


def test_huber_is_that_of_torch(draw):
    f, y = (draw.normal(6, 4, scale=2.0).requires_grad_() for _ in range(2))
    expected = functional.huber_loss(f, y, reduction="none").sum(-1)
    torch.testing.assert_close(losses.loss_per_example(f, y, "huber"), expected)
    torch.testing.assert_close(losses.residual(f, y, "huber"), torch.autograd.grad(expected.sum(), f)[0])


@pytest.mark.parametrize("impl", ["reference", "cpp", "triton", "cuda"])
def test_huber_at_its_kink(impl):
    """A difference of exactly 1 belongs to the square: slope 1. Beyond it 0, and what is no number stays none."""
    gaps = torch.tensor([[1.0, -1.0, 1.0 + 2**-20, -1.0 - 2**-20, 1.0 - 2**-20, float("inf"), float("nan")]])
    slopes = torch.tensor([[1.0, 1.0, 0.0, 0.0, 1.0, 0.0, float("nan")]])
    if impl not in ops.label_gradient.__globals__["OPERATOR"].implementations("cpu"):
        pytest.skip(f"no {impl} kernel here")
    h, y, v = torch.ones(1, 1), torch.zeros(1, 7), torch.ones(7, 1)
    given = {"loss": "huber", "targets": y, "impl": impl}
    torch.testing.assert_close(ops.label_gradient(h, gaps, v, **given), slopes, equal_nan=True)
    torch.testing.assert_close(ops.hessian_vector_product(h, gaps, v, **given)[0], slopes.mT, equal_nan=True)
    residual = ops.last_layer_gradient(h, gaps, y, loss="huber", impl=impl)[1]
    torch.testing.assert_close(residual, gaps[0].clamp(-1, 1), equal_nan=True)


@pytest.mark.parametrize("value", [0.0, 1e-30, 1e-4, 0.1, 0.4999, 0.5, 0.5001, 1.0, 3.0, 9.0, 30.0, 1e4, float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_tanh_of_the_kernels(value, dtype):
    """``dl/df`` at ``y`` far below: 2 (t + 1) (1 - t^2) knows t within a few roundings, and 2 (t - u) at u = 0 too."""
    f = torch.tensor([[value, -value]], dtype=dtype)
    h = torch.ones(1, 1, dtype=dtype)
    got = ops.last_layer_gradient(h, f, torch.zeros_like(f), loss="mse_tanh", impl="cpp")[1]
    t = f.double().tanh()[0]
    expected = 2 * t * (1 - t * t)
    unit = torch.finfo(dtype).eps
    assert ((got.double() - expected).abs() <= 8 * unit * (2 * t.abs())).all()
