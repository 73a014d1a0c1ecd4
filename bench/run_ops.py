"""Every operator against what users have today: eager PyTorch, torch.compile, autograd, BackPACK, curvlinops and more.

On the CPU. Runs the operators' tests first; one whose tests fail is not measured. Writes ops.json, ops.csv, ops.md,
ops.png and ops-roofline.png.
"""

import argparse
import dataclasses
import math
import sys
import tempfile
import time
from pathlib import Path

import torch

from bench import choices, environment, files, gate, report
from bench.clock import clock_for
from bench.measure import SETTINGS
from bench.operators import RESULTS, chosen, measure_all
from bench.rows import Row, title, warn_if_contended


def add_arguments(parser: argparse.ArgumentParser) -> None:
    choices.add_choices(parser)
    rounds = SETTINGS["cpu"].rounds
    parser.add_argument("--rounds", type=int, default=rounds, help="samples of each variant (%(default)s)")
    parser.add_argument("--threads", type=int, help="torch's threads (default: its own choice)")
    parser.add_argument("--out", type=Path, help="folder for the results (bench/results/<processor and threads>)")


def run(options: argparse.Namespace) -> int:
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    cases = chosen(options, "cpu")
    if not cases:
        print("No case has such an operator and shape.", file=sys.stderr)
        return 2
    start = time.monotonic()
    operators = list(dict.fromkeys(case.operator for case, _ in cases))
    print(f"Testing {len(operators)} operators ...", flush=True)
    tests = gate.run_tests(operators, choices.STEMS)
    verdicts = tests["operators"]
    for operator, verdict in verdicts.items():
        print(f"  {operator}: {verdict['reason']}", flush=True)
    settings = dataclasses.replace(SETTINGS["cpu"], rounds=3 if options.quick else options.rounds)
    described = environment.describe()
    with tempfile.TemporaryDirectory() as work:
        progress = files.Progress(Path(work, "operators.json"))
        green = [(case, dtypes) for case, dtypes in cases if verdicts[case.operator]["green"]]
        measure_all(green, progress, clock_for("cpu"), settings, math.inf)
    results: Row = {
        "schema_version": report.SCHEMA_VERSION,
        "environment": described,
        "settings": dataclasses.asdict(settings),
        "shared": progress.shared,
        "tests": tests,
        "refused": len(green) < len(cases),
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
