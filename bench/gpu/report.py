"""A run's results as JSON, as markdown and on the terminal. Cells that were not measured stay empty."""

import sys
from pathlib import Path
from typing import Any

from bench import text
from bench.gpu import choices, files, goals, outcomes
from bench.gpu.rows import MAX_AUTOTUNE, Row, device_us, main_variant, measured, over, title

SCHEMA_VERSION = 1


def collect(parts: Path, phases: dict[str, dict[str, Any]], seconds: float) -> dict[str, Any]:
    """Everything the phases have written so far into the folder ``parts``."""
    operators = files.read(parts / "operators.json") or {}
    tests = outcomes.summarize(parts / "outcomes.jsonl", choices.STEMS)
    results = {
        "schema_version": SCHEMA_VERSION,
        "environment": files.read(parts / "environment.json") or {},
        "phases": phases,
        "tests": tests,
        "shared": operators.get("shared", {}),
        "operators": operators.get("cases", []),
        "unfinished": operators.get("unfinished", []),
        "crashed": operators.get("crashed", {}),
        "steps": files.read(parts / "step.json") or [],
        "seconds": seconds,
    }
    return results | {"goals": [goal.as_json() for goal in goals.goals(results)]}


def write(results: dict[str, Any], folder: Path) -> None:
    """Write gpu.json and gpu.md."""
    files.write(folder / "gpu.json", results)
    (folder / "gpu.md").write_text(markdown(results))


def draw(results: dict[str, Any], folder: Path) -> None:
    """The pictures, where matplotlib is installed."""
    try:
        from bench.gpu import plot

        plot.draw(results, folder)
    except Exception as error:  # matplotlib is not installed, or chokes: the tables are still to be printed
        print(f"No pictures: {type(error).__name__}: {error}", file=sys.stderr)


def phase_line(name: str, record: dict[str, Any]) -> str:
    reason = f": {record['reason']}" if record["reason"] else ""
    return f"{name}: {record['status']} in {record['seconds']:.0f} s{reason}"


def _cell(value: float | None, form: Any = text.factor) -> str:
    return "" if value is None else form(value)


def _phases(results: dict[str, Any]) -> list[str]:
    rows = [
        [name, record["status"], f"{record['seconds']:.0f}", record["reason"]]
        for name, record in results["phases"].items()
    ]
    return text.table(["phase", "status", "s", ""], rows)


def _tests(results: dict[str, Any]) -> list[str]:
    tests = results["tests"]
    skips = sum(tests["skipped"].values())
    if not tests["passed"] and not tests["failed"]:
        return []
    lines = [f"Tests on the device: {tests['passed']} passed, {len(tests['failed'])} failed, {skips} skipped.", ""]
    lines += [f"- {one['test']}: {_one_line(one['message'])}" for one in tests["failed"][:20]]
    if len(tests["failed"]) > 20:
        lines.append(f"- and {len(tests['failed']) - 20} more, in gpu.json")
    return lines + [""] * bool(tests["failed"])


def _one_line(message: str) -> str:
    return " ".join(message.split())[:160]


def _operator_row(record: Row, failing: str) -> list[str]:
    start = [record["operator"] + failing, record["shape"], record["dtype"]]
    ours = main_variant(record)
    if ours is None:
        failed = record.get("failed") or next(
            (v["reason"] for v in record["variants"] if v["name"] == record["main"] and "reason" in v), "no time"
        )
        return [*start, _one_line(failed), *[""] * 11]
    eager, compiled = measured(record, "eager"), measured(record, "compile")
    default = [v for v in compiled if v["name"] != MAX_AUTOTUNE]
    tuned = [v for v in compiled if v["name"] == MAX_AUTOTUNE]
    peers = measured(record, "peer")
    return [
        *start,
        text.time(ours["stream_us"]),
        _cell(device_us(ours), text.time),
        _cell(ours.get("times_floor")),
        record["cost"]["bound"],
        _cell(ours.get("launches"), str),
        _cell(ours.get("host_us"), lambda us: f"{us:.1f}"),
        _cell(over(record, eager, device=False)),
        _cell(over(record, eager, device=True)),
        " / ".join(_cell(over(record, one, device=False)) for one in (default, tuned)).strip(" /"),
        " / ".join(_cell(over(record, one, device=True)) for one in (default, tuned)).strip(" /"),
        f"{_cell(over(record, peers, device=False))} {peers[0]['name']}" if peers else "",
        _cell(ours.get("peak_bytes"), text.memory),
    ]


