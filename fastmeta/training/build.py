"""From settings to a trainer: what depends on the data is filled in, then everything is made."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastmeta.data import (
    AugmentationConfig,
    Images,
    Plain,
    Shift,
    Split,
    generator_for,
    make_split,
    open_images,
    record,
    views_for,
    with_foreign_classes,
)
from fastmeta.data.augment import Views, Whitening
from fastmeta.data.cache import cache_folder
from fastmeta.data.features import frozen_features, restore_head
from fastmeta.data.landmarks import Landmarks
from fastmeta.data.split_file import read_split
from fastmeta.data.text import AsTokens, ReplacedWords, Texts
from fastmeta.data.tokenizer import HUB
from fastmeta.methods import l2i
from fastmeta.models import NETS, WITHOUT_LAST_LAYER, Normalized, automatic_model, build_model
from fastmeta.models.bert import TEXT_NETS, build_text_model
from fastmeta.models.tcdcn import MIN_SIZE
from fastmeta.ssl import BASES
from fastmeta.training.batches import TrainingData
from fastmeta.training.config import RunConfig
from fastmeta.training.evaluation import Evaluator
from fastmeta.training.processes import Processes
from fastmeta.training.recipes import BASE_RECIPES, LANDMARK_METHODS, METHODS, MIXED, base_of
from fastmeta.training.trainer import Trainer
from fastmeta.training.whitening import agreed_whitening

_SMALL = 16  # pixels: nets for such images are too small for more than one thread
_LARGE = 96  # from here on a crop of 7/8 of what is stored is trained on
_CHOSEN_ON_DIGITS = [base for base in BASE_RECIPES if base not in ("mean-teacher", "vat")]
"""Bases whose recipes are for digits alone; other images get the settings that a base has by itself, as published."""
_FEW = 10  # labeled images of a class, whose weak views are soon known by heart


def load_images(config: RunConfig) -> Images:
    """The images that the settings name."""
    of_other = config.model if _is_pretrained(config.model) else None
    images = open_images(config.data, image_size=config.image_size, tokenizer=of_other)
    _check_task(config, images)
    return with_foreign_classes(images, config.split.foreign_classes)


def _is_pretrained(model: str) -> bool:
    return model.startswith(HUB) or (model not in ("auto", *NETS, *TEXT_NETS) and Path(model).is_dir())


def resolve(config: RunConfig, images: Images) -> RunConfig:
    """The settings with everything filled in that was left to the data."""
    digits = config.data in ("digits", "mnist-5k")
    side = min(images.image_shape[1:], default=images.image_shape[0])
    steps = config.steps or (1000 if config.machine.device == "cpu" else 20_000)
    labels = config.labels_per_class if config.labels_per_class is not None or not digits else 1
    balanced = digits and not config.split.validation
    split = replace(
        config.split,
        holdout_per_class=_first(config.split.holdout_per_class, 3 if digits and not config.split.holdout else 0),
        validation_per_class=_first(config.split.validation_per_class, 20 if balanced else 0),
        test_fraction=_first(config.split.test_fraction, 0.25 if digits else 0.0),
    )
    every = config.evaluation.every or (50 if digits else max(1, steps // 20))
    size = config.image_size or (side if side <= _LARGE or isinstance(images, Texts) else round(side * 7 / 8))
    few = labels is not None and labels <= _FEW
    rate = 0.2 if digits and config.optimizer.name == "sgd" else config.optimizer.peak
    if isinstance(images, Landmarks) and config.optimizer.name == "sgd":
        rate = 0.01  # published: 0.03, for batches of 128
    if isinstance(images, Texts) and _is_pretrained(config.model) and config.optimizer.name != "sgd":
        rate = 2e-5  # with which BERT is fine-tuned
    if config.trainable == "head":  # features are far longer than those of a net in training
        rate = 0.002 if config.optimizer.name == "sgd" else 0.0005
    small = config.machine.device == "cpu"
    return replace(
        config,
        labels_per_class=labels,
        steps=steps,
        split=split,
        labeled_batch=config.labeled_batch or (40 if digits else 32 if small else 64),
        unlabeled_batch=config.unlabeled_batch or (120 if digits else 96 if small else 448),
        model=_automatic_model(images, size, small) if config.model == "auto" else config.model,
        method_settings={**_of_task(config, images), **config.method_settings},
        image_size=size,
        views="digits" if digits and config.views == "auto" else config.views,
        base_settings=config.base_settings if digits else {**_published(config.base), **config.base_settings},
        labeled_view=config.labeled_view or ("strong" if few and not isinstance(images, Texts) else "weak"),
        optimizer=replace(config.optimizer, learning_rate=config.optimizer.learning_rate or rate),
        average=replace(config.average, decay=_first(config.average.decay, min(0.999, max(0.99, 1 - 10 / steps)))),
        evaluation=replace(config.evaluation, every=every),
        machine=replace(
            config.machine,
            threads=config.machine.threads or (1 if side <= _SMALL else torch.get_num_threads()),
            checkpoint_every=config.machine.checkpoint_every or every,
        ),
    )


@dataclass(frozen=True)
class Built:
    """A run, made."""

    config: RunConfig
    images: Images
    split: Split
    trainer: Trainer
    evaluator: Evaluator
    whole: nn.Module | None = None
    """The net whose last layer alone is trained; None where all of it is."""
    whitening: Whitening | None = None
    """What the views begin with; None: pixels."""

    def weights_for_use(self, trained: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The state of the whole net, from that of what was trained."""
        if self.whole is None:
            return trained
        restore_head(self.whole, trained)
        return self.whole.state_dict()


