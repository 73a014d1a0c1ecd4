"""What a training step costs with each method, each way of taking its derivative, and each schedule.

Plain steps, the published forms and fastmeta's: on the CPU WRN-28-2 and the 13-layer net of the papers, on a GPU
WRN-28-2 and ResNet-50, also with the method's part in a CUDA graph. Steps whose gradients are not those of the
published form are not timed. Writes step.json, step.md and step.png.
"""

import argparse
import dataclasses
import sys
import time
import traceback
from pathlib import Path

import torch

from bench import environment
from bench.clock import DeviceLost, clock_for, reason_of
from bench.operators import DEVICE_LOST, RESULTS
from bench.rows import Row, warn_if_contended
from bench.step import report
from bench.step.measure import Settings, measure_network
from bench.step.task import NETWORKS
from bench.step.variants import for_gpu, variants

NAMES = list(dict.fromkeys(network.name for networks in NETWORKS.values() for network in networks))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--networks", nargs="+", choices=NAMES, default=NAMES, metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--methods", nargs="+", metavar="TEXT", help="steps whose name contains this")
    parser.add_argument("--rounds", type=int, help="samples of each step (9; on a GPU 15)")
    parser.add_argument("--batch", type=int, help="images of each kind (16; on a GPU as many as the papers have)")
    parser.add_argument("--quick", action="store_true", help="three rounds; on a GPU five")
    parser.add_argument("--threads", type=int, default=2, help="torch's threads (%(default)s)")
    parser.add_argument("--device", choices=list(NETWORKS), default="cpu")
    parser.add_argument("--seconds", type=float, help="for all networks; steps that would begin too late are left out")
    parser.add_argument("--out", type=Path, help="folder for the results (bench/results/<processor and threads>)")


def run(options: argparse.Namespace) -> int:
    on_gpu = options.device == "cuda"
    torch.set_num_threads(options.threads)
    torch.backends.cudnn.benchmark = on_gpu
    start = time.monotonic()
    clock = clock_for(options.device)
    networks = [network for network in NETWORKS[options.device] if network.name in options.networks]
    rounds = options.rounds or (15 if on_gpu else 9)
    settings = Settings(min(rounds, 5 if on_gpu else 3) if options.quick else rounds, warm_up=3 if on_gpu else 1)
    results: Row = {
        "schema_version": report.SCHEMA_VERSION,
        "environment": environment.describe(),
        "settings": dataclasses.asdict(settings),
        "networks": [],
    }
    folder = options.out or RESULTS / environment.machine_name()
    written: list[str] = []
    for place, network in enumerate(networks):
        found = for_gpu(network, quick=options.quick) if on_gpu else variants()
        chosen = [v for v in found if options.methods is None or any(text in v.name for text in options.methods)]
        if not chosen:
            print("No step has such a name.", file=sys.stderr)
            return 2
        if options.batch:
            network = dataclasses.replace(network, labeled=options.batch, unlabeled=options.batch)
        if options.seconds:
            left = options.seconds - (time.monotonic() - start)
            settings = dataclasses.replace(settings, seconds=left / (len(networks) - place))
        print(f"{network}: {len(chosen)} steps with a method ...", flush=True)
        try:
            results["networks"].append(measure_network(network, chosen, settings, clock))
        except DeviceLost as error:
            print(f"The device is lost: {error}", file=sys.stderr)
            return DEVICE_LOST
        except Exception as error:  # a network that is not installed, say
            traceback.print_exc()
            results.setdefault("failed", {})[str(network)] = reason_of(error)
        results["seconds"] = time.monotonic() - start
        written = report.write(results, folder)
        torch.cuda.empty_cache()
    try:
        from bench import plot
    except ImportError:
        print("No picture: matplotlib is not installed.", file=sys.stderr)
    else:
        written += [path.name for path in plot.draw_steps(results, folder)]
    said = f"{results['seconds']:.0f} s; {', '.join(written)} in {folder}"
    print("\n".join(["", *report.goals_table(results), said]))
    warn_if_contended(report.timed(results))
    rows = [(network["network"], row) for network in results["networks"] for row in network["steps"]]
    bad = [(name, row) for name, row in rows if row["status"] in ("wrong", "failed")]
    for name, row in bad:
        print(f"{name}, {row['name']} left out: {row['reason']}", file=sys.stderr)
    return 1 if bad or "failed" in results else 0
