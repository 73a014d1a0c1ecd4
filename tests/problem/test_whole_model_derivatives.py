"""``fastmeta.label_gradient`` and ``example_weight_gradient`` of whole models against plain autograd, in float64."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import torch
from brute_force import assert_close
from cases import Draw
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from whole_model_brute_force import (
    Bilevel,
    brute_force_directional,
    brute_force_directions,
    brute_force_label_gradient,
    brute_force_weight_gradient,
    flatten,
    forward,
    losses_of,
    trainable,
)
from whole_model_nets import NETS, Inputs, Net, net_cases

from fastmeta import example_weight_gradient, label_gradient
from fastmeta.derivatives import HOWS
from fastmeta.losses import LOSSES
from fastmeta.problem.model_function import ModelFunction

EXACT = ("double_backward", "jvp")
DIFFERENCES = {"finite_difference": 2, "forward_difference": 1}  # order of convergence in the radius
RADII = (8e-3, 4e-3, 2e-3, 1e-3)

nets = pytest.mark.parametrize("name", list(NETS))
modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
losses = pytest.mark.parametrize("loss", list(LOSSES))
exact = pytest.mark.parametrize("how", EXACT)
every_how = pytest.mark.parametrize("how", HOWS)


def make_net(draw: Draw, name: str, training: bool = True) -> Net:
    net = NETS[name](draw.generator)
    net.model.train(training)
    return net


def any_direction(draw: Draw, model: nn.Module, how: str = "jvp") -> dict[str, Tensor]:
    """Of every parameter, or of those that ``how`` can move."""
    names = [n for n in trainable(model) if how != "last_layer" or n.startswith("fc.")]
    return {n: draw.normal(*trainable(model)[n].shape) for n in names}


def label_pull(labels: Tensor, loss: str) -> Callable[[Tensor], Tensor]:
    """``-dl/dy``, whose derivative along v is the label tangent."""

    def pull(logits: Tensor) -> Tensor:
        y = labels.clone().requires_grad_()
        return -torch.autograd.grad(losses_of(logits, y, loss).sum(), y, create_graph=True)[0]

    return pull


@nets
@modes
@losses
@exact
def test_one_inner_step_differentiated_through(draw, name, training, loss, how):
    """The definition: dC^H(theta*)/dz and dC^H(theta*)/dw, with v the hold-out gradient at theta*."""
    model, make_inputs = make_net(draw, name, training)
    labels, inputs = draw.probabilities(5, 3), make_inputs(5)
    problem = Bilevel(model, inputs, labels, make_inputs(4), draw.classes(4, 3), loss=loss, rate=0.3)
    (direction,) = brute_force_directions(problem)
    by_labels = label_gradient(model, inputs, direction, loss=loss, scale=0.3 / 5, how=how, targets=labels)
    assert_close(by_labels, brute_force_label_gradient(problem))
    by_weights = example_weight_gradient(model, inputs, labels, direction, loss=loss, scale=0.3 / 5, how=how)
    assert_close(by_weights, brute_force_weight_gradient(problem))


@settings(max_examples=40, deadline=None)
@given(case=net_cases(), loss=st.sampled_from(list(LOSSES)), how=st.sampled_from(EXACT), some=st.booleans())
def test_any_shape_and_some_parameters(case, loss, how, some):
    """N = 1, one channel, one token, one unit; a parameter that the direction leaves out does not move."""
    draw = Draw(case.generator)
    direction = any_direction(draw, case.model)
    if some:
        direction = {name: v for name, v in direction.items() if draw.integer(0, 2)} or {
            "fc.bias": direction["fc.bias"]
        }
    count = len(forward(case.model, case.inputs))
    labels, classes = draw.probabilities(count, case.classes), draw.classes(count, case.classes)
    tangent = brute_force_directional(case.model, case.inputs, direction, label_pull(labels, loss))
    scale = float(1 + flatten(direction).norm())  # where nothing moves there is rounding to compare with
    got = label_gradient(case.model, case.inputs, direction, loss=loss, how=how, targets=labels)
    assert float((got - tangent).norm()) <= 1e-9 * float(tangent.norm()) + 1e-14 * scale
    for targets in (labels, classes):
        moved = brute_force_directional(case.model, case.inputs, direction, lambda f, y=targets: -losses_of(f, y, loss))
        got = example_weight_gradient(case.model, case.inputs, targets, direction, loss=loss, how=how)
        assert float((got - moved).norm()) <= 1e-9 * float(moved.norm()) + 1e-14 * scale


@nets
@modes
@pytest.mark.parametrize("parts", [("weight", "bias"), ("weight",), ("bias",)], ids="+".join)
def test_last_layer_alone(draw, name, training, parts):
    """The closed form of the last layer, where only it moves."""
    model, make_inputs = make_net(draw, name, training)
    inputs, labels = make_inputs(5), draw.probabilities(5, 3)
    direction = {f"fc.{part}": draw.normal(*getattr(model.fc, part).shape) for part in parts}
    for loss in LOSSES:
        tangent = brute_force_directional(model, inputs, direction, label_pull(labels, loss))
        moved = brute_force_directional(model, inputs, direction, lambda f, loss=loss: losses_of(f, labels, loss))
        for how in ("last_layer", *EXACT):
            got = label_gradient(model, inputs, direction, loss=loss, scale=2.0, how=how, targets=labels)
            assert_close(got, 2 * tangent)
            got = example_weight_gradient(model, inputs, labels, direction, loss=loss, scale=2.0, how=how)
            assert_close(got, -2 * moved)


def test_last_layer_refuses_what_it_cannot_move(draw):
    model, make_inputs = make_net(draw, "mlp")
    with pytest.raises(ValueError, match=r"direction must name the last layer's parameters .* got '0.weight'"):
        label_gradient(model, make_inputs(2), any_direction(draw, model), how="last_layer")


def order_of(errors: list[float]) -> float:
    """Slope of log(error) over log(radius), by least squares."""
    x, y = torch.tensor(RADII).double().log(), torch.tensor(errors).double().log()
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


@nets
@modes
@pytest.mark.parametrize("how", list(DIFFERENCES))
def test_order_of_convergence(draw, name, training, how):
    model, make_inputs = make_net(draw, name, training)
    inputs, labels = make_inputs(5), draw.probabilities(5, 3)
    direction = any_direction(draw, model)
    for loss in LOSSES.keys() - {"huber"}:  # a kink of it within the radius has no order
        functions: dict[str, tuple[Callable[[float], Tensor], Tensor]] = {
            "labels": (
                lambda radius, loss=loss: label_gradient(
                    model, inputs, direction, loss=loss, scale=0.5, how=how, radius=radius, targets=labels
                ),
                0.5 * brute_force_directional(model, inputs, direction, label_pull(labels, loss)),
            ),
            "weights": (
                lambda radius, loss=loss: example_weight_gradient(
                    model, inputs, labels, direction, loss=loss, scale=0.5, how=how, radius=radius
                ),
                -0.5
                * brute_force_directional(model, inputs, direction, lambda f, loss=loss: losses_of(f, labels, loss)),
            ),
        }
        for of, (probe, expected) in functions.items():
            errors = [float((probe(radius) - expected).norm() / expected.norm()) for radius in RADII]
            assert abs(order_of(errors) - DIFFERENCES[how]) < 0.03, (loss, of, errors)


def test_radius_is_the_length_of_the_perturbation(draw):
    """``(T(theta + eps v) - T(theta - eps v)) / 2 eps`` with ``eps = radius / ||v||``, however long v is."""
    model, make_inputs = make_net(draw, "conv")
    inputs, direction = make_inputs(4), any_direction(draw, model)
    epsilon = 0.4 / float(flatten(direction).norm())
    theta = trainable(model)
    pulls = {
        t: forward(model, inputs, {n: p + t * epsilon * direction[n] for n, p in theta.items()}).log_softmax(-1)
        for t in (-1, 0, 1)
    }
    for length in (1.0, 7.0):
        long = {name: length * v for name, v in direction.items()}
        got = label_gradient(model, inputs, long, how="finite_difference", radius=0.4)
        assert_close(got, length * (pulls[1] - pulls[-1]) / (2 * epsilon))
        got = label_gradient(model, inputs, long, how="forward_difference", radius=0.4)
        assert_close(got, length * (pulls[1] - pulls[0]) / epsilon)


class Trace:
    """Everything of a model that a call may not change, bit for bit and object for object."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._before = self._now()
        self._values = copy.deepcopy(self._before)

    def _now(self) -> dict[str, Any]:
        named = dict(self._model.named_parameters(remove_duplicate=False))
        tensors = named | dict(self._model.named_buffers(remove_duplicate=False))
        return {
            "tensors": tensors,
            "grad": {name: p.grad for name, p in named.items()},
            "requires_grad": {name: p.requires_grad for name, p in named.items()},
            "training": [module.training for module in self._model.modules()],
            "random": torch.get_rng_state(),
            "settings": (
                torch.is_grad_enabled(),
                torch.is_autocast_cache_enabled(),
                torch.backends.mha.get_fastpath_enabled(),
                torch.backends.cuda.flash_sdp_enabled(),
            ),
        }

    def assert_unchanged(self) -> None:
        now = self._now()
        for key in ("tensors", "grad"):
            assert now[key].keys() == self._before[key].keys()
            for name, tensor in now[key].items():
                assert tensor is self._before[key][name], name
                assert tensor is None or torch.equal(tensor, self._values[key][name]), name
        assert torch.equal(now["random"], self._values["random"])
        for key in ("requires_grad", "training", "settings"):
            assert now[key] == self._values[key], key


