import dataclasses
import json

import pytest
import torch

from fastmeta.data import (
    DataError,
    ImageDataset,
    load_digits,
    make_split,
    record,
    split_digits,
    with_foreign_classes,
)
from fastmeta.data.images import fingerprint_of
from fastmeta.data.split_file import read_split, written
from fastmeta.training.build import split_of
from fastmeta.training.config import RunConfig, SplitConfig

SIZES = {"holdout_per_class": 3, "validation_per_class": 20, "test_fraction": 0.25}


@pytest.fixture(scope="module")
def digits():
    return load_digits()


def _parts(split):
    return [getattr(split, field.name) for field in dataclasses.fields(split)]


@pytest.mark.parametrize("labels_per_class", [1, 4])
def test_parts_are_disjoint_and_complete(digits, labels_per_class):
    split = make_split(digits, labels_per_class=labels_per_class, seed=3, **SIZES)
    assert torch.cat(_parts(split)).sort().values.equal(torch.arange(len(digits)))
    assert digits.targets[split.labeled].bincount().tolist() == [labels_per_class] * 10
    assert digits.targets[split.holdout].bincount().tolist() == [3] * 10
    assert digits.targets[split.validation].bincount().tolist() == [20] * 10


def test_the_split_of_digits_stays_what_its_figures_were_measured_on(digits):
    assert fingerprint_of(*_parts(split_digits(digits, 1, 0))) == "81b049c3e0d8d442"
    assert fingerprint_of(*_parts(split_digits(digits, 4, 2))) == "6eb8fa38e69929fa"


def test_the_seed_moves_all_but_the_test_set(digits):
    first, again, other = (split_digits(digits, 1, seed) for seed in (0, 0, 1))
    assert all(a.equal(b) for a, b in zip(_parts(first), _parts(again), strict=True))
    assert first.test.equal(other.test)
    assert not first.labeled.equal(other.labeled)


def test_more_labels_include_the_fewer(digits):
    few, many = split_digits(digits, 1, 0), split_digits(digits, 4, 0)
    assert set(few.labeled.tolist()) < set(many.labeled.tolist())
    assert few.validation.equal(many.validation)


@pytest.fixture
def official():
    """Two classes; in "train" the last one has no label."""
    targets = torch.tensor([0, 1, 0, 1, 0, 1, 0, -1, -1, -1, 0, 1, 1, 0])
    places = {"train": range(8), "unlabeled": range(8, 10), "validation": range(10, 12), "test": range(12, 14)}
    parts = {part: torch.tensor(list(where)) for part, where in places.items()}
    return ImageDataset("official", torch.zeros(14, 1, 2, 2), targets, ("cat", "dog"), parts)


def test_official_parts_stay_whole(official):
    split = make_split(official, labels_per_class=1, seed=0, holdout_per_class=1)
    assert split.validation.tolist() == [10, 11]
    assert split.test.tolist() == [12, 13]
    assert split.unlabeled.tolist()[-3:] == [7, 8, 9]
    assert torch.cat(_parts(split)).sort().values.tolist() == list(range(14))
    assert official.targets[split.labeled].tolist() == official.targets[split.holdout].tolist() == [0, 1]


