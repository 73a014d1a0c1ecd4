"""The speeds this project set itself on an H200-class card, beside what was measured."""

from collections.abc import Callable, Iterator
from typing import Any

from bench.goal import Goal
from bench.gpu.rows import Row, device_us, main_variant, measured, named, over, title

GIANT = "8192, 2048, 128256"
SMALL = ("256, 128, 10", "448, 128, 100", "768, 512, 200")
STEP_RATIO = 1.03


def _share(record: Row, variant: Row | None, part: str) -> float | None:
    """A part of the floor over the device's time."""
    us = None if variant is None else device_us(variant)
    return None if us is None else record["cost"][part] / us


def _collect(records: list[Row], value: Callable[[Row], float | None]) -> dict[str, float]:
    return {title(record): found for record in records if (found := value(record)) is not None}


def _of(records: list[Row], operators: tuple[str, ...], shapes: tuple[str, ...]) -> list[Row]:
    return [r for r in records if r["operator"] in operators and r["shape"].removesuffix(", head") in shapes]


def goals(results: dict[str, Any]) -> list[Goal]:
    records = [record for record in results["operators"] if "variants" in record]
    return [*_operators(records, results["shared"]), _steps(results["steps"])]


def _operators(records: list[Row], shared: dict[str, Any]) -> Iterator[Goal]:
    def copying(record: Row) -> float | None:
        return _share(record, main_variant(record), "copy_us")

    label_step, lists = ("finite_difference_labels",), ("perturbed", "alignment_direction")
    long_rows = _of(records, label_step, ("32768, 1000", "8192, 4000"))
    yield Goal("row kernel, C >= 1,000: share of the copy bandwidth", 0.85, _collect(long_rows, copying))
    short_rows = _of(records, label_step, ("65536, 256",))
    yield Goal("row kernel, C = 256: share of the copy bandwidth", 0.60, _collect(short_rows, copying))

    products = ("label_gradient", "per_example_dot", "last_layer_gradient", "hessian_vector_product")
    large = _of(records, products, ("4096, 2048, 1000",))
    yield Goal(
        "(4096, 2048, 1000): cuBLAS's time for the products over the whole call's",
        0.90,
        _collect(large, lambda r: _share(r, main_variant(r), "gemm_us")),
    )

    peak = shared.get("peak_flops", {})

    def flash(record: Row) -> float | None:
        variant = named(record, "triton flash")
        us = None if variant is None else device_us(variant)
        rate = peak.get(record["dtype"])
        return None if us is None or not rate else 1e6 * record["cost"]["flops"] / us / rate

    giant = [r for r in _of(records, products, (GIANT,)) if r["dtype"] == "bfloat16"]
    yield Goal(f"({GIANT}): flash form's share of cuBLAS's largest bfloat16 rate", 0.50, _collect(giant, flash))

    small = _of(records, products, SMALL)
    yield Goal(
        "(768, 512, 200) and below: times faster than eager, no graphs",
        3.0,
        _collect(small, lambda r: over(r, measured(r, "eager"), device=False)),
        unit="x",
    )
    yield Goal(
        "(768, 512, 200) and below: times faster than torch.compile, no graphs",
        1.5,
        _collect(small, lambda r: over(r, measured(r, "compile"), device=False)),
        unit="x",
    )
    yield Goal(
        "(768, 512, 200) and below: launches",
        2,
        _collect(small, lambda r: (main_variant(r) or {}).get("launches")),
        at_least=False,
        unit="",
    )
    yield Goal(
        "lists of tensors, 25.6M parameters: share of the copy bandwidth",
        0.85,
        _collect(_of(records, lists, ("ResNet-50",)), copying),
    )


def _steps(tasks: list[dict[str, Any]]) -> Goal:
    ratios = {
        f"{variant['name']}, {task['task']}": variant["ratio"]
        for task in tasks
        for variant in task["variants"]
        if variant.get("method") and "ratio" in variant
    }
    return Goal("a step with a last-layer method over the plain step", STEP_RATIO, ratios, at_least=False, unit="x")
