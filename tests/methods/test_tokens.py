"""Logits of tokens, targets of -100, label smoothing and class weights, against autograd of F.cross_entropy."""

import pytest
import torch
from device_tensors import no_wait, on_device, pretends_a_gpu
from torch import nn
from torch.func import functional_call
from torch.nn import functional
from whole_model_nets import normal

import fastmeta
from fastmeta import L2I, AlignedImputation, ExampleWeights, ImplicitImputation, LabelGradientAlignment

B, T, D, C = 3, 4, 5, 3
WAYS = ("jvp", "double_backward", "finite_difference", "last_layer")


class Tagger(nn.Module):
    """A class for each token: ``[B, T, D]`` to logits ``[B, T, C]``."""

    def __init__(self):
        super().__init__()
        self.body, self.fc = nn.Linear(D, 6), nn.Linear(6, C)

    def forward(self, x):
        return self.fc(torch.tanh(self.body(x)))


class Task:
    def __init__(self, generator, ignored=5):
        self.model = Tagger().double()
        for parameter in self.model.parameters():
            parameter.data = normal(generator, *parameter.shape)
        self.unlabeled, self.holdout = normal(generator, 2, T, D), normal(generator, B, T, D)
        self.targets = torch.randint(C, (B, T), generator=generator)
        self.targets.view(-1)[torch.randperm(B * T, generator=generator)[:ignored]] = -100

    def batch(self, **more):
        return {"unlabeled": self.unlabeled, "holdout": self.holdout, "targets": self.targets} | more

    def outputs(self, **more):
        """What a loop gives that made one forward over both batches."""
        with fastmeta.capture_features(self.model) as tape:
            logits_u, logits_h = self.model(self.unlabeled), self.model(self.holdout)
        unlabeled, holdout = (tape.outputs(logits.flatten(0, -2)) for logits in (logits_u, logits_h))
        return {"unlabeled": unlabeled, "holdout": holdout, "targets": self.targets} | more


def plain(how, **options):
    options = {"label_space": "probabilities", "project": False, "unit_length": False, "radius": 1e-6} | options
    return L2I("V1", how=how, inner_loss="cross_entropy", **options)


def labels_by_autograd(task, how, outer, ahead=None):
    """One step of L2I V1 on the labels, differentiated through the inner step; ``outer``: of the hold-out logits.

    ``ahead``: the rate of a step to theta*, where the outer loss then is taken, and the weight of that loss in it.
    """
    moving = dict((task.model.fc if how == "last_layer" else task.model).named_parameters())
    logits = task.model(task.unlabeled).flatten(0, -2)
    z = logits.softmax(1).detach().requires_grad_()
    inner, outside = functional.cross_entropy(logits, z), outer(task.model(task.holdout).flatten(0, -2))
    rate, weight = ahead or (1.0, 0.0)
    step = torch.autograd.grad(inner + weight * outside, tuple(moving.values()), create_graph=True)
    if ahead:
        prefix = "fc." if how == "last_layer" else ""
        there = {prefix + name: p - rate * g for (name, p), g in zip(moving.items(), step, strict=True)}
        (gradient,) = torch.autograd.grad(outer(functional_call(task.model, there, task.holdout).flatten(0, -2)), z)
    else:
        v = torch.autograd.grad(outside, tuple(moving.values()))
        (gradient,) = torch.autograd.grad(-sum((a * b).sum() for a, b in zip(step, v, strict=True)), z)
    return (z - gradient).detach()


def assert_close(got, wanted, how):
    torch.testing.assert_close(got, wanted, **({"rtol": 1e-5, "atol": 1e-7} if how == "finite_difference" else {}))


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("ignored", [0, 5])
@pytest.mark.parametrize("flat", [False, True])
def test_ignored_tokens_are_those_of_cross_entropy(how, ignored, flat, generator):
    task = Task(generator, ignored)
    wanted = labels_by_autograd(task, how, lambda f: functional.cross_entropy(f, task.targets.flatten()))
    given = {"targets": task.targets.flatten()} if flat else {}
    assert_close(plain(how).refine(model=task.model, **task.batch(**given)).labels, wanted, how)
    if how == "last_layer":
        assert_close(plain(how).refine(**task.outputs(**given)).labels, wanted, how)


