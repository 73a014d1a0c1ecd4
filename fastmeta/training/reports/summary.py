"""From runs to the numbers of the table."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from fastmeta.training.reports.intervals import mean_and_deviation, t_interval


def summarize(runs: Sequence[dict[str, Any]], step_seconds: Mapping[str, float]) -> list[dict[str, Any]]:
    """One row per base and method, in order of appearance.

    ``difference`` is the test error minus the base's, seed by seed (both runs share split, initialization and data
    order); its interval is Student's over the seeds that both have finished.

    Args:
        runs: what results.json of each finished run holds.
        step_seconds: by base and method, ``fixmatch`` and ``fixmatch + l2i``, from runs timed in turn; the medians of
            the runs themselves stand in where it is silent, and then there is no ratio.

    Returns:
        Rows with errors and differences as fractions (0.05 is 5%); what is not known is None.

    >>> run = {"base": "fixmatch", "seed": 0, "validation_error": 0.2, "seconds_per_step": 0.02}
    >>> runs = [{**run, "method": "none", "test_error": 0.5}, {**run, "method": "l2i", "test_error": 0.25}]
    >>> row = summarize(runs, {"fixmatch": 0.5, "fixmatch + l2i": 0.625})[1]
    >>> row["difference"], row["step_ratio"]
    (-0.25, 1.25)
    """
    arms: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for run in runs:
        arms.setdefault((run["base"], run["method"]), {})[run["seed"]] = run
    rows = []
    for (base, method), by_seed in arms.items():
        mean, deviation = mean_and_deviation([run["test_error"] for run in by_seed.values()])
        timed = step_seconds.get(base if method == "none" else f"{base} + {method}")
        row: dict[str, Any] = {
            "base": base,
            "method": method,
            "seeds": sorted(by_seed),
            "test_error": mean,
            "test_error_sd": deviation,
            "validation_error": _mean_of_known([run["validation_error"] for run in by_seed.values()]),
            "seconds_per_step": timed or statistics.median(run["seconds_per_step"] for run in by_seed.values()),
            "difference": None,
            "difference_low": None,
            "difference_high": None,
            "step_ratio": None,
        }
        alone = arms.get((base, "none"), {})
        shared = [seed for seed in sorted(by_seed) if seed in alone]
        if shared and method != "none":
            interval = t_interval([by_seed[seed]["test_error"] - alone[seed]["test_error"] for seed in shared])
            row["difference"] = interval.mean
            row["difference_low"], row["difference_high"] = interval.low, interval.high
            row["step_ratio"] = timed / step_seconds[base] if timed and base in step_seconds else None
        rows.append(row)
    return rows


def _mean_of_known(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows of :func:`summarize` as text, errors in percent, differences in percentage points."""
    header = ("", "test error %", "sd", "minus base", "95% interval", "ms/step", "x base", "seeds")
    lines = [header]
    for row in rows:
        name = row["base"] if row["method"] == "none" else f"  + {row['method']}"
        interval = ""
        if row["difference_low"] is not None:
            interval = f"[{100 * row['difference_low']:+.1f}, {100 * row['difference_high']:+.1f}]"
        lines.append(
            (
                name,
                f"{100 * row['test_error']:.1f}",
                "" if row["test_error_sd"] is None else f"{100 * row['test_error_sd']:.1f}",
                "" if row["difference"] is None else f"{100 * row['difference']:+.1f}",
                interval,
                f"{1000 * row['seconds_per_step']:.1f}",
                "" if row["step_ratio"] is None else f"{row['step_ratio']:.2f}",
                str(len(row["seeds"])),
            )
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    text = []
    for number, line in enumerate(lines):
        cells = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
        cells[0] = line[0].ljust(widths[0])
        text.append("  ".join(cells).rstrip())
        if number == 0:
            text.append("-" * (sum(widths) + 2 * len(widths) - 2))
    return "\n".join(text)
