"""``pytest bench``: every case once, right or not. ``pytest bench --benchmark-enable`` times them for regressions."""

import re
from typing import Any

import pytest
import torch

from bench.case import Case, Variant, Workload, dtype_name
from bench.ops import cases


def name(case: Case, dtype: torch.dtype) -> str:
    """As ``-k`` can take it: ``label_gradient-64x128x10-float32``."""
    label = re.sub(r"[^\w-]+", "-", re.sub(r", (?=\d)", "x", case.label))
    return f"{case.operator}-{label}-{dtype_name(dtype)}"


CASES = cases("cpu")
RUNS = [pytest.param(case, dtype, id=name(case, dtype)) for case in CASES for dtype in case.dtypes]
SMALLEST = {case.operator: case for case in reversed(CASES)}


def assert_right(workload: Workload, variant: Variant) -> None:
    with variant.entered():
        error = workload.error(variant.result())
    assert error <= workload.tolerance, f"{variant.name}: error {error:.1e}, tolerance {workload.tolerance:.1e}"


@pytest.mark.parametrize(("case", "dtype"), RUNS)
def test_fastmeta(benchmark: Any, case: Case, dtype: torch.dtype) -> None:
    workload = case.build(dtype, "cpu")
    variant = next(variant for variant in workload.variants if variant.name == case.main)
    assert_right(workload, variant)
    benchmark.group = f"{case.operator} ({case.label})"
    with torch.no_grad():
        benchmark(variant.call)


@pytest.mark.parametrize("case", SMALLEST.values(), ids=SMALLEST.keys())
def test_every_variant_computes_the_same(case: Case) -> None:
    for dtype in case.dtypes:
        workload = case.build(dtype, "cpu")
        for variant in workload.variants:
            assert_right(workload, variant)
    torch.compiler.reset()
