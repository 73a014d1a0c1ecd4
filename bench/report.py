"""A run's results as JSON, as markdown and on the terminal."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import text
from bench.roofline import Ceilings

SCHEMA_VERSION = 1
Row = dict[str, Any]


def ceilings_json(ceilings: Ceilings) -> Row:
    return {
        "gemm_gflops": {dtype: rate / 1e9 for dtype, rate in ceilings.gemm.items()},
        "copy_gb_per_s": {str(size): rate / 1e9 for size, rate in ceilings.copy.items()},
    }


def write_json(results: Row, folder: Path) -> Path:
    path = folder / "ops.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    return path


def measured(case: Row, role: str | None = None, dtype: str = "float32") -> list[Row]:
    """The case's timed variants of one role, fastest first."""
    chosen = [
        v
        for v in case.get("variants", [])
        if "median_us" in v and v["dtype"] == dtype and (role is None or v["role"] == role)
    ]
    return sorted(chosen, key=lambda v: v["median_us"])


def main_variant(case: Row, dtype: str = "float32") -> Row | None:
    """The variant that the others are compared with; None if it has no time."""
    return next((v for v in measured(case, dtype=dtype) if v["name"] == case["main"]), None)


def speed_up(case: Row, other: Row | None, dtype: str = "float32") -> float | None:
    """How many times longer ``other`` takes than fastmeta; None where either has no time."""
    ours = main_variant(case, dtype)
    return None if ours is None or other is None else other["median_us"] / ours["median_us"]


def _summary_row(case: Row) -> list[str]:
    ours, bf16 = main_variant(case), main_variant(case, "bfloat16")
    peers = measured(case, "peer")
    eager, compiled = (next(iter(measured(case, role)), None) for role in ("eager", "compile"))
    eager_bf16 = next(iter(measured(case, "eager", "bfloat16")), None)
    fp32_over_bf16 = eager["median_us"] / bf16["median_us"] if eager and bf16 and ours else None
    return [
        case["operator"],
        case["shape"],
        text.time(ours["median_us"]) if ours else "",
        text.factor(ours["times_floor"]) if ours else "",
        text.factor(speed_up(case, eager)),
        text.factor(speed_up(case, compiled)),
        f"{text.factor(speed_up(case, peers[0]))} {peers[0]['name']}" if ours and peers else "",
        text.time(bf16["median_us"]) if bf16 else "",
        text.factor(fp32_over_bf16),
        text.factor(speed_up(case, eager_bf16, "bfloat16")),
    ]


def summary(results: Row) -> list[str]:
    """The table of all cases; an operator whose tests fail has a line and no figure."""
    header = [
        "operator",
        "shape",
        "fastmeta",
        "x floor",
        "over best eager",
        "over torch.compile",
        "over best other peer",
        "bfloat16",
        "bf16 over fp32 eager",
        "bf16 over bf16 eager",
    ]
    lines = text.table(header, [_summary_row(case) for case in results["cases"]])
    for operator, verdict in results["tests"].items():
        if not verdict["green"]:
            lines += [f"**{operator}: not measured, {verdict['reason']}.**", ""]
    return lines


def contended_share(results: Row) -> float:
    """Share of the samples that were taken although other processes ran."""
    timed = [v for case in results["cases"] for v in case["variants"] if "median_us" in v]
    return sum(v["contended_samples"] for v in timed) / max(1, sum(v["samples"] for v in timed))


def _cell(case: Row, variant: Row) -> str:
    if "median_us" not in variant:
        return variant["status"]
    time = text.time(variant["median_us"]) + "*" * ("extrapolated" in variant)
    remarks = [text.factor(speed_up(case, variant, variant["dtype"]))] if main_variant(case, variant["dtype"]) else []
    if "iterations" in variant:
        remarks.append(f"{variant['iterations']} iterations")
    return f"{time} ({', '.join(remarks)})" if remarks else time


def _memory_cell(case: Row, variant: Row) -> str:
    return text.memory(variant["peak_bytes"]) if "peak_bytes" in variant else ""


def _matrix(cases: list[Row], cell: Callable[[Row, Row], str]) -> list[str]:
    """Variants down, shapes across."""
    names = list(dict.fromkeys((v["name"], v["dtype"]) for case in cases for v in case["variants"]))
    rows = []
    for name, dtype in names:
        cells = []
        for case in cases:
            variant = next((v for v in case["variants"] if (v["name"], v["dtype"]) == (name, dtype)), None)
            cells.append("" if variant is None else cell(case, variant))
        rows.append([name if dtype == "float32" else f"{name}, {dtype}", *cells])
    return text.table(["", *(case["shape"] for case in cases)], rows)


def markdown(results: Row) -> str:
    """The whole report."""
    environment, ceilings = results["environment"], results["ceilings"]
    gemm = ", ".join(f"{dtype} {rate:.0f} GFLOP/s" for dtype, rate in ceilings["gemm_gflops"].items())
    copy = ", ".join(f"{text.memory(float(size))} {rate:.0f} GB/s" for size, rate in ceilings["copy_gb_per_s"].items())
    lines = [
        "# Operators on the CPU",
        "",
        f"{environment['cpu']}, {environment['threads']} threads, {environment['torch_cpu_capability']}, "
        f"torch {environment['torch']}, fastmeta {environment['fastmeta']} at "
        f"{(environment['git_commit'] or '?')[:10]}, {environment['date']}.",
        "",
        f"Ceilings of the same run: GEMM {gemm}; copy, read and write together: {copy}.",
        "",
        "Medians of interleaved samples in one process, with data in cache where it fits. The floor is max(flops / "
        "GEMM rate, bytes / copy bandwidth). A factor is a variant's time over fastmeta's, so above "
        "1 fastmeta is faster. "
        f"Other processes ran during {contended_share(results):.0%} of the samples.",
        "",
        *summary(results),
    ]
    for operator in dict.fromkeys(case["operator"] for case in results["cases"]):
        cases = [case for case in results["cases"] if case["operator"] == operator]
        lines += [
            f"## {operator}",
            "",
            *([cases[0]["note"], ""] if cases[0]["note"] else []),
            "Time, and its ratio to fastmeta's in the same dtype:",
            "",
        ]
        lines += _matrix(cases, _cell)
        if any("extrapolated" in v for case in cases for v in case["variants"]):
            lines += ["\\* measured on a few examples and scaled to all of them: the whole would not fit.", ""]
        lines += ["Peak memory beyond the arguments, results included:", "", *_matrix(cases, _memory_cell)]
        notes = {v["name"]: v["note"] for case in cases for v in case["variants"] if "note" in v}
        lines += [f"- {name}: {note}." for name, note in notes.items()] + [""] * bool(notes)
    return "\n".join(lines).rstrip() + "\n"
