import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from fastmeta import capture_features
from fastmeta.models import ConvLarge

# Kernel size, padding and channels of each convolution, as Laine and Aila's Table 5 lists them; "pool" stands for 2x2
# max pooling followed by dropout.
TABLE = [*[(3, 1, 128)] * 3, "pool", *[(3, 1, 256)] * 3, "pool", (3, 0, 512), (1, 0, 256), (1, 0, 128)]


@pytest.fixture
def images(generator):
    torch.manual_seed(generator.initial_seed())  # models and dropout too

    def make(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return make


def written_out(model, x):
    """The net by its table, from the bare parameters, with the statistics of the batch."""
    parameters = iter(model.parameters())
    for layer in TABLE:
        if layer == "pool":
            x = functional.dropout2d(functional.max_pool2d(x, 2), 0.5)
            continue
        kernel, padding, channels = layer
        weight = next(parameters)
        assert weight.shape[0] == channels
        assert weight.shape[2:] == (kernel, kernel)
        x = functional.conv2d(x, weight, padding=padding)
        mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), unbiased=False, keepdim=True)
        scale, shift = next(parameters), next(parameters)
        x = (x - mean) / (variance + 1e-5).sqrt() * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)
        x = torch.where(x > 0, x, 0.1 * x)
    weight, bias = parameters
    return x.flatten(2).mean(2) @ weight.T + bias


def test_conv_large_is_the_table_of_the_paper(images):
    model = ConvLarge(7, channels=2).double()
    for parameter in model.parameters():  # norms that are not the identity
        parameter.data.add_(0.05 * images(*parameter.shape))
    batch = images(3, 2, 17, 12)
    state = torch.get_rng_state()
    expected = written_out(model, batch)
    torch.set_rng_state(state)
    assert torch.allclose(model(batch), expected, rtol=1e-9)


def test_conv_large_drops_whole_channels_in_two_places_in_training_only(images):
    model = ConvLarge(10).double()
    seen = []
    for layer in model.modules():
        if isinstance(layer, nn.Dropout2d):
            layer.register_forward_hook(lambda layer, args, output: seen.append((args[0], output)))
    model(images(4, 3, 32, 32))
    for (before, after), size in zip(seen, (16, 8), strict=True):
        assert before.shape[2:] == (size, size)
        alive = after.flatten(2).any(2)
        assert 0.35 < alive.double().mean() < 0.65  # of 512 or more
        kept = alive[:, :, None, None].expand_as(after)
        assert torch.allclose(after[kept], 2 * before[kept])
    seen.clear()
    model.eval()
    model(images(4, 3, 32, 32))
    assert all(before.equal(after) for before, after in seen)
    assert len(seen) == 2


def test_conv_large_in_channels_last_is_the_same_net(images):
    model = ConvLarge(10, dropout=0.0).double()
    other = copy.deepcopy(model).to(memory_format=torch.channels_last)
    batch = images(4, 3, 32, 32)
    inputs = batch.contiguous(memory_format=torch.channels_last)
    assert other.body(inputs).is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(other(inputs), model(batch), rtol=1e-9)
    slopes = torch.autograd.grad(other(inputs).square().sum(), list(other.parameters()))
    assert all(bool(slope.isfinite().all()) and bool(slope.any()) for slope in slopes)


def test_conv_large_ends_in_fc_behind_128_features(images):
    model = ConvLarge(10).double()
    with capture_features(model.fc) as tape:
        logits = model(images(2, 3, 32, 32))
    assert tape.outputs(logits).features.shape == (2, 128)
    assert logits.shape == (2, 10)


def test_conv_large_in_forward_mode_is_what_differentiating_twice_gives(images):
    # the activations are in place
    model = ConvLarge(3, dropout=0.0).double()
    batch = images(2, 3, 12, 12)
    parameters = {name: parameter.detach().requires_grad_() for name, parameter in model.named_parameters()}
    direction = {name: images(*parameter.shape) for name, parameter in parameters.items()}

    def logits(parameters):
        return torch.func.functional_call(copy.deepcopy(model), parameters, batch)

    _, tangent = torch.func.jvp(logits, (parameters,), (direction,))
    cotangent = torch.zeros_like(tangent, requires_grad=True)
    pulled = torch.autograd.grad(logits(parameters), list(parameters.values()), cotangent, create_graph=True)
    dot = sum((g * d).sum() for g, d in zip(pulled, direction.values(), strict=True))
    assert torch.allclose(tangent, torch.autograd.grad(dot, cotangent)[0], rtol=1e-9)


def test_conv_large_refuses_images_that_the_poolings_use_up(images):
    model = ConvLarge(10).double()
    assert model(images(2, 3, 12, 13)).shape == (2, 10)
    with pytest.raises(ValueError, match="images must have at least 12 x 12 pixels, got 32 x 11"):
        model(images(2, 3, 32, 11))
