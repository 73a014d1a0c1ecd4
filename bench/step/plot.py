"""The picture of a run: every step over its plain step."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from bench.plot import COMPILE, EAGER, INK, OURS, PEER

Row = dict[str, Any]
COLORS = {"last_layer": OURS, "jvp": EAGER, "finite_difference": COMPILE, "double_backward": "#6b4fa0"}
LABELS = {
    "last_layer": "last layer",
    "jvp": "whole model, jvp",
    "finite_difference": "finite difference",
    "double_backward": "double backward",
}
GRAY = "#666d73"


def lines(steps: list[Row]) -> dict[str, list[Row]]:
    """The steps with a time, by method and schedule; the published form beside the schedule it has."""
    rows: dict[str, list[Row]] = {}
    for row in steps:
        if row["status"] == "measured" and "ratio" in row:
            schedule = row["schedule"]
            if schedule == "published":
                schedule = "fused" if row["method"] == "LabelGradientAlignment" else "alternating"
            rows.setdefault(f"{row['method']}, {schedule}", []).append(row)
    return rows


def _panel(axes: Axes, network: Row, labels: list[str]) -> None:
    found = lines(network["steps"])
    for y, label in enumerate(labels):
        rows = found.get(label, [])
        if rows:
            axes.plot([1, max(row["ratio"] for row in rows)], [y, y], color="#e4e7ea", linewidth=5, zorder=1)
        for row in rows:
            color = COLORS[row["how"]]
            if row["schedule"] == "published":
                axes.scatter(row["ratio"], y, color="none", edgecolor=color, marker="D", s=95, linewidth=1.6, zorder=5)
            else:
                axes.scatter(row["ratio"], y, color=color, s=80, edgecolor="white", linewidth=1.1, zorder=4)
    axes.set_title(network["network"], loc="left", fontsize=11.5, fontweight="bold", color=INK, family="monospace")
    axes.set_yticks(range(len(labels)), labels, fontsize=9)
    axes.set_ylim(len(labels) - 0.45, -0.55)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}×")
    axes.axvline(1, color=INK, linewidth=1.2)
    axes.grid(axis="x", color="#eef0f2", zorder=0)
    axes.tick_params(length=0, colors=INK, labelbottom=True)
    axes.tick_params(axis="x", labelsize=9, colors=GRAY)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)


def draw(results: Row, folder: Path) -> Path:
    """Methods and schedules down, networks across."""
    networks = results["networks"]
    labels = list(dict.fromkeys(label for network in networks for label in lines(network["steps"])))
    height = 0.34 * len(labels) + 2.2
    width = 5.6 * len(networks) + 2.8
    figure, grid = plt.subplots(1, len(networks), figsize=(width, height), squeeze=False, sharex=True, sharey=True)
    for axes, network in zip(grid.flat, networks, strict=True):
        _panel(axes, network, labels)
    title = "Time of a training step as a multiple of the plain step"
    figure.text(0.012, 1 - 0.14 / height, title, fontsize=17, fontweight="bold", color=INK, va="top")
    handles = [
        Line2D([], [], color=color, marker="o", linestyle="", markersize=8, label=LABELS[how])
        for how, color in COLORS.items()
    ]
    published = Line2D([], [], color=PEER, marker="D", linestyle="", fillstyle="none", label="as published")
    figure.legend(
        handles=[*handles, published],
        loc="upper left",
        bbox_to_anchor=(0.006, 1 - 0.44 / height),
        ncols=5,
        frameon=False,
        fontsize=10.5,
        handletextpad=0.3,
    )
    environment, settings = results["environment"], results["settings"]
    caption = (
        f"float32, {environment['cpu']}, {environment['threads']} threads, {settings['batch']} labeled and "
        f"{settings['batch']} unlabeled images of 32 × 32 pixels.\nAlternating: the papers' order, the method's passes "
        "its own. Fused: the method shares the base's passes."
    )
    figure.text(0.012, 0.08 / height, caption, fontsize=9, color=GRAY, va="bottom")
    figure.tight_layout(rect=(0, 0.5 / height, 1, 1 - 0.85 / height), w_pad=2.6)
    path = folder / "step.png"
    figure.savefig(path, dpi=160, facecolor="white")
    plt.close(figure)
    return path
