"""Every operator against what users have today: eager PyTorch, torch.compile, autograd, BackPACK, curvlinops and more.

On the CPU. Runs the operators' tests first; one whose tests fail is not measured. Writes ops.json, ops.csv, ops.md,
ops.png and ops-roofline.png.
"""

# ``python -m bench.operators --out FILE --until T`` is the phase ``operators`` of ``python -m bench gpu``: every result
# is written at once, and started again on the same file it goes on after the variant that it died in. With
# ``--only-compile I/N`` it runs the I-th of N shares of the cases once and times nothing: processes beside each other
# fill the compilers' caches, which the measuring one finds.

import argparse
import dataclasses
import gc
import math
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from bench import choices, environment, files, gate, goals, report
from bench.case import COMPILE_MODES, Case, Variant
from bench.clock import Clock, DeviceLost, clock_for, ensure_healthy, reason_of
from bench.files import Progress
from bench.floors import DTYPES, Ceilings, Products, measure_ceilings
from bench.measure import QUICK, SETTINGS, Settings, measure_case, new_record
from bench.ops import cases
from bench.rows import MAX_AUTOTUNE, Row, main_variant, reason_without_time, title, warn_if_contended

RESULTS = Path(__file__).parent / "results"
DEVICE_LOST = 70  # exit status
_LAUNCHES_S = 20.0  # kept back for counting launches at the end
_MUCH = 2**33
Chosen = list[tuple[Case, tuple[torch.dtype, ...]]]


def recorded(folder: Path = RESULTS) -> set[str]:
    """Keys of all cases that some GPU's record in the repository has a time for."""
    found = set()
    for path in folder.glob("*/gpu.json"):
        found |= {r["key"] for r in (files.read(path) or {}).get("operators", []) if main_variant(r)}
    return found


def _rank(case: Case, dtype: torch.dtype, known: set[str]) -> int:
    """What no record holds first, then what the goals ask for; last what takes seconds a call and is cut off first."""
    if case.is_large and dtype == torch.float32:
        return 3
    if case.key(dtype) not in known:
        return 0
    return 1 if case.label.removesuffix(", head") in goals.SHAPES else 2


def chosen(options: argparse.Namespace, device: str) -> Chosen:
    """The cases asked for. On a GPU each dtype on its own, in the order in which they are measured."""
    found = [
        (case, tuple(DTYPES[name] for name in options.dtypes if DTYPES[name] in case.dtypes))
        for case in cases(device)
        if case.operator in options.operators
        and (options.shapes is None or any(text in case.label for text in options.shapes))
    ]
    if device != "cuda":
        return [(case, dtypes) for case, dtypes in found if dtypes]
    known = recorded()
    alone = [(case, (dtype,)) for case, dtypes in found for dtype in dtypes]
    return sorted(alone, key=lambda one: (_rank(one[0], one[1][0], known), one[0].is_large))


def measure_all(
    cases: Chosen,
    progress: Progress,
    clock: Clock,
    settings: Settings,
    deadline: float,
    *,
    ceilings: Ceilings | None = None,
    compiled: set[str] | None = None,
) -> None:
    """Measure what is not there yet; no case begins after the deadline (``time.monotonic()``).

    Ceilings that are not given are measured before the first case and after the last. ``compiled`` has each
    ``key/variant`` that the caches on disk hold; None: compile here whatever is missing.
    """
    progress.announce("ceilings", "ceilings")
    products = Products(clock)
    held = ceilings or measure_ceilings(clock)
    progress.shared = held.as_json()
    done = {record["key"] for record in progress.cases}
    for case, all_dtypes in cases:
        dtypes = tuple(dtype for dtype in all_dtypes if case.key(dtype) not in done)
        if dtypes and time.monotonic() > deadline:
            progress.unfinished += [case.key(dtype) for dtype in dtypes]
        elif dtypes:
            key = case.key(dtypes[0])
            crashes = progress.crashed.get(key, {})
            measure = partial(
                measure_case,
                *(case, dtypes, clock, products, settings),
                left_out=_left_out(case, dtypes[0], compiled, crashes),
                announce=partial(progress.announce, key),
            )
            for record in _records(case, dtypes, measure, crashes, clock):
                held.apply(record)
                progress.finish(record)
                print(f"{record['key']}: {_line(record)}", flush=True)
            free(clock.device)
    if ceilings is None:
        held = held.best_of(measure_ceilings(clock))
        progress.shared = held.as_json()
        for record in progress.cases:
            held.apply(record)
    progress.save()


