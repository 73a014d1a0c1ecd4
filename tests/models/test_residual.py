"""The nets for photographs, against their definitions written out from the bare state dict."""

import pytest
import torch
from torch.nn import functional

from fastmeta import capture_features
from fastmeta.models import MobileNetV2, ResNet, ResNet26


class Written:
    """Convolutions and normalizations by the names of a state dict, with running statistics."""

    def __init__(self, model):
        generator = torch.Generator().manual_seed(0)
        self.state = {
            # statistics and scales that are not the identity
            name: value + 0.2 * torch.rand(value.shape, generator=generator).to(value.dtype)
            if value.is_floating_point()
            else value
            for name, value in model.double().state_dict().items()
        }
        model.load_state_dict(self.state)

    def convolved(self, x, name, stride=1, groups=1):
        weight = self.state[f"{name}.weight"]
        return functional.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2, groups=groups)

    def normed(self, x, name):
        scale, shift, mean, variance = (
            self.state[f"{name}.{part}"].view(-1, 1, 1) for part in ("weight", "bias", "running_mean", "running_var")
        )
        return (x - mean) / (variance + 1e-5).sqrt() * scale + shift

    def linear(self, x, name):
        return x.flatten(2).mean(2) @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]


def resnet(net, x, blocks, strided):
    """He et al. (2016), Table 1; ``strided`` is the number of the convolution that halves the image."""
    x = net.normed(net.convolved(x, "conv1", stride=2), "bn1").relu()
    x = functional.max_pool2d(x, 3, 2, 1)
    for group, count in enumerate(blocks, start=1):
        for place in range(count):
            name, stride = f"layer{group}.{place}", 2 if group > 1 and place == 0 else 1
            y = x
            last = 3 if f"{name}.conv3.weight" in net.state else 2
            for number in range(1, last + 1):
                y = net.convolved(y, f"{name}.conv{number}", stride if number == strided else 1)
                y = net.normed(y, f"{name}.bn{number}")
                y = y.relu() if number < last else y
            if f"{name}.downsample.0.weight" in net.state:
                x = net.normed(net.convolved(x, f"{name}.downsample.0", stride), f"{name}.downsample.1")
            x = (x + y).relu()
    return net.linear(x, "fc")


def resnet26(net, x):
    """Rebuffi et al. (2017): shortcuts of averages and zeros."""
    x = net.normed(net.convolved(x, "stem"), "norm")
    for place in range(12):
        name, stride = f"blocks.{place}", 2 if place % 4 == 0 else 1
        y = net.normed(net.convolved(x, f"{name}.conv1", stride), f"{name}.norm1").relu()
        y = net.normed(net.convolved(y, f"{name}.conv2"), f"{name}.norm2")
        if stride == 2:
            averages = (x[:, :, ::2, ::2] + x[:, :, 1::2, ::2] + x[:, :, ::2, 1::2] + x[:, :, 1::2, 1::2]) / 4
            y[:, : x.shape[1]] += averages
            x = y.relu()
        else:
            x = (x + y).relu()
    return net.linear(net.normed(x, "last_norm").relu(), "fc")


def mobilenet_v2(net, x):
    """Sandler et al. (2018), Table 2."""

    def layer(x, name, **how):
        return net.normed(net.convolved(x, f"{name}.0", **how), f"{name}.1").clamp(0, 6)

    x, number = layer(x, "features.0", stride=2), 0
    for count, stride in ((1, 1), (2, 2), (3, 2), (4, 2), (3, 1), (3, 2), (1, 1)):
        for place in range(count):
            number += 1
            name, y = f"features.{number}.conv", x
            first = 0 if number == 1 else 1
            if first:
                y = layer(y, f"{name}.0")
            y = layer(y, f"{name}.{first}", stride=1 if place else stride, groups=y.shape[1])
            y = net.normed(net.convolved(y, f"{name}.{first + 1}"), f"{name}.{first + 2}")
            x = x + y if place else y
    return net.linear(layer(x, "features.18"), "classifier.1")


@pytest.mark.parametrize(
    ("make", "definition"),
    [
        (lambda: ResNet(7, depth=18, channels=2), lambda net, x: resnet(net, x, (2, 2, 2, 2), strided=1)),
        (lambda: ResNet(7, depth=50, channels=2), lambda net, x: resnet(net, x, (3, 4, 6, 3), strided=2)),
        (lambda: ResNet26(7, channels=2), resnet26),
        (lambda: MobileNetV2(7, channels=2), mobilenet_v2),
    ],
    ids=["ResNet-18", "ResNet-50", "ResNet-26", "MobileNetV2"],
)
def test_the_net_is_its_definition(make, definition):
    model = make().eval()
    net = Written(model)
    images = torch.rand(2, 2, 40, 48, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad(), capture_features(model) as tape:
        logits = model(images)
        assert torch.allclose(logits, definition(net, images), rtol=1e-9)
        last = model.to(memory_format=torch.channels_last)(images.contiguous(memory_format=torch.channels_last))
        assert torch.allclose(last, logits, rtol=1e-9)
    assert tape.calls[0][1] is logits


@pytest.mark.parametrize(
    ("make", "count"),
    [
        (lambda: ResNet(1000, depth=34), 21797672),
        (lambda: ResNet(1000, depth=50), 25557032),
        (lambda: ResNet(1000, depth=101), 44549160),
    ],
)
def test_parameters_are_as_many_as_published(make, count):
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in make().parameters()) == count


def test_resnet_26_takes_images_of_an_odd_size():
    assert ResNet26(10)(torch.zeros(2, 3, 33, 31)).shape == (2, 10)


def test_a_depth_that_is_none_is_refused():
    with pytest.raises(ValueError, match="depth must be one of 18, 34, 50, 101, got 26"):
        ResNet(10, depth=26)