def test_all_labels(official):
    split = make_split(official, labels_per_class=None, seed=0)
    assert split.labeled.sort().values.tolist() == list(range(7))
    assert split.unlabeled.tolist() == [7, 8, 9]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels_per_class": 0}, "labels_per_class must be at least 1, got 0"),
        ({"labels_per_class": 1, "test_fraction": 1.0}, r"test_fraction must lie in \[0, 1\), got 1.0"),
        ({"labels_per_class": 1, "holdout_per_class": -1}, "holdout_per_class must be at least 0, got -1"),
        (
            {"labels_per_class": 1000, **SIZES},
            "labels_per_class must be at most 111, because class 0 has 134 labeled images outside of the test set "
            "and 23 are for hold-out and validation, got 1000",
        ),
        ({"labels_per_class": None, "holdout_per_class": 178}, "class 0 has 178 labeled images and 178 .*expected 179"),
    ],
)
def test_what_is_wrong_is_named(digits, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_split(digits, seed=0, **arguments)


def test_official_parts_and_drawn_ones_exclude_each_other(official):
    with pytest.raises(ValueError, match="test_fraction must be 0, because official has an official test part"):
        make_split(official, labels_per_class=1, seed=0, test_fraction=0.5)
    with pytest.raises(ValueError, match="validation_per_class must be 0, because official has an official validation"):
        make_split(official, labels_per_class=1, seed=0, validation_per_class=1)


def test_a_class_needs_labels(official):
    official.targets[official.targets == 1] = -1
    with pytest.raises(DataError, match="official: class dog has no labeled training image"):
        make_split(official, labels_per_class=1, seed=0)


def test_one_class_is_a_path_one_folder_too_high():
    pets = ImageDataset("pets", torch.zeros(2, 1, 2, 2), torch.tensor([0, 0]), ("images",))
    with pytest.raises(DataError, match="pets: expected two classes or more, got images; if that is a folder of class"):
        make_split(pets, labels_per_class=1, seed=0)


def balanced(classes, images, **parts):
    """So many images of each class, class by class; ``parts`` hold more images of each class."""
    counts = {"train": images, **parts}
    targets = torch.cat([torch.arange(classes).repeat_interleave(count) for count in counts.values()])
    ends = torch.tensor([0, *(count * classes for count in counts.values())]).cumsum(0).tolist()
    places = {part: torch.arange(start, end) for part, start, end in zip(counts, ends[:-1], ends[1:], strict=True)}
    return ImageDataset("balanced", torch.zeros(len(targets), 1, 2, 2), targets, classes, places)


def counted(images, places):
    return images.targets[places].bincount(minlength=len(images.classes)).tolist()


def test_imbalance_is_geometric_from_the_first_class_to_the_last():
    images = balanced(5, 900, test=7)
    split = make_split(images, labels_per_class=100, seed=0, imbalance=100, unlabeled_imbalance=16)
    assert counted(images, split.labeled) == [100, 32, 10, 3, 1]  # 100, 31.6, 10, 3.16, 1
    assert counted(images, split.unlabeled) == [800, 400, 200, 100, 50]
    assert counted(images, split.test) == [7] * 5
    assert not set(split.labeled.tolist()) & set(split.unlabeled.tolist())
    alone = make_split(images, labels_per_class=100, seed=0, imbalance=100)
    assert alone.labeled.equal(split.labeled)
    assert counted(images, alone.unlabeled) == [900 - labels for labels in (100, 32, 10, 3, 1)]


def test_few_labels_are_one_of_a_class_at_least():
    images = balanced(3, 10)
    assert counted(images, make_split(images, labels_per_class=2, seed=0, imbalance=50).labeled) == [2, 1, 1]


def test_validation_images_without_regard_to_classes():
    images = balanced(10, 60)
    splits = [make_split(images, labels_per_class=4, seed=seed, validation=200) for seed in range(3)]
    for split in splits:
        assert split.sizes() == {"labeled": 40, "unlabeled": 360, "holdout": 0, "validation": 200, "test": 0}
        assert torch.cat(_parts(split)).sort().values.equal(torch.arange(600))
        assert counted(images, split.labeled) == [4] * 10
    assert any(counted(images, split.validation) != [20] * 10 for split in splits)
    assert not splits[0].validation.equal(splits[1].validation)
    more = make_split(images, labels_per_class=9, seed=0, validation=200)
    assert more.validation.equal(splits[0].validation)
    assert set(splits[0].labeled.tolist()) < set(more.labeled.tolist())


def test_holdout_images_without_regard_to_classes():
    images = balanced(10, 60)
    split = make_split(images, labels_per_class=4, seed=0, validation=200, holdout=103)
    assert split.sizes() == {"labeled": 40, "unlabeled": 257, "holdout": 103, "validation": 200, "test": 0}
    assert torch.cat(_parts(split)).sort().values.equal(torch.arange(600))
    assert counted(images, split.labeled) == [4] * 10
    assert split.validation.equal(make_split(images, labels_per_class=4, seed=0, validation=200).validation)


def test_foreign_classes_are_unlabeled_and_not_evaluated():
    images = balanced(5, 20, validation=3, test=4)
    images.targets[:100:20] = -1  # one of each class
    open_set = with_foreign_classes(images, 2)
    split = make_split(open_set, labels_per_class=6, seed=0)
    assert open_set.classes == ("0", "1", "2")
    assert counted(open_set, split.labeled) == [6] * 3
    truths = images.targets[split.unlabeled]
    assert [int((truths == label).sum()) for label in range(-1, 5)] == [5, 13, 13, 13, 19, 19]
    assert (open_set.targets[split.unlabeled][truths >= 3] == -1).all()
    assert counted(open_set, split.validation) == [3] * 3
    assert counted(open_set, split.test) == [4] * 3
    assert open_set.fingerprint != images.fingerprint
    assert with_foreign_classes(open_set, 2) is open_set
    assert with_foreign_classes(images, 0) is images


def test_places_are_part_of_the_record():
    images = balanced(3, 10)
    records = [record(images, make_split(images, labels_per_class=2, seed=seed))["places"] for seed in (0, 0, 1)]
    assert records[0] == records[1] != records[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"imbalance": 0.5}, "imbalance must be at least 1 and finite, got 0.5"),
        ({"unlabeled_imbalance": float("inf")}, "unlabeled_imbalance must be at least 1 and finite, got inf"),
        ({"imbalance": 2.0, "labels_per_class": None}, "imbalance must be 1 without labels_per_class, got 2.0"),
        ({"validation": 30}, "validation must be below 30, the labeled images there are, got 30"),
        ({"validation": -1}, "validation must be at least 0, got -1"),
        ({"validation": 3, "validation_per_class": 1}, "validation must be 0 with validation_per_class 1, got 3"),
        ({"holdout": 30}, "holdout must be below 30, the labeled images there are, got 30"),
        ({"holdout": 3, "holdout_per_class": 1}, "holdout must be 0 with holdout_per_class 1, got 3"),
        ({"validation": 29}, "labels_per_class must be at most 0, because class . has 0 labeled images outside of"),
    ],
)
def test_what_is_wrong_with_a_drawn_size_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_split(balanced(3, 10), **{"labels_per_class": 2, "seed": 0, **arguments})


