"""Features of a frozen backbone in place of images."""

import copy
import multiprocessing
import os
import types

import pytest
import torch
from torch import nn

from fastmeta import capture_features
from fastmeta.data import (
    ImageDataset,
    KeyedRandom,
    Split,
    Stream,
    UnreadableImage,
    Views,
    frozen_features,
    read_in_order,
    restore_head,
    views_for,
)
from fastmeta.models import build_model
from fastmeta.training.batches import TrainingData
from fastmeta.training.config import EvaluationConfig, OptimizerConfig
from fastmeta.training.evaluation import Evaluator
from fastmeta.training.recipes import METHODS, base_of
from fastmeta.training.trainer import Trainer

COUNT, SIZE = 11, 8
AUGMENTED = torch.tensor([1, 2, 3, 5, 8, 10])
VIEWS = views_for("digits", (1, SIZE, SIZE), SIZE)


class Gallery(ImageDataset):
    """Images of which some cannot be read, and which count what is read."""

    def __init__(self, broken=()):
        images = torch.rand(COUNT, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
        targets = torch.arange(COUNT) % 3
        parts = {"train": AUGMENTED[:3], "unlabeled": AUGMENTED[3:], "test": torch.tensor([0, 4, 6, 7, 9])}
        super().__init__("gallery", images, targets, 3, parts)
        self.broken, self.read = broken, []

    def get(self, places):
        for place in places.tolist():
            if place in self.broken:
                raise UnreadableImage(place, self.describe(place), "truncated")
        self.read.extend(places.tolist())
        return super().get(places)


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = build_model("conv-net", num_classes=3, channels=1, image_size=SIZE)
    with torch.no_grad():
        model(torch.rand(20, 1, SIZE, SIZE))  # running statistics
    return model


def computed(model, inputs):
    with torch.no_grad(), capture_features(model) as tape:
        copy.copy(model).eval()(inputs)
    return tape.calls[-1][0]


def keys(count):
    return KeyedRandom(3, "unlabeled", "weak", torch.arange(count))


def test_each_view_is_the_model_on_that_view_and_which_one_is_by_the_number_of_the_example(model, tmp_path):
    model.eval()
    made = frozen_features(model, Gallery(), VIEWS, folder=tmp_path, views_per_image=3, seed=7, batch_size=4)
    images = Gallery().images
    for kind in ("weak", "strong"):
        view = getattr(made.views, kind)
        each = torch.stack(
            [
                computed(
                    model, getattr(VIEWS, kind)(images[AUGMENTED], KeyedRandom(7, "features", f"{kind} {v}", AUGMENTED))
                )
                for v in range(3)
            ],
            dim=1,
        )
        assert each.std(dim=1).max() > 0.01
        places = AUGMENTED.repeat(50)
        row = torch.arange(len(places))
        found = view(made.images.get(places), keys(len(places)))
        drawn = keys(len(places)).integers(0, 3, 1)[:, 0]
        assert torch.allclose(found, each[row % len(AUGMENTED), drawn], atol=1e-6)
        assert drawn.bincount(minlength=3).min() > 50
        part = view(places[40:44], KeyedRandom(3, "unlabeled", "weak", torch.arange(40, 44)))
        assert part.equal(found[40:44])
    everyone = torch.arange(COUNT).flip(0)
    assert torch.allclose(made.views.plain(everyone), computed(model, images[everyone]), atol=1e-6)


def test_the_head_gives_the_logits_of_the_model_and_goes_back_into_it(model, tmp_path):
    made = frozen_features(model, Gallery(), VIEWS, folder=tmp_path)
    assert model.training
    model.eval()
    images = Gallery().images
    assert made.head.weight.requires_grad
    assert torch.allclose(made.head(made.views.plain(torch.arange(COUNT))), model(images), atol=1e-6)
    with torch.no_grad():
        made.head.weight.mul_(2)
    assert not torch.allclose(made.head.weight, model.fc.weight)
    restore_head(model, made.head.state_dict())
    assert torch.allclose(made.head(made.views.plain(torch.arange(COUNT))), model(images), atol=1e-6)


def test_a_stream_and_an_evaluation_run_on_the_features(model, tmp_path):
    made = frozen_features(model, Gallery(), VIEWS, folder=tmp_path)
    stream = Stream(made.images, AUGMENTED, batch_size=4, seed=0, name="unlabeled")
    rows = next(stream)
    assert rows.images.equal(rows.places)
    assert made.views.weak(rows.images, KeyedRandom(0, "unlabeled", "weak", rows.keys)).shape == (4, 64)
    read = list(read_in_order(made.images, torch.arange(COUNT), batch_size=4))
    assert torch.cat([made.views.plain(part.images) for part in read]).shape == (COUNT, 64)
    assert made.images.image_shape == (64,)
    assert made.images.targets.equal(Gallery().targets)
    assert made.images.describe(3) == "gallery[3]"


@pytest.mark.parametrize("method", ["none", "l2i", "example-weights"])
def test_the_trainer_trains_a_head_on_features_as_it_trains_a_net_on_images(model, tmp_path, method):
    images = Gallery()
    made = frozen_features(model, images, VIEWS, folder=tmp_path)
    split = Split(
        AUGMENTED[:3], AUGMENTED[3:], *[images.parts["test"][start:stop] for start, stop in ((0, 2), (0, 0), (2, 5))]
    )
    recipe = METHODS[method]
    trainer = Trainer(
        copy.deepcopy(made.head),
        TrainingData(made.images, split, made.views, labeled_batch=4, unlabeled_batch=6),
        base=base_of("fixmatch"),
        method=recipe.build(len(split.unlabeled), 3, {}),
        steps=3,
        optimizer=OptimizerConfig(name="adam", learning_rate=0.01),
    )
    for _ in range(3):
        trainer.train_step()
    assert trainer.skipped.tolist() == [0, 0]
    assert (trainer.model.weight - made.head.weight).abs().max() > 0.01
    with torch.no_grad():
        model.fc.weight.zero_()
    restore_head(model, trainer.model.state_dict())
    config = EvaluationConfig(weights="student")
    errors = [
        Evaluator(config, seen, split, views)(3, net.eval(), net)
        for seen, views, net in ((made.images, made.views, trainer.model), (images, VIEWS, model))
    ]
    assert errors[0] == errors[1]


def test_what_cannot_be_read_is_remembered_and_told_again(model, tmp_path):
    for _ in range(2):  # computed, then read
        made = frozen_features(model, Gallery(broken=(2, 9)), VIEWS, folder=tmp_path, batch_size=2)
        with pytest.raises(UnreadableImage, match=r"gallery\[9\]: truncated"):
            made.images.get(torch.tensor([0, 9, 2]))
        (read,) = read_in_order(made.images, torch.tensor([8, 9, 2, 10]), batch_size=4)
        assert read.places.tolist() == [8, 10]
        assert set(read.unreadable) == {"gallery[9]", "gallery[2]"}
        assert made.views.plain(torch.tensor([9])).count_nonzero() == 0
        expected = computed(model.eval(), Gallery().images[8:9])
        assert torch.allclose(made.views.plain(torch.tensor([8])), expected, atol=1e-6)


def test_features_are_computed_once_and_again_where_something_else_went_in(model, tmp_path):
    def reads(model=model, views=VIEWS, images=None, **how):
        images = images or Gallery()
        frozen_features(model, images, views, folder=tmp_path, **how)
        return len(images.read)

    assert reads() == COUNT
    assert reads() == 0
    with torch.no_grad():
        model.fc.weight.add_(1)  # no feature depends on it
    assert reads() == 0
    assert reads(seed=1) == COUNT
    assert reads(views_per_image=2) == COUNT
    assert reads(dtype=torch.float16) == COUNT
    assert reads(augmented=AUGMENTED[1:]) == COUNT
    assert reads(views=views_for("none", (1, SIZE, SIZE), SIZE)) == COUNT
    relabeled = Gallery()
    relabeled.fingerprint = "other"
    assert reads(images=relabeled) == COUNT
    changed = Gallery()  # in place: names, sizes and labels are what they were
    changed.images[3, 0, 0, 0] = 0
    assert reads(images=changed) == COUNT
    with torch.no_grad():
        model.body[0].weight[0, 0, 0, 0] += 1e-6
    assert reads() == COUNT
    with torch.no_grad():
        model.body[1].running_mean += 1e-6
    assert reads() == COUNT
    for torn in tmp_path.glob("*.bin"):
        os.truncate(torn, 100)
    assert reads() == COUNT


def test_a_killed_computation_goes_on_where_it_was_saved(model, tmp_path, monkeypatch):
    monkeypatch.setattr("fastmeta.data.feature_cache._SECONDS", 0.0)  # after every batch
    whole = frozen_features(model, Gallery(broken=(1,)), VIEWS, folder=tmp_path / "whole", batch_size=2)

    def stop(done, total):
        if done == 8:
            os._exit(9)  # as kill -9: the fourth batch is written, but not recorded

    work = multiprocessing.get_context("fork").Process(
        target=lambda: frozen_features(
            model, Gallery(broken=(1,)), VIEWS, folder=tmp_path / "killed", batch_size=2, on_progress=stop
        )
    )
    work.start()
    work.join()
    assert work.exitcode == 9
    images = Gallery()
    made = frozen_features(model, images, VIEWS, folder=tmp_path / "killed", batch_size=2)
    assert images.read == list(range(6, COUNT))
    rest = torch.tensor([0, *range(2, COUNT)])
    assert made.views.plain(rest).equal(whole.views.plain(rest))
    assert made.views.strong(AUGMENTED[1:], keys(5)).equal(whole.views.strong(AUGMENTED[1:], keys(5)))
    with pytest.raises(UnreadableImage, match=r"gallery\[1\]"):  # found before it was killed
        made.images.get(torch.tensor([1]))


def test_two_processes_compute_it_once(model, tmp_path):
    def work(slow):
        images = Gallery()
        frozen_features(model, images, VIEWS, folder=tmp_path, batch_size=2)
        (tmp_path / f"read-{slow}").write_text(str(len(images.read)))

    processes = [multiprocessing.get_context("fork").Process(target=work, args=(number,)) for number in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert sorted(int(path.read_text()) for path in tmp_path.glob("read-*")) == [0, 0, COUNT]


def test_float16_halves_the_file_and_refuses_what_is_too_large(model, tmp_path):
    wide = frozen_features(model, Gallery(), VIEWS, folder=tmp_path / "wide")
    half = frozen_features(model, Gallery(), VIEWS, folder=tmp_path / "half", dtype=torch.float16)
    sizes = [next((tmp_path / name).glob("*.bin")).stat().st_size for name in ("wide", "half")]
    assert sizes == [(COUNT + 8 * len(AUGMENTED)) * 64 * width for width in (4, 2)]
    places = torch.arange(COUNT)
    assert half.views.plain(places).dtype == torch.float32
    assert half.views.plain(places).equal(wide.views.plain(places).half().float())
    with torch.no_grad():
        model.body[-4].weight.mul_(1e9)
    with pytest.raises(ValueError, match=r"features must be finite in torch.float16, got up to"):
        frozen_features(model, Gallery(), VIEWS, folder=tmp_path / "half", dtype=torch.float16)
    assert model.training


def test_an_image_without_views_gets_no_other_images(model, tmp_path):
    made = frozen_features(model, Gallery(), VIEWS, folder=tmp_path)
    with pytest.raises(IndexError):
        made.views.weak(torch.tensor([0]), keys(1))
    with pytest.raises(ValueError, match="random must be given to choose one of 4 views"):
        made.views.strong(AUGMENTED)


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({"views_per_image": 0}, "views_per_image must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"dtype": torch.float64}, "dtype must be one of torch.float32, torch.float16, got torch.float64"),
        ({"augmented": torch.tensor([11])}, r"augmented must hold places in \[0, 11\), got up to 11"),
        ({"views": Views(types.SimpleNamespace(f=object()), None, None)}, "views must say what they do in their text"),
        ({"model": nn.Sequential(nn.Flatten(), nn.Linear(64, 3), nn.ReLU())}, "must be those of its last nn.Linear"),
    ],
)
def test_bad_arguments_are_refused(model, tmp_path, how, expected):
    with pytest.raises(ValueError, match=expected):
        frozen_features(**{"model": model, "images": Gallery(), "views": VIEWS, "folder": tmp_path, **how})
    assert not list(tmp_path.glob("*.bin"))
