"""The README's loop is run as it is printed, with every method, against brute force of the loss that it trains."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

import fastmeta
from fastmeta import Method

README = (Path(__file__).parents[1] / "README.md").read_text()
LOOP, WHOLE_MODEL = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)[:2]
M, C, N, D = 20, 4, 12, 6
INDEX = torch.tensor([3, 0, 7, 19, 11, 2, 5, 13, 1, 8, 17, 4])


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.fc = nn.Linear(5, D), nn.Linear(D, C)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.fc(self.body(inputs).tanh())


def run(meta: Method | None, draw: torch.Generator, code: str = LOOP) -> dict[str, Any]:
    """The names that the printed lines leave behind; in place of the method they make, ``meta``."""
    torch.manual_seed(int(torch.randint(2**31, (), generator=draw)))
    model, x_weak = Net().double(), torch.randn(N, 5, dtype=torch.float64)
    with torch.no_grad():
        while model(x_weak).softmax(1).amax(1).median() < 0.95:  # half of the predictions are confident
            model.fc.weight.mul_(1.3)
    batch = {"x_l": torch.randn(7, 5, dtype=torch.float64), "y_l": torch.randint(C, (7,)), "index": INDEX}
    batch |= {"x_weak": x_weak, "x_strong": x_weak + 0.3 * torch.randn(N, 5, dtype=torch.float64)}
    names = {"torch": torch, "F": functional, "fastmeta": fastmeta, "model": model, **batch}
    if meta is not None:
        made, rest = code.split("\n", 1)
        assert made.startswith("meta = fastmeta.")
        code, names["meta"] = rest, meta
    exec(code, names)
    return names


class Trained:
    """The losses of the loop as functions of the parameters that move, the labels and the weights."""

    def __init__(self, names: dict[str, Any], moving: str) -> None:
        self.model = names["model"]
        self.moving = [name for name, _ in self.model.named_parameters() if name.startswith(moving)]
        own = dict(self.model.named_parameters())
        self.shapes = [own[name].shape for name in self.moving]
        self.theta = torch.cat([own[name].detach().flatten() for name in self.moving]).requires_grad_()
        self.labeled, self.strong = names["x_l"], names["x_strong"]
        self.targets, self.mask = names["y_l"], names["mask"]
        self.labels = names["labels_given"].detach().requires_grad_()
        self.weights = torch.ones(N, dtype=torch.float64, requires_grad=True)

    def logits(self, inputs: Tensor, theta: Tensor) -> Tensor:
        parts = theta.split([shape.numel() for shape in self.shapes])
        values = {name: part.view(shape) for name, part, shape in zip(self.moving, parts, self.shapes, strict=True)}
        return functional_call(self.model, values, (inputs,))

    def holdout(self, theta: Tensor) -> Tensor:
        return functional.cross_entropy(self.logits(self.labeled, theta), self.targets)

    def unlabeled(self, theta: Tensor) -> Tensor:
        log_p = self.logits(self.strong, theta).log_softmax(1)
        return (self.mask * self.weights * -(self.labels * log_p).sum(1)).mean()

    def gradient(self, of: Callable[[Tensor], Tensor]) -> Tensor:
        return torch.autograd.grad(of(self.theta), self.theta, create_graph=True)[0]

    def along(self, v: Tensor, by: Tensor) -> Tensor:
        """The gradient of ``-<grad of the unlabeled loss, v>``: that of ``<grad G, theta'>`` after a step at rate 1."""
        return torch.autograd.grad(-self.gradient(self.unlabeled) @ v.detach(), by)[0]

    def solved(self, damping: float) -> Tensor:
        hessian = torch.autograd.functional.hessian(lambda t: self.holdout(t) + self.unlabeled(t), self.theta)
        return torch.linalg.solve(hessian + damping * torch.eye(len(hessian)), self.gradient(self.holdout))

    def gap(self, labels: Tensor, by: Tensor) -> Tensor:
        """Of ``sum_k (g_l - g_u)_k^2 / (epsilon + sqrt(v_k^4))``, the objective of alignment at a first step."""
        self.labels = labels
        v = self.gradient(self.holdout).detach() - self.gradient(self.unlabeled)
        return torch.autograd.grad((v.square() / (1e-3 + v.detach().square())).sum(), by)[0]


def surrogate(names: dict[str, Any], method: Method) -> Tensor:
    """What is pulled back through the labels."""
    return torch.autograd.grad(names["refined"].loss, names["q"], retain_graph=True)[0]


def step(names: dict[str, Any], method: Method) -> Tensor:
    return names["labels_given"].detach() - names["refined"].labels


def table(names: dict[str, Any], method: Any) -> Tensor:
    """A first moment of Adam after one step is in the direction of the gradient."""
    return method.update.table.exp_avg[INDEX]


def logit_step(names: dict[str, Any], method: Method) -> Tensor:
    moved = names["labels_given"].detach().log() - names["refined"].labels.log()
    return moved - moved.mean(1, keepdim=True)


def of_logits(trained: Trained) -> Tensor:
    z = trained.labels
    g = trained.along(trained.gradient(trained.holdout), z)
    moved = z * (g - (z * g).sum(1, keepdim=True))
    return (moved - moved.mean(1, keepdim=True)).detach()


def of_table(trained: Trained) -> Tensor:
    w = torch.zeros(N, C, dtype=torch.float64, requires_grad=True)
    return trained.gap(w.softmax(1), w)


Case = tuple[Callable[..., Method], Callable[[dict[str, Any], Any], Tensor], Callable[[Trained], Tensor]]
DOUBLE = {"dtype": torch.float64}


