"""Everything that needs a GPU, in one command: build, tests, sanitizer, operator and step benchmarks, one report.

Each phase runs in a process of its own with a time limit; one that fails is reported and the others go on. Writes
gpu.json, gpu.md, operators.png, step.png and log.txt into the folder, the first two all the time, and prints the tables
last. Exit status: 0 if every phase that ran passed, 1 if one did not, 2 without a GPU.
"""

import argparse
import importlib.util
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.gpu import choices, files, outcomes, report, sanitizer
from bench.gpu.phases import Phase, run_together, skipped

ROOT = Path(__file__).resolve().parents[2]
PHASES = ("build", "environment", "tests", "compile", *sanitizer.TOOLS, "operators", "step")
BUDGET_S = 460.0
# Groups of phases beside each other: seconds that are kept for each, and the most it takes where those before it
# left some of theirs.
GROUPS: tuple[tuple[tuple[str, ...], float, float], ...] = (
    (("build",), 100.0, 180.0),
    (("environment",), 20.0, 40.0),
    (("tests", "compile", *sanitizer.TOOLS), 140.0, 150.0),
    (("operators",), 135.0, 240.0),
    (("step",), 60.0, 120.0),
)
TEST_FILES = (
    *("test_ops*.py", "test_gpu_*.py", *(f"test_{stem}*.py" for stem in choices.STEMS.values())),
    *("test_triton_*.py", "test_cuda_*.py", "test_graph*.py", "test_device_solver*.py"),
)
HOST_TESTS = {"test_cuda_chunk_table.py", "test_cuda_emulator.py", "test_cuda_narrow_plan.py"}  # need no GPU
TEST_PROCESSES = 6
COMPILE_PROCESSES = 6
LOG = 200_000  # characters of each phase's output that are kept
_START_S = 12.0  # a process's imports and last writes, inside its limit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, nargs="?", help="where the results go (bench/results/<the GPU's name>)")
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=PHASES, metavar="NAME", help=", ".join(PHASES))
    parser.add_argument("--budget", type=float, default=BUDGET_S, metavar="S", help="seconds in all (%(default).0f)")
    choices.add_choices(parser)


@dataclass(frozen=True)
class Plan:
    """What the phases need to know of the run.

    Args:
        work: a folder for their parts of the results and their output.
        options: as given.
    """

    work: Path
    options: argparse.Namespace

    def part(self, name: str) -> Path:
        return self.work / "parts" / name

    def log(self, name: str) -> Path:
        return self.work / "logs" / f"{name}.txt"

    def shares(self) -> list[Path]:
        return [self.part(f"compiled-{share}.json") for share in range(COMPILE_PROCESSES)]


def _python(module: str, *arguments: object) -> list[str]:
    return [sys.executable, "-W", "ignore::RuntimeWarning", "-m", module, *(str(one) for one in arguments)]


def _until(seconds: float) -> float:
    """When a process that starts now should write its last result: the same for each attempt."""
    return time.time() + seconds - _START_S


def _build(plan: Plan, seconds: float) -> list[Phase]:
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    major, minor = torch.cuda.get_device_capability()
    environment = {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),  # has ninja
        "FASTMETA_CUDA_ARCHITECTURES": os.environ.get("FASTMETA_CUDA_ARCHITECTURES", f"{major}{minor}"),
    }
    return [Phase("build", command, seconds, plan.log("build"), environment=environment)]


def _environment(plan: Plan, seconds: float) -> list[Phase]:
    command = _python("bench.gpu.environment", "--out", plan.part("environment.json"))
    return [Phase("environment", command, seconds, plan.log("environment"))]


def files_of_tests(folder: Path) -> list[str]:
    """The operators' tests, and those of what only a GPU has."""
    found = [path for pattern in TEST_FILES for path in sorted(folder.glob(pattern)) if path.name not in HOST_TESTS]
    return [str(path) for path in dict.fromkeys(found)]


def _tests(plan: Plan, seconds: float) -> list[Phase]:
    beside = ["-n", str(TEST_PROCESSES), "--dist", "loadgroup"] if importlib.util.find_spec("xdist") else []
    plugins = ["-p", "no:cacheprovider", "-p", "bench.gpu.pytest_outcomes"]
    command = _python("pytest", "-q", "--tb=short", *plugins, *beside, *files_of_tests(ROOT / "tests"))
    environment = {
        "FASTMETA_TEST_DEVICE": "cuda",
        outcomes.FILE: str(plan.part("outcomes.jsonl")),
        "OMP_NUM_THREADS": "2",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    return [Phase("tests", command, seconds, plan.log("tests"), environment=environment)]


def _compile(plan: Plan, seconds: float) -> list[Phase]:
    """Fills the compilers' caches on disk while the tests run."""
    found = []
    for share, path in enumerate(plan.shares()):
        arguments = ["--out", path, "--until", _until(seconds), "--only-compile", f"{share}/{COMPILE_PROCESSES}"]
        command = _python("bench.gpu.operators", *arguments, *choices.as_arguments(plan.options))
        name = f"compile {share}"
        environment = {"OMP_NUM_THREADS": "2", "TORCHINDUCTOR_COMPILE_THREADS": "2"}
        found.append(Phase(name, command, seconds, plan.log(f"compile-{share}"), environment=environment))
    return found


def _sanitizer(tool: str) -> Callable[[Plan, float], list[Phase]]:
    def phases(plan: Plan, seconds: float) -> list[Phase]:
        program = sanitizer.find()
        if program is None:
            return []
        # Without its cache every tensor is an allocation of its own, whose bounds memcheck knows.
        environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "OMP_NUM_THREADS": "2"}
        return [Phase(tool, sanitizer.command(program, tool), seconds, plan.log(tool), environment=environment)]

    return phases


