"""A run's results as markdown and on the terminal."""

from collections.abc import Iterable

from bench import text
from bench.report import where
from bench.rows import Row, contended_share
from bench.text import table_of
from bench.train.stopwatch import PARTS

SCHEMA_VERSION = 1
METHOD = (
    "The trainer's own steps on generated images in memory, all methods of a task in turn; a ratio is the median of "
    "the rounds' own. What a step is made of comes from further steps under a stopwatch, on a GPU with a wait after "
    "each part. *wait*: for images to be read; *views*: their augmentation; *forward*: the base's loss without the "
    "method, *refine*. Several processes share each batch; *scaling* is images a second over those of one process. "
    "*all steps*: the whole run at this rate, without evaluations: 2^20 steps, or the preset's own number."
)


def markdown(results: Row) -> str:
    rows = results["rows"]
    busy = f"Other processes ran during {100 * contended_share(rows) if rows else 0:.0f}% of the steps."
    lines = ["# Training", "", where(results["environment"]), "", METHOD, "", busy, "", *tables(rows)]
    if results["left_out"]:
        lines += ["Not measured: " + "; ".join(results["left_out"]) + ".", ""]
    return "\n".join(lines)


def tables(rows: list[Row]) -> list[str]:
    """For each task and number of processes: the steps, and their parts."""
    lines: list[str] = []
    for task in dict.fromkeys(row["task"] for row in rows):
        of_task = [row for row in rows if row["task"] == task]
        lines += [f"## {task}", "", *table_of(_step(row, of_task) for row in of_task), *table_of(map(_parts, of_task))]
    return lines


def _step(row: Row, others: Iterable[Row]) -> dict[str, str]:
    single = next((r for r in others if r["method"] == row["method"] and r["processes"] == 1), None)
    scaling = None if single in (None, row) else row["images_per_second"] / single["images_per_second"]
    return {
        "processes": str(row["processes"]),
        "method": row["method"],
        "step": text.time(row["median_us"]),
        "quartiles": " to ".join(text.time(us) for us in row["quartiles_us"]),
        "x the base alone": f"{row['ratio']:.3f}",
        "images/s": f"{row['images_per_second']:.0f}",
        "scaling": "" if scaling is None else f"{scaling:.2f}",
        "all steps": f"{row['hours']:.1f} h",
    }


def _parts(row: Row) -> dict[str, str]:
    shares = {part: f"{100 * row['parts'][part]:.1f}%" for part in PARTS}
    return {"processes": str(row["processes"]), "method": row["method"], **shares}
