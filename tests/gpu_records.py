"""A GPU run that never was: made-up figures in the form that the phases write, for tests of the report."""

import zlib
from pathlib import Path
from typing import Any

import torch

from bench import files
from bench.case import COMPILE_MODES, Case, dtype_name
from bench.floors import Ceilings
from bench.rows import GRAPH_BELOW_US
from bench.step.task import NETWORKS
from bench.step.variants import PLAIN, for_gpu

CEILINGS = Ceilings({"bfloat16": 7.5e14, "float32": 5e13}, {2**20: 3e12, 2**32: 4.1e12}, {"stream": 2.5, "graph": 1.2})
SLOWER = {"fastmeta": 1.0, "triton flash": 1.3, "triton rows": 1.1, "eager": 4.0, "eager 2": 5.0, "vmap(grad)": 40.0}


def _noise(*words: object) -> float:
    """Between 0.8 and 1.2, the same in every run."""
    return 0.8 + 0.4 * (zlib.crc32(repr(words).encode()) % 1000) / 1000


def record(case: Case, dtype: torch.dtype) -> dict[str, Any]:
    """A measured case."""
    n, d, c = case.shape or (4096, 64, 64)
    flops, num_bytes = (2.0 * n * d * c if case.shape else 0.0), 2.0 * (n * c + n * d + c * d)
    cost = {"flops": flops, "bytes": num_bytes, "working_set": None, "row_bytes": 6.0 * n * c, "in_l2": n < 1000}
    cost["gemm_us"] = flops / 6e8
    floor = max(CEILINGS.parts_us(cost, dtype_name(dtype), graph=True).values())
    variants = []
    for variant, factor in (SLOWER | dict.fromkeys(COMPILE_MODES, 2.0)).items():
        role = "compile" if variant in COMPILE_MODES else "peer" if variant == "vmap(grad)" else variant.split()[0]
        role = "fastmeta" if role == "triton" else role
        entry: dict[str, Any] = {"name": case.main if variant == "fastmeta" else variant, "role": role, "note": ""}
        device = floor * 1.2 * factor * _noise(case.key(dtype), variant)
        stream = max(device, 12.0 * factor)
        scatter = 1.5 if variant == "eager 2" else 1.1
        entry |= {"status": "measured", "error": 1e-6, "stream_us": stream, "quartiles_us": [stream, scatter * stream]}
        entry |= {"samples": 15, "peak_bytes": int(num_bytes * factor), "p20_p80_us": [stream, stream]}
        if stream < GRAPH_BELOW_US:
            entry |= {"graph_us": device, "host_us": min(stream, 11.0 * factor), "launches": round(2 * factor)}
        variants.append(entry)
    variants.append(
        {"name": "func.jvp", "role": "peer", "note": "", "status": "failed", "reason": "OutOfMemoryError: no"}
    )
    made = {
        "key": case.key(dtype),
        "operator": case.operator,
        "shape": case.label,
        "dtype": dtype_name(dtype),
        "main": case.main,
        "note": case.note,
        "cost": cost,
        "variants": variants,
    }
    CEILINGS.apply(made)
    return made


def steps() -> list[dict[str, Any]]:
    """Both networks with every method, in the loop and in a graph."""
    found = []
    for network, milliseconds in zip(NETWORKS["cuda"], (18.0, 240.0), strict=True):
        plain = [{"name": name, "schedule": "plain", "status": "measured"} for name in PLAIN]
        rows: list[dict[str, Any]] = [row | {"median_us": 1e3 * milliseconds, "peak_bytes": 10**9} for row in plain]
        for variant in for_gpu(network):
            row = {key: getattr(variant, key) for key in ("name", "method", "how", "schedule", "plain")}
            ratio = 1 + (0.01 if variant.graph else 0.03) * _noise(network.name, variant.name)
            row |= {"status": "measured", "ratio": ratio, "ratio_quartiles": [ratio - 0.015, ratio + 0.015]}
            row |= {"median_us": 1e3 * milliseconds * ratio, "refine_us": 120.0, "refine_host_syncs": 0}
            rows.append(row | {"bound": 1 + 0.12 / milliseconds, "memory_ratio": 1.0})
        images = {"labeled": network.labeled, "unlabeled": network.unlabeled, "pixels": network.pixels}
        made = {"network": network.name, "device": "cuda", "images": images, "parameters": 10**6, "steps": rows}
        found.append(made | {"forward_flops": 10**12, "derivatives": []})
    return found


def write_parts(folder: Path, cases: list[Case]) -> None:
    """The files of all phases."""
    parts = folder / "parts"
    records = [record(case, dtype) for case in cases for dtype in case.dtypes]
    lost = {"operator": "label_gradient", "shape": "1, 1, 1", "dtype": "float32", "main": "fastmeta", "key": "x"}
    shared = CEILINGS.as_json()
    crashed = {
        "hessian_vector_product (768, 512, 200) float32": {"triton flash": "the process died in it: exit status 70"}
    }
    operators = {"shared": shared, "cases": [*records, lost | {"failed": "OutOfMemoryError: 9 GB"}], "crashed": crashed}
    files.write(parts / "operators.json", operators | {"unfinished": ["per_example_dot (1, 2, 3) float32"]})
    done = {"networks": steps(), "failed": {"Other": "no torchvision"}}
    gpu = {"name": "A GPU", "capability": "9.0", "multiprocessors": 132, "memory_bytes": 15e10, "l2_bytes": 6e7}
    environment = {"gpu": gpu, "torch": "2.11.0", "packages": {"triton": "3.6.0"}, "fastmeta": "0.1.0", "date": "today"}
    environment["git_commit"] = "0123456789abcdef"
    files.write(parts / "environment.json", environment)
    files.write(parts / "step" / "step.json", done | {"environment": environment, "settings": {"rounds": 15}})
    lines = ['{"test": "tests/test_hvp.py::test_a", "outcome": "failed", "message": "assert 1 == 2"}']
    lines += ['{"test": "tests/test_ops.py::test_b[label_gradient]", "outcome": "passed"}']
    lines += ['{"test": "tests/test_ops.py::test_c", "outcome": "skipped", "message": "no room"}', '{"test": "cut o']
    (parts / "outcomes.jsonl").write_text("\n".join(lines))
