"""A GPU run as JSON, CSV, markdown, pictures and on the terminal."""

import sys
from pathlib import Path

from bench import choices, files, gate, goals, report
from bench.goals import goal_rows
from bench.rows import Row
from bench.text import cell, one_line, table_of


def collect(parts: Path, phases: Row, seconds: float) -> Row:
    """Everything the phases have written so far into the folder ``parts``."""
    operators = files.read(parts / "operators.json") or {}
    results = {
        "schema_version": report.SCHEMA_VERSION,
        "environment": files.read(parts / "environment.json") or {},
        "phases": phases,
        "tests": gate.summarize(sorted(parts.glob("*.jsonl")), choices.STEMS),
        "shared": operators.get("shared", {}),
        "operators": operators.get("cases", []),
        "unfinished": operators.get("unfinished", []),
        "crashed": operators.get("crashed", {}),
        "steps": files.read(parts / "step" / "step.json") or {"networks": []},
        "seconds": seconds,
    }
    return results | {"goals": [goal.as_json() for goal in goals.of_operators(results)]}


def write(results: Row, folder: Path) -> None:
    """Write gpu.json, gpu.csv and gpu.md."""
    files.write(folder / "gpu.json", results)
    report.write_csv(results, folder / "gpu.csv")
    (folder / "gpu.md").write_text(report.markdown(results, "GPU", _sections(results)))


def draw(results: Row, folder: Path) -> None:
    """The pictures, where matplotlib is installed."""
    try:
        from bench import plot

        plot.draw(results, folder, "operators")
        plot.draw_steps(results["steps"], folder)
    except Exception as error:  # matplotlib is not installed, or chokes: the tables are still to be printed
        print(f"No pictures: {type(error).__name__}: {error}", file=sys.stderr)


def _phases(results: Row) -> list[str]:
    if not results["phases"]:
        return []
    return table_of(
        {"phase": name, "status": record["status"], "s": f"{record['seconds']:.0f}", "": record["reason"]}
        for name, record in results["phases"].items()
    )


def _tests(results: Row) -> list[str]:
    tests = results["tests"]
    if not tests["passed"] and not tests["failed"]:
        return []
    counts = f"{tests['passed']} passed, {len(tests['failed'])} failed, {sum(tests['skipped'].values())} skipped"
    lines = [f"Tests on the device: {counts}.", ""]
    lines += [f"- {one['test']}: {one_line(one['message'])}" for one in tests["failed"][:20]]
    if len(tests["failed"]) > 20:
        lines.append(f"- and {len(tests['failed']) - 20} more, in gpu.json")
    return lines + [""] * bool(tests["failed"])


def _steps(results: Row) -> list[str]:
    """A line for each step; its own report has the rest."""
    failed = results["steps"].get("failed", {})
    lines = [line for name, why in failed.items() for line in (f"{name}: not measured, {why}.", "")]
    for network in results["steps"]["networks"]:
        lines += table_of(
            {
                network["network"]: row["name"],
                "ms per step": cell(row.get("median_us"), lambda us: f"{us / 1e3:.2f}"),
                "x plain step": cell(row.get("ratio"), "{:.3f}"),
                "quartiles": " to ".join(f"{q:.3f}" for q in row.get("ratio_quartiles", ())),
                "refine alone, us": cell(row.get("refine_us"), "{:.0f}"),
                "bound": cell(row.get("bound"), "{:.3f}"),
                "host syncs": cell(row.get("refine_host_syncs"), str),
                "left out": row.get("reason", ""),
            }
            for row in network["steps"]
        )
    return lines


def _goals(results: Row) -> list[str]:
    rows = [*goal_rows(goals.of_operators(results))]
    for network in results["steps"]["networks"]:
        for row in goal_rows(goals.of_steps(network)):
            rows.append(row | {"goal": f"step of {network['network']}: {row['goal']}"})
    return table_of(rows)


def _sections(results: Row) -> list[tuple[str, list[str]]]:
    return [
        ("Phases", _phases(results)),
        ("Goals", _goals(results)),
        ("Tests", _tests(results)),
        ("Operators", report.operators(results)),
        ("Forms", report.forms(results)),
        ("Step time", _steps(results)),
        ("Not measured, wrong, waiting or noisy", report.left_out(results)),
    ]


def terminal(results: Row) -> str:
    """The tables alone, the shortest last."""
    parts = dict(_sections(results))
    order = ("Forms", "Operators", "Step time", "Not measured, wrong, waiting or noisy", "Tests", "Goals", "Phases")
    lines = [line for heading in order if parts[heading] for line in (f"{heading}:", *parts[heading])]
    return "\n".join([*lines, f"{results['seconds']:.0f} s in all."])