@pytest.mark.parametrize("how", ["jvp", "last_layer"])
def test_ignored_tokens_of_the_labeled_loss(how, generator):
    """In the inner steps and in the outer loss at theta*."""
    task = Task(generator)
    outer = lambda f: functional.cross_entropy(f, task.targets.flatten())  # noqa: E731
    wanted = labels_by_autograd(task, how, outer, ahead=(0.3, 0.7))
    method = plain(how, look_ahead=True, labeled_weight=0.7, rate=0.3)
    more = {"labeled": task.holdout, "labeled_targets": task.targets}
    assert_close(method.refine(model=task.model, **task.batch(**more)).labels, wanted, how)


METHODS = {
    "ExampleWeights": lambda how: ExampleWeights(8, how=how, damping=0.3, dtype=torch.float64, tol=1e-12),
    "ExampleWeights, neumann": lambda how: ExampleWeights(
        8, how=how, inverse_hessian="neumann", damping=0.3, dtype=torch.float64
    ),
    "ImplicitImputation": lambda how: ImplicitImputation("V1", how=how, damping=0.3, tol=1e-12),
    "AlignedImputation": lambda how: AlignedImputation(how=how),
    "LabelGradientAlignment": lambda how: LabelGradientAlignment(8, C, how=how, dtype=torch.float64),
    "Eq. (6)": lambda how: L2I("V1", how=how, **({"derivative": "eq6"} if how == "last_layer" else {})),
    "mse_probs": lambda how: L2I("V1", how=how, outer_loss="mse_probs"),
}


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("make", METHODS.values(), ids=METHODS)
def test_ignored_tokens_are_as_if_they_were_not_there(make, how, generator):
    """Every method, and losses other than the cross-entropy: the same as without these rows."""
    task = Task(generator)
    task.unlabeled = task.unlabeled.flatten(0, 1)
    keep = task.targets != -100
    labels = normal(generator, 8, C).softmax(1).requires_grad_()
    more = {"labels": labels, "index": torch.arange(8), "labeled": task.holdout, "labeled_targets": task.targets}
    less = {"holdout": task.holdout[keep], "targets": task.targets[keep], "labeled": task.holdout[keep]}
    less["labeled_targets"] = task.targets[keep]
    first, second = make(how), make(how)
    for _ in range(2):
        got = first.refine(model=task.model, **task.batch(**more))
        wanted = second.refine(model=task.model, **task.batch(**(more | less)))
    for name in ("labels", "weights", "loss"):
        torch.testing.assert_close(getattr(got, name), getattr(wanted, name), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("how", WAYS)
def test_all_ignored(how, generator):
    task = Task(generator, B * T)
    refined = plain(how).refine(model=task.model, **task.batch())
    torch.testing.assert_close(refined.labels, task.model(task.unlabeled).flatten(0, -2).softmax(1).detach())


def test_weight_of_the_labeled_loss(generator):
    task = Task(generator)
    method = LabelGradientAlignment(8, C, labeled_weight=lambda step: 3.0)
    outputs = task.outputs(index=torch.arange(8))
    wanted = 2 * functional.cross_entropy(outputs["holdout"].logits, task.targets.flatten())
    torch.testing.assert_close(method.refine(**outputs).loss, wanted)


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("loss", ["cross_entropy", "mse_probs"])
def test_example_weight_gradient(how, loss, generator):
    task = Task(generator)
    v = {"fc.weight": normal(generator, C, 6)}
    got = fastmeta.example_weight_gradient(task.model, task.holdout, task.targets, v, how=how, loss=loss)
    keep = (task.targets != -100).flatten()
    kept = fastmeta.example_weight_gradient(
        task.model, task.holdout.flatten(0, 1)[keep], task.targets.flatten()[keep], v, how=how, loss=loss
    )
    torch.testing.assert_close(got[keep], kept)
    assert not got[~keep].any()


@pytest.mark.parametrize("how", ["jvp", "last_layer"])
def test_arguments_of_tokens_may_have_the_shape_of_the_logits(how, generator):
    task = Task(generator)
    labels, mask = normal(generator, 2, T, C).softmax(-1), torch.rand(2, T, generator=generator).round()
    index = torch.arange(8).view(2, T)
    soft = functional.one_hot(task.targets.clamp_min(0), C).double()
    method, other = (ExampleWeights(8, how=how, inverse_hessian="identity") for _ in range(2))
    got = method.refine(model=task.model, **task.batch(labels=labels, mask=mask, index=index, targets=soft))
    flat = {"labels": labels.flatten(0, 1), "mask": mask.flatten(), "index": index.flatten()}
    flat["targets"] = soft.flatten(0, 1)
    wanted = other.refine(model=task.model, **task.batch(**flat))
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)
    assert got.labels.shape == (8, C)


