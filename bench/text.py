"""Numbers and tables as text. What was not measured stays empty."""

from collections.abc import Callable, Iterable
from typing import Any


def time(us: float) -> str:
    for unit, size in (("s", 1e6), ("ms", 1e3)):
        if us >= size:
            return f"{us / size:.3g} {unit}"
    return f"{us:.3g} us"


def memory(size: float) -> str:
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.3g} {unit}"
    return f"{size:.0f} B"


def factor(value: float) -> str:
    return f"{value:.2f}x" if value < 10 else f"{value:.0f}x"


def cell(value: Any, form: Callable[[Any], str] | str = factor) -> str:
    """A value as a function or a format string (``{:.3f}``) writes it; empty for None."""
    return "" if value is None else form.format(value) if isinstance(form, str) else form(value)


def one_line(message: str) -> str:
    return " ".join(message.split())[:160]


def table(header: list[str], rows: Iterable[list[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines] + [""]


def table_of(rows: Iterable[dict[str, str]]) -> list[str]:
    """Columns in the order in which they first have something in them."""
    rows = list(rows)
    names = list(dict.fromkeys(name for row in rows for name in row))
    header = [name for name in names if any(row.get(name) for row in rows)]
    return table(header, [[row.get(name, "") for name in header] for row in rows])
