"""What the tests of the two sums over N share: their forms, each forced, and ways to make long rows and slabs short."""

import contextlib
from collections.abc import Iterator

import pytest
import torch
from cases import CASES, DEVICE, Case, Draw
from kernel_checks import check

pytest.importorskip("triton")
from fastmeta.triton_kernels import _forms, _gradient, _launch, _tuning

FORMS = ("rows", "fused", "flash")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
forms = pytest.mark.parametrize("form", FORMS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# Tile edges: around 16 and beyond, features and classes that fill no tile. Many entries each: products of the library
# are rounded, as in eager PyTorch, whose error in a single entry may be 0 by chance.
SHAPES = [(17, 16, 16), (5, 40, 33), (20, 35, 130)]
TINY_SHAPES = [(1, 1, 1), (9, 1, 1), (1, 7, 2), (8, 3, 1)]


def case(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


@contextlib.contextmanager
def settings(
    form: str, *, limit: int | None = None, flash_bytes: int | None = None, most_classes: int | None = None
) -> Iterator[None]:
    """A form, with slabs of at most so many bytes, and with rows that are long from so many classes on."""
    before = _gradient.FLASH_BYTES, _gradient.MOST_CLASSES
    with contextlib.ExitStack() as stack:
        stack.enter_context(_forms.force(form))
        if limit is not None:
            stack.enter_context(_forms.slab_limit(limit))
        _gradient.FLASH_BYTES = before[0] if flash_bytes is None else flash_bytes
        _gradient.MOST_CLASSES = before[1] if most_classes is None else most_classes
        try:
            yield
        finally:
            _gradient.FLASH_BYTES, _gradient.MOST_CLASSES = before
            _launch.forget_plans()


def check_forms(case: Case, form: str, loss: str, dtype: torch.dtype, generator: torch.Generator, **how: int) -> None:
    draw = Draw(generator, dtype)
    with settings(form, **how):
        tiny = [draw.choice(TINY_SHAPES)] if dtype == torch.float32 or form == "fused" else []
        for shape in [draw.choice(SHAPES), *tiny]:
            variant = draw.choice(case.variants)
            note = f"{form} {case.name} {shape} {loss} {variant!r} {dtype} {how}"
            check(case, case.arguments(draw, shape, loss, variant), "triton", note)


def plans(module: object) -> list:
    return list(module._PLANS.values())  # type: ignore[attr-defined]


def check_every_tile(
    case: Case, form: str, shape: tuple[int, int, int], variants: tuple[str, ...], generator: torch.Generator
) -> set[str]:
    """Every tile of every kernel that a form takes at a shape; returns the kernels."""
    seen = set()
    for dtype in (torch.float32, torch.bfloat16):
        draw = Draw(generator, dtype)
        for variant in variants:
            given = case.arguments(draw, shape, "mse_probs", variant)
            with settings(form), _tuning.requested() as requests:
                case.call(given, "triton")
                asked = list(dict.fromkeys(requests))
            for kernel, _, table in asked:
                seen.add(kernel)
                for tile in table:
                    with settings(form), _tuning.using(kernel, tile):
                        check(case, given, "triton", f"{kernel} {tile} {form} {shape} {variant!r} {dtype}")
    return seen


def check_non_finite(case: Case, form: str, loss: str, generator: torch.Generator, **how: int) -> None:
    """NaN and infinities in the features, logits and weights come out where the reference has them."""
    draw = Draw(generator, torch.float32)
    for bad in (float("nan"), float("inf"), float("-inf")):
        given = case.arguments(draw, (6, 5, 40), loss, next(v for v in case.variants if "weights" in v))
        for name in ("features", "logits", "weights", "targets"):
            if not isinstance(given.get(name), torch.Tensor) or not given[name].is_floating_point():
                continue
            dirty = given | {name: given[name].clone()}
            dirty[name][(2, 3)[: dirty[name].dim()]] = bad
            with settings(form, **how):
                got = case.call(dirty, "triton")
            for g, r in zip(got, case.call(dirty, "reference"), strict=True):
                note = f"{bad} in {name}, {form} {case.name} {loss} {how}"
                assert torch.equal(g.isfinite(), r.isfinite()), note
                assert torch.equal(g.isnan(), r.isnan()), note


def available(case: Case) -> pytest.MarkDecorator:
    return pytest.mark.skipif("triton" not in case.operator.implementations(DEVICE), reason="no Triton kernel here")
