"""Targets of every loss, and hold-out gradients, as loops have them."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from whole_model_nets import mlp, normal

import fastmeta
from fastmeta import L2I, AlignedImputation, ExampleWeights, ImplicitImputation, ImputeAndWeight, MetaGradient
from fastmeta.losses import LOSSES

WAYS = ("jvp", "double_backward", "finite_difference", "last_layer")
WITHOUT_SOFTMAX = [name for name in LOSSES if not fastmeta.losses.of(name).has_softmax]


def method_of(loss, how, **more):
    options = more | {"label_space": "probabilities", "project": False, "unit_length": False, "radius": 1e-6}
    return L2I("V1", how=how, inner_loss=loss, outer_loss=loss, **options)


@pytest.mark.parametrize("how", WAYS)
def test_a_binary_head(how, generator):
    """Floating targets ``[N, 1]`` are those of autograd through the inner step; classes are refused."""
    model, make_inputs = mlp(generator, classes=1)
    unlabeled, holdout, y = make_inputs(5), make_inputs(4), torch.tensor([1.0, 0.0, 1.0, 0.0]).double().view(4, 1)
    loss = functional.binary_cross_entropy_with_logits
    parameters = list((model.fc if how == "last_layer" else model).parameters())
    z = model(unlabeled).sigmoid().detach().requires_grad_()
    step = torch.autograd.grad(loss(model(unlabeled), z), parameters, create_graph=True)
    v = torch.autograd.grad(loss(model(holdout), y), parameters)
    (gradient,) = torch.autograd.grad(-sum((a * b).sum() for a, b in zip(step, v, strict=True)), z)
    batch = {"model": model, "unlabeled": unlabeled, "holdout": holdout}
    refined = method_of("binary_cross_entropy", how).refine(**batch, targets=y)
    torch.testing.assert_close(refined.labels, (z - gradient).detach(), rtol=1e-5, atol=1e-7)
    for classes in (torch.tensor([1, 0, 1, 0]), torch.zeros(4, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"^targets .*use targets.to\(logits.dtype\).view\(-1, 1\)"):
            method_of("binary_cross_entropy", how).refine(**batch, targets=classes)


@pytest.mark.parametrize("loss", WITHOUT_SOFTMAX)
@pytest.mark.parametrize("how", WAYS)
def test_classes_of_one_output(loss, how, generator):
    model, make_inputs = mlp(generator, classes=1)
    x, classes = make_inputs(4), torch.zeros(4, dtype=torch.int64)
    v = {"fc.weight": normal(generator, *model.fc.weight.shape)}
    match = r"targets must be floating \[N, 1\] for one output, got int64 classes \[4\]"
    with pytest.raises(ValueError, match=match):
        fastmeta.example_weight_gradient(model, x, classes, v, loss=loss, how=how)
    if fastmeta.losses.of(loss).label_tangent_reads_targets:
        with pytest.raises(ValueError, match=match):
            fastmeta.label_gradient(model, x, v, loss=loss, how=how, targets=classes)
    with pytest.raises(ValueError, match=match):
        method_of(loss, how).refine(model=model, unlabeled=x, holdout=x, targets=classes)
    method = method_of(loss, how, look_ahead=True, labeled_weight=1.0)
    batch = {"model": model, "unlabeled": x, "holdout": x, "targets": classes.double().view(4, 1)}
    with pytest.raises(ValueError, match=f"labeled_{match}"):
        method.refine(**batch, labeled=x, labeled_targets=classes)


@pytest.mark.parametrize("how", ["jvp", "last_layer"])
def test_the_softmax_of_one_output_is_refused(how, generator):
    model, make_inputs = mlp(generator, classes=1)
    x = make_inputs(4)
    with pytest.raises(ValueError, match="targets are classes of one output, whose softmax is always 1"):
        fastmeta.MetaGradient(how=how).refine(model=model, unlabeled=x, holdout=x, targets=torch.zeros(4).long())


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("how", ["jvp", "last_layer"])
def test_classes_of_several_outputs_are_one_hot_rows(loss, how, generator):
    model, make_inputs = mlp(generator, classes=3)
    x, classes = make_inputs(4), torch.tensor([0, 2, 1, 1])
    v = {"fc.weight": normal(generator, *model.fc.weight.shape)}
    one_hot = functional.one_hot(classes, 3).double()
    got, wanted = (fastmeta.example_weight_gradient(model, x, y, v, loss=loss, how=how) for y in (classes, one_hot))
    torch.testing.assert_close(got, wanted)


WRONG = {
    "one-hot int64": (torch.eye(4, 3).long(), ValueError, r"got \[4, 3\]; as probabilities \[N, C\]: "),
    "int32": (torch.zeros(4, dtype=torch.int32), TypeError, r"got int32; as classes: \w+.long\(\)"),
    "uint8": (torch.zeros(4, dtype=torch.uint8), TypeError, r"got uint8; as classes: \w+.long\(\)"),
    "bool": (torch.zeros(4, 3, dtype=torch.bool), TypeError, r"got bool; as probabilities: \w+.float\(\)"),
    "classes as floats": (torch.zeros(4), ValueError, r"got .*\[4\]; use .*\w+.long\(\)"),
}


@pytest.mark.parametrize(("targets", "error", "match"), WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("how", WAYS)
def test_errors_name_the_conversion(targets, error, match, how, generator):
    model, make_inputs = mlp(generator, classes=3)
    x, y = make_inputs(4), torch.tensor([0, 1, 2, 0])
    batch = {"model": model, "unlabeled": x, "holdout": x}
    with pytest.raises(error, match=f"^targets .*{match}"):
        L2I(how=how).refine(**batch, targets=targets)
    with pytest.raises(error, match=f"^labeled_targets .*{match}"):
        ImplicitImputation(how=how).refine(**batch, targets=y, labeled=x, labeled_targets=targets)


class TwoHeads(nn.Module):
    """A net whose second head no call uses."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc, self.aux = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3), nn.Linear(8, 2)

    def forward(self, x):
        return self.fc(torch.tanh(self.b(torch.tanh(self.a(x)))))


