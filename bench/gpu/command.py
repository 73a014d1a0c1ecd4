"""Everything that needs a GPU, in one command: build, tests, sanitizer, operator and step benchmarks, one report.

From a bare checkout in 8 minutes, with --quick in 4. Each phase runs in a process of its own with a time limit; one
that fails is reported and the others go on. Writes gpu.json, gpu.csv, gpu.md, pictures and log.txt into the folder, the
first three all the time, and prints the tables last. Exit status: 0 if every phase that ran passed, 1 if one did not, 2
without a GPU. --cache reads what was compiled before (``python -m bench compile`` makes it without a GPU) and keeps
what this run compiles.
"""

import argparse
import importlib.util
import os
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import choices, files, gate
from bench.gpu import cache, report, sanitizer
from bench.gpu.phases import Phase, not_run, run_together

ROOT = Path(__file__).resolve().parents[2]
PHASES = ("build", "environment", "compile", "tests", *sanitizer.TOOLS, "operators", "step", "large")
BUDGET_S, QUICK_S = 465.0, 230.0
# Groups of phases beside each other: the parts of the budget that are kept for each, and the most it takes where those
# before it left some of theirs. Compilation runs alone: it takes all cores and much of the memory.
GROUPS: tuple[tuple[tuple[str, ...], float, float], ...] = (
    (("build",), 0.13, 0.30),
    (("environment",), 0.06, 0.15),
    (("compile",), 0.12, 0.26),
    (("tests",), 0.16, 0.22),
    (sanitizer.TOOLS, 0.08, 0.13),
    (("operators",), 0.26, 0.50),
    (("step",), 0.13, 0.25),
    (("large",), 0.04, 0.12),
)
TEST_FILES = (
    *("test_ops*.py", "test_gpu_*.py", *(f"test_{stem}*.py" for stem in choices.STEMS.values())),
    *("test_triton_*.py", "test_cuda_*.py", "test_lists*.py", "test_inverse_hessian*.py"),
)
LARGE = "ops/test_gpu_large.py"  # fills the card: last, and alone
# Tests that need no GPU, or stub one.
HOST_TESTS = {
    *("test_cuda_chunk_table.py", "test_cuda_emulator.py", "test_cuda_narrow_plan.py", "test_cuda_tracing.py"),
    *("test_triton_rule.py", "test_triton_sass.py"),
}
ON_A_GPU = (
    "test_graph.py::test_on_a_gpu",
    "ops/test_solve_on_gpu.py::test_on_a_gpu",
)  # in files that otherwise stub one
PROCESSES = 6
LOG = 200_000  # characters of each phase's output that are kept
_START_S = 10.0  # a process's imports and last writes, inside its limit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, nargs="?", help="where the results go (bench/results/<the GPU's name>)")
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=PHASES, metavar="NAME", help=", ".join(PHASES))
    budget = f"seconds in all ({BUDGET_S:.0f}; with --quick {QUICK_S:.0f})"
    parser.add_argument("--budget", type=float, metavar="S", help=budget)
    parser.add_argument("--cache", type=Path, metavar="FILE", help="archive of compiled kernels: read, then written")
    choices.add_choices(parser)


@dataclass(frozen=True)
class Plan:
    """What the phases need to know of the run."""

    work: Path  # a folder for their parts of the results and their output
    options: argparse.Namespace
    caches: Path = field(default_factory=cache.default_folder)  # folder of the compilers' caches
    libraries: Sequence[str] = ()  # of fastmeta, that the archive has brought

    def part(self, name: str) -> Path:
        return self.work / "parts" / name

    def log(self, name: str) -> Path:
        return self.work / "logs" / f"{name}.txt"

    def shares(self) -> list[Path]:
        return [self.part(f"compiled-{share}.json") for share in range(PROCESSES)]

    def phase(
        self, name: str, command: Sequence[object], seconds: float, environment: Mapping[str, str] = {}, **options: Any
    ) -> Phase:
        given = cache.environment(self.caches) | dict(environment)
        return Phase(name, [str(one) for one in command], seconds, self.log(name), environment=given, **options)


def _python(module: str, *arguments: object) -> list[object]:
    return [sys.executable, "-W", "ignore::RuntimeWarning", "-m", module, *arguments]


def _until(seconds: float) -> float:
    """When a process that starts now should write its last result: the same for each attempt."""
    return time.time() + seconds - _START_S


