"""A stream is the same whoever reads it: workers, processes, a resumed run; unreadable images are replaced alike."""

import os
import signal

import pytest
import torch

from fastmeta.data import KeyedRandom, Stream, views_for
from fastmeta.data.images import DataError, ImageDataset, UnreadableImage

CLASSES = 4
SIZE = 61


class Pictures(ImageDataset):
    """Images whose pixels name their place; some cannot be read. Reads are counted."""

    def __init__(self, bad=(), labeled=True):
        pixels = torch.arange(SIZE, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 4, 4)
        targets = torch.arange(SIZE) % CLASSES if labeled else torch.full((SIZE,), -1)
        super().__init__("pictures", pixels, targets, CLASSES)
        self.bad = set(bad)
        self.reads = 0

    def get(self, places):
        self.reads += len(places)
        for place in places.tolist():
            if place in self.bad:
                raise UnreadableImage(place, self.describe(place), "truncated")
        return super().get(places)


PART = torch.arange(60, 0, -1)  # place in the whole = 60 - place in the part
SETTINGS = {"batch_size": 8, "seed": 3, "name": "labeled", "max_unreadable": 0.1}


def stream(images=None, **settings):
    return Stream(Pictures() if images is None else images, PART, **{**SETTINGS, **settings})


def taken(source, steps):
    return [next(source) for _ in range(steps)]


def fields(rows):
    return [rows.images, rows.places, rows.index, rows.keys]


def assert_same(first, second):
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert all(a.equal(b) for a, b in zip(fields(one), fields(other), strict=True))


def joined(shares):
    """The rows of several processes as one batch."""
    return [
        type(pieces[0])(*(torch.cat(parts) for parts in zip(*map(fields, pieces), strict=True)))
        for pieces in zip(*shares, strict=True)
    ]


BAD = (7, 30, 31, 59)


@pytest.fixture(scope="module")
def reference():
    source = stream(Pictures(BAD))
    return taken(source, 20), dict(source.unreadable)


def test_rows_name_what_they_show(reference):
    for step, rows in enumerate(reference[0]):
        assert rows.images.dtype == torch.uint8
        assert rows.images[:, 0, 0, 0].equal(rows.places.to(torch.uint8))
        assert rows.places.equal(PART[rows.index])
        assert rows.keys.tolist() == list(range(8 * step, 8 * step + 8))


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_nothing(reference, workers):
    source = stream(Pictures(BAD), workers=workers, steps=20)
    assert_same(list(source), reference[0])
    assert source.unreadable == reference[1]
    assert source.position == 160


@pytest.mark.parametrize("processes", [2, 3, 4])
def test_processes_share_the_same_rows(reference, processes):
    shares = [taken(stream(Pictures(BAD), rank=rank, processes=processes), 20) for rank in range(processes)]
    assert_same(joined(shares), reference[0])


@pytest.mark.parametrize("step", [1, 7, 8, 19])
def test_a_stream_resumes_from_its_position_alone(reference, step):
    before = stream(Pictures(BAD))
    taken(before, step)
    assert_same(taken(stream(Pictures(BAD), position=before.position), 20 - step), reference[0][step:])


