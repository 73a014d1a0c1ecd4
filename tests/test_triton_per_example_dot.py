"""The forms of ``per_example_dot`` on a GPU or under Triton's interpreter, each forced."""

import pytest
import row_forms as forms
import torch
from cases import DEVICE, Draw
from kernel_checks import check

from fastmeta.losses import LOSSES

pytest.importorskip("triton")
from fastmeta.triton_kernels import _forms, _launch, _products
from fastmeta.triton_kernels import per_example_dot as module

CASE = forms.case("per_example_dot")
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
    seen = forms.check_every_tile(CASE, "rows", [(2, 3, tile.classes - 1) for tile in module._ROW_TILES], generator)
    assert seen == set(module._ROW_TILES)
    classes = [tile.classes for tile in _products.FUSED_TILES["half"]]
    seen = forms.check_every_tile(CASE, "fused", [(17, 72, c - 1) for c in classes], generator)
    assert seen == set(sum(_products.FUSED_TILES.values(), ()))
    seen = forms.check_every_tile(CASE, "flash", [(130, 72, 140)], generator)
    assert seen == set(sum(_products.FLASH_TILES.values(), ()))


@losses
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


@losses
@pytest.mark.parametrize("form", ["rows", "flash"])
def test_long_rows(form, loss, generator):
    """More classes than a row tile holds; many flash tiles."""
    forms.check_long_rows(CASE, form, loss, 8800 if form == "rows" else 1100, generator)


@softmax_losses
def test_one_program_for_a_long_row(loss, generator, monkeypatch):
    """Sums over hundreds of tiles, with every tangent of one sign."""
    monkeypatch.setattr(module, "splits", lambda *sizes: 1)
    given = CASE.arguments(Draw(generator, torch.float32), (4, 4, 8200), loss, "bias")
    given["direction_bias"] += 20
    with forms.settings("flash", flash_tile=forms.SMALL):
        check(CASE, given, "triton", loss)
        assert [(plan.shares, plan.tiles) for plan in forms.plans(module)] == [(1, 513)]


@losses
@pytest.mark.parametrize("variant", ["bias", "head bias", "head head-without-bias classes"])
def test_slabs_of_rows(variant, loss, generator):
    dtype = Draw(generator).choice(forms.DTYPES)
    given = CASE.arguments(Draw(generator, dtype), (70, 6, 30), loss, variant)
    with forms.settings("rows"):
        whole = CASE.call(given, "triton")[0]
    with forms.settings("rows", limit=2000):
        check(CASE, given, "triton", f"{loss} {variant!r} {dtype}")
        assert [plan.slab < 70 for plan in forms.plans(module)] == [True]
        torch.testing.assert_close(CASE.call(given, "triton")[0], whole)


@losses
@forms.forms
def test_non_finite(form, loss, generator):
    forms.check_non_finite(CASE, form, loss, generator)


@softmax_losses
@forms.forms
def test_nothing_but_masked_classes(form, loss, generator):
    forms.check_all_masked(CASE, form, loss, generator)


@losses
@forms.forms
def test_class_that_does_not_exist(form, loss, generator):
    """Its row is NaN where to raise would wait for the GPU; on the CPU the operator raises."""
    given = CASE.arguments(Draw(generator, torch.float32), (5, 8, 40), loss, "classes bias")
    with forms.settings(form, flash_tile=forms.SMALL):
        clean = CASE.call(given, "triton")[0]
        (plan,) = forms.plans(module)
        for wrong in (-1, 40 if form == "rows" else 2**40):
            given["targets"][2] = wrong
            arguments = CASE.raw(given)[:-1]
            got = plan(*arguments)
            assert got[2].isnan()
            assert torch.equal(got[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])
            if DEVICE == "cpu":
                with pytest.raises(ValueError, match=r"classes in \[0, 40\)"):
                    CASE.call(given, "triton")


def test_form_and_precision_are_part_of_the_plan(generator):
    given = CASE.arguments(Draw(generator, torch.float32), (20, 8, 10), "cross_entropy", "bias")
    _launch.forget_plans()
    CASE.call(given, "triton")
    CASE.call(given, "triton")
    assert len(forms.plans(module)) == 1
    with forms.float32_products("tf32"):
        CASE.call(given, "triton")
        assert len(forms.plans(module)) == 2
    with _forms.force("rows"):
        CASE.call(given, "triton")
        assert [plan.slab for plan in forms.plans(module)] == [20]


def test_programs_that_share_classes():
    """As many as fill the processors evenly, and no more than there are tiles."""
    processors = _forms.chip().processors
    assert _products.splits(processors, 1000) == 1
    assert _products.splits(1, 4) == 4
    assert _products.splits(processors // 2, 1000) == 2
    for blocks in (1, 3, 64, 100, processors + 1):
        count = _products.splits(blocks, 1000)
        waves = -(-blocks * count // processors)
        assert waves * -(-1000 // count) <= -(-blocks // processors) * 1000
