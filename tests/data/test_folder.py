import os
import unicodedata

import numpy as np
import pytest
import torch
from picture_folders import write_digits, write_photographs
from PIL import Image

from fastmeta.data import DataError, UnreadableImage, make_split, open_images, open_pictures, record


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("FASTMETA_CACHE", str(tmp_path_factory.mktemp("cache")))


def _gray(value, size=(8, 8)):
    return Image.fromarray(np.full(size, value, np.uint8))


def _write(root, *paths):
    """A gray picture at each path, the k-th of gray 10 k."""
    for number, path in enumerate(paths):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        _gray(10 * number).save(root / path, "PNG")
    return root


def _grays(images):
    return images.get(torch.arange(len(images)))[:, 0, 0, 0].tolist()


@pytest.mark.parametrize("cache", [True, False])
def test_digits_written_as_pictures_come_back(tmp_path, cache):
    images = open_images(write_digits(tmp_path, train=3, test=2, unlabeled=4), cache=cache)
    assert images.classes == tuple("0123456789")
    assert images.image_shape == (1, 8, 8)
    assert {part: len(places) for part, places in images.parts.items()} == {"train": 30, "unlabeled": 4, "test": 20}
    assert images.targets.tolist() == [d for d in range(10) for _ in range(3)] + [-1] * 4 + [
        d for d in range(10) for _ in range(2)
    ]
    pixels = images.get(torch.tensor([53, 0]))
    for place, got in zip((53, 0), pixels, strict=True):
        assert (got[0].numpy() == np.asarray(Image.open(images.describe(place)))).all()
    assert images.describe(0) == str(tmp_path / "train/0/0000.png")
    assert images.get(torch.arange(0)).shape == (0, 1, 8, 8)


def test_photographs_are_a_data_set(tmp_path):
    pytest.importorskip("skimage")
    images = open_images(write_photographs(tmp_path), cache=False)
    assert images.image_shape == (3, 32, 32)
    assert {"china", "flower"} <= set(images.classes)
    split = make_split(images, labels_per_class=4, seed=0)
    written = record(images, split)
    assert written["sizes"]["labeled"] == 4 * len(images.classes)
    assert written["image_shape"] == [3, 32, 32]
    assert written["fingerprint"] == open_images(tmp_path, image_size=16, cache=False).fingerprint


def test_class_folders_alone_are_train(tmp_path):
    images = open_images(_write(tmp_path, "a/1.png", "b/1.png", "Unlabelled/1.png", "valid/a/1.png"))
    assert images.classes == ("a", "b")
    assert {part: places.tolist() for part, places in images.parts.items()} == {
        "train": [0, 1],
        "unlabeled": [2],
        "validation": [3],
    }


def test_names_that_users_have(tmp_path):
    kept = ["train/a b/é 1.PNG", "train/a b/deep/er/1.jpeg", "train/ß/x.y.JPG", "unlabeled/any where/1.png"]
    _write(tmp_path, *kept, "train/a b/._1.png", "train/.hidden/1.png", "train/__MACOSX/1.png")
    for junk in ("train/.DS_Store", "train/a b/Thumbs.db", "train/a b/notes.txt", "readme.md"):
        (tmp_path / junk).write_text("no picture")
    (tmp_path / "docs").mkdir()
    images = open_images(tmp_path)
    assert images.classes == ("a b", "ß")
    assert sorted(images.describe(place) for place in range(len(images))) == sorted(str(tmp_path / k) for k in kept)


