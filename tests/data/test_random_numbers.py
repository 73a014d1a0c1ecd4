"""Keyed random numbers: the same in any batch, and not to be told from independent uniform ones."""

import itertools

import pytest
import torch
from scipy import stats

from fastmeta.data import KeyedRandom
from fastmeta.data.random_numbers import _WEYL, _mix

ROWS = 20_000
KEYS = torch.arange(ROWS)
BASE = 0xC5DFCD72C2115132 - 2**64  # the hash of (0, 'unlabeled', 'weak'): part of every recorded run


def random(seed=0, stream="unlabeled", view="weak", keys=KEYS):
    return KeyedRandom(seed, stream, view, keys)


def p_value_of_pairs(first, second, bins=10):
    """Whether pairs fill a grid evenly: uniform and independent. ``first`` and ``second`` lie in [0, 1)."""
    cell = (first * bins).long() * bins + (second * bins).long()
    return stats.chisquare(cell.flatten().bincount(minlength=bins**2).numpy()).pvalue


def test_numbers_are_those_of_splitmix():
    word = 2**64 - 1

    def mix(z):
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & word
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & word
        return z ^ (z >> 31)

    assert mix(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF  # the published generator's first number from state 0
    weyl = 0x9E3779B97F4A7C15
    base = BASE % 2**64
    keys = [0, 1, 5_000_000_000]
    expected = [[mix(mix(base + k * weyl & word) + j * weyl & word) >> 40 for j in (1, 2, 3)] for k in keys]
    drawn = random(keys=torch.tensor(keys)).uniform(3)
    assert (drawn * 2**24).long().tolist() == expected


def test_a_row_is_the_same_in_any_batch_and_any_portions():
    whole = random().uniform(7)
    rows = torch.tensor([19_999, 3, 4, 3])
    part = random(keys=rows)
    assert torch.cat([part.uniform(2), part.uniform(0), part.uniform(5)], dim=1).equal(whole[rows])
    assert random(keys=KEYS[:0]).uniform(7).shape == (0, 7)
    first, second = random(), random()
    first.uniform(2)
    assert not first.uniform(1).equal(second.uniform(1))


def test_a_tensor_s_numbers_are_an_array_s():
    on_device = random()  # as on a GPU
    on_device._rows = _mix(KEYS * _WEYL + BASE).unsqueeze(1)
    expected = random()
    for _ in range(2):
        assert on_device.uniform(4).equal(expected.uniform(4))
        assert on_device.integers(-3, 1000, 4).equal(expected.integers(-3, 1000, 4))


@pytest.mark.parametrize("column", range(3))
def test_uniform(column):
    drawn = random().uniform(3)[:, column].double()
    assert drawn.min() >= 0
    assert drawn.max() < 1
    assert stats.kstest(drawn.numpy(), "uniform").pvalue > 1e-4
    low_bits = (drawn * 2**24).long() % 64
    assert stats.chisquare(low_bits.bincount(minlength=64).numpy()).pvalue > 1e-4


NEIGHBOURS = {
    "next k": lambda: (random().uniform(4)[:-1], random().uniform(4)[1:]),
    "k far": lambda: (random().uniform(4), random(keys=KEYS + 2**32).uniform(4)),
    "batch's distance": lambda: (random().uniform(4)[:-448], random().uniform(4)[448:]),
    "next column": lambda: (random().uniform(5)[:, :-1], random().uniform(5)[:, 1:]),
    "next k, next column": lambda: (random().uniform(5)[:-1, 1:], random().uniform(5)[1:, :-1]),
    "views": lambda: (random().uniform(4), random(view="strong").uniform(4)),
    "streams": lambda: (random().uniform(4), random(stream="labeled").uniform(4)),
    "seeds": lambda: (random().uniform(4), random(seed=1).uniform(4)),
}


@pytest.mark.parametrize("neighbours", NEIGHBOURS)
def test_neighbours_are_independent(neighbours):
    first, second = NEIGHBOURS[neighbours]()
    assert p_value_of_pairs(first, second) > 1e-4
    correlation = torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1]
    assert correlation.abs() < 4 / first.numel() ** 0.5


def test_columns_of_one_row_are_jointly_uniform():
    bits = (random().uniform(8) >= 0.5).long()
    patterns = (bits * 2 ** torch.arange(8)).sum(dim=1).bincount(minlength=256)
    assert stats.chisquare(patterns.numpy()).pvalue > 1e-4


def test_no_two_rows_of_near_keys_are_equal():
    keys = [(seed, stream, view) for seed, stream, view in itertools.product((0, 1, 2), "ab", ("w", "s"))]
    rows = torch.cat([KeyedRandom(*key, torch.arange(1000)).uniform(3) for key in keys])
    assert len(rows.unique(dim=0)) == len(rows)


@pytest.mark.parametrize(("low", "high"), [(0, 2), (-4, 5), (0, 1000)])
def test_integers_are_uniform_over_their_range(low, high):
    drawn = random().integers(low, high, 2)
    counts = (drawn - low).flatten().bincount(minlength=high - low)
    assert len(counts) == high - low
    assert stats.chisquare(counts.numpy()).pvalue > 1e-4


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"keys must be int64 \[n\], got torch.float32 \[2\]"):
        random(keys=torch.zeros(2))
    with pytest.raises(ValueError, match=r"high - low must lie in 1 .. 2\*\*31, got 3 - 3"):
        random().integers(3, 3, 1)


def test_normal_numbers():
    numbers = random().normal(3)
    assert numbers.shape == (ROWS, 3)
    for column in numbers.T:
        assert stats.kstest(column.numpy(), "norm").pvalue > 1e-4
    uniform = torch.special.ndtr(numbers.double())
    for first, second in itertools.combinations(uniform.T, 2):
        assert p_value_of_pairs(first, second) > 1e-4
    assert random(keys=KEYS[5:7]).normal(3).equal(numbers[5:7])
