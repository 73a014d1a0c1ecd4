"""The last-layer gradient's forms on a GPU or under Triton's interpreter, each forced."""

import gradient_forms as forms
import pytest
import torch
from cases import DEVICE, Draw, map_tensors
from kernel_checks import check, strided

from fastmeta import Head, ops
from fastmeta.losses import LOSSES

pytest.importorskip("triton")
from fastmeta.triton_kernels import _forms, _gradient
from fastmeta.triton_kernels import last_layer_gradient as module

CASE = forms.case("last_layer_gradient")
VARIANTS = (
    "weights unnormalized",
    "head weights",
    "head head-without-bias classes weights",
)
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
@pytest.mark.parametrize("variant", ["weights unnormalized", "head weights"])
def test_more_classes_than_a_tile_holds(variant, loss, generator):
    given = CASE.arguments(Draw(generator, torch.float32), (3, 2, _gradient.MOST_CLASSES + 9), loss, variant)
    with forms.settings("rows"):
        check(CASE, given, "triton", f"{loss} {variant}")


@forms.dtypes
@pytest.mark.parametrize("form", ["rows", "flash"])
@pytest.mark.parametrize("variant", CASE.variants)
def test_slabs_of_rows(variant, form, dtype, generator):
    """A limit of one byte: slabs of 16 rows, the last one shorter, add up in float32."""
    draw = Draw(generator, dtype)
    given = CASE.arguments(draw, (38, 2, 30), draw.choice(tuple(LOSSES)), variant)
    with forms.settings(form, limit=1, flash_bytes=1):
        check(CASE, given, "triton", f"{form} {variant!r} {dtype}")
        assert [plan.slabs for plan in forms.plans(module)] == [3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", ["weights unnormalized", "head weights"])
def test_slabs_of_classes(variant, dtype, generator):
    given = CASE.arguments(Draw(generator, dtype), (20, 3, 1100), "mse_probs", variant)
    with forms.settings("flash", flash_bytes=1):
        check(CASE, given, "triton", f"{variant!r} {dtype}")
        assert [(plan.columns, plan.slabs) for plan in forms.plans(module)] == [(1024, 2)]


def test_given_long_rows_go_by_classes(generator):
    given = CASE.arguments(Draw(generator, torch.bfloat16), (20, 3, 1100), "cross_entropy", "weights unnormalized")
    with forms.settings("rows", limit=1, most_classes=20):
        check(CASE, given, "triton", "slabs of classes")
        assert [plan.columns for plan in forms.plans(module)] == [1024]


def test_slabs_are_not_smaller_than_they_are_worth():
    """At least four times the result; 16-bit results in one where their sum in float32 would take as much."""
    rows = _gradient._slab_rows
    assert rows(10**6, 64, 1000, torch.float32, 2 << 20) == 2**21 // 4000 // 16 * 16
    assert rows(10**6, 2048, 128256, torch.bfloat16, 256 << 20) == 4 * 2048
    assert rows(7 * 2048, 2048, 128256, torch.bfloat16, 256 << 20) == 7 * 2048
    assert rows(7 * 2048 + 1, 2048, 128256, torch.bfloat16, 256 << 20) == 4 * 2048
    assert rows(4 * 2048 + 1, 2048, 128256, torch.float32, 256 << 20) == 4 * 2048
    assert all(rows(n, d, c, torch.float32, 1) % 16 == 0 for n, d, c in [(999, 1, 1), (999, 7, 5), (999, 33, 100)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@losses
def test_rows_split_among_programs(loss, dtype, generator):
    """More than 1,024 rows for few tiles of the result: parts, and their sum."""
    given = CASE.arguments(Draw(generator, dtype), (1100, 3, 5), loss, "weights unnormalized")
    with forms.settings("fused"):
        check(CASE, given, "triton", f"{loss} {dtype}")
        assert [plan.transposed.parts_shape for plan in forms.plans(module)] == [(2, 5, 4)]


@pytest.mark.parametrize(
    ("form", "shape", "kernels"),
    [
        ("rows", (20, 3, 20), {"whole_rows"}),
        ("fused", (20, 3, 20), {"whole_rows", "product_rows", "transposed_product"}),
        ("flash", (20, 3, 140), {"sweep", "sweep_product", "rows_of_statistics"}),
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


@pytest.mark.parametrize("loss", ["cross_entropy", "mse_probs"])
@pytest.mark.parametrize(("form", "how"), [("rows", {}), ("fused", {}), ("flash", {}), ("rows", {"most_classes": 20})])
def test_masked_classes(form, how, loss, generator):
    """-inf in a tile's every class, and in all but one: probability 0, not NaN; nothing but -inf: NaN."""
    draw = Draw(generator, torch.float32)
    given = CASE.arguments(draw, (4, 3, 200), loss, "")
    given["logits"][:2, :150] = float("-inf")
    given["logits"][2, 1:] = float("-inf")
    with forms.settings(form, **how):
        check(CASE, given, "triton", f"{form} {loss}")
        given["logits"][3] = float("-inf")
        assert all(part.isnan().all() for part in CASE.call(given, "triton"))


@pytest.mark.parametrize("kind", ["transposed", "row-stride", "column-step", "row-step", "offset"])
@forms.forms
def test_strides(form, kind, generator):
    draw = Draw(generator, torch.bfloat16)
    variant = draw.choice(CASE.variants)
    plain = CASE.arguments(draw, (37, 9, 21), "mse_probs", variant)
    given = map_tensors(lambda t: strided(t, kind), plain)
    with forms.settings(form, limit=1, flash_bytes=1):
        check(CASE, given, "triton", f"{form} {variant!r} {kind}", plain)


@forms.forms
def test_weight_zero_leaves_a_row_out(form, generator):
    draw = Draw(generator, torch.float32)
    given = CASE.arguments(draw, (12, 5, 7), "cross_entropy", "weights unnormalized")
    given["weights"][::2] = 0
    kept = {name: value[1::2] if isinstance(value, torch.Tensor) else value for name, value in given.items()}
    with forms.settings(form):
        for all_rows, odd_rows in zip(CASE.call(given, "triton"), CASE.call(kept, "triton"), strict=True):
            torch.testing.assert_close(all_rows, odd_rows)


@pytest.mark.parametrize(
    ("form", "shape", "most_classes"),
    [("rows", (70, 2, 30), 4096), ("rows", (70, 2, 30), 20), ("fused", (1100, 2, 5), 4096), ("flash", (70, 2, 30), 20)],
)
def test_deterministic(form, shape, most_classes, generator):
    given = CASE.arguments(Draw(generator, torch.bfloat16), shape, "cross_entropy", "weights unnormalized")
    with forms.settings(form, limit=1, flash_bytes=1, most_classes=most_classes):
        first, again = CASE.call(given, "triton"), CASE.call(given, "triton")
        assert all(map(torch.equal, first, again))


@forms.forms
@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("bad", [-1, 7])
def test_a_class_that_does_not_exist(bad, head, form):
    """An error on the CPU; on a GPU, where the check would be a wait, NaN."""
    h, w = torch.ones(3, 2, device=DEVICE), torch.ones(7, 2, device=DEVICE)
    f = Head(w) if head else h @ w.T
    classes = torch.tensor([0, bad, 1], device=DEVICE)
    with _forms.force(form):
        ops.last_layer_gradient(h, f, classes.clamp(0, 6), impl="triton")
        if DEVICE == "cpu":
            with pytest.raises(ValueError, match=r"classes in \[0, 7\)"):
                ops.last_layer_gradient(h, f, classes, impl="triton")
        else:
            assert all(part.isnan().all() for part in ops.last_layer_gradient(h, f, classes, impl="triton"))
