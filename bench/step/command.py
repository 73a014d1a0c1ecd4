"""What a training step costs with each method, each way of taking its derivative, and each schedule.

Plain steps, the published forms and fastmeta's, on WRN-28-2 and the 13-layer net of the papers, on the CPU. Steps whose
gradients are not those of the published form are not timed. Writes step.json, step.md and step.png.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

from bench import environment
from bench.run_ops import RESULTS
from bench.step import report
from bench.step.measure import Settings, measure_network
from bench.step.task import NETWORKS
from bench.step.variants import variants

NAMES = [network.name for network in NETWORKS]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--networks", nargs="+", choices=NAMES, default=NAMES, metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--methods", nargs="+", metavar="TEXT", help="steps whose name contains this")
    parser.add_argument("--rounds", type=int, default=Settings.rounds, help="samples of each step (%(default)s)")
    parser.add_argument("--batch", type=int, default=Settings.batch, help="images of each kind (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="three rounds")
    parser.add_argument("--threads", type=int, default=2, help="torch's threads (%(default)s)")
    parser.add_argument("--out", type=Path, help="folder for the results (bench/results/<processor and threads>)")


def run(options: argparse.Namespace) -> int:
    torch.set_num_threads(options.threads)
    start = time.monotonic()
    settings = Settings(rounds=3 if options.quick else options.rounds, batch=options.batch)
    chosen = [v for v in variants() if options.methods is None or any(text in v.name for text in options.methods)]
    if not chosen:
        print("No step has such a name.", file=sys.stderr)
        return 2
    described = environment.describe()
    networks = []
    for network in NETWORKS:
        if network.name in options.networks:
            print(f"{network.name}: {len(chosen)} steps with a method ...", flush=True)
            networks.append(measure_network(network, chosen, settings))
    results = {
        "schema_version": report.SCHEMA_VERSION,
        "environment": described,
        "settings": vars(settings),
        "networks": networks,
        "seconds": time.monotonic() - start,
    }
    folder = options.out or RESULTS / environment.machine_name()
    written = report.write(results, folder)
    try:
        from bench.step import plot
    except ImportError:
        print("No picture: matplotlib is not installed.", file=sys.stderr)
    else:
        written.append(plot.draw(results, folder).name)
    print(
        "\n".join(["", *report.goals_table(results), f"{results['seconds']:.0f} s; {', '.join(written)} in {folder}"])
    )
    if (share := report.contended_share(results)) > 0.1:
        print(
            f"Other processes ran during {share:.0%} of the samples: measure again on a quiet machine.", file=sys.stderr
        )
    left_out = [(network["network"], row) for network in networks for row in network["steps"] if "reason" in row]
    for name, row in left_out:
        print(f"{name}, {row['name']} left out: {row['reason']}", file=sys.stderr)
    return 1 if left_out else 0
