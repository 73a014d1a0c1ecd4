"""Nets of other libraries, where these are installed."""

import pytest
import torch
from torch import nn

from fastmeta import capture_features
from fastmeta.models import MobileNetV2, ResNet, UnknownModel, build_model
from fastmeta.models.libraries import LIBRARIES, LibraryNet

SIZES = {"num_classes": 4, "channels": 3, "image_size": 64}


def gives_logits(model, channels=3, size=64):
    model.eval()
    with torch.no_grad(), capture_features(model) as tape:
        logits = model(torch.rand(2, channels, size, size))
    return logits.shape == (2, 4) and tape.calls[-1][1].equal(logits)


def stand_in(monkeypatch, net):
    """A library whose nets are ``net``."""
    made = LibraryNet(net, ((0.5,), (0.25,)), None)
    monkeypatch.setitem(LIBRARIES, "library", lambda name, classes, size, own: made)


def test_a_net_of_elsewhere_is_normalized_and_left_in_its_mode(monkeypatch):
    net = nn.Sequential(nn.Flatten(), nn.Dropout(0.9), nn.Linear(3 * 64 * 64, 4))
    stand_in(monkeypatch, net)
    model = build_model("library:any", **SIZES)
    assert model.training
    images = torch.rand(2, 3, 64, 64)
    assert torch.allclose(model.eval()(images), net(4 * images - 2))


@pytest.mark.parametrize(
    ("net", "expected"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 64), nn.Flatten()), "by a last nn.Linear: module must be or contain"),
        (nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, 4), nn.Sigmoid()), "by a last nn.Linear$"),
        (nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, 5)), r"must give logits \[N, 4\] by a last nn.Linear$"),
        (nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4)), "cannot take images of 64 x 64 pixels: mat1 and mat2"),
    ],
)
def test_a_net_whose_last_linear_layer_does_not_give_its_logits_is_refused(monkeypatch, net, expected):
    stand_in(monkeypatch, net)
    with pytest.raises(ValueError, match=expected):
        build_model("library:any", **SIZES)


def test_what_a_library_raises_is_told(monkeypatch):
    def refuse(name, classes, size, own):
        raise AssertionError("Input shape indivisible by patch size!\nmore")

    monkeypatch.setitem(LIBRARIES, "library", refuse)
    with pytest.raises(ValueError, match=r"model library:any cannot be made: Input shape indivisible by patch size!$"):
        build_model("library:any", **SIZES)
    with pytest.raises(ValueError, match="channels must be 1 or 3 for model library:any, got 4"):
        build_model("library:any", num_classes=4, channels=4, image_size=64)


def test_torchvision_nets_and_weights_under_their_names():
    torchvision = pytest.importorskip("torchvision", exc_type=ImportError)
    assert gives_logits(build_model("torchvision:resnet18", num_classes=4, channels=1, image_size=64), channels=1)
    for ours, name in ((lambda: ResNet(4, depth=50), "resnet50"), (lambda: MobileNetV2(4), "mobilenet_v2")):
        theirs = torchvision.models.get_model(name, num_classes=4).eval()
        model = ours().eval()
        model.load_state_dict(theirs.state_dict())
        images = torch.rand(1, 3, 64, 64)
        assert torch.allclose(model(images), theirs(images), rtol=1e-4)
    with pytest.raises(UnknownModel, match="did you mean torchvision:resnet18,"):
        build_model("torchvision:resnet_18", **SIZES)
    with pytest.raises(ValueError, match="auxiliary logits"):
        build_model("torchvision:googlenet", **SIZES)


def test_timm_nets_of_a_fixed_size_are_made_for_the_images():
    pytest.importorskip("timm", exc_type=ImportError)
    model = build_model("timm:vit_tiny_patch16_224", **SIZES)
    assert gives_logits(model)
    assert model.mean.flatten().tolist() == [0.5, 0.5, 0.5]
    with pytest.raises(UnknownModel, match="did you mean timm:"):
        build_model("timm:vit_tinny", **SIZES)


def test_transformers_folders_are_loaded_with_their_weights(tmp_path):
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=4
    )
    net = transformers.ResNetForImageClassification(config).eval()
    net.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.5, 1.0]}')
    model = build_model(f"transformers:{tmp_path}", **SIZES)
    assert gives_logits(model)
    images = torch.rand(2, 3, 64, 64)
    normalized = (images - 0.5) / torch.tensor([0.25, 0.5, 1.0]).view(3, 1, 1)
    assert torch.allclose(model(images), net(pixel_values=normalized).logits, atol=1e-6)
    assert build_model(str(tmp_path), num_classes=6, channels=3, image_size=64)(images).shape == (2, 6)
    with pytest.raises(UnknownModel, match=r"transformers:.* cannot be loaded"):
        build_model(f"transformers:{tmp_path}/none", **SIZES)
