"""Meta-Gradient where the whole model moves, its published probes, its presets and its mix-up."""

import pytest
import torch
from cases import Draw
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from whole_model_brute_force import brute_force_directional, flatten, forward, loss_gradient
from whole_model_nets import NETS, Inputs, net_cases

from fastmeta import MetaGradient
from fastmeta.methods.meta_gradient import training

NAMES = ("paper", "official_code")


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    assert actual.shape == expected.shape
    assert float((actual - expected).norm()) <= tolerance * float(expected.norm()) + 1e-14


class Task:
    """A net with labeled and unlabeled inputs, and the quantities of the slides by plain autograd."""

    def __init__(self, draw: Draw, name: str = "conv", count: int = 5) -> None:
        self.model, self.make = NETS[name](draw.generator)
        self.unlabeled, self.holdout = self.make(count), self.make(4)
        self.targets = draw.classes(4, 3)
        self.count = count

    def refine(self, method: MetaGradient, **options) -> Tensor:
        batch = {"unlabeled": self.unlabeled, "holdout": self.holdout, "targets": self.targets} | options
        return method.refine(model=self.model, **batch).labels

    def labels(self) -> Tensor:
        return forward(self.model, self.unlabeled).softmax(-1).detach()

    def gradient(self) -> dict[str, Tensor]:
        return loss_gradient(self.model, self.holdout, self.targets)

    def slope(self) -> Tensor:
        """``2 D_v p``, v the labeled gradient."""
        v = self.gradient()
        return brute_force_directional(self.model, self.unlabeled, v, lambda f: 2 * f.softmax(-1))

    def probe(self, radius: float, one_sided: bool = False) -> Tensor:
        """Eq. (16) with parameters really moved."""
        v = self.gradient()
        epsilon = radius / float(flatten(v).norm())

        def at(t: float) -> Tensor:
            theta = {n: p + t * v[n] for n, p in self.model.named_parameters() if n in v}
            return forward(self.model, self.unlabeled, theta).softmax(-1).detach()

        return 2 * (at(epsilon) - at(0.0)) / epsilon if one_sided else (at(epsilon) - at(-epsilon)) / epsilon


@settings(max_examples=30, deadline=None)
@given(case=net_cases(), how=st.sampled_from(("jvp", "double_backward")), rate=st.sampled_from((None, 0.3)))
def test_exact_step_of_any_net(case, how, rate):
    draw = Draw(case.generator)
    targets = draw.classes(len(forward(case.model, case.holdout)), case.classes)
    v = loss_gradient(case.model, case.holdout, targets)
    labels = forward(case.model, case.inputs).softmax(-1).detach()
    slope = brute_force_directional(case.model, case.inputs, v, lambda f: 2 * f.softmax(-1))
    method = MetaGradient(how=how, step=0.7, rate=rate, project=False)
    refined = method.refine(model=case.model, unlabeled=case.inputs, holdout=case.holdout, targets=targets)
    assert_close(refined.labels - labels, -0.7 * (1.0 if rate is None else rate / len(labels)) * slope, 1e-8)