def split_of(config: RunConfig, images: Images) -> Split:
    """The parts of the images, from resolved settings."""
    part = config.split
    images = with_foreign_classes(images, part.foreign_classes)
    if part.file is not None:
        split = read_split(part.file, images)
    else:
        split = make_split(
            images,
            labels_per_class=config.labels_per_class,
            seed=config.seed,
            holdout_per_class=part.holdout_per_class or 0,
            validation_per_class=part.validation_per_class or 0,
            validation=part.validation or 0,
            test_fraction=part.test_fraction or 0.0,
            imbalance=part.imbalance,
            unlabeled_imbalance=part.unlabeled_imbalance,
            holdout=part.holdout or 0,
        )
        if part.labeled_in_unlabeled:
            split = replace(split, unlabeled=torch.cat([split.unlabeled, split.labeled]))
    if BASES[config.base].imputes and not len(split.unlabeled):
        raise ValueError(
            f"data must have unlabeled images for base {config.base}, got none in {config.data}: put some in the "
            "folder unlabeled, or leave some labels out with labels_per_class"
        )
    return split


def record_of(config: RunConfig, images: Images) -> dict[str, Any]:
    """For config.json: all settings, what was left to the data filled in, and what the data are."""
    images = with_foreign_classes(images, config.split.foreign_classes)
    config = resolve(config, images)
    return {**config.as_dict(), "record": record(images, split_of(config, images))}


