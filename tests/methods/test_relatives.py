"""Learning to reweight, Meta-Weight-Net and Meta Pseudo Labels beside their published forms: autograd through a step.

Nothing of the definitions uses fastmeta: the model takes the inner step as a function of its parameters.
"""

import itertools
from collections.abc import Callable
from typing import Any

import forked
import pytest
import torch
from cases import Draw
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

import fastmeta
from fastmeta import L2I, LearningToReweight, MetaPseudoLabels, MetaWeightNet, Method
from fastmeta.ops.process_group import Group

N, HELD_OUT, C, HIDDEN = 6, 5, 3, 7
HOWS = ("last_layer", "jvp")
Batch = dict[str, Tensor]


def net(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, C)).double()


def batch_of(seed: int) -> Batch:
    draw = torch.Generator().manual_seed(seed)
    normal = {
        name: torch.randn(n, d, dtype=torch.float64, generator=draw)
        for name, n, d in (("x_u", N, 4), ("x_l", HELD_OUT, 4), ("teacher", N, C))
    }
    return {
        **normal,
        "labels": normal["teacher"].softmax(1),
        "mask": torch.tensor([1.0, 1, 0, 1, 1, 1], dtype=torch.float64),
        "targets": torch.randint(C, (HELD_OUT,), generator=draw),
    }


def refined(method: Method, model: nn.Sequential, batch: Batch, **more: Any) -> fastmeta.Refined:
    given = {"labels": batch["labels"], "targets": batch["targets"], **more}
    if method.derivative.how != "last_layer":
        return method.refine(model=model, unlabeled=batch["x_u"], holdout=batch["x_l"], **given)
    with fastmeta.capture_features(model) as tape:
        logits_l, logits_u = model(batch["x_l"]), model(batch["x_u"])
    return method.refine(unlabeled=tape.outputs(logits_u), holdout=tape.outputs(logits_l), **given)


class Published:
    """One step of the inner problem, differentiated through; of the last layer, or the whole model."""

    def __init__(self, model: nn.Sequential, batch: Batch, how: str) -> None:
        self.model, self.batch = model, batch
        names = [name for name, _ in model.named_parameters() if how == "jvp" or name.startswith("2.")]
        self.theta = {name: model.get_parameter(name).detach().requires_grad_() for name in names}

    def each(self, labels: Tensor) -> Tensor:
        """The losses of the unlabeled examples ``[N]``."""
        log_p = functional_call(self.model, self.theta, (self.batch["x_u"],)).log_softmax(1)
        return -(labels * log_p).sum(1)

    def stepped(self, loss: Tensor, rate: float) -> dict[str, Tensor]:
        grads = torch.autograd.grad(loss, list(self.theta.values()), create_graph=True)
        return {name: p - rate * g for (name, p), g in zip(self.theta.items(), grads, strict=True)}

    def outer(self, theta: dict[str, Tensor]) -> Tensor:
        return functional.cross_entropy(functional_call(self.model, theta, (self.batch["x_l"],)), self.batch["targets"])


