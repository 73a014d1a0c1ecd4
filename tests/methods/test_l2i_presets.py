"""Learning to Impute: every difference between the papers and the published code, in numbers."""

from dataclasses import asdict, replace

import pytest
import torch
from brute_force import make_layer
from cases import Draw
from torch import Tensor
from whole_model_brute_force import Bilevel, brute_force_label_gradient, forward
from whole_model_nets import NETS

from fastmeta import L2I
from fastmeta.methods.l2i import preset, training

NAMES = ("paper", "official_code")
names = pytest.mark.parametrize("name", NAMES)
variants = pytest.mark.parametrize("variant", ["V1", "V2"])
# 50 and 100 times the learning rate of 0.002.
RATES = {"V1": 0.2, "V2": 0.1}


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    assert actual.shape == expected.shape
    assert float((actual - expected).norm()) <= tolerance * float(expected.norm()) + 1e-14


def make_problem(draw: Draw, **options) -> Bilevel:
    model, make_inputs = NETS["conv"](draw.generator)
    return Bilevel(
        model,
        make_inputs(5),
        draw.probabilities(5, 3),
        make_inputs(4),
        draw.classes(4, 3),
        **({"reduction": "sum"} | options),
    )


def refine(method: L2I, problem: Bilevel, labels: Tensor | None):
    return method.refine(
        model=problem.model,
        unlabeled=problem.unlabeled,
        holdout=problem.holdout,
        targets=problem.targets,
        labels=labels,
    )


def published_gradient(problem: Bilevel, name: str) -> Tensor:
    """``dC^H/dz`` with a sum over the hold-out examples in the papers, a mean in the code."""
    return brute_force_label_gradient(problem) * (4 if name == "paper" else 1)


def published_problem(draw: Draw, name: str, variant: str) -> Bilevel:
    return make_problem(draw, rate=RATES[variant], labeled_weight=1.0 if name == "paper" else 0.0)


@names
def test_v2_is_the_published_update(draw, name):
    """Sums in the inner step, at rate 0.1; with C^T, a sum outside and the base's labels: paper; without: code."""
    problem = published_problem(draw, name, "V2")
    z = problem.labels.clone().requires_grad_()
    method = L2I.from_preset(name, "V2")
    assert method.derivative.how == "jvp"
    gradient = torch.autograd.grad(refine(method, problem, z).loss, z)[0]
    assert_close(gradient, published_gradient(problem, name))


@names
def test_v1_is_the_published_update(draw, name):
    """Rate 0.2. The paper steps on z and leaves it where it is, the code on the logits of z."""
    problem = published_problem(draw, name, "V1")
    z, gradient = problem.labels, published_gradient(problem, name)
    moved = refine(L2I.from_preset(name, "V1"), problem, z).labels
    if name == "paper":
        assert_close(moved, z - gradient)
    else:
        assert_close(moved, (z.log() - z * (gradient - (z * gradient).sum(-1, keepdim=True))).softmax(-1))


@variants
@names
def test_labels_that_are_given_are_used(draw, name, variant):
    """The code's second update has labels of a second view, by the student; any others come from the caller as well."""
    problem = published_problem(draw, name, variant)
    model, u = problem.model.eval(), problem.unlabeled
    labels = model(u + 0.3 * draw.normal(*u.shape)).softmax(-1)
    problem = replace(problem, labels=labels.detach())
    z, gradient = problem.labels, published_gradient(problem, name)
    refined = refine(L2I.from_preset(name, variant), problem, labels)
    if variant == "V2":
        own = list(model.parameters())
        got, expected = (
            torch.autograd.grad(s, own, retain_graph=True) for s in (refined.loss, (gradient * labels).sum())
        )
        assert_close(torch.cat([g.flatten() for g in got]), torch.cat([g.flatten() for g in expected]))
        assert_close(refined.labels, z)
    elif name == "paper":
        assert_close(refined.labels, z - gradient)
    else:
        assert_close(refined.labels, (z.log() - z * (gradient - (z * gradient).sum(-1, keepdim=True))).softmax(-1))


FIELDS = {
    "labeled_weight": (1.0, 0.0),
    "outer_reduction": ("sum", "mean"),
    "label_space": ("probabilities", "logits"),
    "project": (False, True),
    "second_reduction": ("sum", "mean_entries"),
}


@variants
def test_paper_and_code_differ_in_these_fields_alone(variant):
    paper, code = (asdict(preset(name, variant)) for name in NAMES)
    assert {field: (paper[field], code[field]) for field in paper if paper[field] != code[field]} == FIELDS
    assert paper["rate"] == code["rate"] == pytest.approx(RATES[variant])


@pytest.mark.parametrize("field", ["labeled_weight", "outer_reduction", "label_space", "rate"])
def test_each_field_of_the_update_changes_it(draw, field):
    """One at a time, from the paper's to the code's: none of them is idle."""
    problem = make_problem(draw)
    problem.model.eval()
    values = {"rate": 0.1} | {name: code for name, (_, code) in FIELDS.items()}
    changed = {field: values[field]} | ({"project": True} if field == "label_space" else {})
    before, after = (
        refine(L2I.from_preset("paper", "V1", **options), problem, problem.labels).labels for options in ({}, changed)
    )
    assert float((before - after).norm()) > 1e-4


