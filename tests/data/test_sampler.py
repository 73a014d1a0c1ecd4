"""The order of a stream: any range of it, any step, any number of processes."""

import itertools

import pytest
import torch

from fastmeta.data import BatchSampler, StatelessSampler, generator_for


def test_order_is_the_passes_permutations_one_after_another():
    sampler = StatelessSampler(7, 3, seed=4, stream="labeled")
    whole = torch.cat([torch.randperm(7, generator=generator_for(4, "labeled", number)) for number in range(4)])
    for start, stop in [(0, 28), (5, 9), (6, 7), (7, 21), (3, 3), (13, 28)]:
        assert sampler.places(start, stop).equal(whole[start:stop])
    assert sampler.batch(2).equal(whole[6:9])
    # recorded: the order of every run there is
    assert StatelessSampler(9, 4, seed=0, stream="unlabeled").places(0, 18).tolist() == RECORDED


RECORDED = [3, 5, 0, 6, 7, 2, 8, 1, 4, 2, 3, 6, 4, 5, 8, 1, 0, 7]


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
def test_processes_share_a_batch_in_order(processes):
    sampler = StatelessSampler(11, 8, seed=0, stream="s")
    shares = [
        list(BatchSampler(sampler, first_step=5, steps=4, rank=rank, processes=processes)) for rank in range(processes)
    ]
    assert [len(share) for share in shares] == [4] * processes
    for step, pieces in enumerate(zip(*shares, strict=True)):
        assert torch.cat(pieces).equal(sampler.batch(5 + step))
        assert max(map(len, pieces)) - min(map(len, pieces)) <= 1


def test_batches_do_not_end_by_themselves():
    batches = BatchSampler(StatelessSampler(3, 2, seed=0, stream="s"))
    assert len(list(itertools.islice(batches, 50))) == 50


def test_a_pass_over_imagenet_is_a_permutation():
    sampler = StatelessSampler(1_281_167, 448, seed=0, stream="unlabeled")
    around = sampler.places(3 * 1_281_167 - 5, 4 * 1_281_167)
    assert around[5:].sort().values.equal(torch.arange(1_281_167))
    assert sampler.places(4 * 1_281_167 - 1, 4 * 1_281_167 + 1)[0] == around[-1]


def test_wrong_ranges_are_named():
    sampler = StatelessSampler(3, 2, seed=0, stream="s")
    with pytest.raises(ValueError, match="start and stop must be 0 <= start <= stop, got -1 and 2"):
        sampler.places(-1, 2)
    with pytest.raises(ValueError, match="start and stop must be 0 <= start <= stop, got 3 and 2"):
        sampler.places(3, 2)