@pytest.mark.parametrize("loss", ["cross_entropy", "mse", "binary_cross_entropy"])
def test_another_loss_that_is_trained(draw, loss):
    """Of a cross-entropy the label gradient has ``D_v log p``; without a softmax labels are no probabilities."""
    task = Task(draw)
    pulls = {"cross_entropy": lambda f: f.log_softmax(-1), "mse": lambda f: 2 * f, "binary_cross_entropy": lambda f: f}
    slope = brute_force_directional(task.model, task.unlabeled, task.gradient(), pulls[loss])
    labels = draw.probabilities(5, 3)
    for how in ("jvp", "double_backward"):
        method = MetaGradient(how=how, inner_loss=loss, step=0.7, project=False)
        assert_close(task.refine(method, labels=labels), labels - 0.7 * slope)
    for how, order in (("finite_difference", 2), ("forward_difference", 1)):
        coarse, fine = (
            float(
                (
                    task.refine(
                        MetaGradient(how=how, inner_loss=loss, step=1.0, radius=radius, project=False), labels=labels
                    )
                    - labels
                    + slope
                ).norm()
            )
            for radius in (2e-3, 1e-3)
        )
        assert 0.8 * 2**order < coarse / fine < 1.2 * 2**order
    if loss != "cross_entropy":
        with pytest.raises(ValueError, match=f"project must be False for {loss}"):
            MetaGradient(inner_loss=loss)
    with pytest.raises(ValueError, match="inner_loss must be mse_probs for how='last_layer_difference'"):
        MetaGradient(how="last_layer_difference", inner_loss=loss, project=False)
    with pytest.raises(ValueError, match="inner_loss must be mse_probs, which the theorem is about"):
        MetaGradient(inner_loss=loss, project=False, rate=0.1).step_condition(
            model=task.model, unlabeled=task.unlabeled, holdout=task.holdout, targets=task.targets
        )


@pytest.mark.parametrize("name", list(NETS))
@pytest.mark.parametrize("how", ["finite_difference", "forward_difference"])
@pytest.mark.parametrize("radius", [1e-3, 0.01, 0.3])
def test_published_probes(draw, name, how, radius):
    task = Task(draw, name)
    method = MetaGradient(how=how, step=0.2, radius=radius, project=False)
    expected = -0.2 * task.probe(radius, how == "forward_difference")
    assert_close(task.refine(method) - task.labels(), expected, 1e-7)


@pytest.mark.parametrize(("how", "order"), [("finite_difference", 2), ("forward_difference", 1)])
def test_probes_converge_to_the_derivative(draw, how, order):
    task = Task(draw, "mlp")
    exact = -task.slope()
    errors = []
    for radius in (4e-3, 2e-3):
        method = MetaGradient(how=how, step=1.0, radius=radius, project=False)
        errors.append(float((task.refine(method) - task.labels() - exact).norm()))
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.1)


@pytest.mark.parametrize("how", ["finite_difference", "forward_difference"])
@pytest.mark.parametrize("rate", [None, 0.3])
def test_the_fused_step_is_the_composed_one(draw, how, rate):
    """A mask of ones goes through derivative and update; without it one operator does both."""
    task = Task(draw)
    method = MetaGradient(how=how, step=3.0, rate=rate)
    assert_close(task.refine(method), task.refine(method, mask=torch.ones(5)), 1e-10)


def count_passes(task: Task, method: MetaGradient, **options) -> int:
    calls: list[None] = []
    handle = task.model.register_forward_hook(lambda *call: calls.append(None))
    task.refine(method, **options)
    handle.remove()
    return len(calls)


def test_no_pass_is_run_twice(draw):
    task = Task(draw)
    passes = {"jvp": 2, "double_backward": 2, "forward_difference": 3, "finite_difference": 4}
    for how, expected in passes.items():
        assert count_passes(task, MetaGradient(how=how)) == expected
    # With the loop's own labeled gradient and labels that it has: the derivative alone.
    known = {"holdout": None, "targets": None, "holdout_gradient": task.gradient(), "labels": task.labels()}
    assert count_passes(task, MetaGradient(how="jvp"), **known) == 1
    assert count_passes(task, MetaGradient(how="finite_difference"), **known) == 2
    method = MetaGradient(how="jvp", project=False)
    assert_close(task.refine(method, **known), task.refine(method), 1e-12)


@pytest.mark.parametrize("how", ["jvp", "finite_difference"])
def test_statistics(draw, how):
    """``running``: evaluation mode for every pass of the method; the model is in training mode before and after."""
    task = Task(draw)
    method = MetaGradient(how=how, statistics="running", step=0.5, project=False)
    state = {n: t.clone() for n, t in task.model.state_dict().items()}
    running = task.refine(method)
    as_it_stands = task.refine(MetaGradient(how=how, step=0.5, project=False))
    assert task.model.training
    assert all(torch.equal(t, state[n]) for n, t in task.model.state_dict().items())
    task.model.eval()
    slope = task.slope() if how == "jvp" else task.probe(0.01)
    assert_close(running - task.labels(), -0.5 * slope, 1e-7)
    assert float((running - as_it_stands).norm()) > 1e-3


