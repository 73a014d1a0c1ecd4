"""Learning to Impute and Meta-Gradient in the trainer against loops written out here from the papers, in float64.

What is taken from the project is the data of each step; derivatives are autograd's, through the inner step.
"""

import copy
import dataclasses
import math
from typing import Any

import pytest
import torch
from loops_by_hand import Parameters, assert_same_parameters, at, leaves, rate, run_of, stepped, updated
from small_trainers import CLASSES, STEPS, trainer
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy, one_hot

from fastmeta.methods import l2i
from fastmeta.ssl import TrainingBatch
from fastmeta.training.config import OptimizerConfig

LR, DECAY = 0.01, 0.5


def assert_same_model(found: nn.Module, wanted: nn.Module) -> None:
    for name, value in wanted.state_dict().items():
        # The gradient of a bias below batch normalization is rounding, which Adam makes steps of.
        noise = 1e-7 if name in ("body.0.bias", "body.1.running_mean") else 1e-11
        torch.testing.assert_close(found.state_dict()[name], value, rtol=1e-9, atol=noise, msg=name)


def imputed(model: nn.Module, psi: Parameters, batch: TrainingBatch, hard: bool) -> tuple[Tensor, Tensor]:
    """What the student says of the labels' view, and which of it is confident."""
    q = at(model, psi, batch.weak).softmax(1)
    if not hard:
        return q, torch.ones(len(q), dtype=q.dtype)
    value = q.detach()
    return one_hot(value.argmax(1), CLASSES) + (q - value), (value.amax(1) >= 0.5).double()


def inner_loss(logits: Tensor, z: Tensor, mask: Tensor, name: str, reduction: str) -> Tensor:
    per_example = (logits.softmax(1) - z).square().sum(1)
    if name == "cross_entropy":
        per_example = -(z * logits.log_softmax(1)).sum(1)
    per_example = mask * per_example
    return per_example.sum() if reduction.startswith("sum") else per_example.mean()


PAPER, CODE = (
    {name: dataclasses.asdict(l2i.preset(preset, name)) for name in ("V1", "V2")}
    for preset in ("paper", "official_code")
)
L2I: dict[str, tuple[str, dict[str, Any]]] = {
    "O": ("mean-teacher", {}),
    "O by double backward": ("mean-teacher", {"how": "double_backward", "moves_statistics": "both"}),
    "L": ("mean-teacher", {**CODE["V1"], "scheduled": "rate", "scheduled_factor": 20.0}),
    "V2": ("mean-teacher", {**PAPER["V2"], "moves_statistics": "none"}),
    "V1": ("mean-teacher", {**PAPER["V1"], "imputer": "teacher"}),
    "FixMatch": ("fixmatch", {"inner_loss": "cross_entropy", "reduction": "mean", "rate": 5.0}),
    "FixMatch, soft labels": ("fixmatch", {"hard": False}),
    "L on FixMatch": ("fixmatch", {**CODE["V1"], "inner_loss": "cross_entropy", "rate": 2.0}),
    "V1 on FixMatch": (
        "fixmatch",
        {**PAPER["V1"], "inner_loss": "cross_entropy", "reduction": "mean", "second_reduction": "mean"},
    ),
    "L by Eq. (6)": ("mean-teacher", {**CODE["V1"], "how": "last_layer", "derivative": "eq6", "rate": 0.02}),
    "Eq. (6)": ("mean-teacher", {"how": "last_layer", "derivative": "eq6", "outer_reduction": "sum"}),
}


