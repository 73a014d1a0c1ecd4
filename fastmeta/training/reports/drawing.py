"""What every plot begins and ends with; matplotlib is imported where the first is drawn."""

from pathlib import Path
from types import ModuleType
from typing import Any


def pyplot() -> ModuleType:
    """``matplotlib.pyplot``, drawing to files.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("matplotlib is not installed (pip install matplotlib)") from error
    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot


def style(axes: Any) -> None:
    """Two spines, and light lines behind the curves."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)


def save(figure: Any, path: Path) -> Path:
    """Write the figure and forget it."""
    figure.savefig(path, dpi=150)
    pyplot().close(figure)
    return path
