import pytest
import torch

from fastmeta.data import StatelessSampler, generator_for


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