def with_gradients(draw: Draw, name: str) -> tuple[nn.Module, Inputs]:
    """A model with some ``.grad``, whose submodules are not all in the same mode."""
    torch.backends.mha.set_fastpath_enabled(True)  # as they start, so that no test before this one hides anything
    torch.set_autocast_cache_enabled(True)
    model, make_inputs = make_net(draw, name)
    for parameter in list(model.parameters())[::2]:
        parameter.grad = draw.normal(*parameter.shape)
    parts = [module for module in model.modules() if not list(module.children())]
    parts[1].eval()  # of two BatchNorm layers the first
    return model, make_inputs(4)


def call_both(model: nn.Module, inputs: Inputs, direction: dict[str, Tensor], how: str) -> None:
    label_gradient(model, inputs, direction, loss="mse_probs", how=how)
    example_weight_gradient(model, inputs, torch.tensor([0, 2, 1, 1]), direction, how=how)


@nets
@every_how
def test_leaves_no_trace(draw, name, how):
    model, inputs = with_gradients(draw, name)
    direction = any_direction(draw, model, how)
    given_direction = copy.deepcopy(direction)
    trace = Trace(model)
    call_both(model, inputs, direction, how)
    trace.assert_unchanged()
    assert all(torch.equal(v, given_direction[n]) for n, v in direction.items())
    with torch.no_grad():
        call_both(model, inputs, direction, how)
    trace.assert_unchanged()


