"""What a report says of one run: figures, confusion, examples, balance of classes."""

import statistics
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastmeta.training.reports.intervals import error_interval
from fastmeta.training.reports.run_folder import RunFolder

FULL_CONFUSION = 20  # classes; of more only the most confused pairs are shown
_MOST_ROWS = 20  # of a table of pairs or classes


@dataclass(frozen=True)
class Figure:
    """A headline: what it is, its value, and a line in small print."""

    name: str
    value: str
    detail: str = ""


@dataclass(frozen=True)
class Confusion:
    """Which classes are taken for which.

    Args:
        part: the images: "test" or "validation".
        rows: for each true class, how many of its images are predicted as each class; empty with many classes.
        pairs: (true, predicted, count, share of the true class), most confused first.
    """

    part: str
    rows: tuple[tuple[int, ...], ...]
    pairs: tuple[tuple[str, str, int, float], ...]


@dataclass(frozen=True, slots=True)
class Example:
    """An unlabeled image that is worth a look: a line of unlabeled.csv."""

    path: str
    label: str
    before: str
    after: str
    truth: str
    confidence: float | None
    weight: float | None
    change: float | None

    @property
    def is_right(self) -> bool | None:
        """Whether its label is the true one; None where that is not known."""
        return self.label == self.truth if self.truth else None


@dataclass(frozen=True)
class ClassShare:
    """A class among the labeled images, among the imputed labels and in truth; None: not known."""

    name: str
    labeled: int | None
    imputed: int
    imputed_share: float
    true_share: float | None


def headlines(run: RunFolder) -> list[Figure]:
    """The figures of a run that one looks at first."""
    results, sizes = run.results, run.sizes
    figures = []
    for part in ("test", "validation"):
        error = (results or {}).get(f"{part}_error")
        if error is not None:
            count = None if run.task == "landmarks" else sizes.get(part)  # whose error is a distance and no share
            figures.append(Figure(f"{part} error", f"{100 * error:.2f}%", _interval_text(error, count, part)))
        top5 = (results or {}).get(f"{part}_top5_error")
        if top5 is not None:
            figures.append(Figure(f"{part} error, top 5", f"{100 * top5:.2f}%"))
    if results is None:
        figures.append(Figure("not finished", f"step {run.step:,}", f"of {run.config.get('steps') or 0:,}"))
    labels = sizes.get("labeled")
    if labels is not None:
        figures.append(Figure("labeled images", f"{labels:,}", f"{sizes.get('unlabeled', 0):,} unlabeled"))
    if results is not None:
        figures.append(Figure("steps", f"{results['step']:,}"))
    seconds = [row["seconds_per_step"] for row in run.timing if row.get("seconds_per_step") is not None]
    if seconds:
        figures.append(Figure("time a step", _duration(statistics.median(seconds)), "median"))
    waits = [row["wait_share"] for row in run.timing if row.get("wait_share") is not None]
    if waits:
        figures.append(Figure("waiting for data", f"{100 * statistics.fmean(waits):.1f}%", "of a step"))
    return figures


def _interval_text(error: float, images: int | None, part: str) -> str:
    if not images:
        return ""
    low, high = error_interval(round(error * images), images)
    return f"95%: {100 * low:.2f} to {100 * high:.2f}, {images:,} {part} images"


def _duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def confusion_of(results: Mapping[str, Any] | None, classes: Sequence[str]) -> Confusion | None:
    """The confusion matrix of a finished run; None if it has none."""
    found = (results or {}).get("confusion")
    if not found:
        return None
    counts = [[int(count) for count in row] for row in found["counts"]]
    pairs = [
        (classes[true], classes[predicted], count, count / sum(row))
        for true, row in enumerate(counts)
        for predicted, count in enumerate(row)
        if count and true != predicted
    ]
    pairs.sort(key=lambda pair: (-pair[2], -pair[3]))
    rows = tuple(map(tuple, counts)) if len(classes) <= FULL_CONFUSION else ()
    return Confusion(found["part"], rows, tuple(pairs[:_MOST_ROWS]))


