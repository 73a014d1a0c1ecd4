"""The phase ``operators``: measures every case and writes each result at once, so that a crash costs one variant.

``python -m bench.gpu.operators --out FILE --until T``. Started again on the same file it goes on after the variant
that it died in. With ``--only-compile I/N`` it runs the I-th of N shares of the cases once and times nothing: processes
beside each other fill the compilers' caches on disk, which the measuring process then finds.
"""

import argparse
import gc
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch

from bench.case import Variant
from bench.gpu import files, last_layer, launches, other_ops
from bench.gpu.case import COMPILE_MODES, MAX_AUTOTUNE, GpuCase
from bench.gpu.choices import add_choices
from bench.gpu.clock import Clock, DeviceLost, clock_for, ensure_healthy
from bench.gpu.floors import COPY_BYTES, Floors
from bench.gpu.measure import Settings, measure_case
from bench.gpu.progress import Progress

CASES: list[GpuCase] = [*last_layer.CASES, *other_ops.CASES]
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
DEVICE_LOST = 70  # exit status
# Of the goals in bench.gpu.goals.
GOAL_SHAPES = (
    *("256, 128, 10", "448, 128, 100", "768, 512, 200", "4096, 2048, 1000", "8192, 2048, 128256"),
    *("65536, 256", "32768, 1000", "8192, 4000", "ResNet-50"),
)
_QUICK = Settings(rounds=3, min_sample_s=0.001, budget_s=0.05)
_LAUNCHES_S = 15.0  # kept back for counting launches at the end
_MUCH = 2**33


def _large(case: GpuCase) -> bool:
    """Whether its inputs are gigabytes, or its calls take many milliseconds."""
    n, d, c = case.shape or (0, 0, 0)
    return n * d * c > 2**34


def _rank(case: GpuCase, dtype: torch.dtype) -> int:
    """What the goals ask for comes first, what takes seconds a call last: that is what a short budget leaves out."""
    if _large(case) and dtype == torch.float32:
        return 2
    return 0 if case.label.removesuffix(", head") in GOAL_SHAPES else 1


def chosen(options: argparse.Namespace) -> list[tuple[GpuCase, torch.dtype]]:
    """The cases asked for, in the order in which they are measured."""
    found = [
        (case, DTYPES[name])
        for case in CASES
        for name in options.dtypes
        if DTYPES[name] in case.dtypes
        and case.operator in options.operators
        and (options.shapes is None or any(text in case.label for text in options.shapes))
    ]
    return sorted(found, key=lambda one: _rank(*one))


def measure_all(
    cases: list[tuple[GpuCase, torch.dtype]],
    progress: Progress,
    clock: Clock,
    settings: Settings,
    deadline: float,
    *,
    copy_bytes: tuple[int, ...] = COPY_BYTES,
    compiled: set[str] | None = None,
) -> None:
    """Measure what is not there yet, until the deadline.

    Args:
        cases: all of them.
        progress: where results go, and which are there.
        clock: of the device.
        settings: how long to measure.
        deadline: by ``time.monotonic()``; no case begins after it.
        copy_bytes: sizes at which the copy bandwidth is measured.
        compiled: ``key/variant`` that the caches on disk hold; None: compile here whatever is missing.
    """
    progress.announce("ceilings", "ceilings")
    floors = Floors(clock, copy_bytes)
    peak = {} if clock.device == "cpu" else {name: floors.peak_flops(dtype) for name, dtype in DTYPES.items()}
    progress.shared = {
        "copy_bytes_per_s": floors.copy,
        "launch_us": {"stream": floors.launch_us, "graph": floors.launch_graph_us},
        "peak_flops": peak,
    }
    done = {record["key"] for record in progress.cases}
    missing = []
    for case, dtype in cases:
        key = case.key(dtype)
        if key in done:
            continue
        if time.monotonic() > deadline:
            missing.append(key)
            continue
        crashes = progress.crashed.get(key, {})
        left_out = dict(crashes)
        if _large(case):
            left_out.setdefault(MAX_AUTOTUNE, "left out at this size: its tuning takes longer than all measurements")
        if compiled is not None:
            late = {name: "not compiled in time" for name in COMPILE_MODES if f"{key}/{name}" not in compiled}
            left_out = late | left_out
        shared = [step for step in crashes if step == "inputs" or step.startswith("timing")]
        begin = time.monotonic()
        if shared:
            record = _failed(case, dtype, f"{shared[0]}: {crashes[shared[0]]}")
        else:
            record = _measured(case, dtype, clock, floors, settings, left_out, progress)
        free(clock.device)
        progress.finish(key, record | {"seconds": time.monotonic() - begin})
        print(f"{key}: {_line(record)}, {time.monotonic() - begin:.1f} s", flush=True)
    progress.end(missing)


