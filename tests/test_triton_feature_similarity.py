"""Feature similarity's forms and tiles on a GPU or under Triton's interpreter, each forced."""

import pytest
import torch
from cases import CASES, DEVICE, Draw, map_tensors
from kernel_checks import check

pytest.importorskip("triton")
from fastmeta import ops
from fastmeta.ops.feature_similarity import gram_is_cheaper
from fastmeta.triton_kernels import _forms, _tuning
from fastmeta.triton_kernels import feature_similarity as module

CASE = next(case for case in CASES if case.name == "feature_similarity")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
variants = pytest.mark.parametrize("variant", CASE.variants)
pytestmark = pytest.mark.skipif("triton" not in CASE.operator.implementations(DEVICE), reason="no Triton kernel here")


def arguments(draw: Draw, nu: int, nh: int, d: int, c: int, variant: str = "bias") -> dict:
    made = CASE.arguments(draw, (nu, d, c), None, variant)
    return made | {"features_h": draw.normal(nh, d), "residual_h": draw.normal(nh, c)}


@dtypes
def test_every_tile(dtype, generator):
    draw = Draw(generator, dtype)
    for tile in module.TILES:
        given = arguments(draw, tile.rows + 3, tile.held_out + 5, tile.features + 7, tile.classes - 1)
        with _forms.force("fused"), _tuning.using("feature_similarity", tile):
            check(CASE, given, "triton", f"{tile} {dtype}")


@dtypes
@variants
@pytest.mark.parametrize("form", ["rows", "fused"])
def test_forms(form, variant, dtype, generator):
    draw = Draw(generator, dtype)
    # Many entries each: what the library writes between its products is rounded, as in eager PyTorch, but not alike.
    for shape in [(33, 20, 40, 70), (25, 64, 130, 10), (40, 300, 3, 33)]:
        given = arguments(draw, *shape, variant)
        with _forms.force(form):
            check(CASE, given, "triton", f"{form} {shape} {variant} {dtype}")


@dtypes
@variants
def test_one_entry(variant, dtype, generator):
    for _ in range(20):
        check(CASE, arguments(Draw(generator, dtype), 1, 1, 1, 1, variant), "triton", f"{variant} {dtype}")


@dtypes
@variants
@pytest.mark.parametrize("gram", [False, True])
def test_both_association_orders(gram, variant, dtype, generator, monkeypatch):
    """The same values by either order; the reference takes one of them."""
    for name in ("gram_is_cheaper", "_library_seconds"):
        monkeypatch.setattr(module, name, lambda order, *rest: order != gram if len(rest) > 3 else gram)
    draw = Draw(generator, dtype)
    shape = (20, 12, 90, 80) if gram else (70, 90, 20, 10)
    assert gram_is_cheaper(*shape) == gram
    with _forms.force("rows"):
        check(CASE, arguments(draw, *shape, variant), "triton", f"{gram} {variant} {dtype}")


def plan(shape, dtype, bias=True):
    nu, nh, d, c = shape
    empty = [torch.empty(size, dtype=dtype, device="meta") for size in ((nu, d), (nh, d), (nh, c))]
    return module._Plan(*empty, bias, "ieee")


def test_choices(monkeypatch):
    monkeypatch.setattr(_forms, "chip", lambda: _forms.CHIPS[90])
    half, single = torch.bfloat16, torch.float32
    for dtype in (half, single):
        assert plan((256, 256, 128, 10), dtype).launch is not None
        assert plan((1024, 1024, 2048, 1000), dtype).launch is None
        assert plan((1024, 1024, 2048, 1000), dtype).gram
        assert not plan((8192, 8192, 2048, 1000), dtype).gram
    for shape in ((448, 448, 128, 100), (768, 768, 512, 200)):  # two launches at most
        for dtype in (half, single):
            chosen = plan(shape, dtype)
            assert chosen.launch is not None or chosen.gram, shape
    assert not plan((768, 768, 512, 200), torch.float16, bias=False).gram  # similarities may exceed 65,504


@pytest.mark.parametrize("form", ["rows", "fused"])
def test_strides(form, generator):
    plain = arguments(Draw(generator, torch.float32), 18, 21, 35, 17)
    for change in (lambda t: t.mT.contiguous().mT, lambda t: t.repeat_interleave(2, 1)[:, ::2]):
        with _forms.force(form):
            check(CASE, map_tensors(change, plain), "triton", form, plain)


@pytest.mark.parametrize("form", ["rows", "fused"])
@variants
def test_empty(form, variant, generator):
    for shape in [(0, 3, 4, 5), (4, 0, 3, 5), (4, 3, 0, 5), (4, 0, 0, 5)]:
        given = arguments(Draw(generator, torch.float32), *shape, variant)
        if shape[0] == 0 and form == "fused":
            continue  # nothing to launch
        with _forms.force(form):
            check(CASE, given, "triton", f"{shape} {variant}")
    given = arguments(Draw(generator, torch.float32), 4, 3, 2, 0, variant)
    assert CASE.call(given, "triton")[0].shape == (4, 0)


@dtypes
@pytest.mark.parametrize("form", ["rows", "fused"])
def test_the_same_bits_again(form, dtype, generator):
    given = arguments(Draw(generator, dtype), 40, 70, 50, 20)
    with _forms.force(form):
        assert torch.equal(*(CASE.call(given, "triton")[0] for _ in range(2)))


def test_similarities_beyond_half_precision_s_range():
    """The fused form keeps them in float32: two terms cancel but for their rounding, which differs by the BLAS."""
    ones = torch.full((2, 64), 64.0, dtype=torch.float16, device=DEVICE)
    residual = torch.tensor([[1e-3], [-1e-3]], dtype=torch.float16, device=DEVICE)
    with _forms.force("fused"):
        got = ops.feature_similarity(ones, ones, residual, impl="triton")
    terms = (64.0**3 + 1) * residual.double().abs().sum()
    assert got.abs().max() <= torch.finfo(torch.float32).eps * terms, "NaN if they were infinite"


def test_a_scale_may_be_an_integer(generator):
    given = arguments(Draw(generator, torch.float32), 5, 6, 7, 8)
    for scale in (1, 0.25, -3):
        with _forms.force("fused"):
            check(CASE, given | {"scale": scale}, "triton", f"scale {scale}")


def test_there_is_no_flash_form():
    with _forms.force("flash"), pytest.raises(ValueError, match="feature_similarity has no form 'flash'"):
        plan((256, 256, 128, 10), torch.float32)
