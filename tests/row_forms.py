"""What the tests of the two operators with a result per row share: their forms, each forced, at many small shapes."""

import contextlib
import itertools
from collections.abc import Iterator

import pytest
import torch
from cases import CASES, DEVICE, Case, Draw, Shape, map_tensors
from kernel_checks import check, strided

pytest.importorskip("triton")
from fastmeta.triton_kernels import _forms, _products, _tuning
from fastmeta.triton_kernels._products import ProductTile

FORMS = ("rows", "fused", "flash")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
forms = pytest.mark.parametrize("form", FORMS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# Tile edges: one of everything, around 16, operands that are aligned and that are not, classes beyond a flash tile.
SHAPES = [(1, 1, 1), (17, 5, 3), (16, 64, 16), (5, 130, 129), (20, 24, 200)]
SMALL = ProductTile(16, 16, 16, 4, 2)  # in place of the flash tiles: many tiles at small shapes


def case(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


def available(case: Case) -> pytest.MarkDecorator:
    return pytest.mark.skipif("triton" not in case.operator.implementations(DEVICE), reason="no Triton kernel here")


@contextlib.contextmanager
def settings(form: str, *, limit: int | None = None, flash_tile: ProductTile | None = None) -> Iterator[None]:
    """A form, with slabs of at most so many bytes, and with one tile in place of the flash form's."""
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        if flash_tile is not None:
            patch.setattr(_products, "FLASH_TILES", dict.fromkeys(_products.FLASH_TILES, (flash_tile,) * 2))
        stack.enter_context(_forms.force(form))
        if limit is not None:
            stack.enter_context(_forms.slab_limit(limit))
        yield


def check_forms(case: Case, form: str, loss: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    draw = Draw(generator, dtype)
    with settings(form):
        for shape in SHAPES[draw.integer(0, 2) :: 2]:
            variant = draw.choice(case.variants)
            note = f"{form} {case.name} {shape} {loss} {variant!r} {dtype}"
            check(case, case.arguments(draw, shape, loss, variant), "triton", note)


def check_strides(case: Case, form: str, kind: str, generator: torch.Generator) -> None:
    draw = Draw(generator, torch.float32)
    variant = draw.choice(case.variants)
    plain = case.arguments(draw, (19, 24, 40), "mse_probs", variant)
    with settings(form):
        check(case, map_tensors(lambda t: strided(t, kind), plain), "triton", f"{form} {kind} {variant!r}", plain)


@contextlib.contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """``ieee`` or ``tf32``."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = precision
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def check_every_tile(case: Case, form: str, shapes: list[Shape], generator: torch.Generator) -> set[object]:
    """Every tile of every kernel that a form takes at these shapes; returns the tiles."""
    seen: set[object] = set()
    kinds = [(torch.float32, "ieee"), (torch.float32, "tf32"), (torch.bfloat16, "ieee")]
    for (dtype, precision), shape in itertools.product(kinds, shapes):
        if form == "fused" and not _products.fused_tiles(shape[2], dtype, precision, True):
            continue
        draw = Draw(generator, dtype)
        variant = draw.choice([v for v in case.variants if "head" not in v])  # a head may be refused the widest tile
        given = case.arguments(draw, shape, "mse_probs", variant)
        with float32_products(precision), settings(form):
            with _tuning.requested() as requests:
                case.call(given, "triton")
            for kernel, _, table in list(dict.fromkeys(requests)):
                for tile in set(table) - seen:
                    seen.add(tile)
                    with _tuning.using(kernel, tile):
                        check(case, given, "triton", f"{kernel} {tile} {form} {shape} {dtype}")
    return seen


def check_long_rows(case: Case, form: str, loss: str, classes: int, generator: torch.Generator) -> None:
    """Logits that rise, fall and are masked along the row: the running maximum changes often, or late, or never."""
    draw = Draw(generator, torch.float32)
    variant = draw.choice([v for v in case.variants if "head" not in v])
    given = case.arguments(draw, (6, 4, classes), loss, variant)
    f = given["logits"]
    ramp = torch.linspace(-60, 60, classes, device=DEVICE)
    f[0] += ramp
    f[1] -= ramp
    if loss in ("cross_entropy", "mse_probs"):
        f[2, : classes - 7] = float("-inf")
        f[3, 5:] = float("-inf")
        f[4, ::2] = float("-inf")
    with settings(form, flash_tile=SMALL):
        check(case, given, "triton", f"{form} {loss} {variant!r}")


def check_non_finite(case: Case, form: str, loss: str, generator: torch.Generator) -> None:
    """NaN and infinities come out in the rows where the reference has them, and nowhere else."""
    draw = Draw(generator, torch.float32)
    for bad in (float("nan"), float("inf"), float("-inf")):
        given = case.arguments(draw, (6, 8, 40), loss, "bias")
        for name in {"features", "logits", draw.choice(["targets", "direction_bias"])} & set(given):
            dirty = given | {name: given[name].clone()}
            dirty[name][(2, 3)[2 - dirty[name].dim() :]] = bad
            with settings(form, flash_tile=SMALL):
                clean, got = (case.call(one, "triton")[0] for one in (given, dirty))
            expected = case.call(dirty, "reference")[0]
            note = f"{bad} in {name}, {form} {case.name} {loss}"
            assert torch.equal(got.isfinite(), expected.isfinite()), note
            assert bad == bad or torch.equal(got.isnan(), expected.isnan()), note
            if name != "direction_bias":
                others = torch.arange(6, device=DEVICE) != 2
                assert torch.equal(got[others], clean[others]), note


def check_all_masked(case: Case, form: str, loss: str, generator: torch.Generator) -> None:
    given = case.arguments(Draw(generator, torch.float32), (5, 8, 40), loss, "bias")
    given["logits"][3] = float("-inf")
    with settings(form, flash_tile=SMALL):
        got = case.call(given, "triton")[0]
    assert got[3].isnan().all()
    assert got[:3].isfinite().all()
    assert got[4].isfinite().all()


def plans(module: object) -> list:
    return list(module._PLANS.values())  # type: ignore[attr-defined]
