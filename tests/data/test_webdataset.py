import io
import pickle
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from fastmeta.data import DataError, UnreadableImage, open_images


def _png(value):
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8), value, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def _write(path, members, mode="w"):
    with tarfile.open(path, mode) as file:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture
def shards(tmp_path):
    _write(
        tmp_path / "train-0.tar",
        {"000.cls": b"3", "000.png": _png(1), "a/001.PNG": _png(2), "a/001.cls": b"12\n", "a/001.json": b"{}"},
    )
    _write(tmp_path / "train-1.tar", {"000.png": _png(3), "002.png": b"broken", "002.cls": b"3", "._3.png": b""})
    _write(tmp_path / "val-0.tar", {"000.png": _png(4), "000.cls": b"12"})
    return tmp_path


@pytest.mark.parametrize("cache", [True, False])
def test_shards(shards, cache):
    images = open_images(shards, cache=cache)
    assert images.classes == ("3", "12")
    assert images.targets.tolist() == [0, 1, -1, 0, 1]
    assert {part: places.tolist() for part, places in images.parts.items()} == {
        "train": [0, 1, 2, 3],
        "validation": [4],
    }
    for copy in (images, pickle.loads(pickle.dumps(images))):
        assert copy.get(torch.tensor([4, 1, 2, 0]))[:, 0, 0, 0].tolist() == [4, 2, 3, 1]
    assert images.describe(1) == f"{shards}/train-0.tar[a/001.PNG]"
    with pytest.raises(UnreadableImage, match=r"train-1.tar\[002.png\]: no picture that Pillow can read"):
        images.get(torch.tensor([3]))


def test_what_is_wrong_is_named(tmp_path):
    with pytest.raises(DataError, match=r"a.tar: must be a whole tar file, not compressed"):
        open_images(_write(tmp_path / "a.tar", {"0.png": _png(0), "0.cls": b"0"}, "w:gz"))
    with pytest.raises(DataError, match=r"no images found, expected key.jpg and key.cls"):
        open_images(_write(tmp_path / "b.tar", {"0.txt": b"0"}))
    with pytest.raises(DataError, match="nothing in the train part has a label"):
        open_images(_write(tmp_path / "c.tar", {"0.png": _png(0)}))
