import json
import pickle

import numpy as np
import pytest
import torch

from fastmeta.data import DataError, ImageDataset, UnreadableImage, load_digits, open_images, save_images


def _three():
    parts = {"train": torch.tensor([0, 2]), "unlabeled": torch.tensor([1])}
    pixels = torch.arange(3 * 3 * 4 * 5, dtype=torch.uint8).view(3, 3, 4, 5)
    return ImageDataset("three", pixels, torch.tensor([1, -1, 0]), ("ä", "b"), parts)


@pytest.fixture
def stored(tmp_path):
    save_images(_three(), tmp_path / "three")
    return tmp_path / "three"


def test_images_come_back(stored):
    before, after = _three(), open_images(stored)
    for images in (after, pickle.loads(pickle.dumps(after))):
        assert images.get(torch.tensor([2, 0])).equal(before.images[[2, 0]])
    assert (after.name, after.classes, after.image_shape) == ("three", ("ä", "b"), (3, 4, 5))
    assert after.fingerprint == before.fingerprint
    assert after.targets.equal(before.targets)
    assert {part: places.tolist() for part, places in after.parts.items()} == {"train": [0, 2], "unlabeled": [1]}
    assert after.describe(1) == "three[1]"


def test_digits_keep_their_floats(tmp_path):
    save_images(load_digits(), tmp_path / "digits")
    assert open_images(tmp_path / "digits").get(torch.arange(1797)).equal(load_digits().images)
    assert open_images(tmp_path / "digits", image_size=16, cache=False).image_shape == (1, 16, 16)


def test_a_worker_takes_the_path_and_not_the_pixels(stored):
    images = open_images(stored)
    images.get(torch.arange(3))
    assert len(pickle.dumps(images)) < 5000


def test_what_cannot_be_read_stays_so(tmp_path):
    class Holed(ImageDataset):
        def get(self, places):
            if 1 in places:
                raise UnreadableImage(1, self.describe(1), "cut off")
            return super().get(places)

    three = _three()
    save_images(Holed("holed", three.images, three.targets, three.classes, three.parts), tmp_path / "holed")
    images = open_images(tmp_path / "holed")
    assert images.get(torch.tensor([0, 2])).equal(three.images[[0, 2]])
    with pytest.raises(UnreadableImage, match=r"holed\[1\]: cut off"):
        images.get(torch.arange(3))


def test_a_folder_with_something_in_it_is_left_alone(stored):
    before = (stored / "images.npy").read_bytes()
    with pytest.raises(FileExistsError, match="folder must be new or empty"):
        save_images(load_digits(), stored)
    assert (stored / "images.npy").read_bytes() == before
    assert [path.name for path in stored.parent.iterdir()] == ["three"]


def test_what_is_wrong_is_named(stored):
    index = json.loads((stored / "index.json").read_text())

    def write(**changes):
        (stored / "index.json").write_text(json.dumps({**index, **changes}))

    write(format="fastmeta images 2")
    with pytest.raises(DataError, match=r"format must be 'fastmeta images 1', got 'fastmeta images 2'"):
        open_images(stored)
    write(targets=[0, 1])
    with pytest.raises(DataError, match=r"images.npy: expected 2 images, got 3"):
        open_images(stored)
    write(targets=[0, 1, 2])
    with pytest.raises(DataError, match=r"three\[2\]: label 2 is no class, expected 0 to 1"):
        open_images(stored)
    (stored / "index.json").write_text("[1")
    with pytest.raises(DataError, match=r"index.json: must be an index that save_images wrote"):
        open_images(stored)
    write()
    np.save(stored / "images.npy", np.zeros((3, 4, 5)))
    with pytest.raises(DataError, match=r"\[M, channels, height, width\], got float64 \[3, 4, 5\]"):
        open_images(stored)
    (stored / "images.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(DataError, match=r"images.npy: must be a whole array of images"):
        open_images(stored)