class Failure(Exception):
    pass


@contextmanager
def failing(module: nn.Module, call: int) -> Iterator[list[int]]:
    """The module raises in its nth call, counted from 0."""
    calls: list[int] = []

    def fail(*_: Any) -> None:
        calls.append(1)
        if len(calls) > call:
            raise Failure

    handle = module.register_forward_pre_hook(fail)
    try:
        yield calls
    finally:
        handle.remove()


@nets
@every_how
@pytest.mark.parametrize("call", [0, 1])
def test_leaves_no_trace_when_the_model_raises(draw, name, how, call):
    """At the end of its first or second evaluation, when buffers have moved and random numbers are drawn."""
    model, inputs = with_gradients(draw, name)
    direction = any_direction(draw, model, how)
    trace = Trace(model)
    evaluations = 2 if how in DIFFERENCES else 1
    with failing(model.fc, call), suppress(Failure) if call >= evaluations else pytest.raises(Failure):
        label_gradient(model, inputs, direction, how=how)
    trace.assert_unchanged()


@exact
@pytest.mark.parametrize("name", ["conv", "text"])
def test_result_has_no_graph_and_gradients_may_be_off(draw, name, how):
    model, make_inputs = make_net(draw, name)
    inputs, direction = make_inputs(3), any_direction(draw, model)
    on = label_gradient(model, inputs, direction, how=how)
    with torch.no_grad():
        off = label_gradient(model, inputs, direction, how=how)
    assert torch.equal(on, off)
    assert not on.requires_grad
    assert not torch.equal(on, torch.zeros_like(on))