def build(
    config: RunConfig,
    images: Images,
    processes: Processes | None = None,
    *,
    whitening: Whitening | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Built:
    """Everything that a run needs, from its settings.

    Args:
        config: the settings.
        images: the images.
        processes: those of the run.
        whitening: that of the run, where it was begun before; None: it is computed, if the settings ask for one.
        on_progress: called with the number of images whose features are computed, and of all, where a head is trained.

    Raises:
        ValueError: data and settings do not fit.
    """
    processes = processes or Processes()
    _check_task(config, images)
    images = with_foreign_classes(images, config.split.foreign_classes)
    config = resolve(config, images)
    split = split_of(config, images)
    if isinstance(images, Landmarks):
        images = images.standardized(split.labeled)
    recipe = METHODS[config.method]
    assert config.labeled_batch is not None
    assert config.unlabeled_batch is not None
    assert config.labeled_view is not None
    assert config.steps is not None
    assert config.image_size is not None
    model = _model(config, images)
    if config.augmentation.whitening == "none":
        whitening = None
    else:
        whitening = agreed_whitening(
            whitening,
            images,
            split,
            config.image_size,
            workers=config.machine.workers,
            device=config.machine.device,
            processes=processes,
        )
    views = _views(config, images, whitening)
    whole, seen = None, images
    if config.trainable == "head":
        if config.pretrained is None and (config.model in NETS or config.model.startswith(("torchvision:", "timm:"))):
            raise ValueError(
                f"pretrained must be given with trainable head: the backbone of {config.model} would be random"
            )
        if config.machine.channels_last:
            raise ValueError("machine.channels_last must be left out with trainable head, which has no images")
        if views.policy is not None:
            raise ValueError("augmentation.adapt must be False with trainable head, whose views are computed once")
        whole = model
        # In the cache, where the runs of all seeds and methods share them.
        seen, views, model = frozen_features(
            whole,
            images,
            views,
            folder=cache_folder() / "features",
            workers=config.machine.workers,
            device=config.machine.device,
            on_progress=on_progress,
        )
    trainer = Trainer(
        model,
        TrainingData(
            seen,
            split,
            views,
            labeled_batch=config.labeled_batch,
            unlabeled_batch=config.unlabeled_batch,
            holdout_batch=config.holdout_batch,
            labeled_view=config.labeled_view,
        ),
        base=base_of(config.base, config.base_settings),
        method=recipe.build(len(split.unlabeled), len(images.classes), config.method_settings, processes.group),
        steps=config.steps,
        seed=config.seed,
        optimizer=config.optimizer,
        schedule=config.schedule,
        average=config.average,
        machine=config.machine,
        processes=processes,
    )
    if trainer.method is not None and trainer.method.passes == "shared" and config.model in WITHOUT_LAST_LAYER:
        raise ValueError(
            f"method must make passes of its own (l2i-jvp, ...) with model {config.model}, where no linear layer gives "
            f"the logits, got {config.method}"
        )
    evaluator = Evaluator(config.evaluation, seen, split, views, machine=config.machine, processes=processes)
    return Built(config, images, split, trainer, evaluator, whole, whitening)


def _check_task(config: RunConfig, images: Images) -> None:
    """Raise unless the base and the method are for what the images have: classes or landmarks."""
    landmarks = isinstance(images, Landmarks)
    if (BASES[config.base].task == "landmarks") != landmarks:
        for_these = [name for name, base in BASES.items() if (base.task == "landmarks") == landmarks]
        has = "landmarks" if landmarks else "classes"
        raise ValueError(f"base must be one of {', '.join(for_these)} for images with {has}, got {config.base!r}")
    if isinstance(images, Texts):
        _check_texts(config)
    if not landmarks:
        return
    if config.method not in ("none", *LANDMARK_METHODS):
        raise ValueError(
            f"method must be none or one of {', '.join(LANDMARK_METHODS)} for images with landmarks, got "
            f"{config.method!r}"
        )
    chosen, split = config.augmentation, config.split
    for setting, fits in (
        ("trainable", config.trainable == "all"),
        ("views", config.views == "auto"),
        ("split.foreign_classes", not split.foreign_classes),
        ("split.imbalance", split.imbalance == 1),
        ("split.unlabeled_imbalance", split.unlabeled_imbalance == 1),
        ("augmentation.strong", chosen.strong in ("auto", "weak")),
        ("augmentation.flip", not chosen.flip),
        ("augmentation.noise", not chosen.noise),
        ("augmentation.whitening", chosen.whitening == "none"),
    ):
        if not fits:
            raise ValueError(f"{setting} must be left out for images with landmarks, which are shifted alone")


def _check_texts(config: RunConfig) -> None:
    """Raise for what needs pixels."""
    if config.base in (*MIXED, "vat"):
        raise ValueError(f"base must be none that mixes or moves pixels for texts, got {config.base!r}")
    if config.augmentation != AugmentationConfig():
        raise ValueError("augmentation must be left out for texts, whose words are replaced")
    for setting, fits in (
        ("trainable", config.trainable == "all"),
        ("pretrained", config.pretrained is None),  # the folder of a pretrained net is the model
        ("views", config.views == "auto"),
        ("machine.channels_last", not config.machine.channels_last),
        ("split.foreign_classes", not config.split.foreign_classes),
    ):
        if not fits:
            raise ValueError(f"{setting} must be left out for texts")


def _of_task(config: RunConfig, images: Images) -> dict[str, Any]:
    """Losses of a method that learns landmarks and not classes."""
    if config.method == "none" or not isinstance(images, Landmarks):
        return {}
    if config.method == "l2i-published":
        return asdict(l2i.preset("official_code", "V2", "landmarks"))
    # As the published code has it, a mean over the coordinates.
    return {"inner_loss": "mse_tanh", "outer_loss": "mse", "weight": 1 / len(images.classes)}


def _views(config: RunConfig, images: Images, whitening: Whitening | None) -> Views:
    assert config.image_size is not None
    if isinstance(images, Landmarks):  # 4 pixels of 60
        chosen = config.augmentation
        pixels = max(1, round(config.image_size / 15)) if chosen.shift is None else chosen.shift
        shift = Shift(config.image_size, pixels, chosen.padding or "reflected")
        return Views(shift, shift, Plain(config.image_size))
    if isinstance(images, Texts):
        counted = images.images[images.read_in_training]
        return Views(AsTokens(), ReplacedWords.of(counted, images.tokenizer.special), AsTokens())
    return views_for(config.views, images.image_shape, config.image_size, config.augmentation, whitening)


def _model(config: RunConfig, images: Images) -> nn.Module:
    torch.manual_seed(generator_for(config.seed, "initialization").initial_seed())
    if isinstance(images, Texts):
        size = images.tokenizer.size
        return build_text_model(config.model, len(images.classes), vocabulary=size, length=images.image_shape[0])
    model = build_model(
        config.model,
        num_classes=len(images.classes),
        channels=images.image_shape[0],
        image_size=config.image_size or min(images.image_shape[1:]),
        pretrained=config.pretrained,
    )
    if config.augmentation.whitening != "none" and isinstance(model, Normalized):
        model.mean.zero_()  # what is whitened is normalized
        model.std.fill_(1)
    return model


def _automatic_model(images: Images, size: int, small: bool) -> str:
    """A wide residual net takes seconds a step on a laptop's cores."""
    if isinstance(images, Landmarks) and size >= MIN_SIZE:
        return "tcdcn"
    if isinstance(images, Texts):
        return "bert-tiny" if small else "bert-base"
    return "conv-net" if small and size <= _LARGE else automatic_model(size)


def _published(base: str) -> dict[str, Any]:
    """The settings in which the recipe for digits is another."""
    if base not in _CHOSEN_ON_DIGITS:
        return {}
    recipe, own = asdict(BASE_RECIPES[base]), asdict(BASES[base]())
    return {name: value for name, value in own.items() if value != recipe[name]}


def _first(value: Any, otherwise: Any) -> Any:
    return otherwise if value is None else value
