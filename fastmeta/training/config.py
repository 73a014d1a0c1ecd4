"""A run's settings: typed, written with the run and read back. None stands for "from the data" until it is resolved."""

import dataclasses
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from fastmeta.data import AugmentationConfig
from fastmeta.ssl import BASES
from fastmeta.training.recipes import METHODS, MIXED, settings_of


@dataclass(frozen=True)
class OptimizerConfig:
    """How the weights move."""

    name: Literal["sgd", "adam"] = "sgd"
    """SGD with momentum, or Adam."""
    learning_rate: float | None = None
    """Peak learning rate (default: digits 0.2, landmarks 0.01, else 0.03; a head 0.002; of Adam 0.002 and 0.0005,
    of a pretrained net of texts 2e-5)."""
    momentum: float = 0.9
    """Of SGD."""
    nesterov: bool = True
    """Nesterov's momentum, of SGD."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Of Adam."""
    weight_decay: float = 5e-4
    """Strength of the decay of weights."""
    decoupled: bool = False
    """Decay the weights themselves, w (1 - rate decay) once a step, and not through the gradient."""
    decayed: Literal["all", "kernels"] = "all"
    """Which parameters decay: all, or kernels alone (no biases, no normalization)."""

    def check(self) -> None:
        """Raise ValueError for a value out of range; the command line makes these before it checks them."""
        if self.learning_rate is not None:
            _in_range("optimizer.learning_rate", self.learning_rate, above=0)
        _in_range("optimizer.weight_decay", self.weight_decay, least=0)
        _in_range("optimizer.momentum", self.momentum, least=0, below=1)
        for beta in self.betas:
            _in_range("optimizer.betas", beta, least=0, below=1)

    @property
    def peak(self) -> float:
        """The peak learning rate."""
        return self.learning_rate or (0.002 if self.name == "adam" else 0.03)


@dataclass(frozen=True)
class ScheduleConfig:
    """How the learning rate changes: a function of the step alone, so that a resume needs no state."""

    name: Literal["constant", "cosine", "cosine-7/16", "steps"] = "cosine-7/16"
    """cosine: (1 + cos(pi k/K)) / 2; cosine-7/16: cos(7 pi k/16 K) (FixMatch); steps: times factor at milestones."""
    warm_up: int = 0
    """Steps of a linear warm-up."""
    milestones: tuple[int, ...] = ()
    """Steps at which the rate is multiplied."""
    factor: float = 0.1
    """By this."""

    def check(self) -> None:
        """Raise ValueError for a value out of range; the command line makes these before it checks them."""
        _in_range("schedule.warm_up", self.warm_up, least=0)
        _in_range("schedule.factor", self.factor, above=0)
        if self.milestones and self.name != "steps":
            raise ValueError(f"schedule.milestones must be left out with schedule {self.name}, got {self.milestones}")


@dataclass(frozen=True)
class AverageConfig:
    """The exponential moving average of the weights."""

    decay: float | None = None
    """It remembers about 1 / (1 - decay) steps (default: a tenth of the run, at least 100 and at most 1000)."""
    warm_up: bool = True
    """min(decay, (1 + t) / (delay + t)) at step t, so that it forgets the initialization."""
    delay: float = 10.0
    """Of the warm-up: the larger, the sooner it forgets; 2 is 1 - 1 / (t + 2), the published mean teacher's."""
    buffers: Literal["copied", "averaged"] = "copied"
    """What it does with batch normalization's running statistics."""

    def check(self) -> None:
        """Raise ValueError for a value out of range; the command line makes these before it checks them."""
        if self.decay is not None:
            _in_range("average.decay", self.decay, least=0, below=1)
        _in_range("average.delay", self.delay, above=1)


@dataclass(frozen=True)
class EvaluationConfig:
    """What is evaluated when, and which figure is the run's."""

    every: int | None = None
    """Steps between evaluations (default: a twentieth of the run)."""
    weights: Literal["both", "average", "student"] = "both"
    """Which weights are evaluated."""
    report: Literal["best-validation", "last", "mean-of-last-20", "median-of-last-20"] | None = None
    """Figure that is reported (default: best-validation where there are validation images, else last)."""

    def check(self) -> None:
        """Raise ValueError for a value out of range; the command line makes these before it checks them."""
        if self.every is not None:
            _in_range("evaluation.every", self.every, least=1)


