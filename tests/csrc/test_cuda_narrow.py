"""The CUDA kernels for at most 32 outputs: what is theirs alone, beside test_ops_kernels.py.

Compiled for the CPU there are 8 multiprocessors; the layout for many rows begins at 64 rows for each.
"""

import pytest
import torch
from cases import CASES, DEVICE, Case, Draw, map_tensors
from kernel_checks import check, strided
from torch import Tensor

from fastmeta import Head
from fastmeta.dispatch import NARROW_OUTPUTS
from fastmeta.losses import LOSSES

NARROW = [case for case in CASES if case.narrow and "cuda" in case.operator.implementations(DEVICE) and case.losses[0]]
pytestmark = pytest.mark.skipif(not NARROW, reason="no CUDA kernel")
narrow = pytest.mark.parametrize("case", NARROW, ids=lambda case: case.name)
MULTIPROCESSORS = 8 if DEVICE == "cpu" else torch.cuda.get_device_properties(0).multi_processor_count
MANY = 64 * MULTIPROCESSORS
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def arguments_of(case: Case, generator, shape, dtype=torch.float32, variant=None, loss=None):
    draw = Draw(generator, dtype)
    variant = draw.choice(case.variants) if variant is None else variant
    loss = draw.choice(case.losses) if loss is None else loss
    return case.arguments(draw, shape, loss, variant), f"{case.name} {shape} {loss} {variant!r} {dtype}"


def agree(case: Case, generator, shape, **choices) -> None:
    arguments, note = arguments_of(case, generator, shape, **choices)
    check(case, arguments, "cuda", note)


@narrow
def test_every_number_of_outputs(case, generator):
    for c in range(1, NARROW_OUTPUTS + 1):
        agree(case, generator, (9, 11, c), dtype=DTYPES[c % 3])


@narrow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(MANY + 9, 20, 10), (MANY + 1, 37, 19)], ids=["16", "32"])
def test_many_rows(case, dtype, shape, generator):
    """Sixteen or eight rows a warp; features side by side, and not."""
    for variant in case.variants if dtype == torch.float32 else [None]:
        agree(case, generator, shape, dtype=dtype, variant=variant)


@narrow
@pytest.mark.parametrize("loss", LOSSES)
def test_losses_with_many_rows(case, loss, generator):
    for c in (3, 21):
        agree(case, generator, (MANY, 8, c), loss=loss)


@narrow
def test_blocks_with_several_chunks_of_rows(case, generator):
    """More rows than four blocks of 128 on each multiprocessor: partial sums grow."""
    agree(case, generator, (8 * MANY + 5, 5, 2), variant=case.variants[0])


@narrow
@pytest.mark.parametrize("n", [5, MANY], ids=["few", "many"])
def test_factors_beyond_shared_memory(case, n, generator):
    """[32, D] does not fit: it comes in parts, for logits from a head and for the tangent."""
    for variant in case.variants if n == 5 else case.variants[-1:]:
        agree(case, generator, (n, 1001 if n == 5 else 516, 32), variant=variant)


@narrow
@pytest.mark.parametrize("d", [128, 256, 260, 384, 520])
def test_warps_share_the_rows_of_few_features(case, d, generator):
    """Four, two and one warp for each slab of 128 features."""
    agree(case, generator, (50, d, 6))


def moved(tensor: Tensor, kind: str) -> Tensor:
    if kind != "only-row-stride" or not tensor.is_floating_point():
        return strided(tensor, kind)
    view = tensor.new_full((*tensor.shape[:-1], tensor.shape[-1] + 5), float("nan"))[..., : tensor.shape[-1]]
    return view.copy_(tensor)


@narrow
@pytest.mark.parametrize("n", [13, MANY + 3], ids=["few", "many"])
@pytest.mark.parametrize("kind", ["offset", "only-row-stride", "row-stride", "row-step", "transposed", "column-step"])
def test_addresses_that_do_not_allow_vectors(case, n, kind, generator):
    """D is a multiple of four: only the address or the strides tell."""
    for dtype in (torch.float32, torch.bfloat16):
        plain, note = arguments_of(case, generator, (n, 24, 7), dtype)
        check(case, map_tensors(lambda t: moved(t, kind), plain), "cuda", f"{kind} {note}", plain)