OPERATOR_HEADER = [
    "operator",
    "N, D, C",
    "dtype",
    "stream",
    "graph",
    "x floor",
    "bound",
    "launches",
    "host us",
    "over eager",
    "in graphs",
    "over compile / max-autotune",
    "in graphs",
    "over best other",
    "peak memory",
]


def _operators(results: dict[str, Any]) -> list[str]:
    records = results["operators"]
    if not records:
        return []
    failed = {name: counts["failed"] for name, counts in results["tests"]["operators"].items()}
    failing = {name: f" ({count} tests fail)" for name, count in failed.items() if count}
    rows = [_operator_row(record, failing.get(record["operator"], "")) for record in records]
    return text.table(OPERATOR_HEADER, rows)


def _forms(results: dict[str, Any]) -> list[str]:
    """The cost model's choice against every form that was measured."""
    rows = []
    for record in results["operators"]:
        choice = record.get("choice")
        if choice is None:
            continue
        times = [
            f"{v['name']} {text.time(v['stream_us'])}{_in_graph(v)}"
            for v in measured(record, "fastmeta")
            if v["name"] != record["main"]
        ]
        rows.append(
            [
                record["operator"],
                record["shape"],
                record["dtype"],
                choice["chosen"] or "",
                choice["best"],
                text.factor(choice["times_best"]),
                "; ".join(times),
            ]
        )
    header = ["operator", "N, D, C", "dtype", "chosen", "best", "chosen over best", "every form: stream (graph)"]
    return text.table(header, rows) if rows else []


def _in_graph(variant: Row) -> str:
    return f" ({text.time(variant['graph_us'])})" if "graph_us" in variant else ""


def _steps(results: dict[str, Any]) -> list[str]:
    lines: list[str] = []
    for task in results["steps"]:
        if "failed" in task:
            lines += [f"{task['task']}: not available, {task['failed']}", ""]
            continue
        rows = [
            [
                variant["name"],
                _cell(variant.get("step_ms"), lambda ms: f"{ms:.2f}"),
                _cell(variant.get("ratio"), lambda ratio: f"{ratio:.3f}"),
                _cell(variant.get("refine_us"), text.time),
                _cell(variant.get("refine_host_syncs"), str),
                variant.get("reason", ""),
            ]
            for variant in task["variants"]
        ]
        header = [f"{task['task']}", "ms per step", "x plain step", "refine alone", "host syncs in it", ""]
        lines += text.table(header, rows)
    return lines


def _goals(results: dict[str, Any]) -> list[str]:
    rows = []
    for goal in goals.goals(results):
        worst = goal.worst
        sign = ">=" if goal.at_least else "<="
        rows.append(
            [
                goal.name,
                f"{sign} {goal.text(goal.required)}",
                "" if worst is None else f"{goal.text(worst[1])}: {worst[0]}",
                {True: "yes", False: "no", None: ""}[goal.met],
            ]
        )
    return text.table(["goal", "required", "worst measured", "met"], rows)


def _not_measured(results: dict[str, Any]) -> list[str]:
    lines = [f"- {key}, {step}: {why}" for key, steps in results["crashed"].items() for step, why in steps.items()]
    if results["unfinished"]:
        lines.append(f"- no time was left for {len(results['unfinished'])} cases: {'; '.join(results['unfinished'])}")
    for record in results["operators"]:
        for variant in record.get("variants", []):
            if variant["status"] in ("failed", "wrong") and "has no form" not in variant["reason"]:
                lines.append(f"- {title(record)}, {variant['name']}: {_one_line(variant['reason'])}")
            elif variant.get("host_syncs"):
                times = variant["host_syncs"]
                lines.append(f"- {title(record)}, {variant['name']}: waits for the device {times} times")
    return ["Not measured, wrong, or with host syncs:", "", *lines, ""] if lines else []