def test_what_official_parts_exclude_is_named(official):
    with pytest.raises(ValueError, match="unlabeled_imbalance must be 1, because official has unlabeled images of its"):
        make_split(official, labels_per_class=1, seed=0, unlabeled_imbalance=2.0)
    with pytest.raises(ValueError, match="validation must be 0, because official has an official validation part, got"):
        make_split(official, labels_per_class=1, seed=0, validation=1)
    with pytest.raises(ValueError, match=r"foreign_classes must lie in \[0, 0\] for official"):
        with_foreign_classes(official, 1)


def test_a_split_in_a_file_is_read_back_for_the_same_images(tmp_path):
    images = balanced(3, 10, test=2)
    split = make_split(images, labels_per_class=2, seed=7, validation=4, unlabeled_imbalance=2)
    path = tmp_path / "split.json"
    path.write_text(json.dumps(written(images, split)))
    assert all(a.equal(b) for a, b in zip(_parts(read_split(path, images)), _parts(split), strict=True))
    config = RunConfig(data="balanced", seed=1, split=SplitConfig(file=str(path), labeled_in_unlabeled=True))
    assert split_of(config, images).labeled.equal(split.labeled)
    with pytest.raises(ValueError, match=r"split.file must be of the same images, balanced .* got .*split.json of bal"):
        read_split(path, balanced(3, 11, test=2))
    for content in ("", "{}", '{"labeled": "all"}'):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"split.file must be the split.json of a run, got"):
            read_split(path, images)
    with pytest.raises(ValueError, match=r"split.file must be the split.json of a run, got"):
        read_split(tmp_path / "nowhere.json", images)
