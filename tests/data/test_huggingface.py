import numpy as np
import pytest
import torch
from PIL import Image

from fastmeta.data import DataError, open_images

datasets = pytest.importorskip("datasets")


def test_a_saved_data_set(tmp_path):
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    splits = {"train": ([1, 2, 3], [0, 1, 1]), "test": ([4], [0]), "unsupervised": ([5], [-1]), "extra": ([6], [0])}
    made = {
        split: datasets.Dataset.from_dict(
            {"img": [Image.fromarray(np.full((8, 8), v, np.uint8)) for v in values], "label": labels}, features=features
        )
        for split, (values, labels) in splits.items()
    }
    datasets.DatasetDict(made).save_to_disk(tmp_path / "saved")
    images = open_images(f"huggingface:{tmp_path}/saved", cache=False)
    assert images.classes == ("cat", "dog")
    assert {part: len(places) for part, places in images.parts.items()} == {"train": 3, "unlabeled": 1, "test": 1}
    values = images.get(torch.arange(5))[:, 0, 0, 0]
    assert {part: values[places].tolist() for part, places in images.parts.items()} == {
        "train": [1, 2, 3],
        "unlabeled": [5],
        "test": [4],
    }
    assert images.targets[images.parts["train"]].tolist() == [0, 1, 1]


def test_what_cannot_be_loaded_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DataError, match=r"huggingface:.*/nothing: cannot be loaded: "):
        open_images(f"huggingface:{tmp_path}/nothing")
