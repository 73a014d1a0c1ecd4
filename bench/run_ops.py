"""Every operator against what users have today: eager PyTorch, torch.compile, autograd, BackPACK, curvlinops and more.

Runs the operators' tests first; one whose tests fail is not measured. Writes ops.json, ops.md and ops.png.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch

from bench import environment, gate, report, roofline
from bench.measure import Settings, add_floors, measure_case
from bench.ops import CASES, OPERATORS, STEMS

RESULTS = Path(__file__).parent / "results"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    shapes = list(dict.fromkeys(case.label for case in CASES))
    parser.add_argument(
        "--operators", nargs="+", choices=OPERATORS, default=OPERATORS, metavar="NAME", help="default: all"
    )
    parser.add_argument(
        "--shapes", nargs="+", metavar="TEXT", help=f"cases whose shape contains this: {'; '.join(shapes)}"
    )
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=tuple(DTYPES), help="default: both")
    parser.add_argument("--rounds", type=int, default=Settings.rounds, help="samples of each variant (%(default)s)")
    parser.add_argument("--threads", type=int, help="torch's threads (default: its own choice)")
    parser.add_argument("--out", type=Path, help="folder for the results (bench/results/<processor and threads>)")


def chosen_cases(options: argparse.Namespace) -> list[Any]:
    shapes = options.shapes
    return [
        case
        for case in CASES
        if case.operator in options.operators and (shapes is None or any(text in case.label for text in shapes))
    ]


def run(options: argparse.Namespace) -> int:
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    cases = chosen_cases(options)
    if not cases:
        print("No case has such an operator and shape.", file=sys.stderr)
        return 2
    start = time.monotonic()
    operators = list(dict.fromkeys(case.operator for case in cases))
    print(f"Testing {len(operators)} operators ...", flush=True)
    verdicts = gate.run_tests(operators, STEMS)
    for operator, verdict in verdicts.items():
        print(f"  {operator}: {verdict.reason}", flush=True)

    settings = Settings(rounds=options.rounds)
    described = environment.describe()
    before = roofline.measure_ceilings()
    measured = []
    for number, case in enumerate(cases, 1):
        if verdicts[case.operator].green:
            print(f"[{number}/{len(cases)}] {case.operator} ({case.label})", flush=True)
            dtypes = [DTYPES[name] for name in options.dtypes if DTYPES[name] in case.dtypes]
            measured.append(measure_case(case, dtypes, settings))
            _complain(measured[-1])
    ceilings = roofline.best_of(before, roofline.measure_ceilings())
    for done in measured:
        add_floors(done, ceilings)
    results = {
        "schema_version": report.SCHEMA_VERSION,
        "environment": described,
        "settings": vars(settings) | {"dtypes": list(options.dtypes)},
        "ceilings": report.ceilings_json(ceilings),
        "tests": {operator: verdict.as_json() for operator, verdict in verdicts.items()},
        "cases": measured,
        "seconds": time.monotonic() - start,
    }
    folder = options.out or RESULTS / environment.machine_name()
    written = save(results, folder)
    print(
        "\n".join(["", *report.summary(results), "", f"{results['seconds']:.0f} s; {', '.join(written)} in {folder}"])
    )
    if (share := report.contended_share(results)) > 0.1:
        print(
            f"Other processes ran during {share:.0%} of the samples: measure again on a quiet machine.", file=sys.stderr
        )
    wrong = any(v["status"] == "wrong" for case in measured for v in case["variants"])
    return 0 if all(verdict.green for verdict in verdicts.values()) and not wrong else 1


def _complain(case: dict[str, Any]) -> None:
    for variant in case["variants"]:
        if variant["status"] != "measured":
            print(f"    {variant['name']} ({variant['dtype']}) left out: {variant['reason']}", file=sys.stderr)


def save(results: dict[str, Any], folder: Path) -> list[str]:
    """Writes the JSON, the tables and, where matplotlib is installed, the picture; returns the file names."""
    folder.mkdir(parents=True, exist_ok=True)
    written = [report.write_json(results, folder).name]
    (folder / "ops.md").write_text(report.markdown(results))
    written.append("ops.md")
    try:
        from bench import plot
    except ImportError:
        print("No picture: matplotlib is not installed.", file=sys.stderr)
        return written
    picture = plot.draw(results, folder)
    return written if picture is None else [*written, picture.name]