def test_an_accent_has_two_forms_and_one_class(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    images = open_images(_write(tmp_path, f"train/{composed}/1.png", "train/b/1.png", f"test/{decomposed}/1.png"))
    assert images.classes == ("b", composed)
    assert images.targets.tolist() == [0, 1, 1]


def test_a_name_that_is_no_text_is_spelled_out(tmp_path):
    _write(tmp_path, os.fsdecode(b"ros\xe9/1.png"), os.fsdecode(b"b/caf\xe9.png"))
    for images in (open_images(tmp_path), open_images(tmp_path, cache=False)):
        assert _grays(images) == [10, 0]
        assert images.classes == ("b", r"ros\xe9")
        assert images.describe(0) == str(tmp_path / r"b/caf\xe9.png")


def test_links_are_followed_and_a_link_back_up_is_not(tmp_path):
    elsewhere = _write(tmp_path / "elsewhere", "1.png", "2.png")
    root = _write(tmp_path / "data", "train/a/0.png", "train/c/0.png")
    (root / "train/b").symlink_to(elsewhere, target_is_directory=True)
    (root / "train/a/1.png").symlink_to(elsewhere / "1.png")
    (root / "train/a/up").symlink_to(root / "train/a", target_is_directory=True)
    (root / "train/c/gone.png").symlink_to(tmp_path / "nowhere.png")
    images = open_images(root)
    assert images.targets.tolist() == [0, 0, 1, 1, 2, 2]
    with pytest.raises(UnreadableImage, match=r"train/c/gone.png: No such file or directory"):
        images.get(torch.tensor([0, 5]))


def test_unlabeled_pictures_in_folders_of_classes_have_a_truth(tmp_path):
    _write(tmp_path, "train/a/1.png", "train/b/1.png", "unlabeled/b/1.png", "unlabeled/b/2.png")
    assert open_images(tmp_path).targets.tolist() == [0, 1, 1, 1]
    _write(tmp_path, "unlabeled/x.png")
    assert open_images(tmp_path).targets.tolist() == [0, 1, -1, -1, -1]


def test_broken_pictures_are_named_when_they_are_read(tmp_path):
    _write(tmp_path, "a/0.png", "a/1.png", "a/2.png", "b/3.png", "b/4.png")
    (tmp_path / "a/0.png").write_bytes(b"")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "b/4.png")
    whole = (tmp_path / "b/4.png").read_bytes()
    (tmp_path / "b/4.png").write_bytes(whole[: len(whole) // 2])
    for images in (open_images(tmp_path, cache=False), open_images(tmp_path), open_images(tmp_path)):
        assert images.get(torch.tensor([1, 2, 3]))[:, 0, 0, 0].tolist() == [10, 20, 30]
        with pytest.raises(UnreadableImage, match=r"a/0.png: no picture that Pillow can read$") as raised:
            images.get(torch.tensor([1, 0, 4]))
        assert (raised.value.place, raised.value.description) == (0, str(tmp_path / "a/0.png"))
        with pytest.raises(UnreadableImage, match=r"b/4.png: .*truncated"):
            images.get(torch.tensor([4]))


def test_other_sizes_and_colours_can_be_asked_for(tmp_path):
    _write(tmp_path, "a/1.png", "b/1.png")
    assert open_images(tmp_path, image_size=224).image_shape == (1, 256, 256)
    assert open_images(tmp_path, image_size=16, mode="RGB").image_shape == (3, 16, 16)
    with pytest.raises(ValueError, match="image_size must be at least 1, got 0"):
        open_images(tmp_path, image_size=0)
    with pytest.raises(ValueError, match=r"mode must be L \(gray\) or RGB, got 'CMYK'"):
        open_images(tmp_path, mode="CMYK")


def test_pictures_alone(tmp_path):
    _write(tmp_path, "loose.png", "deep/er/1.png")
    images = open_pictures([tmp_path, tmp_path / "loose.png"], image_size=8)
    assert images.describe(2) == str(tmp_path / "loose.png")
    assert {part: places.tolist() for part, places in images.parts.items()} == {"unlabeled": [0, 1, 2]}
    assert _grays(images) == [10, 0, 0]
    with pytest.raises(DataError, match=r"gone.png: no such file or folder"):
        open_pictures([tmp_path / "gone.png"])


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ([], r"no images found, expected train/<class>/ or <class>/ with jpg, png"),
        (["train/a/x.txt"], r"train/a: class a has no pictures, expected jpg, png"),
        (["train/a/1.png", "train/loose.png"], r"train: loose.png: in no class's folder, expected train/<class>/"),
        (["loose.png"], r"loose.png: in no class's folder"),
        (["train/a/1.png", "test/b/1.png", "test/c/1.png"], r"test: b, c: no class of train, expected a$"),
        (["train/a/1.png", "val/1.png"], r"val: 1.png: in no class's folder, expected val/<class>/1.png"),
        (["train/a/1.png", "val/a/1.png", "valid/a/1.png"], "val and valid are one part, validation: expected one"),
        (["test/a/1.png"], "no images found, expected train/<class>/"),
    ],
)
def test_what_is_wrong_with_a_folder_is_named(tmp_path, paths, message):
    with pytest.raises(DataError, match=message):
        open_images(_write(tmp_path, *paths))
    assert not os.listdir(os.environ["FASTMETA_CACHE"])


def test_all_broken(tmp_path):
    _write(tmp_path, "a/1.png")
    (tmp_path / "a/1.png").write_bytes(b"GIF89a")
    with pytest.raises(DataError, match=r"none of 1 pictures can be read, the first is .*a/1.png: "):
        open_images(tmp_path)


def test_kinds_that_are_not_read_are_warned_of(tmp_path):
    with pytest.warns(UserWarning, match=r"a: 2 .heic files are not read, save them as jpg"):
        open_images(_write(tmp_path, "a/1.png", "a/2.HEIC", "a/3.heic"))


def test_a_path_that_is_nothing(tmp_path):
    with pytest.raises(DataError, match="nowhere: no such file or folder"):
        open_images(tmp_path / "nowhere")
    (tmp_path / "data.xyz").write_text("")
    with pytest.raises(DataError, match=r"data.xyz: must be a folder, or a .csv, .parquet, .npz or .tar file"):
        open_images(tmp_path / "data.xyz")
