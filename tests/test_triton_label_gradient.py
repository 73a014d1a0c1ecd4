"""The forms of ``label_gradient`` on a GPU or under Triton's interpreter, each forced."""

import math

import pytest
import row_forms as forms
import torch
from cases import Draw
from kernel_checks import check

from fastmeta import ops
from fastmeta.losses import LOSSES

pytest.importorskip("triton")
from fastmeta.triton_kernels import _products
from fastmeta.triton_kernels import label_gradient as module

CASE = forms.case("label_gradient")
losses = pytest.mark.parametrize("loss", LOSSES)
softmax_losses = pytest.mark.parametrize("loss", ["cross_entropy", "mse_probs"])
pytestmark = forms.available(CASE)


@forms.dtypes
@losses
@forms.forms
def test_forms(form, loss, dtype, generator):
    forms.check_forms(CASE, form, loss, dtype, generator)


@forms.forms
@pytest.mark.parametrize("kind", ["transposed", "row-stride", "column-step", "row-step", "offset"])
def test_strides(kind, form, generator):
    forms.check_strides(CASE, form, kind, generator)


def test_every_tile(generator):
    shapes = [(2, 3, tile.classes - 1) for tile in _products.ROW_TILES]
    assert forms.check_every_tile(CASE, "rows", shapes, generator) == set(_products.ROW_TILES)
    classes = [tile.classes for tile in _products.FUSED_TILES["half"]]
    seen = forms.check_every_tile(CASE, "fused", [(17, 72, c - 1) for c in classes], generator)
    assert seen == set(sum(_products.FUSED_TILES.values(), ()))
    seen = forms.check_every_tile(CASE, "flash", [(130, 72, 140)], generator)
    assert seen == set(sum(_products.FLASH_TILES.values(), ()))


@softmax_losses
@pytest.mark.parametrize("variant", CASE.variants)
def test_shares_of_the_classes(variant, loss, generator, monkeypatch):
    """Several tiles for each program, several programs for each row; the last has fewer tiles."""
    monkeypatch.setattr(module, "splits", lambda *sizes: 3)
    given = CASE.arguments(Draw(generator, torch.float32), (20, 24, 16 * 7 + 3), loss, variant)
    with forms.settings("flash", flash_tile=forms.SMALL):
        check(CASE, given, "triton", f"{loss} {variant!r}")
        assert [(plan.shares, plan.tiles) for plan in forms.plans(module)] == [(3, 3)]
        first, again = (CASE.call(given, "triton")[0] for _ in range(2))
    assert torch.equal(first, again)


@forms.dtypes
@softmax_losses
@pytest.mark.parametrize("variant", CASE.variants)
def test_two_sweeps_over_rows_that_no_tile_holds(variant, loss, dtype, generator):
    given = CASE.arguments(Draw(generator, dtype), (3, 4, 8200), loss, variant)
    with forms.settings("rows"):
        check(CASE, given, "triton", f"{loss} {variant!r} {dtype}")
        assert [plan.whole for plan in forms.plans(module)] == [False]


@softmax_losses
@pytest.mark.parametrize("form", ["rows", "flash"])
def test_long_rows(form, loss, generator):
    """More classes than a row tile holds; many flash tiles."""
    forms.check_long_rows(CASE, form, loss, 8800 if form == "rows" else 1100, generator)


@softmax_losses
@pytest.mark.parametrize("variant", ["head bias scale", "head head-without-bias"])
@pytest.mark.parametrize("classes", [30, 8200])
def test_slabs_of_rows(classes, variant, loss, generator):
    """A head's logits are made for a few rows at a time; the last slab is shorter."""
    dtype = Draw(generator).choice(forms.DTYPES)
    given = CASE.arguments(Draw(generator, dtype), (17, 6, classes), loss, variant)
    with forms.settings("rows", limit=7 * classes * dtype.itemsize):
        check(CASE, given, "triton", f"{loss} {variant!r} {dtype}")
        assert [plan.slab for plan in forms.plans(module)] == [7]


@forms.dtypes
@pytest.mark.parametrize("loss", ["binary_cross_entropy", "mse"])
def test_losses_without_a_softmax_are_a_product(loss, dtype, generator):
    """Whatever the logits are, and whatever lies in the memory of the result."""
    for variant, form in [("bias", "rows"), ("scale", "rows"), ("head bias scale", "flash"), ("bias", "fused")]:
        given = CASE.arguments(Draw(generator, dtype), (9, 6, 30), loss, variant)
        with forms.settings(form):
            check(CASE, given, "triton", f"{loss} {variant!r} {dtype}")
            before = CASE.call(given, "triton")[0]
            if "head" not in variant:
                given["logits"].fill_(float("nan"))
                assert torch.equal(CASE.call(given, "triton")[0], before)


@losses
@forms.forms
def test_scales(form, loss, generator):
    """One plan for all of them: an int, zero and 1 as well."""
    given = CASE.arguments(Draw(generator, torch.float32), (9, 8, 30), loss, "bias")
    with forms.settings(form):
        for scale in (1, 0.25, 0, -3, 1e-20):
            check(CASE, given | {"scale": scale}, "triton", f"{form} {loss} {scale}")
        for scale in (math.inf, math.nan):
            with pytest.raises(ValueError, match="scale must be finite"):
                ops.label_gradient(**given | {"scale": scale}, impl="triton")
        assert len(forms.plans(module)) == 1


@losses
@forms.forms
def test_non_finite(form, loss, generator):
    forms.check_non_finite(CASE, form, loss, generator)


@softmax_losses
@forms.forms
def test_nothing_but_masked_classes(form, loss, generator):
    forms.check_all_masked(CASE, form, loss, generator)