def _build(plan: Plan, seconds: float) -> list[Phase]:
    if {f"_C{sysconfig.get_config_var('EXT_SUFFIX')}", "_C_cuda.so"} <= set(plan.libraries):
        return [plan.phase("build", [sys.executable, "-c", "print('the cache has the libraries')"], seconds)]
    major, minor = torch.cuda.get_device_capability()
    environment = {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),  # has ninja
        "FASTMETA_CUDA_ARCHITECTURES": os.environ.get("FASTMETA_CUDA_ARCHITECTURES", f"{major}{minor}"),
    }
    if "_C_cuda.so" in plan.libraries:
        environment["FASTMETA_CUDA"] = "0"  # only what depends on this Python is missing
    return [plan.phase("build", [sys.executable, "setup.py", "-q", "build_ext", "--inplace"], seconds, environment)]


def _environment(plan: Plan, seconds: float) -> list[Phase]:
    return [plan.phase("environment", _python("bench.environment", "--out", plan.part("environment.json")), seconds)]


def _compile(plan: Plan, seconds: float) -> list[Phase]:
    """Fills the compilers' caches on disk."""
    environment = {"OMP_NUM_THREADS": "2", "TORCHINDUCTOR_COMPILE_THREADS": "2"}
    found = []
    for share, path in enumerate(plan.shares()):
        arguments = ["--out", path, "--until", _until(seconds), "--only-compile", f"{share}/{PROCESSES}"]
        command = _python("bench.operators", *arguments, *choices.as_arguments(plan.options))
        found.append(plan.phase(f"compile {share}", command, seconds, environment))
    return found


def files_of_tests(folder: Path) -> list[str]:
    """The operators' tests, and those of what only a GPU has."""
    found = [path for pattern in TEST_FILES for path in sorted(folder.rglob(pattern))]
    chosen = [str(path) for path in found if path.name not in HOST_TESTS | {Path(LARGE).name}]
    return [*dict.fromkeys(chosen), *(str(folder / name) for name in ON_A_GPU)]


def _tests(plan: Plan, seconds: float) -> list[Phase]:
    beside = ["-n", str(PROCESSES), "--dist", "loadgroup"] if importlib.util.find_spec("xdist") else []
    return [_pytest(plan, "tests", "outcomes.jsonl", seconds, files_of_tests(ROOT / "tests"), *beside)]


def _large(plan: Plan, seconds: float) -> list[Phase]:
    return [_pytest(plan, "large", "large.jsonl", seconds, [str(ROOT / "tests" / LARGE)])]


def _pytest(plan: Plan, name: str, outcomes: str, seconds: float, tests: list[str], *options: str) -> Phase:
    environment = gate.environment(plan.part(outcomes)) | {"FASTMETA_TEST_DEVICE": "cuda", "OMP_NUM_THREADS": "2"}
    return plan.phase(name, gate.command(tests, "--tb=short", *options), seconds, environment)


def _sanitizer(tool: str, plan: Plan, seconds: float) -> list[Phase]:
    program = sanitizer.find()
    if program is None:
        return []
    # Without its cache every tensor is an allocation of its own, whose bounds memcheck knows.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "OMP_NUM_THREADS": "2"}
    return [plan.phase(tool, sanitizer.command(program, tool), seconds, environment)]


def _operators(plan: Plan, seconds: float) -> list[Phase]:
    out = plan.part("operators.json")
    arguments: list[object] = ["--out", out, "--until", _until(seconds), *choices.as_arguments(plan.options)]
    compiles = "compile" not in plan.options.phases
    if not compiles:
        arguments += ["--compiled", *plan.shares()]
    stall = 180.0 if compiles else 60.0
    progress: dict[str, Any] = {"attempts": 6, "progress": files.running(out), "stall_s": stall}
    return [plan.phase("operators", _python("bench.operators", *arguments), seconds, **progress)]


def _step(plan: Plan, seconds: float) -> list[Phase]:
    quick = ["--quick"] if plan.options.quick else []
    arguments = ["step", "--device", "cuda", "--out", plan.part("step"), "--seconds", seconds - _START_S, *quick]
    return [plan.phase("step", _python("bench", *arguments), seconds)]


Makers = Mapping[str, Callable[[Plan, float], list[Phase]]]
MAKERS: Makers = {
    "build": _build,
    "environment": _environment,
    "compile": _compile,
    "tests": _tests,
    **{tool: partial(_sanitizer, tool) for tool in sanitizer.TOOLS},
    "operators": _operators,
    "step": _step,
    "large": _large,
}


