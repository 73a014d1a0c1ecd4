"""Registers, shared memory and spills of every kernel, compiled for sm_80, sm_90 and sm_100; no GPU is needed.

Every Triton kernel with every tile in every dtype, and the CUDA C++ kernels where nvcc is found. The exit
status is 0 only if all of them compile without spills and fit the chip.
"""

import argparse
import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Row:
    """A kernel with its constants in one arithmetic, on every architecture."""

    operators: list[str]
    kernel: str
    arithmetic: list[str]
    constants: str
    registers: dict[str, int] = field(default_factory=dict)
    shared: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    quick = "the heaviest loss in two dtypes, each kernel for one architecture"
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--processes", type=int, help="compilers that run at once (default: one for each processor)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table there too")


def run(options: argparse.Namespace) -> int:
    from fastmeta.triton_kernels._program import INTERPRETED

    if INTERPRETED:
        print("Triton's interpreter compiles nothing: unset TRITON_INTERPRET", file=sys.stderr)
        return 2
    begin = time.monotonic()
    rows, problems, count = triton_rows(options.quick, options.processes)
    text = table(rows)
    summary = [f"{count} Triton compilations of {len(rows)} kernels with their constants"]
    cuda: list[dict[str, Any]] = []
    if not options.quick:
        cuda, cuda_text, spilled = cuda_rows()
        text += f"\n\n{cuda_text}"
        problems += spilled
    summary += problems or ["all compile, without spills, and fit"]
    found = {"triton": [asdict(row) for row in rows], "cuda": cuda, "problems": problems}
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    if options.markdown:
        options.markdown.write_text(f"```\n{text}\n```\n\n" + "\n".join(summary) + "\n")
    print(text)
    print(f"\n{time.monotonic() - begin:.0f} s;", "\n".join(summary))
    return 1 if problems else 0


def triton_rows(quick: bool, processes: int | None) -> tuple[list[Row], list[str], int]:
    """The table, what is wrong, and the number of compilations."""
    from bench import compiled, specimens

    rows: dict[tuple[str, str, str], Row] = {}
    jobs: dict[compiled.Work, Row] = {}
    for operator, arithmetic, launch in specimens.launches(quick):
        key = specimens.kernel_name(launch), specimens.pointer_types(launch), specimens.constants(launch)
        if key not in rows:
            rows[key] = Row([], key[0], [], key[2])
        row = rows[key]
        for known, new in ((row.operators, operator), (row.arithmetic, arithmetic)):
            if new not in known:
                known.append(new)
        for turn, architecture in enumerate(compiled.ARCHITECTURES):
            if not quick or turn == list(rows).index(key) % len(compiled.ARCHITECTURES):  # one each, in turn
                jobs[compiled.work(launch, architecture)] = row
    problems = []
    for job, resources in compiled.in_processes(compiled.compile_one, jobs, processes):
        row, name = jobs[job], f"sm_{job.architecture}"
        row.registers[name] = max(row.registers.get(name, 0), resources.registers)
        row.shared[name] = max(row.shared.get(name, 0), resources.shared)
        if resources.problem:
            problem = f"{name}: {resources.problem}"
            row.problems.append(problem)
            problems.append(f"{row.kernel} {'/'.join(row.arithmetic)} {row.constants} on {problem}")
    return list(rows.values()), problems, len(jobs)


def table(rows: Iterable[Row]) -> str:
    """One line for each row: registers and kB of shared memory on each architecture."""
    from bench.compiled import ARCHITECTURES

    names = [f"sm_{architecture}" for architecture in ARCHITECTURES]
    lines = [("kernel", "arithmetic", "constants", *(f"{name} regs / kB" for name in names), "spills")]
    for row in sorted(rows, key=lambda row: (row.kernel, row.arithmetic, row.constants)):
        used = (
            f"{row.registers[name]:3d} / {row.shared[name] / 1024:5.1f}" if name in row.shared else "" for name in names
        )
        lines.append((row.kernel, "/".join(row.arithmetic), row.constants, *used, "; ".join(row.problems) or "-"))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def build_cuda() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_cuda", ROOT / "csrc/build_cuda.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def cuda_rows() -> tuple[list[dict[str, Any]], str, list[str]]:
    """The CUDA C++ kernels, as a list and as text, and what spills."""
    build = build_cuda()
    if build.find_nvcc() is None:
        return [], "CUDA C++: nvcc is not found", []
    with tempfile.TemporaryDirectory() as folder:
        entries = build.resources(build.build(Path(folder) / "_C_cuda.so"))
    spilled = [f"{entry.kernel} on {entry.architecture}: {entry.spills} bytes of spills" for entry in entries]
    spilled = [text for text, entry in zip(spilled, entries, strict=True) if entry.spills]
    return [asdict(entry) for entry in entries], f"CUDA C++\n{build.table(entries)}", spilled
