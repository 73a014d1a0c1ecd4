"""Curves of several runs on shared axes: what a report's template draws as SVG."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 360, 220  # of a panel, in its own units; the page scales it
LEFT, RIGHT, TOP, BOTTOM = 44, 8, 8, 24  # margins
_MOST_POINTS = 200  # of a line: more than a panel has room for


@dataclass(frozen=True)
class Tick:
    """A line of the grid with its number."""

    at: float
    text: str


@dataclass(frozen=True)
class Line:
    """One run's curve: pieces ``"x,y x,y ..."``, broken where a value is missing, and its last value as text."""

    run: int
    pieces: tuple[str, ...]
    end: tuple[float, float]
    text: str


@dataclass(frozen=True)
class Panel:
    """One figure: a quantity of all runs over the training steps."""

    title: str
    lines: tuple[Line, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]


def panel(title: str, curves: Sequence[Sequence[tuple[float, float | None]]], *, percent: bool = False) -> Panel | None:
    """The figure of a quantity, or None if no run has it.

    Args:
        title: what it shows.
        curves: for each run its points (step, value); a value that is None or not finite breaks the line.
        percent: whether values are shares, to be shown in percent.

    >>> figure = panel("error", [[(0, 0.5), (10, 0.25)], []], percent=True)
    >>> [tick.text for tick in figure.y_ticks], figure.lines[0].text
    (['0%', '20%', '40%'], '25.0%')
    """
    kept = [_thinned(curve) for curve in curves]
    points = [(step, value) for curve in kept for step, value in curve if _is_number(value)]
    if not points:
        return None
    last_step = max(max(step for step, _ in points), 1)
    values = [value for _, value in points if value is not None]
    low, high = min(0.0, min(values)), max(values)
    high = high if high > low else low + 1.0

    def place(step: float, value: float) -> tuple[float, float]:
        x = LEFT + (WIDTH - LEFT - RIGHT) * step / last_step
        y = HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - low) / (high - low)
        return round(x, 1), round(y, 1)

    def text(value: float) -> str:
        return f"{round(100 * value, 6):g}%" if percent else f"{value:.4g}"

    lines = []
    for run, curve in enumerate(kept):
        pieces: list[list[tuple[float, float]]] = [[]]
        last = None
        for step, value in curve:
            if value is None or not _is_number(value):
                pieces.append([])
            else:
                pieces[-1].append(place(step, value))
                last = value
        if last is not None:
            drawn = [piece for piece in pieces if piece]
            joined = tuple(" ".join(f"{x:g},{y:g}" for x, y in piece) for piece in drawn if len(piece) > 1)
            lines.append(Line(run, joined, drawn[-1][-1], f"{100 * last:.1f}%" if percent else f"{last:.3g}"))
    x_ticks = tuple(Tick(place(step, low)[0], f"{step:,.0f}") for step in ticks(0, last_step, 4) if step == int(step))
    y_ticks = tuple(Tick(place(0, value)[1], text(value)) for value in ticks(low, high, 5))
    return Panel(title, tuple(lines), x_ticks, y_ticks)


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers in ``[low, high]``: multiples of 1, 2 or 5 times a power of ten, at most ``most`` of them.

    >>> ticks(0, 1000, 4)
    [0.0, 500.0, 1000.0]
    """
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    for factor in (1, 2, 5, 10, 20):
        spacing = factor * power
        first, last = math.ceil(low / spacing - 1e-9), math.floor(high / spacing + 1e-9)
        if last - first < most:
            break
    return [round(number * spacing, 12) for number in range(first, last + 1)]


def _thinned(curve: Sequence[tuple[float, float | None]]) -> list[tuple[float, float | None]]:
    stride = math.ceil(len(curve) / _MOST_POINTS)
    return list(curve[::-stride][::-1]) if stride > 1 else list(curve)  # the last one stays


def _is_number(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