@every_how
def test_one_dropout_mask_in_every_evaluation(draw, how):
    """Each evaluation, in every way, drops what a plain forward from the same random state drops."""
    model, make_inputs = make_net(draw, "conv")
    inputs = make_inputs(4)
    masks: list[list[Tensor]] = [[], []]
    dropouts = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    for place, dropout in enumerate(dropouts):
        dropout.register_forward_hook(lambda _module, _inputs, output, at=place: masks[at].append(output.detach() == 0))
    forward(model, inputs)
    label_gradient(model, inputs, any_direction(draw, model, how), how=how)
    assert len(masks[0]) == (3 if how in DIFFERENCES else 2)
    for seen in masks:
        assert 0 < int(seen[0].sum()) < seen[0].numel()
        assert all(torch.equal(seen[0], mask) for mask in seen)


@pytest.mark.parametrize("name", ["conv", "text"])
@every_how
def test_the_mask_follows_the_random_state(draw, name, how):
    model, make_inputs = make_net(draw, name)
    inputs, direction = make_inputs(4), any_direction(draw, model, how)
    first = label_gradient(model, inputs, direction, how=how)
    assert torch.equal(label_gradient(model, inputs, direction, how=how), first)
    torch.rand(1)
    assert not torch.equal(label_gradient(model, inputs, direction, how=how), first)


def test_one_mask_as_long_as_a_function_lives(draw):
    """Whatever has drawn random numbers in between."""
    model, make_inputs = make_net(draw, "conv")
    inputs, function = make_inputs(4), ModelFunction(model)
    first = function.logits(inputs)
    assert_close(first, forward(model, inputs).detach())
    torch.rand(1)
    assert torch.equal(function.logits(inputs), first)
    assert not torch.equal(ModelFunction(model).logits(inputs), first)


def test_batch_statistics_make_examples_interact(draw):
    """In train mode more than each example on its own; in eval mode exactly that."""
    model, make_inputs = NETS["conv"](draw.generator, dropout=0.0)
    images, direction = make_inputs(4), any_direction(draw, model)

    def apart() -> Tensor:
        return torch.cat([label_gradient(model, image, direction) for image in images.split(1)])

    together = label_gradient(model, images, direction)
    assert float((together - apart()).norm()) > 1e-3 * float(together.norm())
    model.eval()
    assert_close(label_gradient(model, images, direction), apart())


@pytest.mark.parametrize("how", [how for how in HOWS if how != "last_layer"])
def test_a_tied_parameter_goes_by_either_name(draw, how):
    model, make_inputs = make_net(draw, "tied")
    assert model.decoder.weight is model.encoder.weight
    inputs, v = make_inputs(3), draw.normal(*model.encoder.weight.shape)
    first = label_gradient(model, inputs, {"encoder.weight": v}, how=how)
    assert torch.equal(label_gradient(model, inputs, {"decoder.weight": v}, how=how), first)
    # Both uses move: untied, they are two directions whose derivatives add up.
    untied = copy.deepcopy(model)
    untied.decoder.weight = nn.Parameter(model.encoder.weight.detach().clone())
    parts = [label_gradient(untied, inputs, {f"{part}.weight": v}) for part in ("encoder", "decoder")]
    if how in EXACT:
        assert_close(first, parts[0] + parts[1])
    assert all(float(part.norm()) > 1e-3 * float(first.norm()) for part in parts)


@every_how
def test_a_frozen_parameter_cannot_move(draw, how):
    model, make_inputs = make_net(draw, "tied")
    direction = {"frozen.weight": draw.normal(*model.frozen.weight.shape)}
    trace = Trace(model)
    with pytest.raises(ValueError, match=r"'frozen\.weight', which is frozen"):
        label_gradient(model, make_inputs(3), direction, how=how)
    trace.assert_unchanged()
