"""The picture of a run: every step over its plain step."""

from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from bench.plot import COMPILE, EAGER, GRAY, INK, OURS, PALE, PEER, bare, save, titled
from bench.rows import Row

COLORS = {"last_layer": OURS, "jvp": EAGER, "finite_difference": COMPILE, "double_backward": "#6b4fa0"}
LABELS = {
    "last_layer": "last layer",
    "jvp": "whole model, jvp",
    "finite_difference": "finite difference",
    "double_backward": "double backward",
}


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
            axes.plot([1, max(row["ratio"] for row in rows)], [y, y], color=PALE, linewidth=5, zorder=1)
        for row in rows:
            color = COLORS[row["how"]]
            if row["name"].endswith(", graph"):
                axes.scatter(row["ratio"], y, color="none", edgecolor=color, marker="s", s=60, linewidth=1.4, zorder=5)
            elif row["schedule"] == "published":
                axes.scatter(row["ratio"], y, color="none", edgecolor=color, marker="D", s=95, linewidth=1.6, zorder=5)
            else:
                axes.scatter(row["ratio"], y, color=color, s=80, edgecolor="white", linewidth=1.1, zorder=4)
    axes.set_title(network["network"], loc="left", fontsize=11.5, fontweight="bold", color=INK, family="monospace")
    axes.set_yticks(range(len(labels)), labels, fontsize=9)
    axes.set_ylim(len(labels) - 0.45, -0.55)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}×")
    axes.axvline(1, color=INK, linewidth=1.2)
    bare(axes)
    axes.tick_params(axis="x", labelsize=9, colors=GRAY)


def draw(results: Row, folder: Path) -> list[Path]:
    """``step.png``, if there are steps: methods and schedules down, networks across."""
    networks = [network for network in results["networks"] if lines(network["steps"])]
    if not networks:
        return []
    labels = list(dict.fromkeys(label for network in networks for label in lines(network["steps"])))
    size = (5.6 * len(networks) + 2.8, 0.34 * len(labels) + 2.2)
    figure, grid = plt.subplots(1, len(networks), figsize=size, squeeze=False, sharex=True, sharey=True)
    for axes, network in zip(grid.flat, networks, strict=True):
        _panel(axes, network, labels)
    shown = {row["how"] for network in networks for row in network["steps"] if "ratio" in row}
    handles = [
        Line2D([], [], color=color, marker="o", linestyle="", markersize=8, label=LABELS[how])
        for how, color in COLORS.items()
        if how in shown
    ]
    others = {"as published": "D"} | ({"in a CUDA graph": "s"} if networks[0]["device"] == "cuda" else {})
    for label, marker in others.items():
        handles.append(Line2D([], [], color=PEER, marker=marker, linestyle="", fillstyle="none", label=label))
    environment, images = results["environment"], networks[0]["images"]
    on_gpu = networks[0]["device"] == "cuda"
    machine = environment.get("gpu", {}).get("name") or f"{environment['cpu']}, {environment['threads']} threads"
    precision = "bfloat16 autocast" if on_gpu else "float32"
    count = f", {images['labeled']} labeled and {images['unlabeled']} unlabeled images of 32 × 32 pixels"
    count *= not on_gpu  # there networks have images of their own
    caption = (
        f"{precision}, {machine}{count}.\nAlternating: the papers' order, the method's passes its own. Fused: the "
        "method shares the base's passes."
    )
    titled(figure, "Time of a training step as a multiple of the plain step", caption, handles)
    return [save(figure, folder / "step.png")]
