"""Parameter counts of the nets, from the tables in which they were published."""

import itertools

import pytest
import torch
from torch import nn

from fastmeta.models import MLP, NETS, build_model


def convolutions(*layers, bias=False):
    """``(inputs, outputs, side of the kernel)``, or with a stride of no matter here."""
    return sum(inputs * outputs * side**2 + bias * outputs for inputs, outputs, side in layers)


def wrn_28_2(classes, *, bias):
    """A stem to 16 channels; 3 groups of 4 blocks of two 3x3 convolutions; a 1x1 where the width changes."""
    widths = [16, 32, 64, 128]
    layers, norms = [(3, 16, 3)], 0
    for inputs, width in itertools.pairwise(widths):
        layers += [(inputs, width, 3), *[(width, width, 3)] * 7, (inputs, width, 1)]
        norms += inputs + 7 * width  # before each of the eight 3x3 convolutions
    return convolutions(*layers, bias=bias) + 2 * (norms + 128) + 128 * classes + classes


THIRTEEN = [(3, 128, 3), *[(128, 128, 3)] * 2, (128, 256, 3), *[(256, 256, 3)] * 2]
THIRTEEN += [(256, 512, 3), (512, 256, 1), (256, 128, 1)]  # Laine and Aila (2017), Table 5
CONV_LARGE = convolutions(*THIRTEEN) + 2 * sum(width for _, width, _ in THIRTEEN) + 128 * 10 + 10

COUNTS = {
    # Oliver et al. (2018), Section 4.1: "1.5M parameters"
    "wrn-28-2": wrn_28_2(10, bias=False),
    "wide-resnet-28-2": 1_467_610,  # the same layers
    "wrn-28-2-l2i": wrn_28_2(10, bias=True),
    "conv-large": CONV_LARGE,  # "about 3.1 million": Athiwaratkun et al. (2019), Section 5
    "conv-large-noise": CONV_LARGE,
    "conv-large-top-norm": CONV_LARGE + 2 * 10,
    "resnet-18": 11_689_512 - 990 * 513,  # torchvision's, of 1,000 classes
    "resnet-50": 25_557_032 - 990 * 2049,
    # Rebuffi et al. (2017): a stem to 32, then 4 blocks each of 64, 128 and 256 channels, shortcuts without parameters
    "resnet-26": convolutions(
        (3, 32, 3), (32, 64, 3), *[(64, 64, 3)] * 7, (64, 128, 3), *[(128, 128, 3)] * 7, (128, 256, 3)
    )
    + convolutions(*[(256, 256, 3)] * 7)
    + 2 * (32 + 8 * (64 + 128 + 256) + 256)
    + 256 * 10
    + 10,
    # 60 -5-> 56 -pool-> 28 -5-> 24 -> 12 -3-> 10 -> 5 -3-> 3, so 80 * 9 features
    "tcdcn": convolutions((3, 20, 5), (20, 48, 5), (48, 64, 3), (64, 80, 3), bias=True) + 720 * 256 + 256 + 2570,
    "mlp": (3 * 60 * 60 + 1) * 128 + 2 * 129 * 128 + 129 * 10,
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameters(name):
    with torch.device("meta"):
        model = build_model(name, num_classes=10, channels=3, image_size=60)
    assert sum(parameter.numel() for parameter in model.parameters()) == COUNTS[name]


def test_counts_that_papers_print():
    assert COUNTS["wrn-28-2"] == COUNTS["wide-resnet-28-2"] == 1_467_610
    assert COUNTS["wrn-28-2-l2i"] - COUNTS["wrn-28-2"] == 16 + 9 * 32 + 9 * 64 + 9 * 128
    assert COUNTS["conv-large"] == 3_121_802
    with torch.device("meta"):
        landmarks = build_model("tcdcn", num_classes=10, channels=1, image_size=60)
    assert sum(parameter.numel() for parameter in landmarks.parameters()) == 285_586


def test_nets_of_the_synthetic_problems():
    circles = MLP(2, 2, [100])
    assert [tuple(parameter.shape) for parameter in circles.parameters()] == [(100, 2), (100,), (2, 100), (2,)]
    assert sum(isinstance(module, nn.Linear) for module in MLP(50, 5, [128] * 3).modules()) == 4
    x = torch.randn(3, 2)
    first, bias, second, shift = circles.parameters()
    assert torch.allclose(circles(x), (x @ first.T + bias).clamp(min=0) @ second.T + shift)


def test_all_nets_of_the_papers_have_a_name():
    assert {*COUNTS, "linear", "conv-net", "wide-resnet-28-8", "resnet-34", "resnet-101", "mobilenet-v2"} <= NETS.keys()