def test_presets(draw):
    """Eq. (16) has alpha / B before the difference and ends there; the code has neither and projects."""
    task = Task(draw, count=8)
    paper, code = (task.refine(MetaGradient.from_preset(name)) for name in NAMES)
    task.model.eval()
    labels, probe = task.labels(), task.probe(0.01)
    assert_close(paper, labels - 128 * 0.1 / 8 * probe, 1e-7)
    moved = (labels - 0.1 * probe).clamp_min(0)
    assert_close(code, moved / moved.sum(-1, keepdim=True), 1e-7)


def test_presets_are_one_at_the_published_batch_size(draw):
    """Where no label leaves the simplex and there is one process they differ by nothing else."""
    task = Task(draw, "mlp", count=128)
    paper, code = (task.refine(MetaGradient.from_preset(name, project=False)) for name in NAMES)
    assert_close(paper, code, 1e-12)
    exact = task.refine(MetaGradient.from_preset("paper", how="jvp"))
    assert_close(exact - task.labels(), -0.1 * task.slope())


def test_a_row_of_labels_never_becomes_zero(draw):
    """Row sums stay 1 whatever the step, so the code's rule for a row without a positive entry has no occasion."""
    task = Task(draw)
    for how in ("jvp", "finite_difference"):
        moved = task.refine(MetaGradient(how=how, step=1e4, project=False))
        assert_close(moved.sum(-1), torch.ones(5, dtype=torch.float64), 1e-7)
        assert bool((moved.max(-1).values > 0).all())


def test_the_loop_around_it(draw):
    """What follows the learning rate, and the ramp of the consistency loss: none in the slides, 1% in the code."""
    task = Task(draw, count=8)
    for name in NAMES:
        loop, method = training(name), MetaGradient.from_preset(name, project=False)
        first = task.refine(method)
        setattr(method, loop.scheduled, 0.1 * getattr(method, loop.scheduled))  # the learning rate drops
        task.model.eval()
        assert_close(task.refine(method) - task.labels(), 0.1 * (first - task.labels()), 1e-6)
        task.model.train()
    weights = {name: [training(name).consistency_weight_at(t) for t in (0.0, 0.0025, 0.01, 1.0)] for name in NAMES}
    assert weights == {"paper": [1.0] * 4, "official_code": [0.0, 0.25, 1.0, 1.0]}
    assert {training(name).mix_up for name in NAMES} == {1.0}


@pytest.mark.parametrize("how", ["jvp", "finite_difference", "forward_difference"])
def test_autocast(draw, how):
    """Predictions of half precision are refined in float32."""
    task = Task(draw, "mlp")
    task.model.float()
    task.unlabeled, task.holdout = task.unlabeled.float(), task.holdout.float()
    method = MetaGradient(how=how, step=0.1, radius=1.0)
    full = task.refine(method)
    with torch.autocast("cpu", torch.bfloat16):
        half = task.refine(method)
    assert half.dtype == torch.float32
    assert_close(half, full, 0.05)


def test_dict_inputs(draw):
    """A text model by keyword arguments, on every way."""
    task = Task(draw, "text")
    inputs: Inputs = task.unlabeled
    assert set(inputs) == {"input_ids", "attention_mask"}
    exact = task.refine(MetaGradient(how="jvp"))
    assert_close(task.refine(MetaGradient(how="double_backward")), exact)
    assert_close(task.refine(MetaGradient(how="finite_difference", radius=1e-4)), exact, 1e-5)
    layer = MetaGradient(how="last_layer")
    assert task.refine(layer).shape == (5, 3)
