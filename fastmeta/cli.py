"""The command line: ``fastmeta compare``, ``train``, ``presets``, ``predict``, ``report``, ``reproduce``."""

import argparse
import ast
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

import torch
import tyro

import fastmeta
from fastmeta.data.landmarks import Landmarks
from fastmeta.data.readers.open import is_path
from fastmeta.data.readers.published import how_to_get
from fastmeta.presets import PRESETS, Preset, preset
from fastmeta.presets.listing import as_json, as_text, matching, otherwise
from fastmeta.presets.smoke import run_smoke
from fastmeta.reproduce import EXPERIMENTS
from fastmeta.ssl import BASES
from fastmeta.training.checkpoints import CheckpointError
from fastmeta.training.command import train_command
from fastmeta.training.compare import CompareConfig, compare, grid
from fastmeta.training.config import MachineConfig, RunConfig, SplitConfig
from fastmeta.training.data_to_predict import open_for_prediction
from fastmeta.training.doctor import doctor, verify_named
from fastmeta.training.files import make_folder
from fastmeta.training.predict import check_machine, predict, require_finished, summary_of, unreadable_text
from fastmeta.training.predict_landmarks import predict_landmarks
from fastmeta.training.recipes import BASE_RECIPES, DEFAULT_METHODS, METHODS
from fastmeta.training.reports.report import write_report
from fastmeta.training.reports.run_folder import read_run
from fastmeta.training.side_by_side import WorkerError
from fastmeta.training.train import ConfigMismatch, NotFinite

if TYPE_CHECKING:
    Base: TypeAlias = str
    Method: TypeAlias = str
    ExperimentName: TypeAlias = str
else:
    Base = tyro.extras.literal_type_from_choices(list(BASE_RECIPES))
    Method = tyro.extras.literal_type_from_choices(list(METHODS))
    ExperimentName = tyro.extras.literal_type_from_choices(list(EXPERIMENTS))


