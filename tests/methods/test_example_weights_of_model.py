"""Influence weights of the whole model: against a dense solve, and what a step runs."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from brute_force import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from whole_model_brute_force import (
    Bilevel,
    brute_force_influence,
    dense_hessian,
    flatten,
    forward,
    loss_gradient,
    losses_of,
    trainable,
)
from whole_model_nets import NETS, NetCase, batch_size, net_cases

import fastmeta
from fastmeta import ExampleWeights

M = 12
DOUBLE = {"dtype": torch.float64}


class Task:
    """A model and a batch with everything that ``refine`` takes, and the inner and outer problem that it means."""

    def __init__(self, case: NetCase) -> None:
        self.model, self.weak, self.holdout, generator = case
        self.strong = other_view(self.weak, generator)
        self.labeled = other_view(self.holdout, generator)
        n, n_h = batch_size(self.weak), batch_size(self.holdout)
        self.targets = torch.randint(case.classes, (n_h,), generator=generator)
        self.labeled_targets = torch.randint(case.classes, (n_h,), generator=generator)
        self.index = torch.randperm(M, generator=generator)[:n]
        self.weights = 2 * torch.rand(M, generator=generator, dtype=torch.float64)
        self.mask = (torch.rand(n, generator=generator) > 0.3).double()
        self.soft = forward(self.model, self.weak).detach().softmax(-1)
        self.pseudo = nn.functional.one_hot(self.soft.argmax(-1), case.classes).double()

    def batch(self, **more: Any) -> dict[str, Any]:
        return {
            "model": self.model,
            "unlabeled": self.weak,
            "strong": self.strong,
            "holdout": self.holdout,
            "targets": self.targets,
            "labeled": self.labeled,
            "labeled_targets": self.labeled_targets,
            "mask": self.mask,
            "index": self.index,
            **more,
        }

    @property
    def problem(self) -> Bilevel:
        return Bilevel(
            self.model,
            self.strong,
            self.pseudo,
            self.holdout,
            self.targets,
            weights=self.weights[self.index],
            mask=self.mask,
            labeled=self.labeled,
            labeled_targets=self.labeled_targets,
            loss="cross_entropy",
            labeled_weight=1.0,
        )

    def damping(self, names: tuple[str, ...] | None = None) -> float:
        """One that makes the Hessian positive definite with room to spare."""
        hessian = dense_hessian(self.problem, names)
        return 1 - min(0.0, float(torch.linalg.eigvalsh((hessian + hessian.T) / 2)[0]))

    def gradient(self, **options: Any) -> Tensor:
        """What Masked Adam is given, at the task's weights."""
        method = ExampleWeights(M, **DOUBLE, **options)
        state = method.state_dict()
        state["update.table.values"] = self.weights.clone()
        method.load_state_dict(state)
        refined = method.refine(**self.batch())
        assert_close(refined.labels, self.soft)
        return method.state_dict()["update.table.exp_avg"][self.index] / (1 - 0.9)


def other_view(inputs: Any, generator: torch.Generator) -> Any:
    if isinstance(inputs, dict):
        return {**inputs, "input_ids": inputs["input_ids"].flip(1)}
    if isinstance(inputs, tuple):
        return tuple(other_view(part, generator) for part in inputs)
    return inputs + torch.randn(inputs.shape, generator=generator, dtype=inputs.dtype)


def make_task(net: str, generator: torch.Generator, train: bool = True) -> Task:
    model, make_inputs = NETS[net](generator)
    return Task(NetCase(model.train(train), make_inputs(5), make_inputs(4), generator))


HESSIAN = {"curvature": "hessian", "tol": 1e-12, "max_iter": 3000}