def label_gradient(trained: Trained) -> Tensor:
    return trained.along(trained.gradient(trained.holdout), trained.labels)


CASES: dict[str, Case] = {
    "L2I": (partial(fastmeta.L2I, inner_loss="cross_entropy"), surrogate, label_gradient),
    "L2I V1": (partial(fastmeta.L2I, "V1", inner_loss="cross_entropy"), logit_step, of_logits),
    "MetaGradient": (
        partial(fastmeta.MetaGradient, inner_loss="cross_entropy", project=False),
        step,
        label_gradient,
    ),
    "LabelGradientAlignment": (partial(fastmeta.LabelGradientAlignment, M, C, **DOUBLE), table, of_table),
    "AlignedImputation": (fastmeta.AlignedImputation, surrogate, lambda t: t.gap(t.labels, t.labels)),
    "ImputeAndWeight": (partial(fastmeta.ImputeAndWeight, M, **DOUBLE), surrogate, label_gradient),
    "ImputeAndWeight's weights": (
        partial(fastmeta.ImputeAndWeight, M, **DOUBLE),
        table,
        lambda t: t.along(t.gradient(t.holdout), t.weights),
    ),
}
LAST_LAYER: dict[str, Case] = {
    "ExampleWeights": (
        partial(fastmeta.ExampleWeights, M, inverse_hessian="cholesky", **DOUBLE),
        table,
        lambda t: t.along(t.solved(0.1), t.weights),
    ),
    "ImplicitImputation": (
        partial(fastmeta.ImplicitImputation, solver="cholesky"),
        surrogate,
        lambda t: t.along(t.solved(0.1), t.labels),
    ),
}


def given_labels(names: dict[str, Any], name: str) -> Tensor:
    q = names["q"]
    return q if name == "L2I V1" else names["hard"] + (q - q.detach())


def check(generator: torch.Generator, name: str, method: Method, case: Case, code: str, moving: str) -> None:
    _, seen, expected = case
    if name == "L2I V1":
        code = code.replace("labels=hard + (q - q.detach())", "labels=q")
    names = run(method, generator, code)
    assert 0 < float(names["mask"].sum()) < N
    names["labels_given"] = given_labels(names, name)
    got, wanted = seen(names, method).flatten(), expected(Trained(names, moving)).flatten()
    assert float(wanted.norm()) > 0
    assert abs(float(functional.cosine_similarity(got, wanted, dim=0)) - 1) < 1e-10


@pytest.mark.parametrize("name", [*CASES, *LAST_LAYER])
def test_the_gradient_is_that_of_the_loss_that_is_trained(generator, name):
    case = {**CASES, **LAST_LAYER}[name]
    check(generator, name, case[0](), case, LOOP, moving="fc")


@pytest.mark.parametrize("how", ["jvp", "double_backward"])
@pytest.mark.parametrize("name", CASES)
def test_the_gradient_of_the_whole_model(generator, name, how):
    """``refine`` is given the inputs of the views in place of their outputs."""
    code = LOOP.replace("unlabeled=tape.outputs(logits_s)", "model=model, unlabeled=x_strong")
    code = code.replace("holdout=tape.outputs(logits_l)", "holdout=x_l")
    check(generator, name, CASES[name][0](how=how), CASES[name], code, moving="")


@pytest.mark.parametrize("name", [*CASES, *LAST_LAYER])
def test_the_loss_is_fixmatch_and_what_the_method_makes_of_it(generator, name):
    names = run({**CASES, **LAST_LAYER}[name][0](), generator)
    model, refined = names["model"], names["refined"]
    with torch.no_grad():
        weak, strong = model(names["x_weak"]).softmax(1), model(names["x_strong"])
        confident = (weak.amax(1) >= 0.95).double()
        per_example = functional.cross_entropy(strong, refined.labels, reduction="none")
        labeled = functional.cross_entropy(model(names["x_l"]), names["y_l"])
        expected = labeled + (confident * refined.weights * per_example).mean() + refined.loss
        torch.testing.assert_close(names["loss"].detach(), expected)
    if name in ("L2I", "L2I V1", "AlignedImputation", "ImplicitImputation"):  # V1: hard labels have no logits to move
        published = labeled + (confident * functional.cross_entropy(strong, weak.argmax(1), reduction="none")).mean()
        torch.testing.assert_close((names["loss"] - refined.loss).detach(), published)
    names["loss"].backward()


def test_the_printed_method_and_the_whole_model(generator):
    names = run(None, generator)
    assert isinstance(names["meta"], fastmeta.L2I)
    assert names["refined"].loss.requires_grad
    names["labels"] = given_labels(names, "L2I")
    exec(WHOLE_MODEL, names)
    assert names["meta"].derivative.how == "jvp"
    names["refined"].loss.backward()
    assert bool(names["model"].body.weight.grad.abs().sum() > 0)


def test_the_table_names_every_method_and_what_it_needs():
    """The columns ``index`` and ``graph`` are what the methods say of themselves."""
    rows = re.findall(r"^\| `(\w+)\((.*?)\)`.*? \|(.*?)\|(.*?)\|", README, flags=re.MULTILINE)
    assert {name for name, *_ in rows} == {
        name for name in fastmeta.methods.__all__ if name not in ("Method", "Refined")
    }
    for name, arguments, index, graph in rows:
        method = eval(f"fastmeta.{name}({arguments})", {"fastmeta": fastmeta, "M": M, "C": C})
        assert (index.strip() == "yes") == method.update.needs_index, name
        assert (graph.strip() == "yes") == method.update.needs_graph, name
