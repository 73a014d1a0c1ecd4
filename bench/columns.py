"""The figures of a run as CSV, in the columns in which kernel benchmarks are exchanged: one line for each time."""

import csv
from collections.abc import Iterator
from pathlib import Path

from bench.rows import Row, measured

HEADER = (
    *("kernel_name", "kernel_provider", "mode", "shape", "dtype", "p20", "p50", "p80", "unit", "device"),
    *("fastmeta_version", "git_commit", "date"),
)


def lines(results: Row) -> Iterator[tuple[object, ...]]:
    """Times in microseconds (``stream``: as called; ``graph``: the device's; ``host``), peak memory in bytes."""
    environment = results["environment"]
    device = environment.get("gpu", {}).get("name") or environment.get("cpu")
    made = environment.get("fastmeta"), (environment.get("git_commit") or "")[:10], environment.get("date")
    for record in results["operators"]:
        what = record["shape"], record["dtype"]
        for v in measured(record):
            name = record["operator"], v["name"]
            low, high = v.get("p20_p80_us", ("", ""))
            yield *name, "stream", *what, low, v["stream_us"], high, "us", device, *made
            if "graph_us" in v:
                low, high = v.get("graph_p20_p80_us", ("", ""))
                yield *name, "graph", *what, low, v["graph_us"], high, "us", device, *made
            for mode, key, unit in (("host", "host_us", "us"), ("memory", "peak_bytes", "B")):
                if v.get(key) is not None:
                    yield *name, mode, *what, v[key], v[key], v[key], unit, device, *made


def write(results: Row, path: Path) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([HEADER, *lines(results)])
