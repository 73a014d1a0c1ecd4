"""Pictures of a run: variants as multiples of the floor, the roofline they stand under, steps over plain steps."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from bench.floors import Ceilings
from bench.rows import MAX_AUTOTUNE, Row, best_known_us, machine, main_variant, measured, over

OURS, EAGER, COMPILE, PEER, INK = "#d1335b", "#2a6fbb", "#e39a1d", "#9aa3ab", "#2b2f33"
TUNED, GRAY, PALE = "#7a4fb5", "#666d73", "#e4e7ea"
_STYLES: dict[str, tuple[str, dict[str, Any]]] = {  # by role, with the legend's words
    "peer": ("autograd, vmap(grad), libraries", {"color": PEER, "marker": "|", "s": 60, "lw": 1.6, "zorder": 2}),
    "tuned": ("torch.compile, max-autotune", {"color": TUNED, "marker": "v", "s": 34, "zorder": 3}),
    "compile": ("torch.compile", {"color": COMPILE, "marker": "^", "s": 40, "zorder": 3}),
    "eager": ("best eager PyTorch", {"color": EAGER, "marker": "s", "s": 30, "zorder": 3}),
}
_SHORT = {"bfloat16": "bf16", "float32": "fp32"}
_HOWS = {
    "last_layer": (OURS, "last layer"),
    "jvp": (EAGER, "whole model, jvp"),
    "finite_difference": (COMPILE, "finite difference"),
    "double_backward": ("#6b4fa0", "double backward"),
}


def draw(results: Row, folder: Path, name: str) -> list[Path]:
    """``<name>.png`` and ``<name>-roofline.png``, if there are figures for them."""
    on_gpu = "gpu" in results["environment"]
    # On a CPU bfloat16 has few peers; its figures are in the tables.
    records = [r for r in results["operators"] if main_variant(r) and (on_gpu or r["dtype"] == "float32")]
    if not records:
        return []
    return [
        _draw_multiples(records, results, folder / f"{name}.png"),
        _draw_roofline(records, results, folder / f"{name}-roofline.png"),
    ]


def _bare(axes: Axes) -> None:
    """No frame, no ticks."""
    axes.tick_params(length=0, colors=INK, labelbottom=True)
    axes.set_axisbelow(True)
    axes.grid(axis="x", color="#eef0f2", zorder=0)
    axes.spines[:].set_visible(False)


def _bars(axes: Axes, title: str, labels: list[str], size: float) -> None:
    """Rows from the top down with a name each, multiples of 1 across."""
    axes.set_title(title, loc="left", fontsize=size + 3, fontweight="bold", color=INK, family="monospace")
    axes.set_yticks(range(len(labels)), labels, fontsize=size)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.axvline(1, color=INK, linewidth=1.2)
    _bare(axes)
    axes.tick_params(axis="x", labelsize=size, colors=GRAY)


def _save(figure: Figure, path: Path, title: str, caption: str, handles: list[Line2D]) -> Path:
    """With a title and a legend above, a caption below, and the panels between them."""
    height = figure.get_figheight()
    figure.text(0.012, 1 - 0.14 / height, title, fontsize=16, fontweight="bold", color=INK, va="top")
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(0.006, 1 - 0.44 / height),
        ncols=5,
        frameon=False,
        fontsize=10 if len(handles) <= 5 else 8.5,
        handletextpad=0.3,
    )
    figure.text(0.012, 0.08 / height, caption, fontsize=8.5, color=GRAY, va="bottom")
    figure.tight_layout(rect=(0, 0.55 / height, 1, 1 - 0.85 / height), h_pad=1.4, w_pad=2.8)
    figure.savefig(path, dpi=140, facecolor="white")
    plt.close(figure)
    return path


def _handle(color: str, marker: str, label: str, **options: Any) -> Line2D:
    return Line2D([], [], color=color, marker=marker, linestyle="", markersize=8, label=label, **options)


def _kind(variant: Row) -> str:
    return "tuned" if variant["name"] == MAX_AUTOTUNE else variant["role"]


def _draw_multiples(records: list[Row], results: Row, path: Path) -> Path:
    panels = list(_panels(records).items())
    columns = min(3, len(panels))
    lines = [panels[start : start + columns] for start in range(0, len(panels), columns)]
    heights = [max(len(rows) for _, rows in line) * 0.27 + 0.9 for line in lines]
    size = (max(9.0, 5.6 * columns), sum(heights) + 1.9)
    figure, grid = plt.subplots(len(lines), columns, figsize=size, squeeze=False, sharex=True, height_ratios=heights)
    for axes in grid.flat:
        axes.axis("off")
    for row, line in zip(grid, lines, strict=True):
        for axes, (title, rows) in zip(row, line, strict=False):
            axes.axis("on")
            for y, (_, record) in enumerate(rows):
                _multiple(axes, y, record)
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}×" if value < 1000 else f"{value / 1000:g}k×")
            axes.xaxis.set_minor_locator(NullLocator())
            _bars(axes, title, [label for label, _ in rows], 8)
    on_gpu = "gpu" in results["environment"]
    beside = "on the stream · in CUDA graphs" if on_gpu else "float32"
    caption = (
        f"{machine(results['environment'])}. Floor (1×): the longest of flops / GEMM rate, bytes / copy bandwidth and, "
        "on a GPU, one empty launch, measured in the same run.\nRight of each row: speed-up over the better of eager "
        f"and torch.compile, {beside}. Rows: examples, features, classes."
    )
    kinds = {_kind(v) for record in records for v in measured(record)}
    handles = [_handle(OURS, "o", "fastmeta", markeredgewidth=1.6)]  # then the peers, those drawn last first
    for kind, (label, style) in reversed(_STYLES.items()):
        if kind in kinds:
            handles.append(_handle(style["color"], style["marker"], label, markeredgewidth=1.6))
    what = "Device time" if on_gpu else "Time"
    return _save(figure, path, f"{what} as a multiple of the hardware floor", caption, handles)


def _panels(records: list[Row]) -> dict[str, list[tuple[str, Row]]]:
    """Rows by panel: one for each operator of three records or more, one for the others."""
    panels: dict[str, list[tuple[str, Row]]] = {}
    several = len({record["dtype"] for record in records}) > 1
    for record in records:
        label = record["shape"] + f"  {_SHORT[record['dtype']]}" * several
        panels.setdefault(record["operator"], []).append((label, record))
    few = [name for name, rows in panels.items() if len(rows) < 3]
    if len(few) > 1:
        rest = [(f"{name}\n{label}", record) for name in few for label, record in panels.pop(name)]
        panels["other operators" if panels else "operators"] = rest
    return panels


def _multiple(axes: Axes, y: float, record: Row) -> None:
    ours = main_variant(record)
    assert ours is not None
    shown = [v for v in measured(record) if v["role"] != "fastmeta"]
    farthest = max(v["times_floor"] for v in [*shown, ours])
    axes.plot([1, farthest], [y, y], color=PALE, linewidth=4, zorder=1, solid_capstyle="round")
    eager = sorted((v for v in shown if v["role"] == "eager"), key=lambda v: v["times_floor"])
    for variant in eager[:1] + [v for v in shown if v["role"] != "eager"]:
        axes.scatter(variant["times_floor"], y, **_STYLES[_kind(variant)][1])
    axes.scatter(ours["times_floor"], y, color=OURS, s=70, edgecolor="white", linewidth=1.0, zorder=4)
    rivals = measured(record, "eager") + measured(record, "compile")
    times = (False, True) if record["cost"]["launch_us"] else (False,)  # on the device alone, too, where it is a GPU
    gains = [gain for device in times if (gain := over(record, rivals, device=device)) is not None]
    axes.annotate(
        " · ".join(f"{gain:.2f}×" if gain < 0.95 else f"{gain:.1f}×" for gain in gains),
        (1.0, y),
        xycoords=("axes fraction", "data"),
        xytext=(5, 0),
        textcoords="offset points",
        va="center",
        color=OURS if all(gain >= 1 for gain in gains) else INK,
        fontsize=8.5,
        fontweight="bold",
    )


def _draw_roofline(records: list[Row], results: Row, path: Path) -> Path:
    """Arithmetic intensity against the rate achieved; what multiplies nothing stands at the left edge, by its bytes."""
    ceilings = Ceilings.from_json(results["shared"])
    bandwidth = ceilings.copy[max(ceilings.copy)]
    dtypes = [dtype for dtype in _SHORT if any(record["dtype"] == dtype for record in records)]
    figure, grid = plt.subplots(1, len(dtypes), figsize=(max(11.0, 6.4 * len(dtypes)), 5.4), squeeze=False)
    names = list(dict.fromkeys(record["operator"] for record in records))
    colors = plt.get_cmap("tab10")
    for axes, dtype in zip(grid.flat, dtypes, strict=True):
        rate = ceilings.gemm.get(dtype, ceilings.gemm["float32"])
        right = 2 * rate / bandwidth
        for record in records:
            ours, cost = main_variant(record), record["cost"]
            if record["dtype"] == dtype and ours is not None:
                intensity = max(cost["flops"] / cost["bytes"], 0.25)  # at the edge: counted as one flop in four bytes
                achieved = max(cost["flops"], 0.25 * cost["bytes"]) / (1e-6 * best_known_us(ours))
                right = max(right, 2 * intensity)
                axes.scatter(intensity, achieved, color=colors(names.index(record["operator"])), s=46, zorder=3)
        axes.plot([0.2, rate / bandwidth, right], [0.2 * bandwidth, rate, rate], color=INK, linewidth=1.4, zorder=2)
        axes.set(xscale="log", yscale="log")
        title = f"{dtype}: GEMM {rate / 1e12:.3g} TFLOP/s, copy {bandwidth / 1e9:,.0f} GB/s"
        axes.set_title(title, loc="left", fontsize=10.5)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("flop/B", color=GRAY)
        axes.set_ylabel("FLOP/s", color=GRAY)
        _bare(axes)
    handles = [Line2D([], [], color=colors(i), marker="o", linestyle="", label=name) for i, name in enumerate(names)]
    caption = (
        f"{machine(results['environment'])}. Line: the lower of the largest copy's bandwidth times the intensity and "
        "the GEMM rate.\nWhat stays in cache may stand above it. Each operator's flops and least bytes. At the left "
        "edge: operators without products, a flop counted for every four bytes."
    )
    return _save(figure, path, "Under the roofline", caption, handles)


def draw_steps(results: Row, folder: Path) -> list[Path]:
    """``step.png``, if there are steps: methods and schedules down, networks across."""
    networks = [network for network in results["networks"] if _step_lines(network)]
    if not networks:
        return []
    labels = list(dict.fromkeys(label for network in networks for label in _step_lines(network)))
    size = (5.6 * len(networks) + 2.8, 0.34 * len(labels) + 2.2)
    figure, grid = plt.subplots(1, len(networks), figsize=size, squeeze=False, sharex=True, sharey=True)
    for axes, network in zip(grid.flat, networks, strict=True):
        found = _step_lines(network)
        for y, label in enumerate(labels):
            rows = found.get(label, [])
            if rows:
                axes.plot([1, max(row["ratio"] for row in rows)], [y, y], color=PALE, linewidth=5, zorder=1)
            for row in rows:
                axes.scatter(row["ratio"], y, **_step_style(row))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}×")
        _bars(axes, network["network"], labels, 9)
    on_gpu = networks[0]["device"] == "cuda"
    shown = {row["how"] for network in networks for row in network["steps"] if "ratio" in row}
    handles = [_handle(color, "o", label) for how, (color, label) in _HOWS.items() if how in shown]
    others = {"as published": "D"} | ({"in a CUDA graph": "s"} if on_gpu else {})
    handles += [_handle(PEER, marker, label, fillstyle="none") for label, marker in others.items()]
    images = networks[0]["images"]
    count = f", {images['labeled']} labeled and {images['unlabeled']} unlabeled images of 32 × 32 pixels"
    count *= not on_gpu  # there networks have images of their own
    precision = "bfloat16 autocast" if on_gpu else "float32"
    caption = (
        f"{precision}, {machine(results['environment'])}{count}.\nAlternating: the papers' order, the method's passes "
        "its own. Fused: the method shares the base's passes."
    )
    title = "Time of a training step as a multiple of the plain step"
    return [_save(figure, folder / "step.png", title, caption, handles)]


def _step_lines(network: Row) -> dict[str, list[Row]]:
    """The steps with a time, by method and schedule; the published form beside the schedule it has."""
    rows: dict[str, list[Row]] = {}
    for row in network["steps"]:
        if row["status"] == "measured" and "ratio" in row:
            schedule = row["schedule"]
            if schedule == "published":
                schedule = "fused" if row["method"] == "LabelGradientAlignment" else "alternating"
            rows.setdefault(f"{row['method']}, {schedule}", []).append(row)
    return rows


def _step_style(row: Row) -> dict[str, Any]:
    color, _ = _HOWS[row["how"]]
    if row["name"].endswith(", graph"):
        return {"color": "none", "edgecolor": color, "marker": "s", "s": 60, "linewidth": 1.4, "zorder": 5}
    if row["schedule"] == "published":
        return {"color": "none", "edgecolor": color, "marker": "D", "s": 95, "linewidth": 1.6, "zorder": 5}
    return {"color": color, "s": 80, "edgecolor": "white", "linewidth": 1.1, "zorder": 4}
