"""The pictures of a run: operators as multiples of the floor, and steps as multiples of the plain step."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullLocator

from bench.gpu.goals import STEP_RATIO
from bench.gpu.rows import MAX_AUTOTUNE, Row, device_us, main_variant, measured, over
from bench.plot import COMPILE, EAGER, INK, OURS, PEER, legend

TUNED, GRAY = "#7a4fb5", "#666d73"
_STYLES: dict[str, dict[str, Any]] = {
    "peer": {"color": PEER, "marker": "|", "s": 60, "linewidths": 1.6, "zorder": 2},
    "tuned": {"color": TUNED, "marker": "v", "s": 34, "zorder": 3},
    "compile": {"color": COMPILE, "marker": "^", "s": 38, "zorder": 3},
    "eager": {"color": EAGER, "marker": "s", "s": 28, "zorder": 3},
}
_LABELS = {
    "eager": "best eager PyTorch",
    "compile": "torch.compile",
    "tuned": "torch.compile, max-autotune",
    "peer": "autograd, vmap(grad), libraries",
}
_SHORT = {"bfloat16": "bf16", "float32": "fp32"}


def draw(results: dict[str, Any], folder: Path) -> list[Path]:
    """The pictures that there are figures for."""
    drawn = [_draw_operators(results, folder), _draw_steps(results, folder)]
    return [path for path in drawn if path is not None]


def _kind(variant: Row) -> str:
    return "tuned" if variant["name"] == MAX_AUTOTUNE else variant["role"]


def _row(axes: Axes, y: float, record: Row) -> None:
    ours = main_variant(record)
    if ours is None or "times_floor" not in ours:
        return
    shown = [v for v in measured(record) if v["role"] != "fastmeta" and "times_floor" in v]
    farthest = max([v["times_floor"] for v in shown] + [ours["times_floor"]])
    axes.plot([1, farthest], [y, y], color="#e4e7ea", linewidth=4, zorder=1, solid_capstyle="round")
    eager = sorted((v for v in shown if v["role"] == "eager"), key=lambda v: v["times_floor"])
    for variant in eager[:1] + [v for v in shown if v["role"] != "eager"]:
        axes.scatter(variant["times_floor"], y, **_STYLES[_kind(variant)])
    axes.scatter(ours["times_floor"], y, color=OURS, s=70, edgecolor="white", linewidth=1.0, zorder=4)
    rivals = measured(record, "eager") + measured(record, "compile")
    gains = [over(record, rivals, device=device) for device in (False, True)]
    words = " · ".join("" if gain is None else f"{gain:.1f}×" for gain in gains)
    axes.annotate(
        words,
        (1.0, y),
        xycoords=("axes fraction", "data"),
        xytext=(5, 0),
        textcoords="offset points",
        va="center",
        color=OURS if all(gain is None or gain >= 1 for gain in gains) else INK,
        fontsize=8.5,
        fontweight="bold",
    )


def _panel(axes: Axes, title: str, records: list[Row]) -> None:
    for y, record in enumerate(records):
        _row(axes, y, record)
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK, family="monospace")
    labels = [f"{record['shape']}  {_SHORT[record['dtype']]}" for record in records]
    axes.set_yticks(range(len(records)), labels, fontsize=8)
    axes.set_ylim(len(records) - 0.4, -0.6)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}×" if value < 1000 else f"{value / 1000:g}k×")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.axvline(1, color=INK, linewidth=1.2)
    axes.grid(axis="x", color="#eef0f2", zorder=0)
    axes.tick_params(length=0, colors=INK, labelbottom=True)
    axes.tick_params(axis="x", labelsize=8, colors=GRAY)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)


def _panels(records: list[Row]) -> dict[str, list[Row]]:
    timed = [r for r in records if (ours := main_variant(r)) is not None and device_us(ours) is not None]
    panels: dict[str, list[Row]] = {}
    for record in timed:
        panels.setdefault(record["operator"], []).append(record)
    few = [name for name, rows in panels.items() if len(rows) < 3]
    if len(few) > 1:
        rest = [record | {"shape": f"{name}, {record['shape']}"} for name in few for record in panels.pop(name)]
        panels["other operators"] = rest
    return panels


def _draw_operators(results: dict[str, Any], folder: Path) -> Path | None:
    panels = _panels(results["operators"])
    if not panels:
        return None
    columns = min(3, len(panels))
    rows = [list(panels.items())[start : start + columns] for start in range(0, len(panels), columns)]
    heights = [max(len(records) for _, records in row) * 0.22 + 0.9 for row in rows]
    height = sum(heights) + 1.9
    figure, grid = plt.subplots(
        len(rows), columns, figsize=(max(9, 5.6 * columns), height), squeeze=False, sharex=True, height_ratios=heights
    )
    for axes in grid.flat:
        axes.axis("off")
    for line, row in zip(grid, rows, strict=True):
        for axes, (title, records) in zip(line, row, strict=False):
            axes.axis("on")
            _panel(axes, title, records)
    figure.text(
        0.012,
        1 - 0.14 / height,
        "Device time as a multiple of the hardware floor",
        fontsize=16,
        fontweight="bold",
        color=INK,
        va="top",
    )
    figure.legend(
        handles=legend(_STYLES, _LABELS),
        loc="upper left",
        bbox_to_anchor=(0.006, 1 - 0.44 / height),
        ncols=5,
        frameon=False,
        fontsize=10,
        handletextpad=0.3,
    )
    name = results["environment"].get("gpu", {}).get("name", "no GPU on record")
    caption = (
        f"{name}. Floor (1×): the longest of the products in cuBLAS, bytes / copy bandwidth and one empty launch, in "
        "the same run.\nRight of each row: speed-up over the better of eager and torch.compile, on the stream · in "
        "CUDA graphs. Rows: examples, features, classes."
    )
    figure.text(0.012, 0.08 / height, caption, fontsize=8.5, color=GRAY, va="bottom")
    figure.tight_layout(rect=(0, 0.55 / height, 1, 1 - 0.85 / height), h_pad=1.4, w_pad=3.2)
    path = folder / "operators.png"
    figure.savefig(path, dpi=140, facecolor="white")
    plt.close(figure)
    return path


def _draw_steps(results: dict[str, Any], folder: Path) -> Path | None:
    tasks = [task for task in results["steps"] if any("ratio" in v and v["method"] for v in task["variants"])]
    if not tasks:
        return None
    methods = list(dict.fromkeys(v["method"] for task in tasks for v in task["variants"] if v["method"]))
    figure, grid = plt.subplots(
        1, len(tasks), figsize=(max(7.5, 5.4 * len(tasks)), 0.42 * len(methods) + 2.2), squeeze=False, sharey=True
    )
    for axes, task in zip(grid.flat, tasks, strict=True):
        _step_panel(axes, task, methods)
    handles = [
        Line2D([], [], color=OURS, marker="o", linestyle="", markersize=8, label="in the loop"),
        Line2D([], [], color=OURS, marker="D", fillstyle="none", linestyle="", markersize=7, label="fastmeta.graph"),
        Line2D([], [], color=INK, linestyle="--", linewidth=1, label=f"goal, {STEP_RATIO}×"),
    ]
    figure.suptitle(
        "Step time with a last-layer method, as a multiple of the plain step", x=0.012, ha="left", fontsize=13
    )
    figure.legend(handles=handles, loc="lower left", ncols=3, frameon=False, fontsize=9.5)
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    path = folder / "step.png"
    figure.savefig(path, dpi=140, facecolor="white")
    plt.close(figure)
    return path


def _step_panel(axes: Axes, task: dict[str, Any], methods: list[str]) -> None:
    for variant in task["variants"]:
        if "ratio" in variant and variant["method"]:
            y = methods.index(variant["method"])
            style: dict[str, Any] = {"marker": "D", "facecolors": "none"} if variant["graph"] else {"marker": "o"}
            axes.scatter(variant["ratio"], y, s=70, edgecolors=OURS, zorder=3, **({"color": OURS} | style))
    axes.axvline(1, color=INK, linewidth=1.2)
    axes.axvline(STEP_RATIO, color=INK, linewidth=1, linestyle="--")
    plain = next(variant for variant in task["variants"] if "ratio" in variant and not variant["method"])
    axes.set_title(f"{task['task']}: {plain['step_ms']:.1f} ms", loc="left", fontsize=10.5, color=INK)
    axes.set_yticks(range(len(methods)), methods, fontsize=9)
    axes.set_ylim(len(methods) - 0.5, -0.5)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.3f}×")
    axes.grid(axis="x", color="#eef0f2", zorder=0)
    axes.tick_params(length=0, colors=INK)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
