import io
import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from fastmeta.data import DataError, UnreadableImage, open_images
from fastmeta.data.readers.parquet import OpenRow

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


def _png(value):
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def _write(path, values, labels, *, image="image", label="label", names=("cat", "dog"), **options):
    """Pictures of these grays in the hub's schema, two rows a group."""
    table = pyarrow.table(
        {image: [{"bytes": None if v is None else _png(v), "path": None} for v in values], label: labels}
    )
    if names:
        features = {image: {"_type": "Image"}, label: {"names": list(names), "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, path, row_group_size=2, **options)
    return path


def test_shards_of_the_hub(tmp_path):
    _write(tmp_path / "data/train-00000-of-00002.parquet", [1, 2, 3], [0, 1, 0], image="img")
    _write(tmp_path / "data/train-00001-of-00002.parquet", [4], [1], image="img")
    _write(tmp_path / "data/test-00000-of-00001.parquet", [5, 6, 7], [1, 1, None], image="img")
    with pytest.raises(DataError, match=r"test-00000-of-00001.parquet\[2\]: a test image has no label \(1 of 3"):
        open_images(tmp_path)
    _write(tmp_path / "data/test-00000-of-00001.parquet", [5, 6], [1, 1], image="img")
    images = open_images(tmp_path, cache=False)
    assert images.classes == ("cat", "dog")
    assert images.image_shape == (3, 8, 8)
    assert {part: places.tolist() for part, places in images.parts.items()} == {"train": [2, 3, 4, 5], "test": [0, 1]}
    assert images.targets.tolist() == [1, 1, 0, 1, 0, 1]
    order = torch.tensor([5, 0, 3, 4, 1, 2])
    for copy in (images, pickle.loads(pickle.dumps(images))):
        assert copy.get(order)[:, 0, 0, 0].tolist() == [4, 5, 2, 3, 6, 1]
    assert images.describe(4) == str(tmp_path / "data/train-00000-of-00002.parquet[2]")


def test_folders_and_files_name_parts(tmp_path):
    _write(tmp_path / "default/train/0000.parquet", [1, 2], [0, 1])
    _write(tmp_path / "default/validation/0000.parquet", [3], [0])
    assert set(open_images(tmp_path, cache=False).parts) == {"train", "validation"}
    alone = open_images(_write(tmp_path / "mine.parquet", [1, 2], ["b", "a"], names=None), cache=False)
    assert (alone.classes, alone.targets.tolist()) == (("a", "b"), [1, 0])
    _write(tmp_path / "svhn/extra-0.parquet", [1], [0])
    _write(tmp_path / "svhn/train-0.parquet", [1], [0])
    assert set(open_images(tmp_path / "svhn", cache=False).parts) == {"train", "unlabeled"}
    _write(tmp_path / "svhn/more-0.parquet", [1], [0])
    with pytest.warns(UserWarning, match="more-0.parquet: left out, the names begin with no part"):
        assert len(open_images(tmp_path / "svhn", cache=False)) == 2


def test_labels_that_the_hub_withholds(tmp_path):
    _write(tmp_path / "train-0.parquet", [1, 2], [0, 1])
    _write(tmp_path / "test-0.parquet", [3, 4], [-1, -1])
    with pytest.warns(UserWarning, match="the test part has no labels and is left out"):
        assert set(open_images(tmp_path, cache=False).parts) == {"train"}


def test_a_row_without_a_picture(tmp_path):
    images = open_images(_write(tmp_path / "train.parquet", [1, None, 3], [0, 1, 1]))
    assert images.get(torch.tensor([0, 2]))[:, 0, 0, 0].tolist() == [1, 3]
    with pytest.raises(UnreadableImage, match=r"train.parquet\[1\]: there is no picture in this row"):
        images.get(torch.tensor([1]))


def test_large_pictures_are_unpacked_once(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTMETA_CACHE", str(tmp_path / "cache"))
    path = _write(tmp_path / "train.parquet", [1, 2, None, 4], [0, 1, 0, 1])
    before = open_images(path, image_size=112, cache=False)
    open_images(path, image_size=112, mode="RGB", cache_gigabytes=0)
    monkeypatch.setattr(OpenRow, "content", lambda *_: pytest.fail("read again"))
    after = open_images(path, image_size=112, mode="RGB", cache_gigabytes=0)
    monkeypatch.undo()
    order = torch.tensor([3, 0, 1])
    for copy in (after, pickle.loads(pickle.dumps(after))):
        assert copy.get(order).equal(before.get(order))
    with pytest.raises(UnreadableImage, match=r"train.parquet\[2\]: there is no picture in this row"):
        after.get(torch.tensor([2]))


def test_what_is_wrong_is_named(tmp_path):
    with pytest.raises(DataError, match=r"expected the columns image or img, and label, got picture_bytes, label"):
        open_images(_write(tmp_path / "a.parquet", [1], [0], image="picture_bytes"))
    with pytest.raises(DataError, match=r"b.parquet\[1\]: label 7 is no class, expected 0 to 1"):
        open_images(_write(tmp_path / "b.parquet", [1, 2], [0, 7]))
    with pytest.raises(DataError, match=r"column label must hold whole numbers or names, got \[0, 1\]"):
        open_images(_write(tmp_path / "d.parquet", [1], [[0, 1]], names=None))
    (tmp_path / "c.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"c.parquet: must be a whole parquet file"):
        open_images(tmp_path / "c.parquet")
