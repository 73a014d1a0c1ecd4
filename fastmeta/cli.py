"""The command line: ``fastmeta compare``, ``fastmeta train``, ``fastmeta doctor``."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from fastmeta.training.compare import CompareConfig, compare, grid
from fastmeta.training.config import RunConfig
from fastmeta.training.doctor import doctor
from fastmeta.training.train import ConfigMismatch
from fastmeta.training.workers import WorkerError

Base = Literal["supervised", "pseudo-label", "mean-teacher", "fixmatch"]
Method = Literal["none", "l2i", "meta-gradient", "example-weights", "label-gradient-alignment"]
BASES: tuple[Base, ...] = ("supervised", "pseudo-label", "mean-teacher", "fixmatch")
METHODS: tuple[Method, ...] = ("none", "l2i", "meta-gradient", "example-weights", "label-gradient-alignment")


@dataclass(frozen=True)
class Compare:
    """Compare methods on the same seeds: error, paired difference to the base, time per step.

    The same command continues an interrupted comparison and only reads a finished one.
    """

    base: Base = "fixmatch"
    """Base algorithm."""
    methods: tuple[Method, ...] = METHODS
    """Methods on top of it; the base alone ("none") is always among them."""
    labels: int = 1
    """Labeled images per class."""
    seeds: int = 3
    """Number of seeds: 0, 1, ..."""
    steps: int = 600
    """Training steps of a run."""
    full: bool = False
    """All bases with all methods and 5 seeds."""
    out: Path | None = None
    """Folder for the results (default: a name under runs/ made from the settings)."""
    workers: int | None = None
    """Processes (default: one per core; results do not depend on it)."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to train."""

    def run(self) -> int:
        """Exit status: 0, or 130 if it was interrupted."""
        if self.seeds < 1:
            raise ValueError(f"seeds must be at least 1, got {self.seeds}")
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"workers must be at least 1, got {self.workers}")
        wanted = METHODS if self.full else ("none", *self.methods)
        if self.base == "supervised" and not self.full:
            if any(method != "none" for method in self.methods) and self.methods != METHODS:
                raise ValueError(f"methods must be none for base supervised (it imputes no labels), got {self.methods}")
            wanted = ("none",)
        seeds = 5 if self.full else self.seeds
        runs = grid(
            BASES if self.full else (self.base,),
            [method for method in METHODS if method in wanted],
            range(seeds),
            labels=self.labels,
            steps=self.steps,
            device=self.device,
        )
        name = f"{'full' if self.full else self.base}-{self.labels}-per-class-{self.steps}-steps"
        out = self.out if self.out is not None else Path("runs") / name
        results = compare(CompareConfig(runs, out, self.workers))
        return 0 if results["finished"] == results["planned"] else 130


@dataclass(frozen=True)
class Train(RunConfig):
    """One run: one base, one method, one seed."""

    base: Base = "fixmatch"
    method: Method = "none"
    device: Literal["cpu", "cuda"] = "cpu"
    out: Path | None = None
    """Folder for the results (default: a name under runs/ made from the settings)."""

    def run(self) -> int:
        """Exit status: 0, or 130 if it was interrupted."""
        run = RunConfig(**{name: getattr(self, name) for name in RunConfig.__dataclass_fields__})
        out = self.out
        if out is None:
            out = Path("runs") / f"train-{self.base}-{self.method}-{self.labels}-per-class-seed-{self.seed}"
        results = compare(CompareConfig([run], out, 1))
        return 0 if results["finished"] == results["planned"] else 130


@dataclass(frozen=True)
class Doctor:
    """Print which implementation of each operator is available, and why the others are not."""

    def run(self) -> int:
        """Exit status 0."""
        print(doctor())
        return 0


Command = (
    Annotated[Compare, tyro.conf.subcommand("compare")]
    | Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Doctor, tyro.conf.subcommand("doctor")]
)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    command = tyro.cli(Command, prog="fastmeta", args=arguments)  # type: ignore[call-overload]
    try:
        return command.run()
    except (ValueError, ConfigMismatch, WorkerError) as error:
        print(f"fastmeta: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