def test_views_are_the_same_for_any_workers_processes_and_start():
    pixels = torch.randint(0, 256, (60, 3, 9, 11), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = ImageDataset("random", pixels, torch.zeros(60, dtype=torch.int64), 1)
    views = views_for("pictures", images.image_shape, 9)

    def seen(source, steps):
        for rows in taken(source, steps):
            for name, view in (("weak", views.weak), ("strong", views.strong)):
                yield view(rows.images, KeyedRandom(3, "unlabeled", name, rows.keys))

    def make(**settings):
        return Stream(images, torch.arange(60), batch_size=8, seed=3, name="unlabeled", **settings)

    whole = list(seen(make(), 6))
    for processes in (2, 3):
        shares = [seen(make(rank=rank, processes=processes), 6) for rank in range(processes)]
        assert all(torch.cat(parts).equal(view) for parts, view in zip(zip(*shares, strict=True), whole, strict=True))
    resumed = seen(make(position=16, workers=1), 4)
    assert all(one.equal(other) for one, other in zip(resumed, whole[4:], strict=True))


def test_a_closed_stream_goes_on(reference):
    source = stream(Pictures(BAD), workers=1, steps=4)
    first = taken(source, 2)
    source.close()
    assert_same(first + list(source), reference[0][:4])
    source.close()


def test_order_is_that_of_seed_and_name():
    whole = [torch.cat([rows.index for rows in taken(stream(**key), 15)]) for key in ({}, {"seed": 4}, {"name": "u"})]
    assert all(order.bincount().tolist() == [2] * 60 for order in whole)
    assert not whole[0].equal(whole[1])
    assert not whole[0].equal(whole[2])


def test_unreadable_images_are_replaced_by_the_next_of_their_class(reference):
    clean = taken(stream(), 20)
    # in the part the places are 60, 59, ..., 1, whose classes repeat every 4; 31 and 30 do not stand in for each other
    replacement = {7: 3, 30: 26, 31: 27, 59: 55}
    for rows, as_wanted in zip(reference[0], clean, strict=True):
        expected = [replacement.get(place, place) for place in as_wanted.places.tolist()]
        assert rows.places.tolist() == expected
    assert reference[1] == {f"pictures[{place}]": "truncated" for place in BAD}


def test_unlabeled_images_are_replaced_without_a_look_at_labels():
    for images, name in [(Pictures(BAD), "unlabeled"), (Pictures(BAD, labeled=False), "labeled")]:
        clean, source = taken(stream(name=name), 20), stream(images, name=name)
        replacement = {7: 6, 30: 29, 31: 29, 59: 58}
        for rows, as_wanted in zip(taken(source, 20), clean, strict=True):
            assert rows.places.tolist() == [replacement.get(place, place) for place in as_wanted.places.tolist()]
        assert len(source.unreadable) == 4


def test_the_part_goes_round():
    source = Stream(Pictures([1]), PART, **{**SETTINGS, "keep_class": False})
    places = torch.cat([rows.places for rows in taken(source, 15)])
    assert places.bincount(minlength=61)[[1, 60]].tolist() == [0, 4]


def test_what_is_known_to_be_unreadable_is_not_read_again():
    images = Pictures(BAD)
    source = stream(images)
    taken(source, 15)
    before = images.reads
    taken(source, 15)
    assert images.reads - before == 120


def test_too_many_unreadable_images_are_an_error_with_names():
    bad = range(10, 20)
    with pytest.raises(
        DataError, match="of 60 images of the labeled part cannot be read, max_unreadable allows 6"
    ) as info:
        taken(stream(Pictures(bad)), 20)
    assert str(info.value).count("truncated") == 5
    assert str(info.value).endswith("...")
    counts = []
    for workers in (0, 1):
        source = stream(Pictures(bad), workers=workers)
        with pytest.raises(DataError):
            taken(source, 20)
        counts.append((source.position, source.unreadable))
    assert counts[0] == counts[1]


def test_one_unreadable_image_is_always_allowed():
    source = Stream(Pictures([60]), PART[:8], **{**SETTINGS, "max_unreadable": 0.0})
    taken(source, 2)
    assert source.unreadable == {"pictures[60]": "truncated"}
    with pytest.raises(DataError, match="2 of 8 images of the labeled part cannot be read, max_unreadable allows 1"):
        taken(Stream(Pictures([60, 59]), PART[:8], **SETTINGS), 2)


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_to_replace_an_image_with_is_an_error(workers):
    source = Stream(Pictures([60]), PART[:4], **{**SETTINGS, "workers": workers, "batch_size": 4})
    message = (
        r"1 of 4 images of the labeled part cannot be read, and nothing could replace one: pictures\[60\] \(truncated\)"
    )
    with pytest.raises(DataError, match=message):
        next(source)


def test_global_random_state_is_not_touched():
    before = torch.get_rng_state()
    taken(stream(workers=1), 1)
    assert torch.get_rng_state().equal(before)


def test_workers_outlive_a_signal_to_the_group():
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)  # gives workers a thread of torch's
    torch.set_num_threads(threads)
    source = stream(workers=1)
    next(source)
    (worker,) = source._iterator._workers
    os.kill(worker.pid, signal.SIGINT)
    assert os.system(f"kill -TERM {worker.pid}") == 0  # from another process than the parent
    taken(source, 10)
    source.close()
    worker.join(10)
    assert worker.exitcode == 0


def test_a_worker_ends_when_its_parent_says_so():
    source = stream(workers=1)
    next(source)
    (worker,) = source._iterator._workers
    worker.terminate()  # as at the end of a process whose worker hangs, for a lock that a killed one holds
    worker.join(10)
    assert worker.exitcode == 0
    source.close()


def test_waited_is_the_time_spent_in_next():
    source = stream(workers=1)
    assert source.waited == 0
    next(source)
    first = source.waited
    next(source)
    assert 0 < first < source.waited


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"position": 12}, "position must be a multiple of batch_size 8, got 12"),
        ({"position": -8}, "position must be a multiple of batch_size 8, got -8"),
        ({"rank": 2, "processes": 2}, "0 <= rank < processes <= batch_size, got 2, 2 and 8"),
        ({"processes": 9}, "0 <= rank < processes <= batch_size, got 0, 9 and 8"),
        ({"workers": -1}, "workers must be at least 0, got -1"),
        ({"max_unreadable": 1.5}, r"max_unreadable must lie in \[0, 1\], got 1.5"),
    ],
)
def test_wrong_arguments_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        stream(**settings)


def test_wrong_parts_are_named():
    with pytest.raises(ValueError, match=r"places must be int64 \[P\], P > 0, got torch.int64 \[0\] for labeled"):
        Stream(Pictures(), PART[:0], **SETTINGS)
    with pytest.raises(ValueError, match=r"places must lie in \[0, 61\), got 3 to 61"):
        Stream(Pictures(), torch.tensor([3, 61]), **SETTINGS)
