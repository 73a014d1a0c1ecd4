"""Label Gradient Alignment against autograd of the objective of its Algorithm 1, averages held constant."""

import pytest
import torch
from brute_force import Layer, assert_close, make_layer, reduced
from torch import Tensor
from torch.nn import functional

from fastmeta import LabelGradientAlignment

DECAY, DECAY_NORM, EPSILON = 0.8, 0.6, 1e-3


class Algorithm1:
    """Eq. (2) written out, on the concatenated weight and bias."""

    def __init__(self, decay: float, decay_norm: float, epsilon: float) -> None:
        self.decay, self.decay_norm, self.epsilon = decay, decay_norm, epsilon
        self.ema_labeled: Tensor | None = None
        self.ema_fourth: Tensor | None = None

    def label_logits_gradient(self, layer: Layer, w: Tensor) -> Tensor:
        def flat(value: Tensor, create_graph: bool = False) -> Tensor:
            grads = layer.gradient(value, layer.parameters, create_graph)
            return torch.cat([g.flatten() for g in grads if g is not None])

        w = w.clone().requires_grad_()
        g_l = flat(layer.outer(layer.parameters))
        f_u = functional.linear(layer.features_u, *layer.parameters)
        g_u = flat(reduced(f_u, w.softmax(-1), "cross_entropy"), create_graph=True)
        self.ema_labeled = g_l if self.ema_labeled is None else self.decay * self.ema_labeled + (1 - self.decay) * g_l
        v = self.ema_labeled - g_u
        fourth = v.detach() ** 4
        if self.ema_fourth is not None:
            fourth = self.decay_norm * self.ema_fourth + (1 - self.decay_norm) * fourth
        self.ema_fourth = fourth
        objective = (v.square() / (self.epsilon + fourth.sqrt())).sum()
        return torch.autograd.grad(objective, w)[0]


def method_and_reference(**options) -> tuple[LabelGradientAlignment, Algorithm1]:
    method = LabelGradientAlignment(
        9, 4, decay=DECAY, decay_norm=DECAY_NORM, epsilon=EPSILON, dtype=torch.float64, **options
    )
    return method, Algorithm1(DECAY, DECAY_NORM, EPSILON)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_gradient_of_the_objective(draw, bias):
    layer = make_layer(draw, bias=bias)
    method, reference = method_and_reference()
    index = torch.tensor([8, 1, 3, 0, 5, 6])
    refined = method.refine(**layer.batch(), index=index)
    expected = reference.label_logits_gradient(layer, torch.zeros(6, 4, dtype=torch.float64))
    assert_close(method.state_dict()["update.table.exp_avg"][index] / (1 - 0.9), expected)
    assert torch.equal(refined.labels, torch.full((6, 4), 0.25, dtype=torch.float64))
    assert torch.equal(refined.weights, torch.ones(6, dtype=torch.float64))
    assert refined.loss.item() == 0


