"""Feature similarity's forms and tiles on a GPU or under Triton's interpreter, each forced."""

import pytest
import torch
from cases import CASES, DEVICE, Draw, map_tensors
from kernel_checks import check

pytest.importorskip("triton")
from fastmeta import ops
from fastmeta.ops.feature_similarity import gram_is_cheaper
from fastmeta.triton_kernels import _rule
from fastmeta.triton_kernels import feature_similarity as module

CASE = next(case for case in CASES if case.name == "feature_similarity")
HALF = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, *HALF]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
FORMS = [("rows", dtype) for dtype in DTYPES] + [("fused", dtype) for dtype in HALF]
forms = pytest.mark.parametrize(("form", "dtype"), FORMS, ids=str)
variants = pytest.mark.parametrize("variant", CASE.variants)
pytestmark = pytest.mark.skipif("triton" not in CASE.operator.implementations(DEVICE), reason="no Triton kernel here")


def arguments(draw: Draw, nu: int, nh: int, d: int, c: int, variant: str = "bias") -> dict:
    made = CASE.arguments(draw, (nu, d, c), None, variant)
    return made | {"features_h": draw.normal(nh, d), "residual_h": draw.normal(nh, c)}


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_every_width(dtype, generator):
    draw = Draw(generator, dtype)
    for classes in (16, 32, 64, 128):
        given = arguments(draw, 19, 37, 71, classes - 1)
        with _rule.force("fused"):
            check(CASE, given, "triton", f"{classes} {dtype}")


@forms
@variants
def test_forms(form, variant, dtype, generator):
    draw = Draw(generator, dtype)
    # Many entries each: what the library writes between its products is rounded, as in eager PyTorch, but not alike.
    for shape in [(33, 20, 40, 70), (25, 64, 130, 10), (40, 300, 3, 33)]:
        given = arguments(draw, *shape, variant)
        with _rule.force(form):
            check(CASE, given, "triton", f"{form} {shape} {variant} {dtype}")


@dtypes
@variants
def test_one_entry(variant, dtype, generator):
    """Fused in 16 bits: the rounding between the products of ``rows`` is not that of eager PyTorch."""
    for _ in range(20):
        with _rule.force("rows" if dtype == torch.float32 else "fused"):
            check(CASE, arguments(Draw(generator, dtype), 1, 1, 1, 1, variant), "triton", f"{variant} {dtype}")


@dtypes
@variants
@pytest.mark.parametrize("gram", [False, True])
def test_both_association_orders(gram, variant, dtype, generator):
    """The same values by either order; the reference takes one of them."""
    draw = Draw(generator, dtype)
    shape = (20, 12, 90, 80) if gram else (70, 90, 20, 10)
    assert gram_is_cheaper(*shape) == gram
    with _rule.force("rows"):
        check(CASE, arguments(draw, *shape, variant), "triton", f"{gram} {variant} {dtype}")


@pytest.mark.parametrize("gram", [False, True])
def test_sums_of_residuals_apart(gram, generator):
    """The program for a library without sums in passing."""
    raw = CASE.raw(arguments(Draw(generator, torch.float32), *((20, 12, 90, 80) if gram else (70, 90, 20, 10))))
    with _rule.force("rows"):
        one, other = (module.plan(*raw, sums_apart=apart).run(raw[:3], raw[3:])[0] for apart in (False, True))
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("form", ["rows", "fused"])
def test_strides(form, generator):
    plain = arguments(Draw(generator, torch.bfloat16), 18, 21, 35, 17)
    for change in (lambda t: t.mT.contiguous().mT, lambda t: t.repeat_interleave(2, 1)[:, ::2]):
        with _rule.force(form):
            check(CASE, map_tensors(change, plain), "triton", form, plain)


@pytest.mark.parametrize("form", ["rows", "fused"])
@variants
def test_empty(form, variant, generator):
    for shape in [(0, 3, 4, 5), (4, 0, 3, 5), (4, 3, 0, 5), (4, 0, 0, 5)]:
        given = arguments(Draw(generator, torch.bfloat16), *shape, variant)
        with _rule.force(form):
            check(CASE, given, "triton", f"{shape} {variant}")
    given = arguments(Draw(generator, torch.float32), 4, 3, 2, 0, variant)
    assert CASE.call(given, "triton")[0].shape == (4, 0)


@forms
def test_the_same_bits_again(form, dtype, generator):
    given = arguments(Draw(generator, dtype), 40, 70, 50, 20)
    with _rule.force(form):
        assert torch.equal(*(CASE.call(given, "triton")[0] for _ in range(2)))


def test_similarities_beyond_half_precision_s_range():
    """The fused form keeps them in float32: two terms cancel but for their rounding, which differs by the BLAS."""
    ones = torch.full((2, 64), 64.0, dtype=torch.float16, device=DEVICE)
    residual = torch.tensor([[1e-3], [-1e-3]], dtype=torch.float16, device=DEVICE)
    with _rule.force("fused"):
        got = ops.feature_similarity(ones, ones, residual, impl="triton")
    terms = (64.0**3 + 1) * residual.double().abs().sum()
    assert got.abs().max() <= torch.finfo(torch.float32).eps * terms, "NaN if they were infinite"


def test_a_scale_may_be_an_integer(generator):
    given = arguments(Draw(generator, torch.bfloat16), 5, 6, 7, 8)
    for scale in (1, 0.25, -3):
        with _rule.force("fused"):
            check(CASE, given | {"scale": scale}, "triton", f"scale {scale}")


def test_what_the_fused_form_does_not_take(generator):
    with _rule.force("fused"):
        for dtype, classes, what in ((torch.float32, 8, "16-bit numbers"), (torch.bfloat16, 129, "128 classes")):
            raw = CASE.raw(arguments(Draw(generator, dtype), 5, 6, 7, classes))
            with pytest.raises(ValueError, match=f"fused form takes at most {what}"):
                module.plan(*raw)
