"""What a model may be called with: N is the number of rows of its logits, wherever its inputs have it."""

from collections import UserDict, namedtuple
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from whole_model_nets import normal

import fastmeta
from fastmeta import L2I, ExampleWeights, ImputeAndWeight, LabelGradientAlignment, MetaGradient

N, HELD_OUT, D, C = 7, 4, 6, 3
WAYS = ("jvp", "double_backward", "finite_difference", "last_layer")
Pair = namedtuple("Pair", ["x", "shift"])


class Recurrent(nn.Module):
    """Sequences ``[T, N, D]``: dimension 0 is time."""

    def __init__(self):
        super().__init__()
        self.rnn, self.fc = nn.LSTM(D, 5), nn.Linear(5, C)

    def forward(self, x):
        packed = isinstance(x, PackedSequence)
        return self.fc(self.rnn(x)[1][0][-1] if packed else self.rnn(x)[0][-1])


class Graph(nn.Module):
    """Nodes ``[N, D]`` behind ``edge_index [2, edges]``."""

    def __init__(self):
        super().__init__()
        self.body, self.fc = nn.Linear(D, 5), nn.Linear(5, C)

    def forward(self, edge_index, x):
        hidden = torch.tanh(self.body(x))
        return self.fc(hidden.index_add(0, edge_index[0], hidden[edge_index[1]]))


class Any(nn.Module):
    """A net whose rows ``x [N, D]`` are found in what it is called with."""

    def __init__(self, find):
        super().__init__()
        self.find, self.body, self.fc = find, nn.Linear(D, 5), nn.Linear(5, C)

    def forward(self, *args, **kwargs):
        return self.fc(torch.tanh(self.body(self.find(*args, **kwargs))))


def letters(texts):
    return torch.tensor([[float(text.count(letter)) for letter in "abcdef"] for text in texts], dtype=torch.float64)


def words(generator, n):
    return ["".join("abcdef"[i] for i in torch.randint(6, (9,), generator=generator)) for _ in range(n)]


def edges(generator, n):
    return torch.randint(n, (2, 11), generator=generator), normal(generator, n, D)


