"""The speeds this project set itself on an H100-class card, beside what was measured."""

from collections.abc import Callable, Iterator

from bench.goal import Goal
from bench.rows import Row, device_us, main_variant, measured, over, title

GIANT = "8192, 2048, 128256"
SMALL = ("256, 128, 10", "448, 128, 100", "768, 512, 200")
SUMS = {"last_layer_gradient": 40.0, "hessian_vector_product": 66.0}  # us at (4096, 2048, 1000) in bfloat16
PRODUCTS = ("label_gradient", "per_example_dot", *SUMS)
LISTS = ("perturbed", "alignment_direction")


def goals(results: Row) -> list[Goal]:
    return list(_operators([record for record in results["operators"] if "cost" in record]))


def _collect(records: list[Row], value: Callable[[Row], float | None]) -> dict[str, float]:
    return {title(record): found for record in records if (found := value(record)) is not None}


def _device(record: Row) -> float | None:
    ours = main_variant(record)
    return None if ours is None else device_us(ours)


def _share(record: Row, *parts: str) -> float | None:
    """Parts of the least time over the device's time."""
    us = _device(record)
    return None if us is None else sum(record["cost"][part] for part in parts) / us


def _operators(records: list[Row]) -> Iterator[Goal]:
    def of(operators: tuple[str, ...], *shapes: str, dtype: str | None = None) -> list[Row]:
        chosen = [r for r in records if r["operator"] in operators and r["shape"] in shapes]
        return [r for r in chosen if dtype in (None, r["dtype"])]

    def copying(record: Row) -> float | None:
        return _share(record, "copy_us")

    def over_compile(record: Row) -> float | None:
        return over(record, measured(record, "compile"), device=True)

    rows = ("finite_difference_labels",)
    long_rows = of(rows, "32768, 1000", "8192, 4000")
    yield Goal("row kernel, C >= 1,000: share of the copy bandwidth", 0.85, _collect(long_rows, copying))
    yield Goal("row kernel, C = 256: share of the copy bandwidth", 0.60, _collect(of(rows, "65536, 256"), copying))
    lists = of(LISTS, "ResNet-50")
    yield Goal("lists of tensors, 25.6M parameters: share of the copy bandwidth", 0.85, _collect(lists, copying))

    large = of(PRODUCTS, "4096, 2048, 1000", dtype="bfloat16")
    shares = _collect(large, lambda r: _share(r, "gemm_us", "row_us"))
    yield Goal("(4096, 2048, 1000) bfloat16: products alone and row bytes at copy speed over the call", 0.85, shares)
    for operator, us in SUMS.items():
        found = _collect(of((operator,), "4096, 2048, 1000", dtype="bfloat16"), _device)
        yield Goal(f"{operator} at (4096, 2048, 1000)", us, found, at_least=False, unit="us")
    dot = of(("per_example_dot",), GIANT, dtype="bfloat16")
    yield Goal(f"per_example_dot at ({GIANT})", 8000.0, _collect(dot, _device), at_least=False, unit="us")
    beside = _collect([*large, *dot], over_compile)
    yield Goal("the same: torch.compile's time over ours on the device", 1.0, beside, unit="x")

    def scratch(record: Row) -> float | None:
        ours = main_variant(record)
        n, _, c = (int(size) for size in record["shape"].removesuffix(", head").split(", "))
        return None if ours is None else ours["peak_bytes"] / (n * c * (2 if record["dtype"] == "bfloat16" else 4))

    heads = _collect(of(("per_example_dot",), f"{GIANT}, head"), scratch)
    yield Goal(f"a head in slabs at ({GIANT}): memory over its logits'", 0.15, heads, at_least=False)

    small = of(PRODUCTS, *SMALL)
    eager = _collect(small, lambda r: over(r, measured(r, "eager")))
    yield Goal("(768, 512, 200) and below: times faster than eager, no graphs", 3.0, eager, unit="x")
    compiled = _collect(small, lambda r: over(r, measured(r, "compile")))
    yield Goal("(768, 512, 200) and below: times faster than torch.compile, no graphs", 1.5, compiled, unit="x")
    launches = _collect(small, lambda r: (main_variant(r) or {}).get("launches"))
    yield Goal("(768, 512, 200) and below: launches", 2, launches, at_least=False, unit="")
