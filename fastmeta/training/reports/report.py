"""One page about one or several runs, in one file: it needs no network, no script and no other file."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import jinja2
import torch

import fastmeta
from fastmeta.data import Images, open_images, with_foreign_classes
from fastmeta.training.build import split_of
from fastmeta.training.config import from_dict
from fastmeta.training.files import write_text
from fastmeta.training.reports import sections
from fastmeta.training.reports.figures import Panel, panel
from fastmeta.training.reports.run_folder import RunFolder, read_run
from fastmeta.training.reports.thumbnails import places_of, thumbnails

# Quantities of metrics.jsonl: title, key, whether it is a share.
_CURVES = (
    ("test error", "test_error_{weights}", True),
    ("validation error", "validation_error_{weights}", True),
    ("loss", "loss", False),
    ("loss of the labeled images", "loss_labeled", False),
    ("loss of the unlabeled images", "loss_unlabeled", False),
    ("imputed labels that are wrong", "imputed_error", True),
    ("wrong ones among those used", "used_error", True),
    ("confident: unlabeled images that are used", "confident", True),
)
_OF_TRUTH = ("imputed_error", "used_error")  # these say nothing where no true label is known
_MOST_PICTURES = 480  # of all runs: some 2 MB
_MOST_EXAMPLES = 24  # of a kind and run
_MOST_UNREADABLE = 100

T = TypeVar("T")


@dataclass
class RunPage:
    """What the page says of one run."""

    run: RunFolder
    name: str
    arm: str
    settings: dict[str, str]
    headlines: list[sections.Figure] = field(default_factory=list)
    confusion: sections.Confusion | None = None
    examples: list[sections.Example] = field(default_factory=list)
    changed: list[sections.Example] = field(default_factory=list)
    differing: list[sections.Example] = field(default_factory=list)
    differing_from: str = ""
    lowest: list[sections.Example] = field(default_factory=list)
    balance: tuple[sections.ClassShare, ...] = ()
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    pictures: dict[str, str] = field(default_factory=dict)
    known_truths: int = 0
    weighted: int = 0
    low_weights: int = 0
    notes: list[str] = field(default_factory=list)

    def part(self, what: str, make: Callable[[], T], otherwise: T) -> T:
        """A part of the page; one that a damaged file makes impossible is left out, with a note."""
        try:
            return make()
        except Exception as error:  # a page without one of its parts is better than none
            self.notes.append(f"{what} could not be shown: {type(error).__name__}: {error}")
            return otherwise


def write_report(runs: Sequence[Path], out: Path) -> None:
    """Write a page about runs, finished or not: figures, curves, settings, confusion, examples worth a look.

    What a run does not have is left out, and where its images are gone their paths are shown alone.

    Args:
        runs: their folders.
        out: the file.

    Raises:
        ValueError: one of them is no run, or there is none.
        OSError: the file cannot be written.
    """
    if not runs:
        raise ValueError("runs must be at least one folder, got none")
    text = report_html([read_run(Path(run)) for run in runs])
    write_text(out, text)


def report_html(runs: Sequence[RunFolder]) -> str:
    """The page as text."""
    count = max(4, min(_MOST_EXAMPLES, _MOST_PICTURES // (2 * len(runs))))
    pages = [_read(run, name) for run, name in zip(runs, _names(runs), strict=True)]
    for page in pages:
        _choose_examples(page, pages, count)
        _add_images(page)
    panels = [_curves(pages, *curve) for curve in _CURVES]
    return _template().render(
        pages=pages,
        panels=[figure for figure in panels if figure is not None],
        different=sections.different_settings([page.settings for page in pages]) if len(pages) > 1 else {},
        version=fastmeta.__version__,
        most_unreadable=_MOST_UNREADABLE,
    )


@functools.cache  # compiling it takes most of a page's time
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # names of classes and files are anything
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.jinja")


def _names(runs: Sequence[RunFolder]) -> list[str]:
    """The folders' names, with as many of the folders above as tell them apart."""
    paths = [run.folder.absolute().parts for run in runs]
    for length in range(1, max(map(len, paths)) + 1):
        names = ["/".join(parts[-length:]) for parts in paths]
        if len(set(names)) == len(set(paths)):
            break
    return names


