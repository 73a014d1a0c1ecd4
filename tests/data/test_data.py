import dataclasses

import pytest
import torch

from fastmeta.data import ImageDataset, StatelessSampler, generator_for, load_digits, make_split


@pytest.fixture(scope="module")
def digits():
    return load_digits()


def test_digits_are_the_whole_data_set_in_unit_range(digits):
    assert digits.image_shape == (1, 8, 8)
    assert len(digits) == 1797
    assert (digits.images.min().item(), digits.images.max().item()) == (0.0, 1.0)
    assert digits.targets.bincount().min() > 170


@pytest.mark.parametrize("labels_per_class", [1, 4])
def test_split_parts_are_disjoint_and_complete(digits, labels_per_class):
    split = make_split(digits, labels_per_class, seed=3)
    parts = [getattr(split, field.name) for field in dataclasses.fields(split)]
    assert torch.cat(parts).sort().values.equal(torch.arange(len(digits)))
    per_class = digits.targets[split.labeled].bincount(minlength=10)
    assert per_class.tolist() == [labels_per_class] * 10
    assert digits.targets[split.holdout].bincount(minlength=10).tolist() == [3] * 10
    assert digits.targets[split.validation].bincount(minlength=10).tolist() == [20] * 10


def test_split_is_a_function_of_the_seed_and_the_test_set_is_not(digits):
    first, again, other = make_split(digits, 1, 0), make_split(digits, 1, 0), make_split(digits, 1, 1)
    for field in dataclasses.fields(first):
        assert getattr(first, field.name).equal(getattr(again, field.name))
    assert first.test.equal(other.test)
    assert not first.labeled.equal(other.labeled)


def test_more_labels_include_the_fewer(digits):
    few, many = make_split(digits, 1, 0), make_split(digits, 4, 0)
    assert set(few.labeled.tolist()) < set(many.labeled.tolist())
    assert few.validation.equal(many.validation)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels_per_class": 0}, "labels_per_class must be at least 1, got 0"),
        ({"labels_per_class": 1000}, "labels_per_class must be at most 110, because class 0 has 134 images"),
        ({"labels_per_class": 1, "test_fraction": 1.0}, "test_fraction must lie between 0 and 1, got 1.0"),
    ],
)
def test_split_names_what_is_wrong(digits, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_split(digits, seed=0, **arguments)


def test_dataset_rejects_what_does_not_fit():
    images = torch.zeros(2, 1, 8, 8)
    with pytest.raises(ValueError, match=r"images must be floating point .* got torch.uint8 \[2, 1, 8, 8\]"):
        ImageDataset("x", images.byte(), torch.zeros(2, dtype=torch.int64), 2)
    with pytest.raises(ValueError, match=r"targets must be int64 \[2\], got torch.float32 \[2\]"):
        ImageDataset("x", images, torch.zeros(2), 2)
    with pytest.raises(ValueError, match=r"targets must lie in \[0, 2\), got up to 2"):
        ImageDataset("x", images, torch.tensor([0, 2]), 2)


@pytest.mark.parametrize(("num_examples", "batch_size"), [(10, 4), (7, 7), (5, 12), (1, 3)])
def test_sampler_covers_the_data_evenly(num_examples, batch_size):
    sampler = StatelessSampler(num_examples, batch_size, seed=0, stream="s")
    drawn = torch.cat([sampler.batch(step) for step in range(num_examples)])
    assert drawn.bincount(minlength=num_examples).tolist() == [batch_size] * num_examples


def test_sampler_has_no_state():
    sampler = StatelessSampler(11, 4, seed=5, stream="s")
    in_order = [sampler.batch(step) for step in range(20)]
    fresh = StatelessSampler(11, 4, seed=5, stream="s")
    assert all(fresh.batch(step).equal(in_order[step]) for step in reversed(range(20)))


def test_sampler_depends_on_seed_and_stream():
    batches = [
        StatelessSampler(100, 50, seed=seed, stream=stream).batch(0)
        for seed, stream in [(0, "labeled"), (1, "labeled"), (0, "unlabeled")]
    ]
    assert not batches[0].equal(batches[1])
    assert not batches[0].equal(batches[2])


def test_generators_with_unequal_keys_are_unrelated():
    keys = [(0, "a", 1), (0, "a", 2), (0, "b", 1), (1, "a", 1), (0, "a1"), (0, "a", "1")]
    draws = {torch.rand(1, generator=generator_for(*key)).item() for key in keys}
    assert len(draws) == len(keys)