def _left_out(case: Case, dtype: torch.dtype, compiled: set[str] | None, crashes: dict[str, str]) -> dict[str, str]:
    """Why variants are not run."""
    found: dict[str, str] = {}
    if compiled is not None:
        found |= {name: "not compiled in time" for name in COMPILE_MODES if f"{case.key(dtype)}/{name}" not in compiled}
    if case.is_large:
        found[MAX_AUTOTUNE] = "left out at this size: its tuning takes longer than all measurements"
    # A crash is announced as "variant" or "variant: what was done with it".
    return found | {step.partition(": ")[0]: why for step, why in crashes.items()}


def _records(
    case: Case,
    dtypes: tuple[torch.dtype, ...],
    measure: Callable[[], list[Row]],
    crashes: dict[str, str],
    clock: Clock,
) -> list[Row]:
    """The case's records; each with a reason in place of figures where it cannot be measured."""
    outside = [step for step in crashes if step in ("inputs", "products alone") or step.startswith("timing")]
    reason = f"{outside[0]}: {crashes[outside[0]]}" if outside else ""
    if not reason:
        try:
            return measure()
        except DeviceLost:
            raise
        except Exception as error:  # the inputs do not fit, say: the other cases may
            traceback.print_exc()
            reason = reason_of(error)
        ensure_healthy(clock.device)
    return [new_record(case, dtype) | {"failed": reason} for dtype in dtypes]


def _line(record: Row) -> str:
    ours = main_variant(record)
    if ours is None:
        return reason_without_time(record)
    inside = f", {ours['graph_us']:.1f} us in a graph" if "graph_us" in ours else ""
    return f"{ours['stream_us']:.1f} us{inside}, {ours['times_floor']:.1f}x the floor"


def free(device: str) -> None:
    """Give cached memory back where there is much of it."""
    if device == "cuda" and torch.cuda.memory_reserved() > _MUCH:
        gc.collect()
        torch.cuda.empty_cache()


def count_launches(cases: Chosen, progress: Progress, clock: Clock, deadline: float) -> None:
    """Add ``launches`` and ``kernels`` to fastmeta's and the eager variants at every size, until the deadline.

    After all timing, which a profiler would disturb.
    """
    records = {record["key"]: record for record in progress.cases}
    small_first = sorted(cases, key=lambda one: one[0].is_large)
    for case, dtype in ((case, dtype) for case, dtypes in small_first for dtype in dtypes):
        record = records.get(case.key(dtype), {})
        measured = {entry["name"]: entry for entry in record.get("variants", []) if "stream_us" in entry}
        try:
            for variant in case.build(dtype, clock.device).variants if measured else []:
                if time.monotonic() > deadline:
                    return
                if variant.role in ("fastmeta", "eager") and variant.name in measured:
                    with variant.entered():
                        found = clock.kernels(variant.call)
                    measured[variant.name] |= {"launches": len(found), "kernels": found}
        except Exception as error:  # no profiler on this machine: the column stays empty
            print(f"Launches are not counted: {reason_of(error)}", flush=True)
            return
        finally:
            progress.save()
        free(clock.device)


def compile_all(cases: Chosen, share: int, shares: int, done: Path, deadline: float, device: str) -> None:
    """Run every variant of a share of the cases once, and note which have run."""
    finished: list[str] = []
    alone = [(case, dtype) for case, dtypes in cases for dtype in dtypes]
    own = [one for one in alone if not one[0].is_large][share::shares]
    # One process alone, because of the memory.
    own += [one for one in alone if one[0].is_large and one[1] != torch.float32] * (share == shares - 1)
    for mode in (None, *COMPILE_MODES):  # what is sure to be measured first, the longest compilation last
        for case, dtype in own:
            if mode == MAX_AUTOTUNE and case.is_large:
                continue
            if time.monotonic() > deadline:
                return
            try:
                for variant in case.build(dtype, device).variants:
                    if variant.name == mode if mode else variant.role != "compile":
                        _run_once(variant, f"{case.key(dtype)}/{variant.name}", finished, device)
                        files.write(done, finished)
            except RuntimeError as error:  # its inputs do not fit beside the other processes'
                print(f"{case.key(dtype)}: {reason_of(error)}", flush=True)
                ensure_healthy(device)
            torch.compiler.reset()
            free(device)