def _read(run: RunFolder, name: str) -> RunPage:
    """All but what needs the images or the other runs."""
    config = run.config
    base, method = config.get("base", "?"), config.get("method", "none")
    settings = sections.flattened({key: value for key, value in config.items() if key != "record"})
    page = RunPage(run, name, base if method == "none" else f"{base} + {method}", settings)
    page.headlines = page.part("the figures", lambda: sections.headlines(run), [])
    page.confusion = page.part("the confusion matrix", lambda: sections.confusion_of(run.results, run.classes), None)
    page.unreadable = page.part(
        "unreadable files", lambda: sorted((run.results or {}).get("unreadable", {}).items()), []
    )
    page.examples = page.part("the unlabeled images", lambda: sections.examples_of(run.unlabeled()), page.examples)
    weights = [example.weight for example in page.examples if example.weight is not None]
    page.weighted, page.low_weights = len(weights), sum(weight < 0.5 for weight in weights)
    page.known_truths = sum(bool(example.truth) for example in page.examples)
    return page


def _choose_examples(page: RunPage, pages: Sequence[RunPage], count: int) -> None:
    """Those that are shown. A method that leaves labels alone and moves what imputes them is held against its base."""
    page.lowest = sections.lowest_weights(page.examples, count)
    page.changed = sections.most_changed(page.examples, count)
    alone = next((other for other in pages if _is_base_of(other.run, page.run)), None)
    if not page.changed and alone is not None:
        page.differing = sections.differing_labels(alone.examples, page.examples, count)
        page.differing_from = alone.name


def _is_base_of(other: RunFolder, run: RunFolder) -> bool:
    same = all(other.config.get(name) == run.config.get(name) for name in ("base", "seed", "labels_per_class"))
    same_data = other.record.get("fingerprint") == run.record.get("fingerprint")
    return same and same_data and other.config.get("method") == "none" != run.config.get("method")


def _add_images(page: RunPage) -> None:
    """What needs the run's images: thumbnails, and the labels of each class."""
    if not page.examples:
        return
    images = _open(page)
    labeled = page.part("labels of each class", lambda: _labeled_of_each_class(page.run, images), None)
    page.balance = sections.balance_of(page.run.classes, labeled, page.examples)
    shown = {example.path: None for example in (*page.changed, *page.differing, *page.lowest)}
    if images is not None and shown and page.run.task == "images":
        page.pictures = page.part("pictures", lambda: thumbnails(images, places_of(images, shown)), {})


def _open(page: RunPage) -> Images | None:
    config = page.run.config
    try:
        of_run = str(page.run.folder) if page.run.task == "texts" else None
        images = open_images(
            config["data"], image_size=config["image_size"], mode=page.run.mode, cache=False, tokenizer=of_run
        )
        return with_foreign_classes(images, config["split"].get("foreign_classes", 0))
    except Exception as error:  # the data may be anywhere by now, or changed
        page.notes.append(f"no pictures: the data cannot be opened any more ({error})")
        return None


def _labeled_of_each_class(run: RunFolder, images: Images | None) -> list[int] | None:
    """Counted in the split that the run made; None without its data."""
    if images is None or images.fingerprint != run.record.get("fingerprint"):
        return None
    split = split_of(from_dict(run.config), images)
    return torch.bincount(images.targets[split.labeled], minlength=len(run.classes)).tolist()


def _curves(pages: Sequence[RunPage], title: str, key: str, percent: bool) -> Panel | None:
    """One quantity of all runs; errors are those of the weights that each run reports."""
    curves = []
    for page in pages:
        run = page.run
        name = key.format(weights=(run.results or {}).get("weights") or "average")
        shown = page.known_truths or not page.examples or key not in _OF_TRUTH
        curves.append([(row["step"], row.get(name)) for row in run.metrics if "step" in row] if shown else [])
    return panel(title, curves, percent=percent)