@dataclass(frozen=True)
class SplitConfig:
    """Parts that are taken from the training images; official validation and test images stay what they are."""

    holdout_per_class: int | None = None
    """Labels for a method's outer objective only."""
    validation_per_class: int | None = None
    """Labels for choices."""
    test_fraction: float | None = None
    """Share of the training images."""
    labeled_in_unlabeled: bool = False
    """Whether the labeled images are also among the unlabeled ones (FixMatch: yes; MixMatch, L2I: no)."""
    validation: int | None = None
    """Labels for choices, so many in all, drawn without regard to their classes."""
    imbalance: float = 1.0
    """Labels of the first class over those of the last, geometric in between; labels_per_class is the first's."""
    unlabeled_imbalance: float = 1.0
    """The same of the unlabeled images; those that are too many are left out."""
    foreign_classes: int = 0
    """The last classes, so many, have no labels: their images are among the unlabeled ones and are not evaluated."""
    holdout: int | None = None
    """Labels for a method's outer objective only, so many in all, drawn without regard to their classes."""
    file: str | None = None
    """The split.json of another run: its places, whatever the seed and all of these but foreign_classes say."""


@dataclass(frozen=True)
class MachineConfig:
    """How a run uses its machine; an interrupted run may go on with other settings of these.

    They change what is computed by rounding alone, but for ``precision``, ``accumulation`` (a method refines each part
    by itself) and ``batch_norm``.
    """

    device: Literal["cpu", "cuda"] = "cpu"
    """Where to train."""
    workers: int = 0
    """Processes that read and decode images, of each training process; 0: the training process itself."""
    threads: int | None = None
    """Threads of the CPU (default: 1 for nets that are too small for more, else all cores)."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: autocast; weights stay float32."""
    channels_last: bool = False
    """Memory format of images and weights."""
    compile: bool = False
    """torch.compile for everything below the last layer."""
    graph: bool = False
    """CUDA graph of a last-layer method's step: one launch in place of ten or more."""
    accumulation: int = 1
    """Parts that a step's batch is computed in, one after the other; a method refines each part by itself."""
    batch_norm: Literal["per-process", "synchronized"] = "per-process"
    """Whose batch statistics, where several processes train; synchronized needs a GPU (SyncBatchNorm)."""
    sharding: Literal["none", "fsdp2"] = "none"
    """fsdp2: each process keeps a part of the weights, for models that outgrow a card; methods of the last layer, or
    whose passes are differences."""
    checkpoint_every: int | None = None
    """Steps between checkpoints (default: as many as between evaluations)."""
    keep: int = 2
    """Checkpoints that are kept, beside the best."""
    max_skipped: int = 20
    """Steps in a row without a finite loss after which the run stops."""

    def check(self) -> None:
        """Raise ValueError for a value out of range; the command line makes these before it checks them."""
        for name in ("accumulation", "keep", "max_skipped", "checkpoint_every", "threads"):
            value = getattr(self, name)
            if value is not None:
                _in_range(f"machine.{name}", value, least=1)
        _in_range("machine.workers", self.workers, least=0)
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("machine.device must be cpu where torch sees no GPU, got 'cuda'")
        if self.graph and self.device == "cpu":
            raise ValueError("machine.graph must be False on the CPU, got True")
        if self.batch_norm == "synchronized" and self.device == "cpu":
            raise ValueError("machine.batch_norm must be per-process on the CPU: torch's SyncBatchNorm needs a GPU")


