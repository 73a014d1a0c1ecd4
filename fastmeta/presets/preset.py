"""A row of a paper's table as a run, and many of them from a table as it is printed."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

from fastmeta.ssl import BASES
from fastmeta.training.config import RunConfig

CLASSES = {
    "cifar-10": 10,
    "cifar-100": 100,
    "svhn": 10,
    "fashion-mnist": 10,
    "tiny-imagenet": 200,
    "imagenet": 1000,
    "imagenet-72": 1000,
    "aflw": 1,
    "imdb": 2,
}
"""Of the data sets of the papers; landmarks count as one."""


@dataclass(frozen=True)
class Preset:
    """A published run.

    Args:
        config: its settings; ``data`` is the name of the data set, in whose place comes where it is.
        dataset: a key of :data:`CLASSES`.
        paper: that prints it.
        table: where in it.
        error: the test error in percent as printed; None where the paper has none, or only draws it.
        note: what a reader of that figure should know.
    """

    config: RunConfig
    dataset: str
    paper: str
    table: str
    error: float | None = None
    note: str = ""


class Column(NamedTuple):
    """A column of a table: a data set with that many labels (0: all), and how names have it (the number if empty)."""

    dataset: str
    labels: int
    word: str = ""


def columns(dataset: str, *labels: int) -> tuple[Column, ...]:
    """One for each number of labels."""
    return tuple(Column(dataset, number) for number in labels)


def rows(
    paper: str,
    prefix: str,
    table: str,
    heads: Sequence[Column],
    figures: Mapping[str, Sequence[float | None]],
    settings: Callable[[str, Column], RunConfig],
    note: str = "",
) -> Iterator[tuple[str, Preset]]:
    """The cells of a table, by the names ``<prefix>-<arm>-<data set>-<labels>``.

    Args:
        paper: see :class:`Preset`.
        prefix: the paper, in names.
        table: see :class:`Preset`.
        heads: the table's columns.
        figures: the errors of each arm, one a column; a row may end early. None: drawn and not printed.
        settings: those of an arm in a column; all labels of the column are labeled images, unless it has some.
        note: see :class:`Preset`.

    >>> def settings(arm, column):
    ...     return RunConfig(base="fixmatch")
    >>> [(name, cell)] = rows("A paper", "a", "Table 1", columns("cifar-10", 250), {"fm": [5.07]}, settings)
    >>> name, cell.config.labels_per_class, cell.error
    ('a-fm-cifar10-250', 25, 5.07)
    """
    for arm, errors in figures.items():
        for column, error in zip(heads, errors, strict=False):
            dataset, labels, word = column
            config = settings(arm, column)
            each = config.labels_per_class or labels // CLASSES[dataset] or None
            # All of the base's settings: those left out are not to be the recipe for digits.
            base_settings = {**asdict(BASES[config.base]()), **config.base_settings}
            config = replace(config, data=dataset, labels_per_class=each, base_settings=base_settings)
            short = dataset.replace("cifar-", "cifar").replace("imagenet-72", "imagenet")
            name = "-".join(part for part in (prefix, arm, short, word or str(labels)) if part)
            yield name, Preset(config, dataset, paper, table, error, note)


def joined(cells: Iterable[tuple[str, Preset]]) -> dict[str, Preset]:
    """Presets by name; a run that several tables have is one, with all of them, and with what they disagree on.

    >>> run = Preset(RunConfig(), "cifar-10", "A paper", "Table 2", 14.76)
    >>> found = joined([("mt", run), ("mt", replace(run, table="Table 8", error=15.76))])
    >>> found["mt"].table, found["mt"].error, found["mt"].note
    ('Tables 2 and 8', 14.76, 'Table 8: 15.76%.')
    """
    found: dict[str, Preset] = {}
    tables: dict[str, list[str]] = {}
    for name, cell in cells:
        printed = tables.setdefault(name, [])
        first = found.setdefault(name, cell)
        if first.config != cell.config:
            raise ValueError(f"preset {name} must be the same run in {first.table} and {cell.table}, got two")
        if cell.table not in printed:
            printed.append(cell.table)
        differs = ""
        if cell.error is not None and cell.error != first.error:
            differs = f"{cell.table}: {cell.error:.2f}%. {cell.note}".rstrip()
        note = " ".join(part for part in (first.note, differs) if part)
        found[name] = replace(first, table=_names_of(printed), note=note)
    return found


def _names_of(tables: Sequence[str]) -> str:
    """``Tables 2, 8 and 9``; those that are no tables come last."""
    numbers = [table.removeprefix("Table ") for table in tables if table.startswith("Table ")]
    others = [table for table in tables if not table.startswith("Table ")]
    listed = [] if not numbers else [f"Table {numbers[0]}"]
    if len(numbers) > 1:
        listed = [f"Tables {', '.join(numbers[:-1])} and {numbers[-1]}"]
    return "; ".join([*listed, *others])