def close(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("how", HOWS)
def test_learning_to_reweight(how: str, draw: Draw) -> None:
    seed = draw.integer(0, 2**31)
    model, batch = net(seed), batch_of(seed)
    published = Published(model, batch, how)
    weights = torch.zeros(N, dtype=torch.float64, requires_grad=True)
    theta = published.stepped((weights * batch["mask"] * published.each(batch["labels"])).sum(), 0.7)
    (gradient,) = torch.autograd.grad(published.outer(theta), weights)
    positive = (-gradient).clamp_min(0)
    wanted = positive / (positive.sum() + (positive.sum() == 0))
    for total, scale in (("one", 1), ("count", N)):
        got = refined(LearningToReweight(how=how, total=total), model, batch, mask=batch["mask"])
        close(got.weights, scale * wanted)
        assert not got.loss.requires_grad


def test_a_batch_that_only_harms_is_left_out() -> None:
    with torch.no_grad():
        model = nn.Linear(1, 2, bias=False).double()
        model.weight.zero_()
    batch = {"unlabeled": torch.ones(3, 1).double(), "holdout": torch.ones(1, 1).double()}
    wrong = torch.tensor([[0.0, 1.0]], dtype=torch.float64).expand(3, 2)
    got = LearningToReweight(how="jvp").refine(model=model, labels=wrong, targets=torch.tensor([0]), **batch)
    assert got.weights.tolist() == [0, 0, 0]


@pytest.mark.parametrize("how", HOWS)
def test_meta_weight_net(how: str, draw: Draw) -> None:
    """Its net, its Adam, and the weights after each step, as a loop of plain PyTorch has them."""
    seed = draw.integer(0, 2**31)
    model = net(seed)
    settings = {"lr": 0.05, "weight_decay": 0.01}
    method = MetaWeightNet(how=how, rate=0.8, hidden=HIDDEN, seed=seed, dtype=torch.float64, **settings)
    v_net = nn.Sequential(nn.Linear(1, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 1), nn.Sigmoid()).double()
    start = method.update.table.values[0].split([HIDDEN, HIDDEN, HIDDEN, 1])
    with torch.no_grad():
        for parameter, value in zip(v_net.parameters(), start, strict=True):
            parameter.copy_(value.view_as(parameter))
    assert bool((start[2].abs() <= HIDDEN**-0.5).all() and (start[0].abs() > HIDDEN**-0.5).any())
    adam = torch.optim.Adam(v_net.parameters(), **settings)
    for step in range(3):
        batch = batch_of(seed + step)
        published = Published(model, batch, how)
        each = published.each(batch["labels"])
        weights = v_net(each.detach().unsqueeze(1)).squeeze(1)
        adam.zero_grad()
        published.outer(published.stepped((batch["mask"] * weights * each).mean(), 0.8)).backward()
        adam.step()
        got = refined(method, model, batch, mask=batch["mask"])
        with torch.no_grad():
            close(got.weights, v_net(each.detach().unsqueeze(1)).squeeze(1))
        close(method.update.table.values[0], torch.cat([p.detach().flatten() for p in v_net.parameters()]))
    seen = torch.tensor([0.1, 5.0], dtype=torch.float64)
    close(method.weight_of(seen), v_net(seen.unsqueeze(1)).squeeze(1).detach())


def drawn(generator: torch.Generator) -> Tensor:
    return torch.randint(C, (N,), generator=generator)


@pytest.mark.parametrize("how", HOWS)
def test_meta_pseudo_labels(how: str, draw: Draw, generator: torch.Generator) -> None:
    seed = draw.integer(0, 2**31)
    model, batch, average = net(seed), batch_of(seed), 0.0
    method = MetaPseudoLabels(how=how, rate=0.6, decay=0.75)
    for _ in range(2):
        classes = drawn(generator)
        hard = functional.one_hot(classes, C).double()
        published = Published(model, batch, how)
        inner = published.each(hard).mean()
        theta = published.stepped(inner, 0.6)
        after = torch.autograd.grad(published.outer(theta), list(theta.values()), retain_graph=True)
        before = torch.autograd.grad(inner, list(published.theta.values()))
        h = 0.6 * sum(float((a * b).sum()) for a, b in zip(after, before, strict=True))
        average = 0.75 * average + 0.25 * h
        teacher = batch["teacher"].clone().requires_grad_()
        wanted = (h - average) * functional.cross_entropy(teacher, classes)
        mine = batch["teacher"].clone().requires_grad_()
        got = refined(method, model, batch, labels=mine.softmax(1), pseudo_labels=classes)
        close(got.loss, wanted)
        close(*(torch.autograd.grad(loss, leaf)[0] for loss, leaf in ((got.loss, mine), (wanted, teacher))))
        assert torch.equal(got.labels, hard)
        assert not got.labels.requires_grad
    assert float(method.update.average) == pytest.approx(average)
    kept = method.state_dict()
    bad = {**batch, "x_l": torch.full_like(batch["x_l"], torch.nan)}
    refined(method, model, bad, labels=mine.softmax(1), pseudo_labels=classes)
    assert torch.equal(method.state_dict()["update.average"], kept["update.average"])


def test_credit_by_example_is_on_average_the_pull_back_of_soft_labels(draw: Draw) -> None:
    """Summed over all labels that can be drawn, with their probabilities."""
    seed = draw.integer(0, 2**31)
    model, batch = net(seed), batch_of(seed)
    few = {**batch, "x_u": batch["x_u"][:2]}
    q = batch["labels"][:2].clone().requires_grad_()
    options: dict[str, Any] = {"how": "jvp", "inner_loss": "cross_entropy", "rate": 0.6, "look_ahead": False}
    soft = refined(L2I(unit_length=False, weight=1.0, **options), model, few, labels=q * 1)
    (wanted,) = torch.autograd.grad(soft.loss, q)
    got = torch.zeros_like(q)
    method = MetaPseudoLabels(credit="example", **options)
    for classes in itertools.product(range(C), repeat=2):
        chance = float(q.detach()[0, classes[0]] * q.detach()[1, classes[1]])
        found = refined(method, model, few, labels=q * 1, pseudo_labels=torch.tensor(classes))
        got += chance * torch.autograd.grad(found.loss, q)[0]
    close(got, wanted)


def test_labels_are_drawn_from_the_teacher(draw: Draw) -> None:
    seed = draw.integer(0, 2**31)
    model, batch = net(seed), batch_of(seed)
    q = torch.tensor([[0.0, 0.3, 0.7]], dtype=torch.float64).expand(N, C).clone().requires_grad_()
    torch.manual_seed(seed)
    found = torch.stack([refined(MetaPseudoLabels(), model, batch, labels=q * 1).labels for _ in range(100)])
    share = found.mean((0, 1))
    assert share[0] == 0
    assert abs(float(share[2]) - 0.7) < 0.11  # six deviations
    likeliest = refined(MetaPseudoLabels(draw="argmax"), model, batch, labels=q * 1)
    assert torch.equal(likeliest.labels, functional.one_hot(torch.full((N,), 2), C).double())


SPREAD: dict[str, Callable[..., Method]] = {
    "reweighted": LearningToReweight,
    "weight net": lambda **o: MetaWeightNet(hidden=HIDDEN, lr=0.05, dtype=torch.float64, **o),
    "pseudo labels": lambda **o: MetaPseudoLabels(decay=None, **o),
    "pseudo labels, credit by example": lambda **o: MetaPseudoLabels(credit="example", **o),
}


def on_rows(group: Group, seed: int) -> dict[str, list[Tensor]]:
    """Every method on this process's rows, in uneven parts; of all rows without a group."""
    cut = slice(None) if group is None else (slice(0, 4), slice(4, None))[group.rank()]
    model, batch = net(seed), batch_of(seed)
    batch = {name: value[cut] for name, value in batch.items()}
    classes = torch.arange(N)[cut] % C
    found = {}
    for name, make in SPREAD.items():
        method = make(how="jvp", process_group=group)
        q = batch["labels"].clone().requires_grad_()
        more = {"pseudo_labels": classes} if isinstance(method, MetaPseudoLabels) else {}
        got = refined(method, model, batch, labels=q * 1, **more)
        pulled = torch.autograd.grad(got.loss, q)[0] if got.loss.requires_grad else torch.zeros_like(q)
        state = [value.clone() for value in method.state_dict().values()]
        found[name] = [got.weights, pulled / (1 if group is None else group.size()), *state]
    return found


def test_on_two_processes(draw: Draw) -> None:
    seed = draw.integer(0, 2**31)
    parts, alone = forked.run(on_rows, 2, seed), on_rows(None, seed)
    for name, wanted in alone.items():
        for number, value in enumerate(wanted):
            of_rows = number < 2
            got = torch.cat([part[name][number] for part in parts]) if of_rows else parts[0][name][number]
            torch.testing.assert_close(got, value, rtol=1e-9, atol=1e-12, msg=f"{name}, {number}")
            assert of_rows or torch.equal(got, parts[1][name][number])


def test_what_they_refuse() -> None:
    for make, words in (
        (lambda: LearningToReweight(total="mean"), "total must be one of one, count, got 'mean'"),
        (lambda: MetaWeightNet(hidden=0), "hidden must be an int >= 1, got 0"),
        (lambda: MetaWeightNet(rate=-1.0), "rate must be"),
        (lambda: MetaPseudoLabels(draw="best"), "draw must be"),
        (lambda: MetaPseudoLabels(inner_loss="mse"), "inner_loss must be"),
        (lambda: MetaPseudoLabels(decay=1.5), "decay must be"),
    ):
        with pytest.raises(ValueError, match=words):
            make()
    model, batch = net(0), batch_of(0)
    with pytest.raises(ValueError, match="labels must be on the graph"):
        refined(MetaPseudoLabels(how="jvp"), model, batch)
    with pytest.raises(ValueError, match="labels must be the probabilities of the teacher"):
        refined(MetaPseudoLabels(how="jvp"), model, batch, labels=None)


def test_wrong_labels_lose_their_weight() -> None:
    """Three clouds, a quarter of the labels wrong, 18 right ones held out: what learning to reweight is for."""
    method = LearningToReweight(how="jvp")
    torch.manual_seed(0)
    centers, true = 3 * torch.randn(C, 6), torch.randint(C, (400,))
    inputs = centers[true] + torch.randn(400, 6)
    wrong = torch.rand(400) < 0.25
    labels = functional.one_hot(torch.where(wrong, (true + 1) % C, true), C).float()
    held_out = torch.arange(C).repeat(6)
    x_held_out = centers[held_out] + torch.randn(18, 6)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, C))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    of_wrong, of_right = 0.0, 0.0
    for _ in range(60):
        rows = torch.randint(400, (64,))
        got = method.refine(
            model=model, unlabeled=inputs[rows], labels=labels[rows], holdout=x_held_out, targets=held_out
        )
        each = functional.cross_entropy(model(inputs[rows]), labels[rows], reduction="none")
        optimizer.zero_grad()
        (got.weights * each).mean().backward()
        optimizer.step()
        of_wrong += float(got.weights[wrong[rows]].mean())
        of_right += float(got.weights[~wrong[rows]].mean())
    assert of_wrong < 0.5 * of_right  # 0.1 to 0.3 for a dozen seeds
    assert float((model(inputs).argmax(1) == true).float().mean()) > 0.94
