import sys

import pytest
import torch
from picture_folders import write_digits

from fastmeta.data import DataError, ImageDataset, load_digits, make_split, open_images, record, save_images


def test_digits_by_name():
    assert open_images("digits").get(torch.arange(1797)).equal(load_digits().images)
    larger = open_images("digits", image_size=16)
    assert larger.image_shape == (1, 16, 16)
    assert larger.targets.equal(load_digits().targets)


@pytest.mark.parametrize("path", [".", "../data", "~/data", "{root}/data/"])
def test_a_path_in_every_form_is_the_same_data(tmp_path, monkeypatch, path):
    root = write_digits(tmp_path / "data", train=2, test=1)
    expected = open_images(root)
    monkeypatch.chdir(root)
    monkeypatch.setenv("HOME", str(tmp_path))
    images = open_images(path.format(root=tmp_path))
    assert (images.name, images.fingerprint) == ("data", expected.fingerprint)
    places = torch.arange(len(images))
    assert images.get(places).equal(expected.get(places))


def test_the_record_knows_moved_data_and_not_changed_data(tmp_path):
    def written(root):
        images = open_images(root)
        return record(images, make_split(images, labels_per_class=1, seed=0))["fingerprint"]

    root = write_digits(tmp_path / "data", train=2, test=1)
    before = written(root)
    moved = root.rename(tmp_path / "elsewhere")
    assert written(moved) == before
    (moved / "train/0/0000.png").rename(moved / "train/1/0000.png")
    assert written(moved) != before


def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch):
    for module in ("pyarrow", "pyarrow.parquet", "datasets"):
        monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / "a.parquet").touch()
    with pytest.raises(DataError, match="parquet files are read with pyarrow: pip install pyarrow"):
        open_images(tmp_path / "a.parquet")
    with pytest.raises(ImportError, match="data sets of the hub are read with datasets: pip install datasets"):
        open_images("huggingface:cifar10")


def test_labels_out_of_range_are_named(tmp_path):
    two = ImageDataset("two", torch.zeros(2, 1, 8, 8), torch.tensor([0, -1]), 1)
    two.targets[1] = -2
    save_images(two, tmp_path / "two")
    with pytest.raises(DataError, match=r"two\[1\]: label -2 is no class, expected 0 to 0, or -1 for none"):
        open_images(tmp_path / "two")