def test_labels_of_tokens_stay_on_their_graph(generator):
    task = Task(generator)
    labels = normal(generator, 2, T, C).softmax(-1).requires_grad_()
    with torch.no_grad():
        refined = L2I(how="jvp").refine(model=task.model, **task.batch(labels=labels))
    refined.loss.backward()
    assert labels.grad.shape == (2, T, C)
    assert labels.grad.any()


def test_a_class_out_of_range_beside_ignored_ones(generator):
    task = Task(generator)
    for wrong in (-1, C):
        task.targets[0, 0] = wrong
        for batch in (task.outputs(), task.batch(model=task.model)):
            with pytest.raises(ValueError, match=rf"targets must be classes in \[0, 3\), got {wrong}"):
                plain("last_layer").refine(**batch)


@pytest.mark.parametrize("how", WAYS)
def test_label_smoothing_and_class_weights_are_soft_targets(how, generator):
    task = Task(generator, 0)
    y, e, w = task.targets.flatten(), 0.1, torch.tensor([0.5, 2.0, 1.0]).double()
    outer = lambda f: functional.cross_entropy(f, y, weight=w, label_smoothing=e)  # noqa: E731
    soft = w * ((1 - e) * functional.one_hot(y, C) + e / C) * len(y) / w[y].sum()
    wanted = labels_by_autograd(task, how, outer)
    assert_close(plain(how).refine(model=task.model, **task.batch(targets=soft)).labels, wanted, how)


@pretends_a_gpu
@pytest.mark.parametrize("name", ["Eq. (6)", "mse_probs"])
def test_no_host_waits_for_ignored_tokens(name, generator):
    """On a GPU nobody looks whether there are any: the count is a tensor, with the same result."""
    task = Task(generator)
    labels = normal(generator, 8, C).softmax(1).requires_grad_()
    outputs = task.outputs(labels=labels)
    wanted = METHODS[name]("last_layer").refine(**outputs)
    there = {key: on_device(value) for key, value in outputs.items()}
    with no_wait():
        got = METHODS[name]("last_layer").refine(**there)
    torch.testing.assert_close(got.labels.as_subclass(torch.Tensor), wanted.labels)
    torch.testing.assert_close(got.weights.as_subclass(torch.Tensor), wanted.weights)


def test_verify(generator):
    task = Task(generator)
    report = fastmeta.verify(task.model, task.holdout, task.targets, quiet=True)
    assert report.ok
    with pytest.raises(ValueError, match=r"targets of int64 classes must be \[N\] = \[12\], got \[11\]"):
        fastmeta.verify(task.model, task.holdout, task.targets.flatten()[1:], quiet=True)