def run(options: argparse.Namespace) -> int:
    if not torch.cuda.is_available():
        print(f"No GPU: torch {torch.__version__} sees no CUDA device.", file=sys.stderr)
        return 2
    if options.folder is None:
        options.folder = ROOT / "bench/results" / files.folder_name(torch.cuda.get_device_name())
    return run_phases(options)


def run_phases(options: argparse.Namespace, makers: Makers = MAKERS) -> int:
    """All groups in turn within the budget."""
    begin = time.monotonic()
    records: dict[str, dict[str, Any]] = {}
    caches = cache.default_folder()
    libraries = cache.unpack(options.cache, caches) if options.cache else []
    with tempfile.TemporaryDirectory(prefix="fastmeta-bench-") as work:
        plan = Plan(Path(work).resolve(), options, caches, libraries)
        for names, limit in _limits(options, begin):
            print(f"{', '.join(names)} (at most {limit:.0f} s) ...", flush=True)
            records |= _run_group(plan, names, limit, makers, partial(_refresh, plan, records, begin))
            _refresh(plan, records, begin)
            for name, record in ((name, records[name]) for name in names):
                reason = f": {record['reason']}" if record["reason"] else ""
                print(f"  {name}: {record['status']} in {record['seconds']:.0f} s{reason}", flush=True)
            built = bool(libraries) or records.get("build", {}).get("status") == "passed"
            if options.cache and "compile" in names:  # a run that is cut off later keeps what took longest
                cache.pack(options.cache, caches, built=built)
        results = _refresh(plan, records, begin)
        report.draw(results, options.folder)
        print("\n" + report.terminal(results))
    if options.cache:
        print(f"{options.cache}: {cache.pack(options.cache, caches, built=built) / 1e6:.0f} MB", flush=True)
    # What was not compiled in time is missing from the tables, which say so.
    bad = [name for name, record in records.items() if record["status"] in ("failed", "timed out")]
    return 1 if set(bad) - {"compile"} else 0


def _refresh(plan: Plan, records: dict[str, dict[str, Any]], begin: float) -> dict[str, Any]:
    """Write what there is."""
    results = report.collect(plan.work / "parts", records, time.monotonic() - begin)
    report.write(results, plan.options.folder)
    logs = sorted((plan.work / "logs").glob("*.txt"), key=lambda path: path.stat().st_mtime)
    texts = [f"===== {path.stem}\n{path.read_text(errors='replace')[-LOG:]}\n" for path in logs]
    (plan.options.folder / "log.txt").write_text("\n".join(texts))
    return results


def _limits(options: argparse.Namespace, begin: float) -> Iterator[tuple[tuple[str, ...], float]]:
    """Each group of the phases asked for, and the seconds it may take when its turn comes."""
    budget = options.budget or (QUICK_S if options.quick else BUDGET_S)
    groups = [
        (tuple(n for n in names if n in options.phases), kept * budget, most * budget) for names, kept, most in GROUPS
    ]
    groups = [group for group in groups if group[0]]
    for place, (names, seconds, most) in enumerate(groups):
        later = sum(kept for _, kept, _ in groups[place + 1 :])
        left = budget - (time.monotonic() - begin)
        # Its part of what is left, if that is less than all parts.
        yield names, max(0.0, min(most, max(left - later, left * seconds / (seconds + later))))


def _run_group(
    plan: Plan, names: Sequence[str], limit: float, makers: Makers, refresh: Callable[[], Any]
) -> dict[str, dict[str, Any]]:
    """The records of phases beside each other."""
    made: dict[str, list[Phase]] = {}
    records: dict[str, dict[str, Any]] = {}
    for name in names:
        try:
            made[name] = makers[name](plan, limit)
        except Exception as error:  # one phase that cannot even begin must not cost the others
            records[name] = not_run("failed", f"{type(error).__name__}: {error}")
    done = run_together([phase for phases in made.values() for phase in phases], ROOT, refresh)
    for name, phases in made.items():
        parts = [done[phase.name] for phase in phases] or [not_run("skipped", "there is no such program here")]
        # Of several processes the first that did not pass speaks for the phase.
        worst = next((part for part in parts if part["status"] != "passed"), parts[0])
        records[name] = worst | {"seconds": max(part["seconds"] for part in parts)}
        if name in sanitizer.TOOLS and phases:
            records[name] = sanitizer.judged(records[name], plan.log(name).read_text(errors="replace"))
    return records