@dataclass(frozen=True)
class Compare:
    """Compare methods on the same seeds: error, paired difference to the base, time per step.

    The same command continues an interrupted comparison and only reads a finished one.
    """

    base: Base = "fixmatch"
    """Base algorithm; vat is virtual adversarial training."""
    methods: tuple[Method, ...] = DEFAULT_METHODS
    """Methods on top of it; the base alone ("none") is always among them. -jvp: the whole model moves, not the last
    layer alone; -alternating: an update of its own, after the base's; -published: a paper's own loop and settings."""
    data: str = "digits"
    """Images: digits, mnist-5k, photographs, or a path."""
    labels_per_class: int = 1
    """Labeled images per class, at least 1; what is left of a class is unlabeled."""
    seeds: int = 7
    """Number of seeds: 0, 1, ..., at least 1. Few are fast and seldom show a difference."""
    steps: int = 1000
    """Training steps of a run, at least 1."""
    image_size: int | None = None
    """Side of the images that the net sees, in pixels (default: as they are stored)."""
    full: bool = False
    """All bases with the default methods: about a hundred arms, so hours."""
    out: Path | None = None
    """Folder for the results (default: a name under runs/ made from the settings)."""
    workers: int | None = None
    """Processes (default: one per core; results do not depend on it)."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to train."""

    def run(self) -> int:
        """Exit status: 0, or 130 if it was interrupted."""
        for name in ("seeds", "workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        bases: tuple[Base, ...] = (self.base,)
        methods: list[Method] = [method for method in METHODS if method == "none" or method in self.methods]
        if self.full:
            if self.base != "fixmatch" or self.methods != DEFAULT_METHODS:
                raise ValueError("full must be given without base and methods: it compares all of them")
            bases = tuple(base for base in BASE_RECIPES if BASES[base].task == "classification")
        elif self.base == "supervised":
            if self.methods not in (DEFAULT_METHODS, ("none",)):
                chosen = " ".join(self.methods)
                raise ValueError(f"methods must be none for base supervised (it imputes no labels), got {chosen}")
            methods = ["none"]
        runs = grid(
            bases,
            methods,
            range(self.seeds),
            data=self.data,
            labels_per_class=self.labels_per_class,
            steps=self.steps,
            image_size=self.image_size,
            machine=MachineConfig(device=self.device),
        )
        name = f"{'full' if self.full else self.base}-{self.labels_per_class}-per-class-{self.steps}-steps"
        if self.data != "digits":
            name = f"{_stem(self.data)}-{name}"
        if self.image_size is not None:
            name = f"{name}-{self.image_size}-pixels"
        out = self.out if self.out is not None else Path("runs") / name
        results = compare(CompareConfig(runs, out, self.workers))
        return 0 if results["finished"] == results["planned"] else 130


@dataclass(frozen=True)
class Train(RunConfig):
    """Train one run on your own images: one base, one method, one seed.

    Under torchrun every process takes its part of each batch. The same command continues an interrupted run.
    """

    base: Base = "fixmatch"
    method: Method = "none"
    base_settings: tuple[str, ...] = ()  # type: ignore[assignment]
    """Settings of the base, such as threshold=0.95 weight=1."""
    method_settings: tuple[str, ...] = ()  # type: ignore[assignment]
    """Settings of the method, such as weight=0.5."""
    out: Path | None = None
    """Folder for the results (default: a name under runs/ made from the settings)."""
    preset: str | None = None
    """Published settings to start from, of those that fastmeta presets lists; what else is given changes them."""
    smoke: bool = False
    """A few steps of the preset on generated images in the same format, without data."""

    def __post_init__(self) -> None:
        """Nothing: ``run`` checks, where an error is one line and not a frame of tyro's."""

    def run(self) -> int:
        """Exit status: 0, or 130 if it was interrupted."""
        values = {name: getattr(self, name) for name in RunConfig.__dataclass_fields__}
        for name in ("base_settings", "method_settings"):
            values[name] = _settings(name, values[name])
        if self.preset is not None:
            _change_settings(values, preset(self.preset).config)
        run = RunConfig(**values)
        if self.preset is not None:
            return self._run_preset(run, preset(self.preset))
        if self.smoke:
            raise ValueError("preset must be given with smoke: see fastmeta presets")
        out = self.out
        if out is None:
            labels = "" if run.labels_per_class is None else f"-{run.labels_per_class}-per-class"
            data = _stem(run.data)
            out = Path("runs") / f"{data}-{run.base}-{run.method}{labels}-seed-{run.seed}"
        return train_command(run, out)

    def _run_preset(self, run: RunConfig, published: Preset) -> int:
        """The run of a preset, or a few steps of it; at the end the paper's figure beside its own."""
        own, dataset = published.config, published.dataset
        if self.smoke:
            if run.data != dataset:
                raise ValueError(f"data must be left out with smoke, which generates its own, got {run.data!r}")
            results = run_smoke(replace(published, config=run), self.out)
            print(f"{self.preset}: {results['step']} steps, {results['skipped_steps']} of them without a finite loss")
            return 1 if results["skipped_steps"] else 0
        if run.data == dataset and not Path(run.data).exists():
            files = how_to_get(dataset)
            raise ValueError(f"data must be where {dataset} is with preset {self.preset}, got none: {files}")
        if is_path(run.data):  # nothing else that may lie there, and what is missing is named
            run = replace(run, data=f"{dataset}:{run.data}")
        status = train_command(run, self.out or Path("runs") / f"{self.preset}-seed-{run.seed}")
        if status == 0 and published.error is not None and os.environ.get("RANK", "0") == "0":
            figure = f"{published.paper}, {published.table}: {published.error:.2f}%."
            print(" ".join(part for part in (figure, published.note, otherwise(run, own)) if part))
        return status


def _change_settings(values: dict[str, Any], own: RunConfig) -> None:
    """Settings that are given go into those of the preset; another base or method has none of these."""
    for part in ("base", "method"):
        settings = f"{part}_settings"
        if values[part] == getattr(own, part):
            values[settings] = {**getattr(own, settings), **values[settings]}
        elif values[settings] == getattr(own, settings):
            values[settings] = {}


def _started_from(arguments: Sequence[str]) -> Train:
    """The settings that ``train`` starts from: its own, or those of a preset."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset")
    name = parser.parse_known_args(arguments)[0].preset if "train" in arguments[:1] else None
    if name is None:
        return Train()
    run = preset(name).config
    values = {name: getattr(run, name) for name in RunConfig.__dataclass_fields__}
    for setting in ("base_settings", "method_settings"):
        values[setting] = tuple(f"{key}={value!r}" for key, value in values[setting].items())
    return Train(**values, preset=name)


def _stem(data: str) -> str:
    """What the default folder of results is named after; "." and ".." are folders with names, too."""
    return Path(os.path.abspath(data)).stem


def _settings(name: str, given: Sequence[str]) -> dict[str, Any]:
    """``("threshold=0.95",)`` as ``{"threshold": 0.95}``; what is no Python literal is text."""
    settings: dict[str, Any] = {}
    for text in given:
        setting, equals, value = text.partition("=")
        if not setting or not equals:
            raise ValueError(f"{name} must be written as setting=value, got {text!r}")
        try:
            settings[setting] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            settings[setting] = value
    return settings


@dataclass(frozen=True)
class Presets:
    """List the rows of the papers' tables that fastmeta train --preset runs, with the papers' errors."""

    words: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="WORD ...")] = ()
    """Only those whose name, paper, table, data set, base and method have all of these words."""
    json: bool = False
    """For programs: with all settings."""

    def run(self) -> int:
        """Exit status: 0."""
        found = matching(PRESETS, self.words)
        print(as_json(found) if self.json else as_text(found))
        return 0


@dataclass(frozen=True)
class Predict:
    """Predict other images or texts with a finished run: a CSV of path, label and confidence, or of landmarks.

    Where they were unlabeled images of the run, also their weights and how the method changed their labels. Where they
    have labels the error is printed, too. A picture that cannot be read has no label; a text or a face stops it all.
    """

    finished: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(name="run", metavar="RUN")]
    """Folder of the run."""
    data: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="DATA ...")]
    """Pictures, texts (.txt), folders of them, or a data set of any kind that fastmeta train takes."""
    out: Path = Path("predictions.csv")
    """The CSV."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the net is."""
    workers: int | None = None
    """Processes that read and decode (default: one a core, none for a thousand images or fewer)."""
    batch_size: int = 256
    """Images at once."""

    def run(self) -> int:
        """Exit status: 0, or 1 if no image could be read."""
        run = read_run(self.finished)
        require_finished(run)
        images = open_for_prediction(self.data, run)
        make_folder(self.out.parent)
        if self.out.is_dir():
            raise ValueError(f"out must be a file, got the folder {self.out}")
        if isinstance(images, Landmarks):
            check_machine(self.device, self.batch_size, self.workers)
            errors = predict_landmarks(run, images, self.out, device=self.device, batch_size=self.batch_size)
            parts = "".join(
                f"\n{part}: error {100 * error:.2f}% of the eyes' distance" for part, error in errors.items()
            )
            print(f"{len(images):,} pictures{parts}\n{self.out}")
            return 0
        predictions = predict(
            run,
            images,
            self.out,
            device=self.device,
            workers=self.workers,
            batch_size=self.batch_size,
            progress=sys.stderr.isatty(),
        )
        print(f"{summary_of(predictions, run)}\n{self.out}")
        if predictions.unreadable:
            print(f"fastmeta: {unreadable_text(predictions)}", file=sys.stderr)
        return 1 if len(predictions.unreadable) == predictions.images else 0


@dataclass(frozen=True)
class Report:
    """One page about one or several runs, finished or not: figures, curves, settings, confusion, images worth a look.

    The page is a single file that needs no network.
    """

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN ...")]
    """Their folders."""
    out: Path = Path("report.html")
    """The page."""

    def run(self) -> int:
        """Exit status: 0."""
        try:
            write_report(self.runs, self.out)
        except OSError as error:
            raise ValueError(f"out must be a file that can be written, got {self.out}: {error.strerror}") from None
        print(self.out)
        return 0


@dataclass(frozen=True)
class Reproduce:
    """Measure an experiment of a paper here: results.json, table.md beside the paper's figures, and pictures.

    Without a name: the list of them. The same command continues an interrupted experiment.
    """

    name: Annotated[ExperimentName | None, tyro.conf.Positional] = None
    """Of the experiment."""
    out: Path | None = None
    """Folder for the results (default: a name under runs/reproduced/)."""
    quick: bool = False
    """A small version that shows that everything works; its figures mean nothing."""
    minutes: float | None = None
    """No cell of the experiment is begun after that long; the same command goes on later."""
    only: tuple[str, ...] = ()
    """Cells with these settings alone: data=digits seed=0; the names are those that each finished cell prints."""

    def run(self) -> int:
        """Exit status: 0."""
        if self.name is None:
            width = max(map(len, EXPERIMENTS))
            print("\n".join(f"{name:{width}}  {experiment.paper}" for name, experiment in EXPERIMENTS.items()))
            return 0
        out = self.out
        if out is None:
            out = Path("runs") / "reproduced" / f"{self.name}{'-quick' if self.quick else ''}"
        EXPERIMENTS[self.name].run(out, self.quick, self.minutes, self.only)
        print(out / "table.md")
        return 0


@dataclass(frozen=True)
class Doctor:
    """Print which implementation of each operator is available, and why the others are not; or verify a model."""

    model: str | None = None
    """Verify the derivatives of a model instead: package.module:function or file.py:function. The function takes no
    argument and returns (model, inputs) or (model, inputs, targets); a batch of a few examples is enough."""

    def run(self) -> int:
        """Exit status: 0, or 1 if something is wrong with the model."""
        if self.model is not None:
            return 0 if verify_named(self.model).ok else 1
        print(doctor())
        return 0


_DESCRIPTION = "Meta-gradient semi-supervised learning. fastmeta --version prints the versions."


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    if given == ["--version"]:
        print(f"fastmeta {fastmeta.__version__}, torch {torch.__version__}")
        return 0
    try:
        started = _started_from(given)
    except ValueError as error:
        return _refused(error)
    commands = (
        Annotated[Compare, tyro.conf.subcommand("compare")]
        | Annotated[Train, tyro.conf.subcommand("train", default=started)]
        | Annotated[Presets, tyro.conf.subcommand("presets")]
        | Annotated[Predict, tyro.conf.subcommand("predict")]
        | Annotated[Report, tyro.conf.subcommand("report")]
        | Annotated[Reproduce, tyro.conf.subcommand("reproduce")]
        | Annotated[Doctor, tyro.conf.subcommand("doctor")]
    )
    command = tyro.cli(commands, prog="fastmeta", description=_DESCRIPTION, args=given)  # type: ignore[call-overload]
    try:
        return command.run()
    except (ValueError, OSError, ImportError, CheckpointError, ConfigMismatch, NotFinite, WorkerError) as error:
        return _refused(error)


def _refused(error: Exception) -> int:
    print(f"fastmeta: error: {_with_flag(str(error))}", file=sys.stderr)
    return 2


def _with_flag(text: str) -> str:
    """The libraries name an argument, the command line its flag."""

    def flag(match: re.Match[str]) -> str:
        part = "split." if match[0] in SplitConfig.__dataclass_fields__ else ""
        return f"--{part}{match[0].replace('_', '-')}"

    return re.sub(r"^[\w.]+(?= must )", flag, text)


if __name__ == "__main__":
    sys.exit(main())
