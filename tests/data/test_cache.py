import fcntl
import multiprocessing
import os
import resource
import shutil
import signal
import time

import numpy as np
import pytest
import torch
from picture_folders import write_digits
from PIL import Image

from fastmeta.data import UnreadableImage, open_images
from fastmeta.data.memory_map import INDEX, PIXELS, MappedImages
from fastmeta.data.readers import decoded_once
from fastmeta.data.readers.collection import DecodedImages

FORK = multiprocessing.get_context("fork")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The cache folder."""
    monkeypatch.setenv("FASTMETA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def pictures(tmp_path):
    return write_digits(tmp_path / "pictures", train=4, test=1)


def _all(images):
    return images.get(torch.arange(len(images)))


def _written(folder):
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


def test_the_second_time_nothing_is_decoded(folder, pictures, monkeypatch):
    first = open_images(pictures)
    monkeypatch.setattr(DecodedImages, "get", lambda *_: pytest.fail("decoded again"))
    second = open_images(pictures)
    monkeypatch.undo()
    assert isinstance(second, MappedImages)
    assert _all(first).equal(_all(second))
    assert _all(second).equal(_all(open_images(pictures, cache=False)))
    assert second.describe(7) == open_images(pictures, cache=False).describe(7)
    assert len(_written(folder)) == 1


def test_what_changes_is_decoded_anew(folder, pictures):
    before = open_images(pictures)
    path = pictures / "train/0/0000.png"
    Image.fromarray(np.full((8, 8), 77, np.uint8)).save(path)
    after = open_images(pictures)
    assert (after.get(torch.tensor([0])) == 77).all()
    assert not (before.get(torch.tensor([0])) == 77).all()
    assert open_images(pictures, image_size=16).image_shape == (1, 16, 16)
    assert open_images(pictures, mode="RGB").image_shape == (3, 8, 8)
    assert len(_written(folder)) == 4


def test_large_images_are_stored_up_to_a_size(folder, pictures):
    assert not isinstance(open_images(pictures, image_size=112, cache_gigabytes=0.0008), MappedImages)
    assert not folder.exists()
    assert isinstance(open_images(pictures, image_size=112, cache_gigabytes=0.001), MappedImages)


def test_many_are_decoded_by_several_processes_in_order(folder, pictures, monkeypatch):
    monkeypatch.setattr(decoded_once, "_ALONE", -1.0)
    monkeypatch.setattr(decoded_once, "_CHUNK_BYTES", 8 * 8 * 7)
    (pictures / "train/3/0013.png").write_bytes(b"broken")
    images = open_images(pictures)
    decoded = open_images(pictures, cache=False)
    readable = torch.tensor([place for place in range(len(images)) if "3/0013" not in images.describe(place)])
    assert len(readable) == 49
    assert images.get(readable).equal(decoded.get(readable))
    with pytest.raises(UnreadableImage, match=r"3/0013.png: no picture"):
        _all(images)


@pytest.mark.parametrize("cause", ["a file", "full", "too small"])
def test_where_it_cannot_be_written_there_is_one_warning(folder, pictures, monkeypatch, cause):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if cause == "a file":
        folder.write_text("in the way")
    elif cause == "too small":
        usage = shutil.disk_usage(pictures)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100))
    else:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # of 3,328 bytes
    try:
        with pytest.warns(UserWarning, match="pictures are decoded each time .* FASTMETA_CACHE") as warned:
            images = open_images(pictures)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(warned) == 1
    assert _all(images).equal(_all(open_images(pictures, cache=False)))
    assert not folder.is_dir() or not _written(folder)


@pytest.mark.parametrize("broken", [PIXELS, INDEX])
def test_what_is_not_whole_is_written_anew(folder, pictures, broken):
    open_images(pictures)
    path = folder / _written(folder)[0] / broken
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    images = open_images(pictures)
    assert path.read_bytes() == whole
    assert _all(images).equal(_all(open_images(pictures, cache=False)))


def test_a_kill_leaves_nothing_that_is_used(folder, pictures, monkeypatch):
    monkeypatch.setattr(decoded_once, "_CHUNK_BYTES", 64)

    def slow(images, places, read=decoded_once.read_chunk):
        time.sleep(0.05)
        return read(images, places)

    with monkeypatch.context() as patched:
        patched.setattr(decoded_once, "read_chunk", slow)
        child = FORK.Process(target=open_images, args=(pictures,))
        child.start()
        while not list(folder.glob(".*.unfinished/images.npy")):
            time.sleep(0.01)
        os.kill(child.pid, signal.SIGKILL)
        child.join()
    assert not list(folder.glob(f"[!.]*/{INDEX}"))
    images = open_images(pictures)
    assert isinstance(images, MappedImages)
    assert _all(images).equal(_all(open_images(pictures, cache=False)))
    assert not list(folder.glob(".*.unfinished"))


def test_processes_that_start_together_decode_once(folder, pictures, monkeypatch):
    decoded = FORK.Value("i", 0)

    def counted(images, places, read=decoded_once.read_chunk):
        time.sleep(0.1)
        with decoded.get_lock():
            decoded.value += len(places)
        return read(images, places)

    monkeypatch.setattr(decoded_once, "read_chunk", counted)
    children = [FORK.Process(target=open_images, args=(pictures,)) for _ in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0, 0]
    assert decoded.value == 50
    assert len(_written(folder)) == 1


def test_without_locks_the_first_to_end_is_kept(folder, pictures, monkeypatch):
    def no_lock(*_):
        raise OSError("no locks here")

    def another_ends_meanwhile(images, places, read=decoded_once.read_chunk):
        monkeypatch.undo()
        monkeypatch.setenv("FASTMETA_CACHE", str(folder))
        monkeypatch.setattr("fastmeta.data.cache.remove_unfinished", lambda _: None)
        monkeypatch.setattr(fcntl, "flock", no_lock)
        assert isinstance(open_images(pictures), MappedImages)
        return read(images, places)

    monkeypatch.setattr(fcntl, "flock", no_lock)
    monkeypatch.setattr(decoded_once, "read_chunk", another_ends_meanwhile)
    assert isinstance(open_images(pictures), MappedImages)
    assert len(_written(folder)) == 1
