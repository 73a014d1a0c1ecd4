"""The label step's Triton kernels: every tile and the sweeps over long rows, under the interpreter or on a GPU."""

import pytest
import torch
from cases import CASES, DEVICE, Draw, map_tensors
from kernel_checks import check

pytest.importorskip("triton")
from fastmeta import ops
from fastmeta.triton_kernels._last_layer import row_tile

CASE = next(case for case in CASES if case.name == "finite_difference_labels")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
SWEPT = 8200  # more classes than any tile of whole rows has

pytestmark = pytest.mark.skipif("triton" not in CASE.operator.implementations(DEVICE), reason="no Triton kernel here")


@dtypes
def test_every_tile_of_whole_rows(dtype, generator):
    draw = Draw(generator, dtype)
    for classes in (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192):
        tile = row_tile(classes, dtype)
        variant = draw.choice(CASE.variants)
        arguments = CASE.arguments(draw, (min(tile.rows, 16) + 1, 1, classes - draw.integer(0, 4)), None, variant)
        check(CASE, arguments, "triton", f"{tile} {variant} {dtype}")


@dtypes
@pytest.mark.parametrize("variant", CASE.variants)
def test_sweeps(dtype, variant, generator):
    arguments = CASE.arguments(Draw(generator, dtype), (2, 1, SWEPT), None, variant)
    check(CASE, arguments, "triton", f"{variant} {dtype}")


def test_sweeps_of_strided_rows(generator):
    plain = CASE.arguments(Draw(generator, torch.float32), (3, 1, SWEPT), None, "project")
    strided = map_tensors(lambda t: t.mT.contiguous().mT if t.dim() == 2 else t, plain)
    check(CASE, strided, "triton", "transposed", plain)


@pytest.mark.parametrize("c", [70, SWEPT])
def test_masked_and_extreme_logits(c, generator):
    draw = Draw(generator, torch.float32)
    arguments = CASE.arguments(draw, (4, 1, c), None, "project")
    arguments["logits_plus"][:, ::3] = float("-inf")  # whole lanes of a sweep among them
    arguments["logits_minus"][0, :-1] = float("-inf")
    arguments["logits_minus"][1] = 1e4 * draw.normal(c).sign()
    check(CASE, arguments, "triton", "masked")


@pytest.mark.parametrize("c", [70, SWEPT])
@pytest.mark.parametrize("project", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_rows_that_are_not_finite(c, project, bad, generator):
    """A row with NaN, +inf or nothing but -inf is NaN, as in the reference; the others are untouched."""
    draw = Draw(generator, torch.float32)
    for name in ("logits_plus", "logits_minus", "labels"):
        arguments = CASE.arguments(draw, (3, 1, c), None, "project" if project else "")
        clean = CASE.call(arguments, "triton")[0]
        arguments[name][1, slice(None) if bad == float("-inf") else draw.integer(0, c)] = bad
        got, expected = (CASE.call(arguments, impl)[0] for impl in ("triton", "reference"))
        assert torch.equal(got[::2], clean[::2])
        assert torch.equal(got.isnan(), expected.isnan())
        assert torch.equal(got.isinf(), expected.isinf())


@pytest.mark.parametrize("c", [16, SWEPT])
def test_rows_clipped_to_nothing_become_uniform(c):
    labels = torch.full((2, c), -1.0, device=DEVICE)
    labels[1, 0] = 3.0
    logits = torch.zeros(2, c, device=DEVICE)
    got = ops.finite_difference_labels(logits, logits, labels, 1.0, step=0.5, impl="triton")
    assert torch.equal(got[0], torch.full((c,), 1 / c, device=DEVICE))
    assert torch.equal(got[1], torch.eye(1, c, device=DEVICE)[0])


def test_a_step_may_be_an_integer(generator):
    """Triton would compile a 1 into the kernel, and later steps of that layout would be of size 1."""
    arguments = CASE.arguments(Draw(generator, torch.float32), (5, 1, 7), None, "")
    for step in (1, 0.25):
        check(CASE, arguments | {"step": step}, "triton", f"step {step}")