def _tables(results: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """Title and lines of every part that has something to say."""
    parts = [
        ("Forms", _forms(results)),
        ("Operators", _operators(results)),
        ("Step time", _steps(results)),
        ("What was left out", _not_measured(results)),
        ("Tests", _tests(results)),
        ("Goals", _goals(results)),
        ("Phases", _phases(results)),
    ]
    return [(title, lines) for title, lines in parts if lines]


def terminal(results: dict[str, Any]) -> str:
    """The tables alone, the shortest last."""
    lines = [line for title, part in _tables(results) for line in (f"{title}:", *part)]
    return "\n".join([*lines, f"{results['seconds']:.0f} s in all."])


def markdown(results: dict[str, Any]) -> str:
    environment, shared = results["environment"], results["shared"]
    gpu = environment.get("gpu", {})
    lines = ["# GPU", ""]
    if gpu:
        lines += [
            f"{gpu['name']} (compute capability {gpu['capability']}, {gpu['multiprocessors']} multiprocessors, "
            f"{text.memory(gpu['memory_bytes'])}, L2 {text.memory(gpu['l2_bytes'])}), torch {environment['torch']}, "
            f"Triton {environment['packages']['triton']}, fastmeta {environment['fastmeta']} at "
            f"{(environment['git_commit'] or '?')[:10]}, {environment['date']}.",
            "",
        ]
    if shared:
        copies = ", ".join(
            f"{text.memory(float(size))} {rate / 1e12:.2f} TB/s" for size, rate in shared["copy_bytes_per_s"].items()
        )
        peaks = ", ".join(f"{dtype} {rate / 1e12:.0f} TFLOP/s" for dtype, rate in shared["peak_flops"].items())
        launch = shared["launch_us"]
        lines += [
            f"Ceilings of the same run: copy, read and write together: {copies}; an 8192-cubed product: {peaks}; an "
            f"empty launch {launch['stream']:.2f} us on the stream, {launch['graph']:.2f} us in a graph.",
            "",
            METHOD,
            "",
        ]
    titles = dict(_tables(results))
    order = ("Phases", "Goals", "Tests", "Operators", "Forms", "Step time", "What was left out")
    for heading in order:
        if heading in titles:
            lines += [f"## {heading}", "", *titles[heading]]
    for operator in dict.fromkeys(record["operator"] for record in results["operators"]):
        records = [r for r in results["operators"] if r["operator"] == operator and "variants" in r]
        if records:
            lines += [f"## {operator}", "", *_details(records)]
    return "\n".join(lines).rstrip() + "\n"


METHOD = (
    "Medians of interleaved samples in one process. *stream*: between two events around many calls, so where the host "
    "is slower than the device it is the host's time; *graph*: the same calls replayed from a CUDA graph, the device's "
    "time (calls beyond 2 ms are not captured: the stream's time is the device's). Arguments rotate over sets that "
    "exceed three times the L2 cache, up to 24 sets; what is smaller is measured within L2, as is its copy. "
    "*x floor*: the graph's time over max(the products in cuBLAS at the same shapes and dtype, bytes / copy bandwidth, "
    "one empty launch in a graph). *over*: a peer's time over fastmeta's, above 1 fastmeta is faster. *host us*: wall "
    "time until a call returns. Every variant's result was checked against float64 before it was timed."
)


def _details(records: list[Row]) -> list[str]:
    """Every variant at every shape: stream, graph, peak memory."""
    names = list(dict.fromkeys(v["name"] for record in records for v in record["variants"]))
    rows = []
    for record in records:
        by_name = {v["name"]: v for v in record["variants"]}
        cells = [_detail(by_name.get(name)) for name in names]
        rows.append([f"{record['shape']} {record['dtype']}{' (in L2)' * record['cost']['in_l2']}", *cells])
    lines = ["Stream (graph), peak memory beyond the arguments:", "", *text.table(["", *names], rows)]
    notes = {v["name"]: v["note"] for record in records for v in record["variants"] if v["note"]}
    return lines + [f"- {name}: {note}." for name, note in notes.items()] + [""] * bool(notes)


def _detail(variant: Row | None) -> str:
    if variant is None or "stream_us" not in variant:
        return ""
    peak = variant.get("peak_bytes")
    memory = "" if peak is None else f", {text.memory(peak)}"
    return f"{text.time(variant['stream_us'])}{_in_graph(variant)}{memory}"