def _measured(
    case: GpuCase,
    dtype: torch.dtype,
    clock: Clock,
    floors: Floors,
    settings: Settings,
    left_out: dict[str, str],
    progress: Progress,
) -> dict[str, Any]:
    key = case.key(dtype)
    # A crash is announced as "variant" or "variant: what was done with it".
    names = {step.partition(": ")[0]: why for step, why in left_out.items()}
    try:
        return measure_case(
            case,
            dtype,
            clock,
            floors,
            settings,
            left_out=names,
            announce=lambda step: progress.announce(key, step),
        )
    except DeviceLost:
        raise
    except Exception as error:  # the inputs do not fit, say: the other cases may
        traceback.print_exc()
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
    ensure_healthy(clock.device)
    return _failed(case, dtype, reason)


def _failed(case: GpuCase, dtype: torch.dtype, reason: str) -> dict[str, Any]:
    name = str(dtype).removeprefix("torch.")
    return {"operator": case.operator, "shape": case.label, "dtype": name, "main": case.main, "failed": reason}


def _line(record: dict[str, Any]) -> str:
    if "failed" in record:
        return record["failed"]
    main: dict[str, Any] = next((v for v in record["variants"] if v["name"] == record["main"]), {})
    if "stream_us" not in main:
        return main.get("reason", "not measured")
    return f"{main['stream_us']:.1f} us on the stream, {main.get('graph_us', float('nan')):.1f} us in a graph"


def free(device: str) -> None:
    """Give cached memory back where there is much of it."""
    if device == "cuda" and torch.cuda.memory_reserved() > _MUCH:
        gc.collect()
        torch.cuda.empty_cache()


def compile_all(
    cases: list[tuple[GpuCase, torch.dtype]], share: int, shares: int, done: Path, deadline: float, device: str
) -> None:
    """Run every variant of a share of the cases once, and note which have run."""
    finished: list[str] = []
    small = [one for one in cases if not _large(one[0])]
    large = [one for one in cases if _large(one[0]) and one[1] != torch.float32]
    own = small[share::shares]
    own += large if share == shares - 1 else []  # one process alone, because of the memory
    for mode in (None, *COMPILE_MODES):  # what is sure to be measured first, the longest compilation last
        for case, dtype in own:
            if mode == MAX_AUTOTUNE and _large(case):
                continue
            if time.monotonic() > deadline:
                return
            try:
                problem = case.build(dtype, device)
                chosen = [v for v in problem.variants if (v.name == mode if mode else v.role != "compile")]
                for variant in chosen:
                    _run_once(variant, f"{case.key(dtype)}/{variant.name}", finished, device)
                    files.write(done, finished)
            except RuntimeError as error:  # its inputs do not fit beside the other processes'
                print(f"{case.key(dtype)}: {type(error).__name__}: {error}".splitlines()[0], flush=True)
                ensure_healthy(device)
            torch.compiler.reset()
            free(device)


def _run_once(variant: Variant, key: str, finished: list[str], device: str) -> None:
    try:
        with variant.around(), torch.set_grad_enabled(variant.grad):
            (variant.check or variant.call)()
        finished.append(key)
    except Exception as error:
        print(f"{key}: {type(error).__name__}: {error}".splitlines()[0], flush=True)
        ensure_healthy(device)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--until", type=float, required=True, help="by time.time()")
    parser.add_argument("--only-compile", metavar="I/N")
    parser.add_argument("--compiled", type=Path, nargs="*", help="what processes with --only-compile wrote")
    add_choices(parser)
    options = parser.parse_args(arguments)
    deadline = time.monotonic() + options.until - time.time()
    warnings.filterwarnings("ignore", message="Online softmax is disabled")
    cases = chosen(options)
    try:
        if options.only_compile:
            share, _, shares = options.only_compile.partition("/")
            compile_all(cases, int(share), int(shares), options.out, deadline, "cuda")
            return 0
        held = None
        if options.compiled is not None:
            held = {name for path in options.compiled for name in files.read(path) or []}
        progress = Progress(options.out)
        settings = _QUICK if options.quick else Settings()
        measure_all(cases, progress, clock_for("cuda"), settings, deadline - _LAUNCHES_S, compiled=held)
        launches.count_all(cases, progress, deadline)
    except DeviceLost as error:
        print(f"The device is lost: {error}", file=sys.stderr)
        return DEVICE_LOST
    return 0


if __name__ == "__main__":
    sys.exit(main())