EVERY = {
    "L2I": lambda: L2I(how="jvp"),
    "L2I look-ahead": lambda: L2I(how="jvp", look_ahead=True, steps=2, unit_length=False),
    "MetaGradient": lambda: MetaGradient(how="finite_difference"),
    "AlignedImputation": lambda: AlignedImputation(how="jvp"),
    "ImputeAndWeight": lambda: ImputeAndWeight(5, how="jvp", dtype=torch.float64),
    "cg": lambda: ExampleWeights(5, how="jvp", inverse_hessian="cg", dtype=torch.float64),
    "neumann": lambda: ExampleWeights(5, how="jvp", inverse_hessian="neumann", dtype=torch.float64),
    "layers": lambda: ExampleWeights(5, how="jvp", layers=("b", "fc"), dtype=torch.float64),
    "unused layer": lambda: ExampleWeights(5, how="jvp", layers=("fc", "aux"), dtype=torch.float64),
    "identity": lambda: ExampleWeights(
        5, how="jvp", inverse_hessian="identity", layers=("fc", "aux"), dtype=torch.float64
    ),
}


@pytest.mark.parametrize("make", EVERY.values(), ids=EVERY)
def test_missing_entries_of_a_holdout_gradient_are_0(make, generator):
    """The gradient as ``backward`` leaves it: None for what the loss does not reach; or without those names."""
    model = TwoHeads().double()
    x_l, x_u, y = normal(generator, 4, 6), normal(generator, 5, 6), torch.tensor([0, 1, 2, 0])
    functional.cross_entropy(model(x_l), y).backward()
    left = {name: p.grad for name, p in model.named_parameters()}
    there = {name: value for name, value in left.items() if value is not None}
    zeros = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    assert len(there) == len(left) - 2
    labels = normal(generator, 5, 3).softmax(1).requires_grad_()
    batch = {"model": model, "unlabeled": x_u, "labels": labels, "index": torch.arange(5), "labeled": x_l}
    batch |= {"labeled_targets": y, "holdout": x_l, "targets": y}  # a look-ahead takes the gradient elsewhere, too
    wanted = make().refine(**batch, holdout_gradient=zeros)
    backwards = dict(reversed(there.items()))
    compiled = {f"_orig_mod.{name}": value for name, value in backwards.items()}
    for gradient in (left, there, backwards):
        torch.testing.assert_close(make().refine(**batch, holdout_gradient=gradient), wanted, rtol=0, atol=0)
    batch["model"] = torch.compile(model)
    torch.testing.assert_close(make().refine(**batch, holdout_gradient=compiled), wanted, rtol=0, atol=0)
    batch["model"] = model
    head = {name: value for name, value in left.items() if name.startswith("fc")}
    of_the_head = make().refine(**batch, holdout_gradient=head)
    rest = {name: torch.zeros_like(p) for name, p in model.named_parameters() if not name.startswith("fc")}
    torch.testing.assert_close(of_the_head, make().refine(**batch, holdout_gradient=rest | head), rtol=0, atol=0)


def test_another_model_s_gradient_is_refused(generator):
    model, other = TwoHeads().double(), mlp(generator)[0]
    batch = {"model": model, "unlabeled": normal(generator, 5, 6)}
    for gradient, error, match in (
        (
            dict(other.named_parameters()),
            ValueError,
            "must name parameters of TwoHeads, got '0.weight'",
        ),
        (dict.fromkeys(dict(model.named_parameters())), TypeError, "holdout_gradient .* got None for every name"),
        (
            {"fc.weight": torch.ones(3, 9).double()},
            ValueError,
            r"_gradient\['fc.weight'\] must be the parameter's",
        ),
    ):
        with pytest.raises(error, match=match):
            L2I(how="jvp").refine(**batch, holdout_gradient=gradient)


def test_a_sparse_holdout_gradient_is_its_dense_one(generator):
    model = nn.Sequential(nn.EmbeddingBag(10, 6, sparse=True), nn.Linear(6, 3)).double()
    x_l, x_u = (torch.randint(10, (n, 4), generator=generator) for n in (4, 5))
    functional.cross_entropy(model(x_l), torch.tensor([0, 1, 2, 0])).backward()
    gradient = {name: p.grad for name, p in model.named_parameters()}
    assert gradient["0.weight"].is_sparse
    dense = gradient | {"0.weight": gradient["0.weight"].to_dense()}
    got, wanted = (
        L2I("V1", how="forward_difference").refine(model=model, unlabeled=x_u, holdout_gradient=g)
        for g in (gradient, dense)
    )
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)