def _run_once(variant: Variant, key: str, finished: list[str], device: str) -> None:
    try:
        with variant.entered():
            variant.result()
        finished.append(key)
    except Exception as error:
        print(f"{key}: {reason_of(error)}", flush=True)
        ensure_healthy(device)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    choices.add_choices(parser)
    rounds = SETTINGS["cpu"].rounds
    parser.add_argument("--rounds", type=int, default=rounds, help="samples of each variant (%(default)s)")
    parser.add_argument("--threads", type=int, help="torch's threads (default: its own choice)")
    parser.add_argument("--out", type=Path, help="folder for the results (bench/results/<processor and threads>)")


def run(options: argparse.Namespace) -> int:
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    found = chosen(options, "cpu")
    if not found:
        print("No case has such an operator and shape.", file=sys.stderr)
        return 2
    start = time.monotonic()
    operators = list(dict.fromkeys(case.operator for case, _ in found))
    print(f"Testing {len(operators)} operators ...", flush=True)
    tests = gate.run_tests(operators, choices.STEMS)
    verdicts = tests["operators"]
    for operator, verdict in verdicts.items():
        print(f"  {operator}: {verdict['reason']}", flush=True)
    settings = dataclasses.replace(SETTINGS["cpu"], rounds=3 if options.quick else options.rounds)
    described = environment.describe()
    with tempfile.TemporaryDirectory() as work:
        progress = Progress(Path(work, "operators.json"))
        green = [(case, dtypes) for case, dtypes in found if verdicts[case.operator]["green"]]
        measure_all(green, progress, clock_for("cpu"), settings, math.inf)
    results: Row = {
        "schema_version": report.SCHEMA_VERSION,
        "environment": described,
        "settings": dataclasses.asdict(settings),
        "shared": progress.shared,
        "tests": tests,
        "refused": len(green) < len(found),
        "operators": progress.cases,
        "seconds": time.monotonic() - start,
    }
    folder = options.out or RESULTS / environment.machine_name()
    written = save(results, folder)
    print("\n".join(["", *report.operators(results), f"{results['seconds']:.0f} s; {', '.join(written)} in {folder}"]))
    warn_if_contended(report.timed(results))
    bad = [(r, v) for r in results["operators"] for v in r.get("variants", []) if v["status"] != "measured"]
    for record, variant in bad:
        print(f"{title(record)}, {variant['name']} left out: {variant['reason']}", file=sys.stderr)
    failed = any("failed" in record for record in results["operators"])
    return 1 if results["refused"] or failed or any(v["status"] == "wrong" for _, v in bad) else 0


def save(results: Row, folder: Path) -> list[str]:
    """Writes the JSON, the CSV, the tables and, where matplotlib is installed, the pictures; returns the file names."""
    files.write(folder / "ops.json", results)
    report.write_csv(results, folder / "ops.csv")
    (folder / "ops.md").write_text(report.markdown(results, "Operators on the CPU", [("", report.operators(results))]))
    written = ["ops.json", "ops.csv", "ops.md"]
    try:
        from bench import plot
    except ImportError:
        print("No picture: matplotlib is not installed.", file=sys.stderr)
        return written
    return written + [path.name for path in plot.draw(results, folder, "ops")]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--until", type=float, required=True, help="by time.time()")
    parser.add_argument("--only-compile", metavar="I/N")
    parser.add_argument("--compiled", type=Path, nargs="*", help="what processes with --only-compile wrote")
    choices.add_choices(parser)
    options = parser.parse_args(arguments)
    deadline = time.monotonic() + options.until - time.time()
    warnings.filterwarnings("ignore", message="Online softmax is disabled")
    found = chosen(options, "cuda")
    try:
        if options.only_compile:
            share, _, shares = options.only_compile.partition("/")
            compile_all(found, int(share), int(shares), options.out, deadline, "cuda")
            return 0
        held = None
        if options.compiled is not None:
            held = {name for path in options.compiled for name in files.read(path) or []}
        progress = Progress(options.out)
        settings = QUICK if options.quick else SETTINGS["cuda"]
        clock = clock_for("cuda")
        measure_all(found, progress, clock, settings, deadline - _LAUNCHES_S, compiled=held)
        count_launches(found, progress, clock, deadline)
    except DeviceLost as error:
        print(f"The device is lost: {error}", file=sys.stderr)
        return DEVICE_LOST
    return 0


if __name__ == "__main__":
    sys.exit(main())
