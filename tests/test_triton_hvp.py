"""The Hessian-vector product's forms on a GPU or under Triton's interpreter, each forced."""

import gradient_forms as forms
import pytest
import torch
from cases import DEVICE, Draw, map_tensors
from kernel_checks import check, strided

from fastmeta.losses import LOSSES

pytest.importorskip("triton")
from fastmeta.triton_kernels import _gradient
from fastmeta.triton_kernels import hvp as module

CASE = forms.case("hessian_vector_product")
VARIANTS = ("bias weights",)
losses = pytest.mark.parametrize("loss", LOSSES)
pytestmark = forms.available(CASE)


@forms.dtypes
@losses
@forms.forms
def test_forms(form, loss, dtype, generator):
    forms.check_forms(CASE, form, loss, dtype, generator)


@forms.dtypes
@losses
def test_rows_longer_than_a_tile(loss, dtype, generator):
    """Statistics first; 20 classes stand for 4,096."""
    forms.check_forms(CASE, "rows", loss, dtype, generator, most_classes=20)


@losses
def test_more_classes_than_a_tile_holds(loss, generator):
    shape = (3, 2, _gradient.MOST_CLASSES + 9)
    given = CASE.arguments(Draw(generator, torch.float32), shape, loss, "bias weights damping")
    with forms.settings("rows"):
        check(CASE, given, "triton", loss)


@forms.dtypes
@pytest.mark.parametrize(("form", "most_classes"), [("rows", 4096), ("rows", 20), ("flash", 4096)])
@pytest.mark.parametrize("variant", CASE.variants)
def test_slabs_of_rows(variant, form, most_classes, dtype, generator):
    """A limit of one byte: slabs of 16 rows, the last one shorter, add up in float32; damping is added once."""
    draw = Draw(generator, dtype)
    given = CASE.arguments(draw, (38, 2, 30), draw.choice(tuple(LOSSES)), variant)
    with forms.settings(form, limit=1, flash_bytes=1, most_classes=most_classes):
        check(CASE, given, "triton", f"{form} {variant!r} {dtype}")
        assert [plan.slabs for plan in forms.plans(module)] == [3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", ["bias weights damping"])
def test_slabs_of_classes(variant, dtype, generator):
    given = CASE.arguments(Draw(generator, dtype), (20, 3, 1100), "mse_probs", variant)
    with forms.settings("flash", flash_bytes=1):
        check(CASE, given, "triton", f"{variant!r} {dtype}")
        assert [(plan.columns, plan.slabs) for plan in forms.plans(module)] == [(1024, 2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", CASE.variants)
def test_rows_split_among_programs(variant, dtype, generator):
    """More than 1,024 rows for few tiles of the result: parts, and their sum with the damping."""
    given = CASE.arguments(Draw(generator, dtype), (1100, 3, 5), "cross_entropy", variant)
    with forms.settings("fused"):
        check(CASE, given, "triton", f"{variant!r} {dtype}")
        assert [plan.transposed.parts_shape for plan in forms.plans(module)] == [(2, 5, 3 + ("bias" in variant))]


@pytest.mark.parametrize(
    ("form", "shape", "kernels"),
    [
        ("rows", (20, 3, 20), {"whole_rows"}),
        ("fused", (20, 3, 20), {"product_rows", "transposed_product"}),
        ("flash", (20, 3, 140), {"sweep_product", "rows_of_statistics"}),
    ],
)
def test_every_tile(form, shape, kernels, generator):
    assert forms.check_every_tile(CASE, form, shape, VARIANTS, generator) == kernels


@losses
@forms.forms
def test_non_finite_numbers(form, loss, generator):
    forms.check_non_finite(CASE, form, loss, generator)
    if form == "rows":
        forms.check_non_finite(CASE, form, loss, generator, most_classes=20)


@pytest.mark.parametrize("kind", ["transposed", "row-stride", "column-step", "row-step", "offset"])
@forms.forms
def test_strides(form, kind, generator):
    variant = "bias weights damping"
    plain = CASE.arguments(Draw(generator, torch.bfloat16), (37, 9, 21), "mse_probs", variant)
    given = map_tensors(lambda t: strided(t, kind), plain)
    with forms.settings(form, limit=1, flash_bytes=1):
        check(CASE, given, "triton", f"{form} {variant!r} {kind}", plain)


@pytest.mark.parametrize("damping", [0.0, 0.5])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", [(0, 3, 2), (4, 0, 2), (4, 3, 0), (4, 3, 2)], ids=str)
def test_the_bias_of_the_raw_operator(shape, with_bias, damping):
    """Empty where the direction has none; without examples, the damping alone."""
    n, d, c = shape
    weight, bias = torch.ones(c, d, device=DEVICE), torch.ones(c, device=DEVICE)
    got_weight, got_bias = module.hessian_vector_product(
        torch.ones(n, d, device=DEVICE), torch.zeros(n, c, device=DEVICE), weight, bias if with_bias else None, None,
        LOSSES["mse"], damping,
    )  # fmt: skip
    assert got_bias.shape == ((c,) if with_bias else (0,))
    tangent = d + with_bias
    torch.testing.assert_close(got_weight, (2 * n * tangent + damping) * weight)
    if with_bias:
        torch.testing.assert_close(got_bias, (2 * n * tangent + damping) * bias)


@pytest.mark.parametrize("damping", [-1.0, float("nan"), float("inf")])
def test_damping_is_checked(damping):
    one = torch.ones(1, 1, device=DEVICE)
    with pytest.raises(ValueError, match="damping must be finite and >= 0"):
        module.hessian_vector_product(one, one, one, None, None, 0, damping)


@pytest.mark.parametrize(
    ("form", "shape", "most_classes"),
    [("rows", (70, 2, 30), 4096), ("rows", (70, 2, 30), 20), ("fused", (1100, 2, 5), 4096), ("flash", (70, 2, 30), 20)],
)
def test_deterministic(form, shape, most_classes, generator):
    given = CASE.arguments(Draw(generator, torch.bfloat16), shape, "cross_entropy", "bias weights damping")
    with forms.settings(form, limit=1, flash_bytes=1, most_classes=most_classes):
        first, again = CASE.call(given, "triton"), CASE.call(given, "triton")
        assert all(map(torch.equal, first, again))