@pytest.mark.parametrize("name", L2I)
def test_learning_to_impute(name: str) -> None:
    """Algorithm 1: the base's step, labels by the student that it left, an inner step, a second step of one Adam."""
    base, settings = L2I[name]
    optimizer = OptimizerConfig("adam", learning_rate=LR, weight_decay=DECAY, decoupled=True)
    run, model, batches = run_of(base, "l2i-published", normalized=True, method_settings=settings, optimizer=optimizer)
    chosen = {**CODE["V2"], "moves_statistics": "inner", "hard": base == "fixmatch", "imputer": "student", **settings}
    theta_star: Parameters
    adam, teacher = torch.optim.Adam(model.parameters(), lr=LR), copy.deepcopy(model)
    for step in range(STEPS):
        batch, lr = batches(step), rate(step, LR)
        assert batch.holdout is not None
        assert batch.holdout_targets is not None
        assert batch.second is not None
        eta = chosen["scheduled_factor"] * lr if "scheduled" in chosen else chosen["rate"]

        # The base's own step, whose labels are the teacher's.
        if base == "mean-teacher":
            z = at(teacher, dict(teacher.named_parameters()), batch.weak).softmax(1)
            logits = model(torch.cat([batch.labeled, batch.second]))
            consistency = (logits[len(batch.labeled) :].softmax(1) - z).square().sum(1).mean()
            weight = 20.0 * math.exp(-5 * (1 - min(1.0, step / STEPS / 0.4)) ** 2)
        else:
            logits, weak, strong = model(torch.cat([batch.labeled, batch.weak, batch.second])).split([6, 10, 10])
            confidence, z = weak.detach().softmax(1).max(1)
            consistency = ((confidence >= 0.5) * cross_entropy(strong, z, reduction="none")).mean()
            weight = 1.0
        loss = cross_entropy(logits[: len(batch.labeled)], batch.targets) + weight * consistency
        updated(adam, model, torch.autograd.grad(loss, list(model.parameters())), lr)

        # Lines 7 to 11, at the parameters it left.
        theta, psi = leaves(model), leaves(model)
        z, mask = imputed(model, psi, batch, chosen["hard"])
        if chosen["imputer"] == "teacher":
            z = at(teacher, dict(teacher.named_parameters()), batch.weak).softmax(1)
        if chosen["variant"] == "V1":  # the labels are themselves what is learned, or their logits are
            z = z.detach()
            if chosen["label_space"] == "logits":  # which of hard labels are not finite
                z = at(model, psi, batch.weak).softmax(1).detach()
            learned = (z.log() if chosen["label_space"] == "logits" else z).clone().requires_grad_()
            z = learned.softmax(1) if chosen["label_space"] == "logits" else learned
        logits = at(model, theta, batch.second)
        inner = inner_loss(logits, z, mask, chosen["inner_loss"], chosen["reduction"])
        of_labeled = cross_entropy(at(model, theta, batch.labeled), batch.targets, reduction=chosen["reduction"])
        moving = list(theta) if chosen.get("derivative") != "eq6" else ["fc.weight", "fc.bias"]
        gradients = torch.autograd.grad(
            inner + chosen["labeled_weight"] * of_labeled, [theta[key] for key in moving], create_graph=True
        )
        theta_star = {**theta, **{key: theta[key].detach() - eta * g for key, g in zip(moving, gradients, strict=True)}}
        logits_h = at(model, theta_star, batch.holdout)
        outer = cross_entropy(logits_h, batch.holdout_targets, reduction=chosen["outer_reduction"])
        if chosen.get("derivative") == "eq6":  # of the labels, in place of the chain rule
            f_h, f_u = (at_features(model, theta, images) for images in (batch.holdout, batch.second))
            residual = logits_h.softmax(1) - one_hot(batch.holdout_targets, CLASSES)
            count = len(residual) if chosen["outer_reduction"] == "mean" else 1
            outer = (eta * (f_u @ f_h.T @ residual / count).detach() * z).sum()
        if chosen["variant"] == "V1":
            moved = learned - chosen["label_step"] * torch.autograd.grad(outer, learned)[0]
            z = moved.softmax(1) if chosen["label_space"] == "logits" else moved
            logits = model(batch.second)
            second = inner_loss(logits, z.detach(), mask, chosen["inner_loss"], chosen["second_reduction"])
            second = second / (CLASSES if chosen["second_reduction"] == "mean_entries" else 1)
            updated(adam, model, torch.autograd.grad(second, list(model.parameters())), lr)
        else:
            updated(adam, model, torch.autograd.grad(outer, list(psi.values())), lr)
            moves = chosen["moves_statistics"]
            for images in {"both": [batch.weak, batch.second], "inner": [batch.second], "none": []}[moves]:
                functional_call(model, {key: value.detach() for key, value in theta.items()}, (images,))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter *= 1 - lr * DECAY
            for average, value in zip(teacher.parameters(), model.parameters(), strict=True):
                average.lerp_(value, 1 - min(0.9, (1 + step) / (10 + step)))
    assert_same_model(run.model, model)
    if base == "mean-teacher":
        for key, value in teacher.named_parameters():
            found = run.average.model.get_parameter(key)
            torch.testing.assert_close(found, value, rtol=1e-9, atol=1e-7 if key == "body.0.bias" else 1e-11)


def at_features(model: Any, parameters: Parameters, images: Tensor) -> Tensor:
    """What the last layer is given."""
    body = {key.removeprefix("body."): value for key, value in parameters.items() if key.startswith("body.")}
    return 4 * at(model.body, body, images)