def test_several_steps_are_adam_on_the_objective(draw):
    """Averages, Adam and the order of reading and writing, over batches that differ."""
    method, reference = method_and_reference(lr=0.5)
    w = torch.zeros(6, 4, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([w], lr=0.5)
    index = torch.arange(6)
    for _ in range(4):
        layer = make_layer(draw)
        refined = method.refine(**layer.batch(), index=index)
        assert_close(refined.labels, w.softmax(-1), 1e-8)
        w.grad = reference.label_logits_gradient(layer, w.detach())
        adam.step()
    assert_close(method.label_logits[index], w, 1e-8)


def test_rows_that_were_not_sampled_stay(draw):
    layer = make_layer(draw)
    method, _ = method_and_reference()
    method.refine(**layer.batch(), index=torch.tensor([0, 1, 2, 3, 4, 5]))
    before = method.label_logits.clone()
    method.refine(**make_layer(draw).batch(), index=torch.tensor([5, 4, 3, 2, 8, 7]))
    changed = (method.label_logits != before).any(-1)
    assert changed.tolist() == [False, False, True, True, True, True, False, True, True]


def test_labels_come_to_explain_the_labeled_gradient(draw):
    """On one fixed problem that has a solution, the true labels, the gap that the method minimizes shrinks."""
    layer = make_layer(draw, holdout=6)
    layer.features_u = layer.features_h
    method = LabelGradientAlignment(6, 4, lr=0.1, dtype=torch.float64)

    def gap(labels: Tensor) -> float:
        f_u = functional.linear(layer.features_u, *layer.parameters)
        g_u = layer.gradient(reduced(f_u, labels, "cross_entropy"), layer.parameters)
        g_l = layer.gradient(layer.outer(layer.parameters), layer.parameters)
        return sum((u - g).square().sum().item() for u, g in zip(g_u, g_l, strict=True))

    labels = [method.refine(**layer.batch(), index=torch.arange(6)).labels for _ in range(60)]
    assert gap(labels[-1]) < 0.1 * gap(labels[0])


@pytest.mark.parametrize("separate", [False, True])
def test_schedule_of_the_labeled_loss(draw, separate):
    """With the loop's own cross-entropy the labeled loss then weighs T(i)."""
    layer = make_layer(draw)
    method = LabelGradientAlignment(6, 4, labeled_weight=lambda step: [1.0, 3.0][step])
    logits, classes = layer.holdout.logits, layer.classes
    batch = layer.batch() | {"index": torch.arange(6)}
    if separate:
        x, classes = draw.normal(3, 5), draw.classes(3, 4)
        labeled = layer.outputs(x)
        logits = labeled.logits
        batch |= {"labeled": labeled, "labeled_targets": classes}
    assert method.refine(**batch).loss.item() == 0
    loss = method.refine(**batch).loss
    own = functional.cross_entropy(logits, classes)
    expected = torch.autograd.grad(3 * own, layer.weight, retain_graph=True)[0]
    assert_close(torch.autograd.grad(own + loss, layer.weight, retain_graph=True)[0], expected)


def test_the_schedule_needs_logits_on_the_graph(draw):
    """Without a graph the returned loss would be a constant; under no_grad it is on that of the logits."""
    layer = make_layer(draw)
    method = LabelGradientAlignment(6, 4, labeled_weight=lambda step: 3.0)
    batch = layer.batch() | {"index": torch.arange(6)}
    with torch.no_grad():
        assert method.refine(**batch).loss.requires_grad
    before = method.label_logits.clone()
    off = batch["holdout"]._replace(logits=batch["holdout"].logits.detach())
    with pytest.raises(
        ValueError, match=r"holdout must have logits on the graph with labeled_weight, .*torch\.no_grad"
    ):
        method.refine(**(batch | {"holdout": off}))
    assert torch.equal(method.label_logits, before)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_averages_without_the_current_batch(draw, reduction):
    """Each step is along the averages of those before it; the first has none but its own."""
    method, _ = method_and_reference(include_current=False, reduction=reduction)
    ema = fourth = None
    for _ in range(3):
        layer = make_layer(draw)
        f_u = functional.linear(layer.features_u, *layer.parameters)
        labels = method.label_logits[:6].softmax(-1)
        g_u = layer.gradient(reduced(f_u, labels, "cross_entropy", None, reduction), layer.parameters)
        f_h = functional.linear(layer.features_h, *layer.parameters)
        g_l = layer.gradient(reduced(f_h, layer.targets, "cross_entropy", None, reduction), layer.parameters)
        ema = [g.clone() for g in g_l] if ema is None else ema
        v = [e - u for e, u in zip(ema, g_u, strict=True)]
        fourth = [x**4 for x in v] if fourth is None else fourth
        before = method.state_dict()["update.table.exp_avg"][:6]
        method.refine(**layer.batch(), index=torch.arange(6))
        direction = [2 * x / (EPSILON + f.sqrt()) for x, f in zip(v, fourth, strict=True)]
        z = functional.linear(layer.features_u, *direction)
        tangent = z - (f_u.softmax(-1) * z).sum(-1, keepdim=True)
        tangent = tangent / (6 if reduction == "mean" else 1)
        expected = labels * (tangent - (labels * tangent).sum(-1, keepdim=True))
        assert_close((method.state_dict()["update.table.exp_avg"][:6] - 0.9 * before) / 0.1, expected.detach(), 1e-8)
        ema = [DECAY * e + (1 - DECAY) * g for e, g in zip(ema, g_l, strict=True)]
        fourth = [DECAY_NORM * f + (1 - DECAY_NORM) * x**4 for f, x in zip(fourth, v, strict=True)]


def lr_of(method: LabelGradientAlignment, draw) -> float:
    """The first step of Adam has length lr wherever the gradient is not 0."""
    method.refine(**make_layer(draw).batch(), index=torch.arange(6))
    return float(method.label_logits[:6].abs().max())


def test_presets(draw):
    """Figure 1 prints both steps and epsilon; the harness that Section 4 takes over has Adam's 3e-3 and a ramp."""
    paper, realistic = (LabelGradientAlignment.from_preset(name, 9, 4) for name in ("paper", "realistic"))
    assert paper.direction.epsilon == realistic.direction.epsilon == 1e-3
    assert paper.labeled_weight is None
    assert [realistic.labeled_weight(step) for step in (200_000, 10**6)] == [1.0, 1.0]
    assert realistic.labeled_weight(0) == pytest.approx(148.4, abs=0.1)
    assert realistic.labeled_weight(100_000) == pytest.approx(torch.tensor(1.25).exp().item())
    layer = make_layer(draw)
    own = functional.cross_entropy(layer.holdout.logits, layer.classes)
    loss = realistic.refine(**layer.batch(), index=torch.arange(6)).loss
    assert ((own + loss) / own).item() == pytest.approx(realistic.labeled_weight(0), rel=1e-5)
    assert lr_of(LabelGradientAlignment.from_preset("paper", 9, 4), draw) == pytest.approx(1e-3, rel=1e-3)
    assert lr_of(LabelGradientAlignment.from_preset("realistic", 9, 4), draw) == pytest.approx(3e-3, rel=1e-3)
    with pytest.raises(ValueError, match="has the presets paper, realistic, got 'official_code'"):
        LabelGradientAlignment.from_preset("official_code", 5, 3)


def test_arguments_are_checked(draw):
    layer = make_layer(draw)
    with pytest.raises(ValueError, match=r"num_classes is 3, but logits are \[6, 4\]"):
        LabelGradientAlignment(9, 3).refine(**layer.batch(), index=torch.arange(6))
    with pytest.raises(ValueError, match="decay must be in"):
        LabelGradientAlignment(9, 3, decay=1.5)
