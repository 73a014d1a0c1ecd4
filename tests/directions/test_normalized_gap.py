"""The normalized gap at both levels, against autograd of the objective of Label Gradient Alignment, Algorithm 1."""

import dataclasses
from typing import Any

import pytest
import torch
from brute_force import assert_close
from hypothesis import given, settings
from torch import Tensor, nn
from whole_model_brute_force import brute_force_alignment_gradient, flatten, loss_gradient, trainable
from whole_model_nets import NETS, NetCase, batch_size, net_cases

from fastmeta import ops
from fastmeta.derivatives import LabelGradient
from fastmeta.directions import NormalizedGap
from fastmeta.problem import LastLayerProblem, Problem, Rows, WholeModelProblem, vectors
from fastmeta.problem.model_function import ModelFunction

DECAY, DECAY_NORM, EPSILON = 0.8, 0.6, 1e-3
MODELS = [(net, mode) for net in NETS for mode in ("train", "eval") if net in ("conv", "text") or mode == "train"]
LEVELS = ["last layer", "whole model"]


class Algorithm1:
    """Its averages by parameter name, updated with PyTorch's own gradients; then the gradient of Eq. (2)."""

    def __init__(self) -> None:
        self.ema_labeled: dict[str, Tensor] = {}
        self.ema_fourth: dict[str, Tensor] = {}

    def label_logits_gradient(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        w = batch["label_logits"]
        g_l = loss_gradient(model, batch["labeled"], batch["targets"])
        g_u = loss_gradient(model, batch["unlabeled"], w.softmax(-1))
        if not self.ema_labeled:
            self.ema_labeled = g_l
            self.ema_fourth = {name: (g_l[name] - g_u[name]) ** 4 for name in g_l}
        else:
            for name, ema in self.ema_labeled.items():
                self.ema_labeled[name] = ema = DECAY * ema + (1 - DECAY) * g_l[name]
                fourth = (ema - g_u[name]) ** 4
                self.ema_fourth[name] = DECAY_NORM * self.ema_fourth[name] + (1 - DECAY_NORM) * fourth
        return brute_force_alignment_gradient(
            model, batch["unlabeled"], w, self.ema_labeled, self.ema_fourth, epsilon=EPSILON
        )


def gap() -> NormalizedGap:
    return NormalizedGap(decay=DECAY, decay_norm=DECAY_NORM, epsilon=EPSILON)


def draw_batch(make_inputs: Any, generator: torch.Generator, classes: int = 3) -> dict[str, Any]:
    return {
        "unlabeled": make_inputs(4),
        "labeled": make_inputs(3),
        "targets": torch.randint(classes, (3,), generator=generator),
        "label_logits": torch.randn(4, classes, generator=generator, dtype=torch.float64),
    }


def problem_of(model: nn.Module, batch: dict[str, Any], level: str = "whole model") -> Problem:
    function, labels = ModelFunction(model), batch["label_logits"].softmax(-1)
    if level == "whole model":
        return WholeModelProblem(function, batch["unlabeled"], labels, batch["labeled"], batch["targets"])
    seen = [function.outputs(batch[name]) for name in ("unlabeled", "labeled")]
    rows = [Rows(outputs.features.detach(), outputs.logits.detach()) for outputs in seen]
    return LastLayerProblem(rows[0], labels, rows[1], batch["targets"])


def label_logits_gradient(problem: Problem, rule: NormalizedGap) -> Tensor:
    """What the method's Adam gets: the label gradient pulled through the softmax."""
    how = "last_layer" if isinstance(problem, LastLayerProblem) else "jvp"
    gradient = LabelGradient("cross_entropy", how=how)(problem, rule(problem))
    p = problem.labels
    return p * (gradient - (p * gradient).sum(-1, keepdim=True))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("net", "mode"), MODELS)
def test_gradient_of_the_objective_over_three_steps(generator, net, mode, level):
    model, make_inputs = NETS[net](generator)
    model.train(mode == "train")
    if level == "last layer":
        model.requires_grad_(False)
        model.fc.requires_grad_(True)
    rule, reference = gap(), Algorithm1()
    for _ in range(3):
        batch = draw_batch(make_inputs, generator)
        expected = reference.label_logits_gradient(model, batch)
        assert_close(label_logits_gradient(problem_of(model, batch, level), rule), expected)
    assert_close(torch.cat([ema.flatten() for ema in rule.ema_labeled]), flatten(reference.ema_labeled))
    assert_close(torch.cat([ema.flatten() for ema in rule.ema_fourth]), flatten(reference.ema_fourth))


