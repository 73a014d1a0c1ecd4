"""A GPU run that never was: made-up figures in the form that the phases write, for tests of the report."""

import zlib
from pathlib import Path
from typing import Any

import torch

from bench.gpu import files
from bench.gpu.case import COMPILE_MODES, GpuCase
from bench.gpu.rows import GRAPH_BELOW_US
from bench.gpu.step import METHODS, PLAIN, TASKS

SLOWER = {"fastmeta": 1.0, "triton flash": 1.3, "triton rows": 1.1, "eager": 4.0, "eager 2": 5.0, "vmap(grad)": 40.0}


def _noise(*words: object) -> float:
    """Between 0.8 and 1.2, the same in every run."""
    return 0.8 + 0.4 * (zlib.crc32(repr(words).encode()) % 1000) / 1000


def record(case: GpuCase, dtype: torch.dtype) -> dict[str, Any]:
    """A measured case."""
    n, d, c = case.shape or (4096, 64, 64)
    name = str(dtype).removeprefix("torch.")
    flops, num_bytes = sum(gemm.flops for gemm in case.gemms), 2.0 * (n * c + n * d + c * d)
    cost = {"flops": flops, "bytes": num_bytes, "gemm_us": flops / 6e8, "copy_us": num_bytes / 4e6, "in_l2": n < 1000}
    cost["floor_us"] = max(cost["gemm_us"], cost["copy_us"], 1.5)
    cost["floor_stream_us"] = max(cost["floor_us"], 4.0)
    cost["bound"] = "GEMM" if cost["floor_us"] == cost["gemm_us"] else "bytes"
    variants = []
    for variant, factor in (SLOWER | dict.fromkeys(COMPILE_MODES, 2.0)).items():
        role = "compile" if variant in COMPILE_MODES else "peer" if variant == "vmap(grad)" else variant.split()[0]
        role = "fastmeta" if role == "triton" else role
        entry: dict[str, Any] = {"name": case.main if variant == "fastmeta" else variant, "role": role, "note": ""}
        device = cost["floor_us"] * 1.2 * factor * _noise(case.key(dtype), variant)
        stream = max(device, 12.0 * factor)
        entry |= {"status": "measured", "error": 1e-6, "stream_us": stream, "quartiles_us": [stream, stream]}
        entry |= {"samples": 5, "peak_bytes": int(num_bytes * factor), "stream_times_floor": stream / 4}
        if stream < GRAPH_BELOW_US:
            entry |= {"graph_us": device, "host_us": min(stream, 11.0 * factor), "launches": round(2 * factor)}
        entry["times_floor"] = device / cost["floor_us"]
        variants.append(entry)
    variants.append(
        {"name": "func.jvp", "role": "peer", "note": "", "status": "failed", "reason": "OutOfMemoryError: no"}
    )
    choice = {"chosen": "triton rows", "best": "triton rows", "best_us": variants[2]["stream_us"], "times_best": 1.02}
    return {
        "key": case.key(dtype),
        "operator": case.operator,
        "shape": case.label,
        "dtype": name,
        "main": case.main,
        "cost": cost,
        "variants": variants,
        "choice": choice if case.shape else None,
    }


def steps() -> list[dict[str, Any]]:
    """Both networks with every method, in the loop and in a graph."""
    found = []
    for task, milliseconds in zip(TASKS, (18.0, 240.0), strict=True):
        variants: list[dict[str, Any]] = [{"name": PLAIN, "method": "", "graph": False, "ratio": 1.0}]
        for method in METHODS:
            for graph in (False, True):
                ratio = 1 + (0.01 if graph else 0.03) * _noise(task.name, method, graph)
                name = f"{method}, graph" if graph else method
                variants.append({"name": name, "method": method, "graph": graph, "ratio": ratio, "refine_us": 120.0})
        for variant in variants:
            variant["step_ms"] = milliseconds * variant["ratio"]
        found.append({"task": str(task), "variants": variants})
    return found


def write_parts(folder: Path, cases: list[GpuCase]) -> None:
    """The files of all phases."""
    parts = folder / "parts"
    records = [record(case, dtype) for case in cases for dtype in case.dtypes]
    lost = {"operator": "label_gradient", "shape": "1, 1, 1", "dtype": "float32", "main": "fastmeta", "key": "x"}
    shared = {
        "copy_bytes_per_s": {"1048576": 3e12, "4294967296": 4.1e12},
        "launch_us": {"stream": 2.5, "graph": 1.2},
        "peak_flops": {"bfloat16": 7.5e14, "float32": 5e13},
    }
    crashed = {
        "hessian_vector_product (768, 512, 200) float32": {"triton flash": "the process died in it: exit status 70"}
    }
    operators = {"shared": shared, "cases": [*records, lost | {"failed": "OutOfMemoryError: 9 GB"}], "crashed": crashed}
    files.write(parts / "operators.json", operators | {"unfinished": ["per_example_dot (1, 2, 3) float32"]})
    files.write(parts / "step.json", [*steps(), {"task": "Other", "failed": "no torchvision", "variants": []}])
    gpu = {"name": "A GPU", "capability": "9.0", "multiprocessors": 132, "memory_bytes": 15e10, "l2_bytes": 6e7}
    environment = {"gpu": gpu, "torch": "2.11.0", "packages": {"triton": "3.6.0"}, "fastmeta": "0.1.0", "date": "today"}
    files.write(parts / "environment.json", environment | {"git_commit": "0123456789abcdef"})
    lines = ['{"test": "tests/test_hvp.py::test_a", "outcome": "failed", "message": "assert 1 == 2"}']
    lines += ['{"test": "tests/test_ops.py::test_b[label_gradient]", "outcome": "passed"}']
    lines += ['{"test": "tests/test_ops.py::test_c", "outcome": "skipped", "message": "no room"}', '{"test": "cut o']
    (parts / "outcomes.jsonl").write_text("\n".join(lines))
