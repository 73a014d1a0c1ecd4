"""Pictures of the operators of a run: every variant as a multiple of the floor, and the roofline they stand under."""

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
from bench.rows import MAX_AUTOTUNE, Row, best_known_us, main_variant, measured, over

OURS, EAGER, COMPILE, PEER, INK = "#d1335b", "#2a6fbb", "#e39a1d", "#9aa3ab", "#2b2f33"
TUNED, GRAY, PALE = "#7a4fb5", "#666d73", "#e4e7ea"
_STYLES: dict[str, dict[str, Any]] = {
    "peer": {"color": PEER, "marker": "|", "s": 60, "linewidths": 1.6, "zorder": 2},
    "tuned": {"color": TUNED, "marker": "v", "s": 34, "zorder": 3},
    "compile": {"color": COMPILE, "marker": "^", "s": 40, "zorder": 3},
    "eager": {"color": EAGER, "marker": "s", "s": 30, "zorder": 3},
}
_LABELS = {
    "eager": "best eager PyTorch",
    "compile": "torch.compile",
    "tuned": "torch.compile, max-autotune",
    "peer": "autograd, vmap(grad), libraries",
}
_SHORT = {"bfloat16": "bf16", "float32": "fp32"}


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


def bare(axes: Axes) -> None:
    """No frame, no ticks."""
    axes.tick_params(length=0, colors=INK, labelbottom=True)
    axes.set_axisbelow(True)
    axes.grid(axis="x", color="#eef0f2", zorder=0)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)


def titled(figure: Figure, title: str, caption: str, handles: list[Line2D]) -> None:
    """A title and a legend above, a caption below, and the panels between them."""
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


def save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=140, facecolor="white")
    plt.close(figure)
    return path


def legend(kinds: list[str]) -> list[Line2D]:
    """fastmeta, then the peers, those drawn last first."""

    def entry(color: str, marker: str, label: str) -> Line2D:
        return Line2D([], [], color=color, marker=marker, linestyle="", markersize=8, markeredgewidth=1.6, label=label)

    drawn = [kind for kind in reversed(_STYLES) if kind in kinds]
    return [entry(OURS, "o", "fastmeta")] + [
        entry(_STYLES[k]["color"], _STYLES[k]["marker"], _LABELS[k]) for k in drawn
    ]


def _kind(variant: Row) -> str:
    return "tuned" if variant["name"] == MAX_AUTOTUNE else variant["role"]


def _row(axes: Axes, y: float, record: Row) -> None:
    ours = main_variant(record)
    assert ours is not None
    shown = [v for v in measured(record) if v["role"] != "fastmeta"]
    farthest = max(v["times_floor"] for v in [*shown, ours])
    axes.plot([1, farthest], [y, y], color=PALE, linewidth=4, zorder=1, solid_capstyle="round")
    eager = sorted((v for v in shown if v["role"] == "eager"), key=lambda v: v["times_floor"])
    for variant in eager[:1] + [v for v in shown if v["role"] != "eager"]:
        axes.scatter(variant["times_floor"], y, **_STYLES[_kind(variant)])
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


def _panel(axes: Axes, title: str, rows: list[tuple[str, Row]]) -> None:
    for y, (_, record) in enumerate(rows):
        _row(axes, y, record)
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK, family="monospace")
    axes.set_yticks(range(len(rows)), [label for label, _ in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}×" if value < 1000 else f"{value / 1000:g}k×")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.axvline(1, color=INK, linewidth=1.2)
    bare(axes)
    axes.tick_params(axis="x", labelsize=8, colors=GRAY)


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
            _panel(axes, title, rows)
    on_gpu = "gpu" in results["environment"]
    beside = "on the stream · in CUDA graphs" if on_gpu else "float32"
    caption = (
        f"{_machine(results)}. Floor (1×): the longest of flops / GEMM rate, bytes / copy bandwidth and, on a GPU, one "
        f"empty launch, measured in the same run.\nRight of each row: speed-up over the better of eager and "
        f"torch.compile, {beside}. Rows: examples, features, classes."
    )
    kinds = [_kind(v) for record in records for v in measured(record)]
    what = "Device time" if on_gpu else "Time"
    titled(figure, f"{what} as a multiple of the hardware floor", caption, legend(kinds))
    return save(figure, path)


def _machine(results: Row) -> str:
    environment = results["environment"]
    name = environment.get("gpu", {}).get("name")
    return name or f"{environment.get('cpu')}, {environment.get('threads')} threads"


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
        points = []
        for record in records:
            ours, cost = main_variant(record), record["cost"]
            if record["dtype"] == dtype and ours is not None:
                intensity = max(cost["flops"] / cost["bytes"], 0.25)  # at the edge: counted as one flop in four bytes
                achieved = max(cost["flops"], 0.25 * cost["bytes"]) / (1e-6 * best_known_us(ours))
                points.append((intensity, achieved))
                axes.scatter(intensity, achieved, color=colors(names.index(record["operator"])), s=46, zorder=3)
        right = 2 * max([rate / bandwidth, *(x for x, _ in points)])
        axes.plot([0.2, rate / bandwidth, right], [0.2 * bandwidth, rate, rate], color=INK, linewidth=1.4, zorder=2)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_title(
            f"{dtype}: GEMM {rate / 1e12:.3g} TFLOP/s, copy {bandwidth / 1e9:,.0f} GB/s", loc="left", fontsize=10.5
        )
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("flop/B", color=GRAY)
        axes.set_ylabel("FLOP/s", color=GRAY)
        bare(axes)
    handles = [Line2D([], [], color=colors(i), marker="o", linestyle="", label=name) for i, name in enumerate(names)]
    caption = (
        f"{_machine(results)}. Line: the lower of the largest copy's bandwidth times the intensity and the GEMM rate.\n"
        "What stays in cache may stand above it. Each operator's flops and least bytes. At the left edge: operators "
        "without products, a flop counted for every four bytes."
    )
    titled(figure, "Under the roofline", caption, handles)
    return save(figure, path)
