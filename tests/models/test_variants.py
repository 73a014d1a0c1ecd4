"""What tells the nets of published codes apart, written out."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from fastmeta import capture_features
from fastmeta.models import TCDCN, ConvLarge, WideResNet, build_model


def unit(x, block, *, before):
    """A residual unit as Oliver et al. (2018) write it, in training mode; ``before``: the activation is shared."""

    def activated(x, norm):
        mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), unbiased=False, keepdim=True)
        x = (x - mean) / (variance + 1e-3).sqrt() * norm.weight.view(-1, 1, 1) + norm.bias.view(-1, 1, 1)
        return torch.where(x < 0, 0.1 * x, x)

    kept = x
    x = activated(x, block.norm1)
    if before:
        kept = x
    stride = block.conv1.stride
    x = functional.conv2d(x, block.conv1.weight, block.conv1.bias, stride, 1)
    x = functional.conv2d(activated(x, block.norm2), block.conv2.weight, block.conv2.bias, padding=1)
    if block.shortcut is not None:
        kept = functional.conv2d(kept, block.shortcut.weight, block.shortcut.bias, stride)
    return kept + x


@pytest.mark.parametrize("name", ["wrn-28-2", "wrn-28-2-l2i"])
def test_wide_residual_nets_of_oliver_and_of_learning_to_impute(name):
    model = build_model(name, num_classes=3, channels=3, image_size=8).double().net
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    images = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    x = functional.conv2d(images, model.stem.weight, model.stem.bias, padding=1)
    for number, block in enumerate(model.blocks):
        x = unit(x, block, before=number == 0)
    mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), unbiased=False, keepdim=True)
    x = (x - mean) / (variance + 1e-3).sqrt() * model.norm.weight.view(-1, 1, 1) + model.norm.bias.view(-1, 1, 1)
    x = torch.where(x < 0, 0.1 * x, x).mean((2, 3))
    assert torch.allclose(model(images), x @ model.fc.weight.T + model.fc.bias)
    assert (model.stem.bias is not None) == name.endswith("l2i")
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert {(norm.momentum, norm.eps) for norm in norms} == {(0.001, 0.001)}


def test_the_default_shares_every_activation():
    torch.manual_seed(0)
    mine, other = WideResNet(3, depth=10), WideResNet(3, depth=10, shared="first")
    other.load_state_dict(mine.state_dict())
    images = torch.rand(4, 3, 8, 8)
    assert not torch.allclose(mine(images), other(images))


def test_noise_of_conv_large_is_there_in_training_alone():
    model = ConvLarge(3, dropout=0.0, noise=0.15)
    seen = []
    model.body.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    images = torch.zeros(8, 3, 32, 32)
    model(images)
    assert seen[0].std().item() == pytest.approx(0.15, rel=0.05)
    assert abs(seen[0].mean().item()) < 0.01
    model.eval()(images)
    assert seen[1].equal(images)


def test_dropout_of_conv_large_by_channels_or_by_values():
    for name, kind in (("conv-large", nn.Dropout2d), ("conv-large-noise", nn.Dropout)):
        model = build_model(name, num_classes=3, channels=3, image_size=32)
        dropped = [module for module in model.modules() if isinstance(module, nn.Dropout | nn.Dropout2d)]
        assert [type(module) for module in dropped] == [kind] * 2
        assert {module.p for module in dropped} == {0.5}


def test_a_normalization_of_the_logits_is_no_last_layer():
    torch.manual_seed(0)
    model = ConvLarge(3, dropout=0.0, top_norm=True)
    with capture_features(model) as tape:
        logits = model(torch.rand(6, 3, 12, 12))
    assert torch.allclose(logits.mean(0), torch.zeros(3), atol=1e-5)
    assert torch.allclose(logits.var(0, unbiased=False), torch.ones(3), atol=0.1)
    with pytest.raises(RuntimeError):
        tape.outputs(logits)


def test_landmark_net_written_out():
    torch.manual_seed(0)
    model = TCDCN().double()
    *kernels, body, shift, head, bias = model.parameters()
    x = torch.rand(2, 1, 60, 60, dtype=torch.float64)
    images = x
    for layer in range(4):
        x = functional.conv2d(x, kernels[2 * layer], kernels[2 * layer + 1]).clamp(-1, 1)
        x = functional.max_pool2d(x, 2) if layer < 3 else x
    assert torch.allclose(model(images), (x.flatten(1) @ body.T + shift) @ head.T + bias)
    with pytest.raises(ValueError, match="image_size must be at least 44 for tcdcn, got 43"):
        TCDCN(image_size=43)
    assert TCDCN(image_size=44)(torch.zeros(1, 1, 44, 44)).shape == (1, 10)