@pytest.mark.parametrize(
    ("net", "train", "how", "layers"),
    [
        ("conv", False, "jvp", None),
        ("conv", True, "double_backward", ("body.4", "fc")),
        ("text", True, "jvp", ("norm", "fc")),
        ("tied", True, "jvp", None),
        ("mlp", True, "double_backward", None),
    ],
)
def test_influence_is_that_of_the_dense_hessian(generator, net, train, how, layers):
    """Labels by the weak view, losses on the strong one, mask, weights, a labeled batch of its own."""
    task = make_task(net, generator, train)
    names = tuple(n for n in trainable(task.model) if layers is None or n.startswith(tuple(f"{x}." for x in layers)))
    damping = task.damping(names)
    got = task.gradient(how=how, inverse_hessian="cg", layers=layers, damping=damping, **HESSIAN)
    assert_close(got, brute_force_influence(task.problem, damping, names))


def test_influence_of_the_sums_of_eq_1_and_2(generator):
    task = make_task("mlp", generator)
    problem = replace(task.problem, reduction="sum")
    hessian = dense_hessian(problem)
    damping = 1 - min(0.0, float(torch.linalg.eigvalsh((hessian + hessian.T) / 2)[0]))
    got = task.gradient(how="jvp", inverse_hessian="cg", reduction="sum", damping=damping, **HESSIAN)
    assert_close(got, batch_size(task.holdout) * brute_force_influence(problem, damping), 1e-8)


LAST = ("fc.weight", "fc.bias")
CHOICES: dict[str, tuple[dict[str, Any], tuple[str, ...] | None]] = {
    "Ren et al.: last layer, exact": ({"how": "last_layer", "inverse_hessian": "cholesky"}, LAST),
    "last layer, cg": ({"how": "last_layer", "inverse_hessian": "cg"}, LAST),
    "last layer, pcg": ({"how": "last_layer", "inverse_hessian": "pcg"}, LAST),
    "last layer, Neumann": ({"how": "last_layer", "inverse_hessian": "neumann"}, LAST),
    "last layer of the whole model": ({"how": "jvp", "inverse_hessian": "cg", "layers": ("fc",)}, LAST),
    "Lorraine et al.: whole model": ({"how": "jvp", "inverse_hessian": "neumann"}, None),
    "Lorraine et al.: last layers": (
        {"how": "jvp", "inverse_hessian": "neumann", "neumann_step": 0.05, "layers": ("2", "fc")},
        ("2.weight", "2.bias", *LAST),
    ),
}


@pytest.mark.parametrize(("options", "names"), CHOICES.values(), ids=CHOICES)
def test_the_choices_of_figure_3(generator, options, names):
    task = make_task("mlp", generator)
    damping = task.damping()
    got = task.gradient(**options, damping=damping, **HESSIAN)
    # The series stops by the length of its last term, which is not the error.
    assert_close(got, brute_force_influence(task.problem, damping, names), 1e-6 if "neumann" in str(options) else 1e-9)


def identity_influence(task: Task, names: tuple[str, ...] | None = None) -> Tensor:
    """Luketina et al.: minus the inner product of validation gradient and example gradient."""
    g = flatten(loss_gradient(task.model, task.holdout, task.targets), names)
    rows = torch.eye(len(task.pseudo), dtype=torch.float64)
    examples = [loss_gradient(task.model, task.strong, task.pseudo, weights=row, reduction="sum") for row in rows]
    return -task.mask * torch.stack([flatten(example, names) @ g for example in examples])


@pytest.mark.parametrize("layers", [None, ("2", "fc")])
def test_identity_hessian(generator, layers):
    task = make_task("mlp", generator)
    names = tuple(n for n in trainable(task.model) if layers is None or n.startswith(("2.", "fc.")))
    assert_close(task.gradient(how="jvp", inverse_hessian="identity", layers=layers), identity_influence(task, names))


@settings(max_examples=6, deadline=None)
@given(case=net_cases(names=("tied", "mlp")), how=st.sampled_from(["jvp", "double_backward", "last_layer"]))
def test_influence_of_any_shape(case: NetCase, how: str):
    task = Task(case)
    names = LAST if how == "last_layer" else None
    damping = task.damping(names)
    options = HESSIAN | {"inverse_hessian": "cholesky" if how == "last_layer" else "cg"}
    assert_close(
        task.gradient(how=how, damping=damping, **options), brute_force_influence(task.problem, damping, names)
    )