# How the model is made, and its inputs for n examples.
KINDS = {
    "lstm": (Recurrent, lambda g, n: normal(g, 5, n, D)),
    "packed sequence": (
        Recurrent,
        lambda g, n: pack_sequence([normal(g, 2 + i % 3, D) for i in range(n)], enforce_sorted=False),
    ),
    "edge_index first": (Graph, edges),
    "dict, edge_index last": (Graph, lambda g, n: dict(zip(("x", "edge_index"), edges(g, n)[::-1], strict=True))),
    "scalar tensor first": (lambda: Any(lambda scale, x: scale * x), lambda g, n: (torch.tensor(2.0), normal(g, n, D))),
    "dict of a shared shift": (
        lambda: Any(lambda shift, x: x + shift),
        lambda g, n: {"shift": normal(g, D), "x": normal(g, n, D)},
    ),
    "mapping": (lambda: Any(lambda x: x), lambda g, n: UserDict(x=normal(g, n, D))),
    "named tuple": (lambda: Any(lambda pair: pair.x + pair.shift), lambda g, n: Pair(normal(g, n, D), normal(g, D))),
    "list": (lambda: Any(torch.stack), lambda g, n: list(normal(g, n, D))),
    "dict in a tuple": (lambda: Any(lambda batch: batch["x"]), lambda g, n: ({"id": "a", "x": normal(g, n, D)},)),
    "object": (lambda: Any(lambda batch: batch.x), lambda g, n: SimpleNamespace(x=normal(g, n, D), num_graphs=n)),
    "texts": (lambda: Any(letters), words),
    "no tensor": (
        lambda: Any(lambda texts, scale: scale * letters(texts)),
        lambda g, n: {"texts": words(g, n), "scale": 2},
    ),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def called(model, inputs):
    """The plain call."""
    if type(inputs) is tuple:
        return model(*inputs)
    return model(**inputs) if isinstance(inputs, (dict, UserDict)) else model(inputs)


def label_gradient_by_autograd(model, unlabeled, holdout, targets, parameters):
    """``dG/dz`` of one inner step on the mean cross-entropy, by differentiating through the step."""
    logits = called(model, unlabeled)
    z = logits.softmax(1).detach().requires_grad_()
    step = torch.autograd.grad(functional.cross_entropy(logits, z), parameters, create_graph=True)
    v = torch.autograd.grad(functional.cross_entropy(called(model, holdout), targets), parameters)
    (gradient,) = torch.autograd.grad(-sum((a * b).sum() for a, b in zip(step, v, strict=True)), z)
    return z.detach(), gradient


def plain(how, **options):
    """L2I without rescaling: the labels fall by ``dG/dz``."""
    options = {"label_space": "probabilities", "project": False, "unit_length": False} | options
    return L2I("V1", how=how, inner_loss="cross_entropy", radius=1e-6, **options)


def make(kind, generator):
    build, make_inputs = KINDS[kind]
    model = build().double()
    for parameter in model.parameters():
        parameter.data = normal(generator, *parameter.shape) / 2
    targets = torch.randint(C, (HELD_OUT,), generator=generator)
    return model, make_inputs(generator, N), make_inputs(generator, HELD_OUT), targets


@kinds
@pytest.mark.parametrize("how", WAYS)
def test_labels_are_those_of_autograd(kind, how, generator):
    model, unlabeled, holdout, targets = make(kind, generator)
    parameters = list((model.fc if how == "last_layer" else model).parameters())
    z, gradient = label_gradient_by_autograd(model, unlabeled, holdout, targets, parameters)
    refined = plain(how).refine(model=model, unlabeled=unlabeled, holdout=holdout, targets=targets)
    tolerance = {"rtol": 1e-5, "atol": 1e-7} if how == "finite_difference" else {}
    torch.testing.assert_close(refined.labels, z - gradient, **tolerance)
    assert refined.weights.shape == (N,)


@kinds
@pytest.mark.parametrize(
    "method",
    [
        lambda: MetaGradient(how="jvp"),
        lambda: ExampleWeights(20, how="jvp", inverse_hessian="cg"),
        lambda: ExampleWeights(20, how="jvp", shared=True),
        lambda: ExampleWeights(20, how="jvp", interval=2),
        lambda: LabelGradientAlignment(20, C, how="finite_difference"),
        lambda: ImputeAndWeight(20, how="double_backward"),
    ],
)
def test_every_method_takes_them(kind, method, generator):
    model, unlabeled, holdout, targets = make(kind, generator)
    labels = torch.full((N, C), 1 / 3, dtype=torch.float64).requires_grad_()
    refined = method().refine(
        model=model, unlabeled=unlabeled, holdout=holdout, targets=targets, index=torch.arange(N), labels=labels
    )
    assert refined.labels.shape == (N, C)
    assert refined.weights.shape == (N,)


@kinds
def test_step_condition(kind, generator):
    model, unlabeled, holdout, targets = make(kind, generator)
    method = MetaGradient(how="jvp")
    found = method.step_condition(model=model, unlabeled=unlabeled, holdout=holdout, targets=targets, lr=0.1)
    of_the_mean = MetaGradient(how="jvp", rate=float(N))
    wanted = of_the_mean.step_condition(model=model, unlabeled=unlabeled, holdout=holdout, targets=targets, lr=0.1)
    assert found == wanted  # without alpha / B the step is that of alpha = N


class Counting(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model, self.calls = model, 0

    def forward(self, *args, **kwargs):
        self.calls += 1
        return self.model(*args, **kwargs)


def test_a_call_that_only_reads_makes_no_pass_for_n(generator):
    inner, unlabeled, *_ = make("lstm", generator)
    model, labels = Counting(inner), torch.full((N, C), 1 / 3)
    refined = ExampleWeights(20, how="jvp", interval=2).refine(
        model=model, unlabeled=unlabeled, index=torch.arange(N), labels=labels
    )
    assert (model.calls, refined.weights.shape) == (0, (N,))


def rows(**changed):
    given = {"index": torch.arange(N), "labels": torch.full((N, C), 1 / 3).double(), "mask": torch.ones(N)}
    return given | changed


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (rows(labels=torch.ones(5, C)), r"labels must be \[N, C\] = \[7, C\] like index, got \[5, 3\]"),
        (rows(mask=torch.ones(5)), r"mask must be \[N\] = \[7\] like index, got \[5\]"),
        (rows(mask=torch.ones(())), r"mask must be \[N\] = \[7\] like index, got \[\]"),
        ({"labels": torch.ones(5)}, r"labels must be \[N, C\], got \[5\]"),
        ({"targets": torch.tensor([0.0, 1.0, 0.0, 1.0])}, r"targets must .* got torch.float32 \[4\]; use"),
        ({"targets": torch.tensor(1)}, r"targets must be \[N, C\] probabilities or \[N\] int64 classes, got"),
    ],
)
def test_what_disagrees_is_refused_before_the_model_runs(given, match, generator):
    inner, unlabeled, holdout, targets = make("lstm", generator)
    model = Counting(inner)
    batch = {"model": model, "unlabeled": unlabeled, "holdout": holdout, "targets": targets} | given
    with pytest.raises(ValueError, match=match):
        plain("jvp").refine(**batch)
    assert model.calls == 0