@settings(max_examples=15, deadline=None)
@given(case=net_cases())
def test_any_shape(case: NetCase):
    shape = (batch_size(case.inputs), case.classes)
    batch = {
        "unlabeled": case.inputs,
        "labeled": case.holdout,
        "targets": torch.randint(case.classes, (batch_size(case.holdout),), generator=case.generator),
        "label_logits": torch.randn(shape, generator=case.generator, dtype=torch.float64),
    }
    got = label_logits_gradient(problem_of(case.model, batch), gap())
    expected = Algorithm1().label_logits_gradient(case.model, batch)
    assert float((got - expected).norm()) <= 1e-9 * float(expected.norm()) + 1e-12


def test_frozen_parameters_are_left_out(generator):
    model, make_inputs = NETS["tied"](generator)
    rule = gap()
    direction = rule(problem_of(model, draw_batch(make_inputs, generator)))
    assert tuple(direction) == tuple(trainable(model))
    assert not any(name.startswith("frozen") for name in direction)
    assert len(rule.ema_labeled) == len(rule.ema_fourth) == len(direction)


def test_one_pass_over_the_parameters(generator, monkeypatch):
    """All tensors go to the list operator in one call, which updates the averages where they are."""
    calls = []
    operator = ops.alignment_direction
    monkeypatch.setattr(
        ops, "alignment_direction", lambda *lists, **rest: calls.append(lists) or operator(*lists, **rest)
    )
    model, make_inputs = NETS["conv"](generator)
    rule = gap()
    rule(problem_of(model, draw_batch(make_inputs, generator)))
    kept = [*rule.ema_labeled, *rule.ema_fourth]
    rule(problem_of(model, draw_batch(make_inputs, generator)))
    assert all(ema is before for ema, before in zip([*rule.ema_labeled, *rule.ema_fourth], kept, strict=True))
    assert [len(tensors) for call in calls for tensors in call] == [len(trainable(model))] * 8


def test_labeled_examples_that_are_not_the_hold_out_ones(generator):
    model, make_inputs = NETS["mlp"](generator)
    batch, other = draw_batch(make_inputs, generator), draw_batch(make_inputs, generator)
    expected = gap()(problem_of(model, batch))
    problem = dataclasses.replace(problem_of(model, batch), holdout=other["labeled"], targets=other["targets"])
    problem = dataclasses.replace(problem, labeled=batch["labeled"], labeled_targets=batch["targets"])
    assert_close(vectors.flat(gap()(problem)), vectors.flat(expected))


@pytest.mark.parametrize("level", LEVELS)
def test_state_resumes_bit_for_bit(generator, level):
    model, make_inputs = NETS["conv"](generator)
    problems = [problem_of(model, draw_batch(make_inputs, generator), level) for _ in range(4)]
    rule = gap()
    directions = [rule(problem) for problem in problems]
    before = gap()
    for problem in problems[:2]:
        before(problem)
    state = before.state_dict()
    before(problems[2])  # what was saved does not move with the rule
    resumed = gap()
    resumed.load_state_dict(state)
    for problem, direction in zip(problems[2:], directions[2:], strict=True):
        assert torch.equal(vectors.flat(resumed(problem)), vectors.flat(direction))


@pytest.mark.parametrize("include_current", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_averages_of_16_bit_gradients(generator, dtype, include_current):
    """In float32: an average of decay 0.99 moves by less than bfloat16 resolves, and v^4 leaves float16 at v = 16."""
    batch = draw_batch(NETS["mlp"](generator).make_inputs, generator)
    rows = [Rows(torch.randn(n, 6, generator=generator), torch.randn(n, 3, generator=generator)) for n in (4, 3)]
    wide = LastLayerProblem(rows[0], batch["label_logits"].softmax(-1).float(), rows[1], batch["targets"])
    narrow = dataclasses.replace(
        wide, unlabeled=Rows(*(t.to(dtype) for t in rows[0])), holdout=Rows(*(t.to(dtype) for t in rows[1])),
        labels=wide.labels.to(dtype),
    )  # fmt: skip
    rules = [NormalizedGap(include_current=include_current) for _ in range(2)]
    for _ in range(3):
        expected, got = (rule(problem) for rule, problem in zip(rules, (wide, narrow), strict=True))
    assert all(ema.dtype == torch.float32 for ema in [*rules[1].ema_labeled, *rules[1].ema_fourth])
    assert got.weight.dtype == dtype
    # Of weight and bias together: the bias's sum may cancel.
    mean, exact = (torch.cat([ema.flatten() for ema in rule.ema_labeled]) for rule in (rules[1], rules[0]))
    assert_close(mean, exact, 0.03)
    assert_close(got.weight.float(), expected.weight, 0.1)


def test_another_model_is_refused(generator):
    rule = gap()
    for width, message in ((6, None), (7, r"do not fit gradients of \[\[7, 4\], .*; use one rule a layer")):
        model, make_inputs = NETS["mlp"](generator, hidden=width)
        problem = problem_of(model, draw_batch(make_inputs, generator))
        if message is None:
            rule(problem)
        else:
            with pytest.raises(ValueError, match=message):
                rule(problem)