def test_the_paper_leaves_labels_that_are_no_probabilities(draw):
    """A label step of 1 along a sum over large examples leaves the simplex; on logits it cannot."""
    problem = make_problem(draw)
    z, step = problem.labels, 2 / float(brute_force_label_gradient(problem).max())
    paper, code = (refine(L2I.from_preset(name, "V1", label_step=50 * step), problem, z) for name in NAMES)
    assert bool((paper.labels < 0).any())
    assert bool((code.labels >= 0).all())
    assert_close(code.labels.sum(-1), torch.ones(5, dtype=torch.float64), 1e-12)


def test_second_step_of_v1(draw):
    """C^U of the refined labels: summed in the paper, a mean over examples and outputs with weight 1 in the code."""
    logits, labels = draw.normal(5, 3), draw.probabilities(5, 3)
    squares = (logits.softmax(-1) - labels).square()
    paper, code = (L2I.from_preset(name, "V1").unlabeled_loss(logits, labels) for name in NAMES)
    assert_close(paper, squares.sum())
    assert_close(code, squares.mean())
    assert_close(L2I("V1", second_weight=3.0).unlabeled_loss(logits, labels), 3 * squares.sum(-1).mean())


@variants
def test_the_cheap_form_is_an_override(draw, variant):
    """Only the last layer moves: the same settings on what the loop's own forward gave."""
    layer = make_layer(draw)
    labels = draw.probabilities(6, 4)
    method = L2I.from_preset("official_code", variant, how="last_layer")
    z = labels.clone().requires_grad_()
    ahead = layer.inner_step(z, rate=RATES[variant], loss="mse_probs", reduction="sum")
    gradient = torch.autograd.grad(layer.outer(ahead), z)[0]
    if variant == "V2":
        given = labels.clone().requires_grad_()
        loss = method.refine(**layer.batch(), labels=given).loss
        assert_close(torch.autograd.grad(loss, given)[0], gradient)
    else:
        dq = labels * (gradient - (labels * gradient).sum(-1, keepdim=True))
        assert_close(method.refine(**layer.batch(), labels=labels).labels, (labels.log() - dq).softmax(-1))


@names
@variants
def test_landmarks(draw, name, variant):
    """Means over examples and coordinates; the code's O has tanh in its inner loss, its L has not, and rates differ."""
    code = name == "official_code"
    tanh = code and variant == "V2"
    eta = {"V2": 10 * 0.03, "V1": 0.03}[variant]
    problem = make_problem(
        draw,
        loss="mse_tanh" if tanh else "mse",
        labeled_loss="mse",
        outer_loss="mse",
        reduction="mean",
        rate=eta / 3,  # of 3 outputs
        labeled_weight=0.0 if code else 1.0,
    )
    targets = draw.normal(4, 3)
    problem = Bilevel(
        **{**vars(problem), "targets": targets, "labels": forward(problem.model, problem.unlabeled).detach()}
    )
    gradient = brute_force_label_gradient(problem) / 3
    method = L2I.from_preset(name, variant, "landmarks", outputs=3)
    if variant == "V1":
        assert_close(refine(method, problem, None).labels, problem.labels - gradient)
    else:
        z = problem.labels.clone().requires_grad_()
        method = L2I.from_preset(name, variant, "landmarks", outputs=3)
        assert_close(torch.autograd.grad(refine(method, problem, z).loss, z)[0], gradient)


def test_the_loop_around_it():
    """Rates follow the learning rate; lambda is 75 in the landmarks' code and 3 in the paper, 50 for CIFAR."""
    for variant, factor in (("V2", 50.0), ("V1", 100.0)):
        loop = training("official_code", variant)
        assert loop.rate_at() == pytest.approx(factor * 0.002)
        assert loop.rate_at(0.001) == pytest.approx(factor * 0.001)
    weights = [
        training(name, "V2", task).unlabeled_weight for task in ("classification", "landmarks") for name in NAMES
    ]
    assert weights == [50.0, 50.0, 3.0, 75.0]
    loop = training("official_code", "V2", "landmarks")
    assert loop.rate_at() == pytest.approx(10 * 0.03 / 10)  # of 10 coordinates
    assert [loop.unlabeled_weight_at(t) for t in (0.0, 0.2, 0.4, 1.0)] == pytest.approx([0.0, 37.5, 75.0, 75.0])
    assert loop.teacher_decay == 0.999


def test_the_rate_follows_a_schedule(draw):
    problem = make_problem(draw)
    for options in ({}, {"look_ahead": False, "labeled_weight": 0.0}):
        method = L2I.from_preset("paper", "V1", **options)
        method.rate = 0.05
        expected = L2I.from_preset("paper", "V1", rate=0.05, **options)
        assert torch.equal(refine(method, problem, None).labels, refine(expected, problem, None).labels)
        assert method.rate == 0.05
    with pytest.raises(ValueError, match="rate must be >= 0"):
        method.rate = -1.0


@pytest.mark.parametrize(
    ("arguments", "overrides", "error", "message"),
    [
        (("papre",), {}, ValueError, "L2I has the presets paper, official_code, got 'papre'"),
        (("paper", "V3"), {}, ValueError, "variant must be one of V1, V2, got 'V3'"),
        (("paper", "V2", "faces"), {}, ValueError, "task must be one of classification, landmarks, got 'faces'"),
        (("paper", "V2", "landmarks", 0), {}, ValueError, "outputs must be an int >= 1, got 0"),
        (("paper", "V2", "classification", 10), {}, ValueError, "outputs must be None for classification, got 10"),
        (("paper",), {"ratee": 1.0}, TypeError, "ratee"),
    ],
)
def test_unknown_presets_and_overrides_are_refused(arguments, overrides, error, message):
    with pytest.raises(error, match=message):
        L2I.from_preset(*arguments, **overrides)