DISAGREE = [
    ({"targets": torch.zeros(5, dtype=torch.int64)}, "targets must have N = 4 like the rows .* for holdout, got 5"),
    ({"targets": torch.ones(5, C)}, "targets must have N = 4 like the rows of the model's logits for holdout, got 5"),
    ({"index": torch.arange(5)}, "index must have N = 7 like the rows of the model's logits for unlabeled, got 5"),
    ({"mask": torch.ones(5)}, "mask must have N = 7 like the rows of the model's logits for unlabeled, got 5"),
]


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize(("given", "match"), DISAGREE)
def test_what_disagrees_with_the_logits_is_refused(how, given, match, generator):
    """Before a table or an average changes."""
    model, unlabeled, holdout, targets = make("lstm", generator)
    batch = {"model": model, "unlabeled": unlabeled, "holdout": holdout, "targets": targets}
    batch |= {} if "mask" in given else {"index": torch.arange(N)}
    if how == "last_layer":
        match = rf"{next(iter(given))} (must|of int64 classes must)"
    for method in (
        ExampleWeights(20, how=how, inverse_hessian="identity"),
        LabelGradientAlignment(20, C, how=how),
        plain(how),
    ):
        if "mask" in given and not isinstance(method, L2I):
            continue
        before = {name: str(value) for name, value in method.state_dict().items()}
        with pytest.raises(ValueError, match=match):
            method.refine(**(batch | given))
        assert {name: str(value) for name, value in method.state_dict().items()} == before


def test_labels_that_disagree_with_the_logits(generator):
    model, unlabeled, holdout, targets = make("lstm", generator)
    batch = {"model": model, "unlabeled": unlabeled, "holdout": holdout, "targets": targets}
    for how in WAYS[:3]:
        for shape, match in (
            ((5, C), "labels must have N = 7 like the rows of the model's logits for unlabeled, got 5"),
            ((N, 4), r"labels must be \[N, C\] = \[7, 3\] like the model's logits for unlabeled, got \[7, 4\]"),
        ):
            with pytest.raises(ValueError, match=match):
                plain(how).refine(**batch, labels=torch.ones(shape))


def test_views_that_disagree(generator):
    model, unlabeled, holdout, targets = make("lstm", generator)
    batch = {"model": model, "unlabeled": unlabeled, "holdout": holdout, "targets": targets, "index": torch.arange(N)}
    for how in ("jvp", "last_layer"):
        method = ExampleWeights(20, how=how)
        with pytest.raises(ValueError, match=r"unlabeled must have N = 4 like the rows .* for strong, got 7"):
            method.refine(**batch, strong=holdout)
        assert torch.equal(method.weights, torch.ones(20))


@pytest.mark.parametrize(
    ("given", "error", "match"),
    [
        ({"unlabeled": None}, TypeError, "unlabeled must be inputs of the model, got None"),
        ({"holdout": None}, ValueError, "holdout and targets must be given together, got holdout=None"),
        ({"targets": None}, ValueError, "holdout and targets must be given together, got targets=None"),
        ({"pseudo_labels": [0] * N}, TypeError, "pseudo_labels must be a tensor, got list"),
        ({"pseudo_labels": torch.full((N,), -100)}, ValueError, r"pseudo_labels must be classes in \[0, 3\), got -100"),
        ({"index": list(range(N))}, TypeError, "index must be an int64 tensor, got list"),
        ({"mask": [1] * N}, TypeError, "mask must be a tensor, got list"),
        (
            {"labels": torch.arange(N)},
            TypeError,
            r"labels must be floating \[N, C\], got torch.int64; of classes F.one_hot",
        ),
    ],
)
def test_what_is_missing_or_no_tensor(given, error, match, generator):
    model, unlabeled, holdout, targets = make("lstm", generator)
    batch = {"model": model, "unlabeled": unlabeled, "holdout": holdout, "targets": targets, "index": torch.arange(N)}
    with pytest.raises(error, match=match):
        ExampleWeights(20, how="jvp").refine(**(batch | given))


def test_names_of_a_dict_are_strings(generator):
    model, unlabeled, *_ = make("mapping", generator)
    v = {"fc.bias": torch.ones(C, dtype=torch.float64)}
    with pytest.raises(TypeError, match="inputs must be a mapping of keyword arguments by name, got the name 0"):
        fastmeta.label_gradient(model, {0: unlabeled["x"]}, v)