@dataclass(frozen=True)
class RunConfig:
    """One run: data, net, base algorithm, method, seed.

    Where None is the default the value depends on the data; :func:`fastmeta.training.resolve` fills it in, and
    config.json has it. For the digits these values were chosen on validation images only, by seeds that no report uses;
    :mod:`fastmeta.training.recipes` says what was tried.
    """

    data: str = "digits"
    """Images: digits, mnist-5k or photographs; a path (a folder with a folder a class, a CSV, parquet, npz, tar); or a
    published data set by name and path, cifar-10:DIR; or texts: reuters-8, a CSV of them; see the README."""
    labels_per_class: int | None = None
    """Labeled images per class, the rest is unlabeled (default: 1 for digits, else all labels there are)."""
    base: str = "fixmatch"
    """Base algorithm; vat is virtual adversarial training."""
    method: str = "none"
    """Method on top of it."""
    model: str = "auto"
    """The net: auto, one of ours, torchvision:NAME, timm:NAME, transformers:NAME, or a folder of weights."""
    pretrained: str | None = None
    """File of weights to start from."""
    trainable: Literal["all", "head"] = "all"
    """head: the backbone stays as it is, its features are computed once, and the last layer alone is trained."""
    seed: int = 0
    """Seed of the split, the initialization, the data order and the augmentation."""
    steps: int | None = None
    """Training steps."""
    labeled_batch: int | None = None
    """Labeled images in a step, of all processes (repeated, differently augmented, when there are fewer)."""
    unlabeled_batch: int | None = None
    """Unlabeled images in a step, of all processes."""
    holdout_batch: int | None = None
    """Hold-out images in a step of a method that has them (default: all of them)."""
    image_size: int | None = None
    """Side of the images that the net sees, in pixels; of texts, how many tokens."""
    views: Literal["auto", "digits", "pictures", "none"] = "auto"
    """Augmentation: digits: no mirroring; pictures: mirrored, too."""
    labeled_view: Literal["weak", "strong"] | None = None
    """Augmentation of the labeled images: with few of them, weak views are soon known by heart."""
    base_settings: dict[str, Any] = field(default_factory=dict)
    """Settings of the base other than its recipe's."""
    method_settings: dict[str, Any] = field(default_factory=dict)
    """Settings of the method other than its recipe's."""
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    average: AverageConfig = field(default_factory=AverageConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    split: SplitConfig = field(default_factory=SplitConfig)
    machine: MachineConfig = field(default_factory=MachineConfig)

    def __post_init__(self) -> None:
        _one_of("base", self.base, BASES)
        _one_of("method", self.method, METHODS)
        if self.method != "none" and not BASES[self.base].imputes:
            raise ValueError(f"method must be none for base {self.base} (it imputes no labels), got {self.method!r}")
        for name in ("labels_per_class", "steps", "labeled_batch", "unlabeled_batch", "holdout_batch", "image_size"):
            value = getattr(self, name)
            if value is not None:
                _in_range(name, value, least=1)
        for name, choices in (("views", ("auto", "digits", "pictures", "none")), ("trainable", ("all", "head"))):
            _one_of(name, getattr(self, name), dict.fromkeys(choices))
        if self.labeled_view is not None:
            _one_of("labeled_view", self.labeled_view, dict.fromkeys(("weak", "strong")))
        _in_range("seed", self.seed, least=0)
        ramp_steps = self.settings()["method_settings"].get("ramp_steps")
        if ramp_steps is not None and self.base in MIXED:
            raise ValueError(
                f"method_settings must have ramp_steps None for base {self.base}, whose labeled images are mixed with "
                f"others, got {ramp_steps}"
            )
        for part in (self.augmentation, self.optimizer, self.schedule, self.average, self.evaluation, self.machine):
            part.check()

    def settings(self) -> dict[str, Any]:
        """All settings of the base and the method, those of their recipes included."""
        return settings_of(self.base, self.method, self.base_settings, self.method_settings)

    @property
    def arm(self) -> str:
        """Base and method as tables name them: ``fixmatch``, ``fixmatch + l2i``."""
        return self.base if self.method == "none" else f"{self.base} + {self.method}"

    def as_dict(self) -> dict[str, Any]:
        """For JSON: nested, with all settings of the base and the method; :func:`from_dict` reads it."""
        return {**dataclasses.asdict(self), **self.settings()}


def from_dict(values: Mapping[str, Any]) -> RunConfig:
    """The settings that :meth:`RunConfig.as_dict` wrote, from JSON as well; keys that are no settings are left out.

    >>> config = RunConfig(method="l2i", optimizer=OptimizerConfig(name="adam"))
    >>> from_dict(config.as_dict()).as_dict() == config.as_dict()
    True
    """
    return _build(RunConfig, values)


def _build(kind: type, values: Mapping[str, Any]) -> Any:
    types = typing.get_type_hints(kind)
    made: dict[str, Any] = {}
    for item in dataclasses.fields(kind):
        if item.name not in values:
            continue
        value = values[item.name]
        if dataclasses.is_dataclass(types[item.name]):
            value = _build(types[item.name], value)
        made[item.name] = tuple(value) if isinstance(value, list) else value
    return kind(**made)


def _one_of(name: str, value: str, choices: Mapping[str, Any]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def _in_range(
    name: str, value: float, *, least: float | None = None, above: float | None = None, below: float | None = None
) -> None:
    if least is not None and below is not None and not least <= value < below:
        raise ValueError(f"{name} must lie in [{least}, {below}), got {value}")
    if least is not None and not least <= value < math.inf:
        finite = "" if isinstance(value, int) else " and finite"
        raise ValueError(f"{name} must be at least {least}{finite}, got {value}")
    if above is not None and not above < value < math.inf:
        raise ValueError(f"{name} must be above {above} and finite, got {value}")