@pytest.mark.parametrize(("how", "order"), [("finite_difference", 2), ("forward_difference", 1)])
def test_differences_converge_to_the_exact_influence(generator, how, order):
    task = make_task("conv", generator)
    truth = task.gradient(how="jvp", inverse_hessian="identity")
    coarse, fine = (
        float((task.gradient(how=how, inverse_hessian="identity", radius=radius) - truth).norm())
        for radius in (2e-3, 1e-3)
    )
    assert 0.9 * 2**order < coarse / fine < 1.1 * 2**order


def test_pseudo_labels_of_a_difference_are_those_at_theta(generator):
    """One view, and no pass at theta to take them from: not those of a perturbed pass."""
    task = make_task("mlp", generator)
    given = {"strong": None, "mask": None}
    exact, difference = (
        ExampleWeights(M, how="jvp", **DOUBLE),
        ExampleWeights(M, how="finite_difference", radius=50.0, inverse_hessian="identity", **DOUBLE),
    )
    first, second = (method.refine(**task.batch(**given)) for method in (exact, difference))
    assert_close(first.labels, second.labels)
    g = loss_gradient(task.model, task.holdout, task.targets)
    step = 50.0 / flatten(g).norm()
    moved = [
        losses_of(
            forward(task.model, task.weak, {n: p + sign * step * g[n] for n, p in trainable(task.model).items()}),
            task.pseudo,
            "cross_entropy",
        )
        for sign in (1, -1)
    ]
    expected = -(moved[0] - moved[1]).detach() / (2 * step)
    assert_close(difference.state_dict()["update.table.exp_avg"][task.index] / (1 - 0.9), expected)


@pytest.fixture
def task(generator) -> Task:
    return make_task("conv", generator, train=False)


@pytest.fixture
def runs(task: Task) -> Iterator[list[str]]:
    """Which of the task's inputs the model was run on."""
    made: list[str] = []
    known = {"weak": task.weak, "strong": task.strong, "holdout": task.holdout, "labeled": task.labeled}

    def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        made.append(next(name for name, value in known.items() if value.equal(arguments[0])))

    handle = task.model.register_forward_pre_hook(hook)
    yield made
    handle.remove()


def test_no_pass_is_run_twice(task, runs):
    def run(how: str, **more: Any) -> list[str]:
        runs.clear()
        method = ExampleWeights(M, how=how, inverse_hessian="identity")
        method.refine(**task.batch(labeled=None, labeled_targets=None, **more))
        return sorted(runs)

    gradient = loss_gradient(task.model, task.holdout, task.targets)
    assert run("jvp") == ["holdout", "strong", "weak"]
    assert run("jvp", strong=None) == ["holdout", "weak"]
    assert run("jvp", labels=task.soft) == ["holdout", "strong"]
    assert run("jvp", labels=task.soft, holdout=None, targets=None, holdout_gradient=gradient) == ["strong"]
    assert run("last_layer") == ["holdout", "strong", "weak"]
    assert run("last_layer", strong=None) == ["holdout", "weak"]
    assert run("last_layer", labels=task.soft) == ["holdout", "strong"]


def test_calls_between_updates_run_nothing_but_the_labels(task, runs):
    method = ExampleWeights(M, how="jvp", inverse_hessian="identity", interval=3)
    for expected in ([], [], ["holdout", "strong"]):
        runs.clear()
        refined = method.refine(**task.batch(labels=task.soft, labeled=None, labeled_targets=None))
        assert sorted(runs) == expected
        assert torch.equal(refined.labels, task.soft)
        assert torch.equal(refined.weights.float(), method.weights[task.index])
    runs.clear()
    refined = method.refine(**task.batch())
    assert runs == ["weak"]
    assert_close(refined.labels, task.soft)


