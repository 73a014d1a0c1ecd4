"""The picture of a run: every variant as a multiple of the floor."""

from collections import Counter
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from bench.report import main_variant, measured, speed_up

OURS, EAGER, COMPILE, PEER, INK = "#d1335b", "#2a6fbb", "#e39a1d", "#9aa3ab", "#2b2f33"
_STYLES: dict[str, dict[str, Any]] = {
    "peer": {"color": PEER, "marker": "|", "s": 70, "linewidths": 1.6, "zorder": 2},
    "compile": {"color": COMPILE, "marker": "^", "s": 48, "zorder": 3},
    "eager": {"color": EAGER, "marker": "s", "s": 38, "zorder": 3},
}
_LABELS = {"eager": "best eager PyTorch", "compile": "torch.compile", "peer": "autograd, vmap(grad), libraries"}


def _row(axes: Axes, y: float, case: dict[str, Any]) -> None:
    ours = main_variant(case)
    if ours is None:
        return
    variants = measured(case)
    axes.plot(
        [1, max(v["times_floor"] for v in variants)],
        [y, y],
        color="#e4e7ea",
        linewidth=5,
        zorder=1,
        solid_capstyle="round",
    )
    for role, style in _STYLES.items():
        chosen = measured(case, role)
        for variant in chosen if role == "peer" else chosen[:1]:
            axes.scatter(variant["times_floor"], y, **style)
    axes.scatter(ours["times_floor"], y, color=OURS, s=95, edgecolor="white", linewidth=1.1, zorder=4)
    rival = min((v for v in variants if v["role"] in ("eager", "compile")), key=lambda v: v["median_us"], default=None)
    gain = speed_up(case, rival)
    if gain is not None:
        axes.annotate(
            f"{gain:.2f}×" if gain < 0.95 else f"{gain:.1f}×",
            (1.0, y),
            xycoords=("axes fraction", "data"),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            color=OURS if gain >= 1 else INK,
            fontsize=10,
            fontweight="bold",
        )


def _panel(axes: Axes, title: str, rows: list[tuple[str, dict[str, Any]]]) -> None:
    for y, (_, case) in enumerate(rows):
        _row(axes, y, case)
    axes.set_title(title, loc="left", fontsize=11.5, fontweight="bold", color=INK, family="monospace")
    axes.set_yticks(range(len(rows)), [label for label, _ in rows], fontsize=9)
    axes.set_ylim(len(rows) - 0.45, -0.55)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}×" if value < 1000 else f"{value / 1000:g}k×")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.axvline(1, color=INK, linewidth=1.2)
    axes.grid(axis="x", color="#eef0f2", zorder=0)
    axes.tick_params(length=0, colors=INK, labelbottom=True)
    axes.tick_params(axis="x", labelsize=9, colors="#666d73")
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)


def _panels(cases: list[dict[str, Any]]) -> dict[str, list[tuple[str, dict[str, Any]]]]:
    """Rows by panel: one for each operator of three shapes or more, one for the others."""
    timed = [case for case in cases if main_variant(case) is not None]
    count = Counter(case["operator"] for case in timed)
    panels: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for case in timed:
        if count[case["operator"]] >= 3:
            panels.setdefault(case["operator"], []).append((case["shape"], case))
    rest = [(f"{case['operator']}\n{case['shape']}", case) for case in timed if count[case["operator"]] < 3]
    return panels | ({"other operators" if panels else "operators": rest} if rest else {})


def legend(styles: dict[str, dict[str, Any]], labels: dict[str, str]) -> list[Line2D]:
    """fastmeta, then the peers, those drawn last first."""

    def entry(color: str, marker: str, label: str) -> Line2D:
        return Line2D([], [], color=color, marker=marker, linestyle="", markersize=8, markeredgewidth=1.6, label=label)

    peers = [entry(style["color"], style["marker"], labels[kind]) for kind, style in reversed(styles.items())]
    return [entry(OURS, "o", "fastmeta"), *peers]


def draw(results: dict[str, Any], folder: Path) -> Path | None:
    """Every case that has a time, as a row; None if there is none."""
    panels = _panels(results["cases"])
    if not panels:
        return None
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    height = 3.1 * rows + 1.4
    figure, grid = plt.subplots(rows, columns, figsize=(max(10, 4.6 * columns), height), squeeze=False, sharex=True)
    for axes, (title, lines) in zip(grid.flat, panels.items(), strict=False):
        _panel(axes, title, lines)
    for axes in list(grid.flat)[len(panels) :]:
        axes.axis("off")
    title = "Time as a multiple of the hardware floor"
    figure.text(0.012, 1 - 0.14 / height, title, fontsize=17, fontweight="bold", color=INK, va="top")
    figure.legend(
        handles=legend(_STYLES, _LABELS),
        loc="upper left",
        bbox_to_anchor=(0.006, 1 - 0.44 / height),
        ncols=4,
        frameon=False,
        fontsize=10.5,
        handletextpad=0.3,
    )
    environment = results["environment"]
    caption = (
        f"float32, {environment['cpu']}, {environment['threads']} threads. Floor (1×): max(flops / GEMM rate, bytes / "
        "copy bandwidth), measured in the same run.\nRight of each row: speed-up over the better of eager and "
        "torch.compile. Rows: examples, features, classes."
    )
    figure.text(0.012, 0.08 / height, caption, fontsize=9, color="#666d73", va="bottom")
    figure.tight_layout(rect=(0, 0.5 / height, 1, 1 - 0.85 / height), h_pad=1.8, w_pad=2.6)
    path = folder / "ops.png"
    figure.savefig(path, dpi=160, facecolor="white")
    plt.close(figure)
    return path