@narrow
def test_only_one_operand_is_not_aligned(case, generator):
    """Features and factors are read in one order, whichever of them has no vectors."""
    for name, variant in [("features", ""), ("direction_weight", ""), ("logits", "head")]:
        variant = next((v for v in case.variants if "head" in v), None) if variant else case.variants[0]
        if variant is None or name not in case.shapes:
            continue
        plain, note = arguments_of(case, generator, (10, 40, 5), variant=variant)
        apart = map_tensors(lambda t: strided(t, "offset"), {name: plain[name]})
        check(case, plain | apart, "cuda", f"{name} of {note}", plain)


@narrow
@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
def test_any_order_of_blocks_and_threads(case, order, generator, monkeypatch):
    """A missing barrier, or a sum in the order of arrival, would change bits."""
    if DEVICE != "cpu":
        pytest.skip("the order is the emulator's")
    for shape in [(70, 30, 9), (MANY + 2, 30, 9), (40, 300, 32)]:
        arguments, note = arguments_of(case, generator, shape)
        monkeypatch.delenv("FASTMETA_EMULATION_ORDER", raising=False)
        expected = case.call(arguments, "cuda")
        monkeypatch.setenv("FASTMETA_EMULATION_ORDER", order)
        assert all(map(torch.equal, case.call(arguments, "cuda"), expected)), note


@narrow
@pytest.mark.parametrize("n", [12, MANY], ids=["few", "many"])
def test_non_finite_features_stay_in_their_row(case, n, generator):
    """A row is beside others in a warp and in a tile, and its features beside zeros beyond the last."""
    if not case.per_row:
        pytest.skip("a sum over rows")
    arguments, _ = arguments_of(case, generator, (n, 30, 10))
    clean = case.call(arguments, "cuda")[0]
    for row in (0, n // 2, n - 1):
        features = arguments["features"].clone()
        features[row, -1] = float("inf")
        got = case.call(arguments | {"features": features}, "cuda")[0]
        others = torch.arange(n, device=DEVICE) != row
        assert torch.equal(got[others], clean[others])
        assert not got[row].isfinite().all()


@narrow
def test_a_class_out_of_range_is_no_class(case, generator):
    """The host does not wait to look; nothing beyond the row is read."""
    loss = next((loss for loss in ("mse", *case.losses) if case.reads_targets(loss)), None)
    if loss is None:
        pytest.skip("without targets")
    variant = next(v for v in case.variants if "classes" in v)
    for bad in (-1, 5, 2**62):
        arguments, _ = arguments_of(case, generator, (6, 4, 5), variant=variant, loss=loss)
        arguments["targets"][2] = bad
        ones = torch.nn.functional.one_hot(arguments["targets"].where(arguments["targets"] != bad, 0), 5).float()
        ones[2] = 0
        for got, want in zip(
            case.call(arguments, "cuda"), case.call(arguments | {"targets": ones}, "reference"), strict=True
        ):
            torch.testing.assert_close(got, want)


@narrow
def test_no_rows_leave_the_damping(case, generator):
    arguments, _ = arguments_of(case, generator, (0, 7, 4), variant=case.variants[0])
    if "direction_weight" in arguments and not case.per_row:
        arguments["damping"] = 0.5
    for got, want in zip(case.call(arguments, "cuda"), case.call(arguments, "reference"), strict=True):
        assert torch.equal(got, want)


@narrow
def test_what_it_does_not_take_is_named(case, generator):
    arguments, _ = arguments_of(case, generator, (3, 4, NARROW_OUTPUTS + 1), variant=case.variants[0])
    with pytest.raises(RuntimeError, match="at most 32 outputs, got 33"):
        case.call(arguments, "cuda")
    arguments, _ = arguments_of(case, generator, (3, 4, 2), dtype=torch.float64, variant=case.variants[0])
    with pytest.raises(RuntimeError, match="float64"):
        case.call(arguments, "cuda")


@pytest.mark.parametrize("name", ["per_example_dot", "label_gradient", "last_layer_gradient"])
def test_head_and_logits_agree(name, generator):
    """One pass that recomputes the logits, against logits that are given."""
    case = next((c for c in NARROW if c.name == name), None)
    assert case is not None
    for shape in [(20, 50, 10), (MANY + 7, 50, 10)]:
        arguments, _ = arguments_of(case, generator, shape, variant=next(v for v in case.variants if "head" in v))
        head = arguments["logits"]
        assert isinstance(head, Head)
        given: dict[str, object] = arguments | {"logits": head.logits(arguments["features"])}
        for got, want in zip(case.call(arguments, "cuda"), case.call(given, "cuda"), strict=True):
            assert isinstance(got, Tensor)
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
