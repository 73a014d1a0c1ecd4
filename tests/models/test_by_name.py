import json
import sys

import pytest
import torch
from torch import nn

from fastmeta import capture_features
from fastmeta.models import (
    NETS,
    WITHOUT_LAST_LAYER,
    ConvNet,
    Normalized,
    ResNet26,
    UnknownModel,
    WideResNet,
    automatic_model,
    build_model,
)

SMALL = {"num_classes": 5, "channels": 3, "image_size": 32}


def images(count=2, channels=3, size=32):
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", [name for name in NETS if name not in WITHOUT_LAST_LAYER])
def test_each_net_gives_logits_by_its_last_linear_layer(name):
    size = 60 if name == "tcdcn" else 32
    for channels in (1, 3):
        with torch.device("meta"):  # shapes alone: some nets are large
            model = build_model(name, num_classes=5, channels=channels, image_size=size).eval()
            inputs = torch.empty(2, channels, size, size)
        with torch.no_grad(), capture_features(model) as tape:
            logits = model(inputs)
        assert logits.shape == (2, 5)
        assert tape.calls[-1][1] is logits


def test_auto_goes_by_the_size_of_the_images():
    names = ["conv-net", "wide-resnet-28-2", "resnet-26", "resnet-18"]
    assert [automatic_model(size) for size in (16, 17, 49, 97)] == names
    assert isinstance(build_model("auto", num_classes=10, channels=1, image_size=8), ConvNet)


def test_the_input_is_normalized_inside():
    model = build_model("wide-resnet-28-2", **SMALL).eval()
    assert torch.allclose(model(images()), model.net(2 * images() - 1), atol=1e-6)
    model = build_model("resnet-18", **SMALL).eval()
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    normalized = (images() - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    assert torch.allclose(model(images()), model.net(normalized), atol=1e-6)
    assert not {"mean", "std"} & {name for name, _ in model.named_parameters()}


def test_weights_of_a_net_or_of_a_model_around_it_are_put_in(tmp_path):
    model = build_model("resnet-26", **SMALL).eval()
    model.mean.fill_(0.25)  # comes with the weights of a model
    expected = model(images())
    written = {
        "model.pt": model.state_dict(),
        "module.pt": {"state_dict": {f"module.{key}": value for key, value in model.state_dict().items()}},
        "net.pt": {"epoch": 3, "model": model.net.state_dict()},
    }
    for name, state in written.items():
        torch.save(state, tmp_path / name)
        loaded = build_model("resnet-26", **SMALL, pretrained=str(tmp_path / name)).eval()
        if name == "net.pt":
            loaded.mean.fill_(0.25)
        assert loaded(images()).equal(expected), name


def test_a_last_layer_of_other_classes_stays_new(tmp_path):
    torch.manual_seed(0)
    held = ResNet26(9)
    torch.save(held.state_dict(), tmp_path / "weights.pt")
    model = build_model("resnet-26", **SMALL, pretrained=str(tmp_path / "weights.pt"))
    assert model.net.fc.weight.shape == (5, 256)
    assert model.net.blocks[11].conv2.weight.equal(held.blocks[11].conv2.weight)
    same = build_model("resnet-26", num_classes=9, channels=3, image_size=32, pretrained=str(tmp_path / "weights.pt"))
    assert same.net.fc.weight.equal(held.fc.weight)


def test_gray_images_go_to_all_three_channels_of_pretrained_weights(tmp_path):
    for channels in (1, 3):
        torch.save(ResNet26(5, channels=channels).state_dict(), tmp_path / f"{channels}.pt")
        model = build_model(
            "resnet-26", num_classes=5, channels=1, image_size=32, pretrained=str(tmp_path / f"{channels}.pt")
        ).eval()
        gray = images(channels=1)
        assert model.net.stem.weight.shape[1] == channels
        assert model(gray).shape == (2, 5)
        if channels == 3:
            assert model(gray).equal(model(gray.expand(-1, 3, -1, -1)))


def test_weights_that_do_not_fit_are_named_and_nothing_is_loaded(tmp_path):
    state = WideResNet(5).state_dict()
    state["stem.weight"] = state["stem.weight"][:, :1]
    state["extra"] = state.pop("norm.bias")
    torch.save(state, tmp_path / "weights.pt")
    expected = (
        r"weights.pt does not fit the net: net.stem.weight is \[16, 1, 3, 3\] and not \[16, 3, 3, 3\]; "
        "without net.norm.bias; left over are net.extra"
    )
    with pytest.raises(ValueError, match=expected):
        build_model("wide-resnet-28-2", **SMALL, pretrained=str(tmp_path / "weights.pt"))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "is damaged|is no such file"),
        (b"not weights", "is no such file"),
        ({"step": 3}, "got .*weights.pt with step: int"),
        ([torch.zeros(2)], "got .*weights.pt with list"),
        ({"a": sys}, "is no such file, or holds objects that are no tensors"),
        (None, "no such file"),
    ],
)
def test_what_is_no_file_of_weights_is_refused(tmp_path, content, expected):
    path = tmp_path / "weights.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, dict) and content.get("a") is sys:
        torch.save({"a": nn.Linear(2, 2)}, path)  # a pickled object
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(ValueError, match=expected):
        build_model("conv-net", **SMALL, pretrained=str(path))


def test_a_torn_file_is_refused(tmp_path):
    path = tmp_path / "weights.pt"
    torch.save(ConvNet(3, 5).state_dict(), path)
    path.write_bytes(path.read_bytes()[:20000])
    with pytest.raises(ValueError, match="it is damaged or cannot be read"):
        build_model("conv-net", **SMALL, pretrained=str(path))


def test_the_folder_of_a_run_is_a_model(tmp_path):
    model = build_model("wide-resnet-28-2", **SMALL).eval()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"must hold a run's config.json beside model.pt"):
        build_model(str(tmp_path), **SMALL)
    (tmp_path / "config.json").write_text(json.dumps({"model": "wide-resnet-28-2"}))
    assert build_model(str(tmp_path), **SMALL).eval()(images()).equal(model(images()))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet18", "got 'resnet18', which is none: did you mean resnet-18,"),
        ("zzz", "model must name a net, got 'zzz', which is none$"),
        ("keras:vgg", "got 'keras:vgg', which is none"),
        ("torchvision:", "got 'torchvision:', which is none"),
        ("README.md", "got a file; give --model NAME --pretrained README.md"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(name, expected):
    with pytest.raises(UnknownModel, match=expected):
        build_model(name, **SMALL)


@pytest.mark.parametrize("package", ["torchvision", "timm", "transformers"])
def test_a_missing_package_is_named(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UnknownModel, match=f"needs the package {package}: pip install {package}"):
        build_model(f"{package}:resnet18", **SMALL)


@pytest.mark.parametrize("argument", ["num_classes", "channels", "image_size"])
def test_a_size_of_nothing_is_refused(argument):
    with pytest.raises(ValueError, match=f"{argument} must be at least 1, got 0"):
        build_model("conv-net", **{**SMALL, argument: 0})


def test_default_weights_are_those_of_libraries_only():
    with pytest.raises(ValueError, match="pretrained must be a file for our conv-net, got 'default'"):
        build_model("conv-net", **SMALL, pretrained="default")


def test_normalized_is_moved_with_its_model():
    model = Normalized(nn.Identity(), (0.5,), (0.25,)).double()
    assert model(torch.ones(1, 1, 1, 1, dtype=torch.float64)).item() == 2
    assert set(model.state_dict()) == {"mean", "std"}
