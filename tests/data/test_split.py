import dataclasses

import pytest
import torch

from fastmeta.data import DataError, ImageDataset, load_digits, make_split, split_digits
from fastmeta.data.images import fingerprint_of

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