def examples_of(rows: Iterable[Mapping[str, str]]) -> list[Example]:
    """The lines of unlabeled.csv with their numbers read."""
    return [
        Example(
            path=row["path"],
            label=sys.intern(row["label"]),
            before=sys.intern(row["label_before"]),
            after=sys.intern(row["label_after"]),
            truth=sys.intern(row["truth"]),
            confidence=_number(row["confidence"]),
            weight=_number(row["weight"]),
            change=_number(row["label_change"]),
        )
        for row in rows
    ]


def _number(text: str) -> float | None:
    return float(text) if text else None


def most_changed(examples: Sequence[Example], count: int) -> list[Example]:
    """Those whose labels the method changed most, largest change first."""
    changed = [example for example in examples if example.change]
    return sorted(changed, key=lambda example: -(example.change or 0.0))[:count]


def lowest_weights(examples: Sequence[Example], count: int) -> list[Example]:
    """Those whose learned weight fell most below 1, where all weights start."""
    low = [example for example in examples if example.weight is not None and example.weight < 1]
    return sorted(low, key=lambda example: example.weight or 0.0)[:count]


def differing_labels(alone: Sequence[Example], examples: Sequence[Example], count: int) -> list[Example]:
    """Images that another run took for another class at the end, the most confident of both runs first."""
    before = {example.path: example for example in alone}
    found = []
    for example in examples:
        other = before.get(example.path)
        if other is not None and other.label and example.label and other.label != example.label:
            confidence = (other.confidence or 0.0) + (example.confidence or 0.0)
            found.append((confidence, replace(example, before=other.label, after=example.label)))
    return [example for _, example in sorted(found, key=lambda pair: -pair[0])[:count]]


def balance_of(
    classes: Sequence[str], labeled: Sequence[int] | None, examples: Sequence[Example]
) -> tuple[ClassShare, ...]:
    """Classes among labels and imputed labels; with many classes those that the two disagree on most.

    Args:
        classes: their names.
        labeled: labeled images of each class, or None.
        examples: the unlabeled images.
    """
    imputed = Counter(example.label for example in examples)
    truths = Counter(example.truth for example in examples if example.truth)
    known = sum(truths.values())
    shares = [
        ClassShare(
            name,
            None if labeled is None else labeled[place],
            imputed[name],
            imputed[name] / max(1, len(examples)),
            truths[name] / known if known else None,
        )
        for place, name in enumerate(classes)
    ]
    if len(classes) > FULL_CONFUSION:
        total = max(1, sum(labeled or ()))

        def expected(share: ClassShare) -> float:
            if share.true_share is not None:
                return share.true_share
            return 1 / len(classes) if share.labeled is None else share.labeled / total

        shares.sort(key=lambda share: -abs(share.imputed_share - expected(share)))
    return tuple(shares[:_MOST_ROWS])


def different_settings(configs: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Settings that are not the same in all runs: name -> a value a run.

    >>> different_settings([{"seed": 0, "split": {"holdout": 1}}, {"seed": 1, "split": {"holdout": 1}}])
    {'seed': ['0', '1']}
    """
    flat = [flattened(config) for config in configs]
    names = dict.fromkeys(name for settings in flat for name in settings)
    table = {name: [settings.get(name, "") for settings in flat] for name in names}
    return {name: values for name, values in table.items() if len(set(values)) > 1}


def flattened(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as ``outer.inner`` -> text.

    >>> flattened({"split": {"holdout": None}, "steps": 10, "betas": [0.9, 0.99]})
    {'split.holdout': '', 'steps': '10', 'betas': '0.9, 0.99'}
    """
    flat: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= flattened(value, f"{prefix}{name}.")
        elif isinstance(value, (list, tuple)):
            flat[prefix + name] = ", ".join(map(str, value))
        else:
            flat[prefix + name] = "" if value is None else str(value)
    return flat