def _operators(plan: Plan, seconds: float) -> list[Phase]:
    out = plan.part("operators.json")
    arguments: list[object] = ["--out", out, "--until", _until(seconds), *choices.as_arguments(plan.options)]
    if "compile" in plan.options.phases:
        arguments += ["--compiled", *plan.shares()]
    command = _python("bench.gpu.operators", *arguments)
    return [
        Phase(
            "operators",
            command,
            seconds,
            plan.log("operators"),
            attempts=6,
            progress=files.running(out),
            stall_s=60.0 if "compile" in plan.options.phases else 180.0,  # it compiles itself
        )
    ]


def _step(plan: Plan, seconds: float) -> list[Phase]:
    quick = ["--quick"] if plan.options.quick else []
    command = _python("bench.gpu.step", "--out", plan.part("step.json"), "--seconds", seconds - _START_S, *quick)
    return [Phase("step", command, seconds, plan.log("step"))]


Makers = Mapping[str, Callable[[Plan, float], list[Phase]]]
MAKERS: Makers = {
    "build": _build,
    "environment": _environment,
    "tests": _tests,
    "compile": _compile,
    **{tool: _sanitizer(tool) for tool in sanitizer.TOOLS},
    "operators": _operators,
    "step": _step,
}


def run(options: argparse.Namespace) -> int:
    if not torch.cuda.is_available():
        print(f"No GPU: torch {torch.__version__} sees no CUDA device.", file=sys.stderr)
        return 2
    if options.folder is None:
        name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
        options.folder = ROOT / "bench/results" / name
    return run_phases(options)


def run_phases(options: argparse.Namespace, makers: Makers = MAKERS) -> int:
    """All groups in turn within the budget."""
    begin = time.monotonic()
    records: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="fastmeta-bench-") as work:
        plan = Plan(Path(work).resolve(), options)

        def refresh() -> dict[str, Any]:
            results = report.collect(plan.work / "parts", records, time.monotonic() - begin)
            report.write(results, options.folder)
            _write_log(plan, options.folder)
            return results

        results = refresh()
        for names, limit in _limits(options, begin):
            print(f"{', '.join(names)} (at most {limit:.0f} s) ...", flush=True)
            records |= _run_group(plan, names, limit, makers, refresh)
            results = refresh()
            for name in names:
                print(f"  {report.phase_line(name, records[name])}", flush=True)
        report.draw(results, options.folder)
    print("\n" + report.terminal(results))
    # What was not compiled in time is missing from the tables, which say so.
    bad = [name for name, record in records.items() if record["status"] in ("failed", "timed out")]
    return 1 if set(bad) - {"compile"} else 0


def _limits(options: argparse.Namespace, begin: float) -> Iterator[tuple[tuple[str, ...], float]]:
    """Each group of the phases asked for, and the seconds it may take when its turn comes."""
    groups = [(tuple(n for n in names if n in options.phases), kept, most) for names, kept, most in GROUPS]
    groups = [group for group in groups if group[0]]
    for place, (names, seconds, most) in enumerate(groups):
        later = sum(kept for _, kept, _ in groups[place + 1 :])
        left = options.budget - (time.monotonic() - begin)
        # Its part of what is left, if that is less than all parts.
        yield names, min(most, max(left - later, left * seconds / (seconds + later)))


def _write_log(plan: Plan, folder: Path) -> None:
    """What the phases printed, in one file."""
    logs = sorted((plan.work / "logs").glob("*.txt"), key=lambda path: path.stat().st_mtime)
    texts = [f"===== {path.stem}\n{path.read_text(errors='replace')[-LOG:]}\n" for path in logs]
    (folder / "log.txt").write_text("\n".join(texts))


def _run_group(
    plan: Plan, names: Sequence[str], limit: float, makers: Makers, refresh: Callable[[], Any]
) -> dict[str, dict[str, Any]]:
    phases: list[Phase] = []
    members: dict[str, list[str]] = {}
    records: dict[str, dict[str, Any]] = {}
    for name in names:
        try:
            made = makers[name](plan, limit)
        except Exception as error:  # one phase that cannot even begin must not cost the others
            records[name] = skipped(f"{type(error).__name__}: {error}") | {"status": "failed"}
            continue
        phases += made
        members[name] = [phase.name for phase in made]
    done = run_together(phases, ROOT, refresh)
    for name, parts in members.items():
        records[name] = _joined([done[part] for part in parts])
        if name in sanitizer.TOOLS and parts:
            records[name] = sanitizer.judged(records[name], plan.log(name).read_text(errors="replace"))
    return records


def _joined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Several processes of one phase as one record; the first that did not pass speaks for it."""
    if not parts:
        return skipped("there is no such program here")
    worst = next((part for part in parts if part["status"] != "passed"), parts[0])
    return worst | {"seconds": max(part["seconds"] for part in parts)}