def test_last_layer_of_the_model_is_the_last_layer_of_its_outputs(task):
    """The model's inputs, or what the loop's own forward gave."""
    named = {"unlabeled": task.weak, "strong": task.strong, "holdout": task.holdout, "labeled": task.labeled}
    with fastmeta.capture_features(task.model) as tape:
        logits = {name: task.model(inputs) for name, inputs in named.items()}
    outputs = {name: tape.outputs(value) for name, value in logits.items()}
    first, second = ExampleWeights(M, damping=1.0, **DOUBLE), ExampleWeights(M, damping=1.0, **DOUBLE)
    one = first.refine(**task.batch())
    other = second.refine(**{**task.batch(), **outputs, "model": None})
    for a, b in zip(one, other, strict=True):
        assert_close(a, b)
    assert_close(first.weights, second.weights)
    assert not torch.equal(first.weights, torch.ones(M, dtype=torch.float64))


@pytest.mark.parametrize("classes", [True, False])
@pytest.mark.parametrize("strong", [True, False])
def test_given_pseudo_labels(task, strong, classes):
    generator = torch.Generator().manual_seed(3)
    pseudo = torch.randint(3, (5,), generator=generator)
    task.pseudo = nn.functional.one_hot(pseudo, 3).double()
    if not strong:
        task.strong = task.weak
    method = ExampleWeights(M, how="jvp", inverse_hessian="identity", **DOUBLE)
    given = {"pseudo_labels": pseudo if classes else task.pseudo, "strong": task.strong if strong else None}
    refined = method.refine(**task.batch(**given))
    assert_close(refined.labels, task.soft)
    got = method.state_dict()["update.table.exp_avg"][task.index] / (1 - 0.9)
    assert_close(got, identity_influence(task))


def test_the_model_is_left_as_it_was(generator):
    task = make_task("conv", generator)
    before = {name: value.clone() for name, value in task.model.state_dict().items()}
    random = torch.get_rng_state()
    ExampleWeights(M, how="jvp", damping=5.0).refine(**task.batch())
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in task.model.state_dict().items())
    assert all(parameter.grad is None for parameter in task.model.parameters())


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "strong of another size": (
        {"strong": torch.zeros(4, 2, 5, 5).double()},
        ValueError,
        "(unlabeled|labels|index) must have N = 4 like the rows of the model's logits for strong, got 5",
    ),
    "too few pseudo-labels": (
        {"pseudo_labels": torch.zeros(4, dtype=torch.int64)},
        ValueError,
        r"pseudo_labels must be \[N\] = \[5\] like index, got \[4\]",
    ),
    "pseudo-labels of int32": (
        {"pseudo_labels": torch.zeros(5, dtype=torch.int32)},
        ValueError,
        "pseudo_labels must be int64 classes",
    ),
    "pseudo-labels of more classes": (
        {"pseudo_labels": torch.ones(5, 9)},
        ValueError,
        r"pseudo_labels must be \[N, C\] = \[5, 3\] like the model.*, got \[5, 9\]",
    ),
    "no index": ({"index": None}, ValueError, "index is needed by ExampleWeights"),
    "no model": ({"model": None}, ValueError, "model is needed by how='jvp'"),
}


@pytest.mark.parametrize(("more", "error", "message"), WRONG.values(), ids=WRONG)
def test_arguments_are_checked(task, more, error, message):
    method = ExampleWeights(M, how="jvp", damping=5.0)
    with pytest.raises(error, match=message):
        method.refine(**task.batch(**more))
    assert torch.equal(method.weights, torch.ones(M))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"how": "vjp"}, "how must be one of"),
        ({"how": "jvp", "bias": False}, "bias=False is for how='last_layer', got how='jvp'"),
        ({"how": "jvp", "inverse_hessian": "cholesky"}, "inverse_hessian='cholesky' is for how='last_layer'"),
        ({"layers": ("fc",)}, "layers must be None for how='last_layer'"),
        ({"mode": "test"}, "mode must be one of train, eval"),
        ({"duplicates": "first"}, "duplicates must be 'sum' or 'last'"),
        ({"curvature": "fisher"}, "curvature must be gauss_newton or hessian"),
        ({"inverse_hessian": "cg", "neumann_step": 0.1}, "step must be > 0 and for solver='neumann'"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        ExampleWeights(M, **options)
