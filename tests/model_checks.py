"""What the tests of whole-model derivatives compare with, and the state that no evaluation may change."""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from whole_model_nets import normal

import fastmeta

WAYS = ("jvp", "double_backward", "finite_difference", "forward_difference")
EXACT = ("jvp", "double_backward")


def direction_of(model, generator, *, names=None):
    return {
        name: torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p)
        for name, p in model.named_parameters()
        if p.requires_grad and (names is None or name in names)
    }


def everything_about(model):
    """Whatever an evaluation must leave alone."""
    values = [*model.parameters(), *model.buffers()]
    return {
        "values": [value.detach().clone() for value in values],
        "tensors": [id(value) for value in values],
        "versions": [value._version for value in values],
        "requires_grad": [value.requires_grad for value in values],
        "grads": [(id(p.grad), None if p.grad is None else p.grad.clone()) for p in model.parameters()],
        "modes": [module.training for module in model.modules()],
        "random": torch.get_rng_state(),
        "settings": (
            torch.is_grad_enabled(),
            torch.is_autocast_cache_enabled(),
            torch.backends.mha.get_fastpath_enabled(),
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.mkldnn.enabled,
        ),
    }


def assert_same_state(before, after):
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=0, atol=0, msg=lambda m, name=name: f"{name}: {m}")


def double(model, generator):
    """In float64, with parameters and running statistics from the generator."""
    model = model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            centre = 1.0 if parameter.dim() == 1 else 0.0
            parameter.copy_(centre + 0.4 * normal(generator, *parameter.shape))
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.copy_(normal(generator, *buffer.shape).abs() + 0.5)
    return model


def by_definition(model, inputs, v, loss="mse"):
    """``2 D_v f`` by differentiating twice, with nothing of fastmeta in it. Leaves the buffers alone."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    theta = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters() if p.requires_grad}
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        f = torch.func.functional_call(model, {**theta, **buffers}, (inputs,))
        cotangent = torch.zeros_like(f, requires_grad=True)
        grads = torch.autograd.grad(
            f, [theta[name] for name in v], cotangent, create_graph=True, materialize_grads=True
        )
        slope = sum((grad * v[name]).sum() for grad, name in zip(grads, v, strict=True))
        return 2 * torch.autograd.grad(slope, cotangent)[0]


def check_ways(model, inputs, v, ways=WAYS, radius=1e-6):
    """All ways against the definition, and no trace of any."""
    expected = by_definition(model, inputs, v)
    assert expected.abs().max() > 1e-6
    before = everything_about(model)
    for how in ways:
        got = fastmeta.label_gradient(model, inputs, v, loss="mse", how=how, radius=radius)
        bound = 1e-9 if how in EXACT else 1e-4
        assert (got - expected).norm() <= bound * expected.norm(), how
        assert_same_state(before, everything_about(model))