META_GRADIENT: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "the code without mix-up": ({"mix_up": False}, {}),
    "Algorithm 1": ({"mix_up": False, "labeled_weight": 0.0}, {"rate": 0.5, "scheduled": "rate", "step": 40.0}),
    "Algorithm 1, cross-entropy": (
        {"mix_up": False, "labeled_weight": 0.0, "consistency": "cross_entropy"},
        {"inner_loss": "cross_entropy", "project": False},
    ),
    "neither": ({"mix_up": False}, {}),
}


@pytest.mark.parametrize("name", META_GRADIENT)
def test_meta_gradient_without_mix_up(name: str) -> None:
    """Labels by the model in evaluation mode, a step on them by Eq. (15) or (16), and a step of SGD on both losses."""
    base_settings, settings = META_GRADIENT[name]
    base_settings = {"ramp": 0.0, "weight": 2.0, **base_settings}
    run, model, batches = run_of(
        "mix-up-consistency",
        "none" if name == "neither" else "meta-gradient-published",
        normalized=True,
        base_settings=base_settings,
        method_settings=settings,
        optimizer=OptimizerConfig(learning_rate=0.1, nesterov=False, weight_decay=0.0),
    )
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    entropy = "inner_loss" in settings
    for step in range(STEPS):
        batch = batches(step)
        model.eval()
        with torch.no_grad():
            labels = model(batch.weak).softmax(1)
        if name != "neither":
            loss = cross_entropy(model(batch.labeled), batch.targets)
            g = dict(zip(leaves(model), torch.autograd.grad(loss, list(model.parameters())), strict=True))
            epsilon = 0.01 / math.sqrt(sum(float(value.square().sum()) for value in g.values()))
            derivatives = []
            for sign in (1, -1):
                moved = {key: value.detach() + sign * epsilon * g[key] for key, value in model.named_parameters()}
                logits = functional_call(model, moved, (batch.weak,))
                # -dPhi/dy: 2 (p - y) of the squares, log p of the cross-entropy.
                derivatives.append(logits.log_softmax(1) if entropy else 2 * logits.softmax(1))
            step_size = rate(step, 0.1) * 40.0 / len(labels) if "rate" in settings else rate(step, 0.1)
            labels = (labels - step_size * (derivatives[0] - derivatives[1]) / (2 * epsilon)).detach()
            if settings.get("project", True):
                labels = labels.clamp_min(0) / labels.clamp_min(0).sum(1, keepdim=True)
        model.train()
        of_labeled = (
            cross_entropy(model(batch.labeled), batch.targets) if "labeled_weight" not in base_settings else 0.0
        )
        logits = model(batch.weak)
        squares = (logits.softmax(1) - labels).square().sum(1).mean()
        stepped(sgd, model, of_labeled + 2.0 * (cross_entropy(logits, labels) if entropy else squares), rate(step, 0.1))
    assert_same_parameters(run.model, model, 1e-7, 1e-9)  # of differences


@pytest.mark.parametrize("base", ["mixmatch", "uda", "flexmatch"])
def test_labels_as_a_base_makes_them(base: str) -> None:
    """MixMatch: sharpened means over all views; UDA: sharpened, with a mask; FlexMatch: hard, by its memory."""
    settings = {"inner_loss": "cross_entropy", "rate": 0.5}
    run = trainer(base, "l2i-published", None, method_settings=settings)
    batch, model = run.batches(0), run.model
    assert run.method is not None
    assert batch.second is not None
    theta, psi = leaves(model), leaves(model)
    views = [batch.weak, batch.second, *batch.more] if base == "mixmatch" else [batch.weak]
    q = sum(at(model, psi, view).softmax(1) for view in views) / len(views)
    confident = q.detach().amax(1) >= 0.5
    if base == "flexmatch":
        z = one_hot(q.detach().argmax(1), CLASSES) + (q - q.detach())
        confident = run.base.finish(q.detach(), run.memory)[1] > 0
    else:
        powers = q ** (1 / (0.5 if base == "mixmatch" else 0.4))
        z = powers / powers.sum(1, keepdim=True)
    mask = torch.ones(len(q)).double() if base == "mixmatch" else confident.double()
    inner = inner_loss(at(model, theta, batch.second), z, mask, "cross_entropy", "sum")
    gradients = torch.autograd.grad(inner, list(theta.values()), create_graph=True)
    moved = {key: value.detach() - 0.5 * g for (key, value), g in zip(theta.items(), gradients, strict=True)}
    assert batch.holdout is not None
    outer = cross_entropy(at(model, moved, batch.holdout), batch.holdout_targets)
    wanted = torch.autograd.grad(outer, list(psi.values()))
    found = torch.autograd.grad(run._method_loss(run.method, batch), list(model.parameters()))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
