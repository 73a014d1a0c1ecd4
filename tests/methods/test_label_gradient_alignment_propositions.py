"""The three propositions of Label Gradient Alignment (Section 3.1), each on a small problem.

Its simplifications: gradient descent for Adam, no minibatches, ``EMA(x) = x``. The paper's loss is ``|y - X theta|^2 /
(2 n)``, half of ``mse``, so that its epsilon is a quarter of the one given here.
"""

from dataclasses import dataclass

import pytest
import torch
from brute_force import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor
from whole_model_brute_force import flatten, forward, loss_gradient
from whole_model_nets import mlp

from fastmeta import LabelGradientAlignment, Method, Outputs
from fastmeta.derivatives import LabelGradient
from fastmeta.directions import NormalizedGap
from fastmeta.updates import LabelStep

EPSILON = 1e-3  # Figure 1
NO_AVERAGE = {"decay": 0.0, "decay_norm": 0.0}


@dataclass
class Regression:
    """Labeled ``X_l [n_l, m], y_l [n_l]`` and unlabeled ``X_u [n_u, m]`` inputs of a linear model."""

    labeled: Tensor
    targets: Tensor
    unlabeled: Tensor

    def labeled_gradient(self, theta: Tensor) -> Tensor:
        """Eq. (8). ``[m]``."""
        return self.labeled.T @ (self.labeled @ theta - self.targets) / len(self.targets)

    def unlabeled_gradient(self, theta: Tensor, labels: Tensor) -> Tensor:
        """Eq. (9). ``[m]``."""
        return self.unlabeled.T @ (self.unlabeled @ theta - labels) / len(labels)

    def batch(self, theta: Tensor) -> dict[str, Outputs | Tensor]:
        def outputs(inputs: Tensor) -> Outputs:
            return Outputs(inputs, (inputs @ theta).unsqueeze(1), theta.unsqueeze(0), None)

        unlabeled, holdout = outputs(self.unlabeled), outputs(self.labeled)
        return {"unlabeled": unlabeled, "holdout": holdout, "targets": self.targets.unsqueeze(1)}

    def solution(self) -> Tensor:
        """Eq. (5)."""
        return torch.linalg.lstsq(self.labeled, self.targets.unsqueeze(1)).solution[:, 0]


def descend(problem: Regression, steps: int, *, rate: float, label_rate: float, epsilon: float) -> list[Tensor]:
    """theta_0, theta_1, ... of Eq. (10) and (11)."""
    method = Method(
        NormalizedGap(loss="mse", epsilon=4 * epsilon, **NO_AVERAGE),
        LabelGradient("mse"),
        LabelStep(step=label_rate / 2, project=False),
    )
    theta = torch.zeros(problem.unlabeled.shape[1], dtype=torch.float64)
    labels = torch.zeros(len(problem.unlabeled), dtype=torch.float64)
    points = [theta]
    for _ in range(steps):
        refined = method.refine(**problem.batch(theta), labels=labels.unsqueeze(1))
        theta = theta - rate * problem.unlabeled_gradient(theta, labels)
        labels = refined.labels[:, 0]
        points.append(theta)
    return points


def orthonormal(rows: int, columns: int, generator: Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64))[0]


def uncorrelated(labeled: Tensor, unlabeled: Tensor, b: Tensor, seed: int) -> Regression:
    """Inputs with ``X^T X / n`` diagonal, of these eigenvalues, and ``X_l^T y_l / n_l = b``."""
    generator = Generator().manual_seed(seed)
    n_l, n_u, m = 2 * len(b) + 1, 3 * len(b), len(b)
    q_l, q_u = orthonormal(n_l, m, generator), orthonormal(n_u, m, generator)
    noise = torch.randn(n_l, generator=generator, dtype=torch.float64)
    targets = q_l @ ((n_l / labeled).sqrt() * b) + noise - q_l @ (q_l.T @ noise)
    return Regression(q_l * (n_l * labeled).sqrt(), targets, q_u * (n_u * unlabeled).sqrt())


def coefficients(labeled: Tensor, unlabeled: Tensor, b: Tensor, seed: int) -> Tensor:
    """``c_k`` of Eq. (12) along the run. ``[K + 1, m]``.

    The step on the labels is of Figure 1's size: with larger ones r_i jumps around 0, which magnifies rounding.
    """
    points = descend(uncorrelated(labeled, unlabeled, b, seed), 40, rate=0.1, label_rate=2 * EPSILON, epsilon=EPSILON)
    return torch.stack(points) * labeled / b


@settings(max_examples=8, deadline=None)
@given(m=st.integers(2, 5), seed=st.integers(0, 2**31))
def test_proposition_1_every_dimension_moves_on_its_own(m, seed):
    """Where ``X_l^T X_l`` and ``X_u^T X_u`` are diagonal, c_{k,i} does not depend on the eigenvalues of j != i."""
    generator = Generator().manual_seed(seed)
    first, second = (0.2 + 2 * torch.rand(2, m, generator=generator, dtype=torch.float64) for _ in range(2))
    b = torch.randn(m, generator=generator, dtype=torch.float64).sign() * (
        0.5 + torch.rand(m, generator=generator, dtype=torch.float64)
    )
    i = int(torch.randint(m, (), generator=generator))
    second[:, i] = first[:, i]
    one, other = coefficients(*first, b, seed), coefficients(*second, b, seed + 1)
    assert_close(one[:, i], other[:, i])
    assert bool(((one - other).abs().amax(0) > 1e-6)[torch.arange(m) != i].all()), "and the others did move otherwise"


def test_proposition_1_needs_uncorrelated_inputs(generator):
    """The condition that the proposition states: the normalization is not invariant to a change of basis."""
    labeled, unlabeled, b = torch.ones(3, 2, dtype=torch.float64)
    rotation = orthonormal(2, 2, generator)
    runs = []
    for scale in (1.0, 3.0):
        problem = uncorrelated(labeled, unlabeled * torch.tensor([1.0, scale]), b, 0)
        problem.unlabeled = problem.unlabeled @ rotation
        runs.append(torch.stack(descend(problem, 40, rate=0.1, label_rate=2 * EPSILON, epsilon=EPSILON))[:, 0])
    assert float((runs[0] - runs[1]).abs().max()) > 1e-6


def label_gradient(problem: Regression, theta: Tensor, labels: Tensor) -> Tensor:
    """``grad_y |g_l - g_u|^2_normalized``. ``[n_u]``."""
    step = Method(
        NormalizedGap(loss="mse", epsilon=EPSILON, **NO_AVERAGE),
        LabelGradient("mse"),
        LabelStep(step=1.0, project=False),
    )
    return labels - step.refine(**problem.batch(theta), labels=labels.unsqueeze(1)).labels[:, 0]


@settings(max_examples=10, deadline=None)
@given(m=st.integers(1, 5), n_u=st.integers(1, 9), seed=st.integers(0, 2**31))
def test_proposition_2_in_regression(m, n_u, seed):
    """Let ``|g_l - g_u| = 0`` be attainable and grad L be linear in y_u. Then at a fixed point ``g_l = 0``.

    The label gradient is 0 exactly where ``g_u = g_l``; there theta moves by ``g_u = g_l``, so it rests only if that is
    0. ``n_u >= m`` makes every g_l attainable.
    """
    generator = Generator().manual_seed(seed)
    n_u = max(n_u, m)
    problem = Regression(
        *(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((7, m), (7,), (n_u, m)))
    )
    theta, other = (torch.randn(size, generator=generator, dtype=torch.float64) for size in (m, n_u))
    g_l = problem.labeled_gradient(theta)
    inverse = torch.linalg.pinv(problem.unlabeled.T)
    labels = problem.unlabeled @ theta - n_u * inverse @ g_l  # g_u = g_l
    # Where X_u is nearly singular the labels are large, and so is the rounding of a gradient of them.
    scale = label_gradient(problem, theta, other).norm() * (1 + labels.norm())
    assert float(label_gradient(problem, theta, labels).norm()) < 1e-9 * float(scale)
    assert_close(problem.unlabeled_gradient(theta, labels), g_l)
    # Elsewhere it is not 0: it is 2/n_u X_u d with d = 2 v / (epsilon + v^2), in which no coordinate of v is lost.
    v = 2 * (g_l - problem.unlabeled_gradient(theta, other))
    d = 2 * v / (EPSILON + v.square())
    least = float(torch.linalg.svdvals(problem.unlabeled)[-1])
    assert float(scale) >= (1 - 1e-9) * 2 / n_u * least * float(d.norm())
    # So the fixed points are those of supervised training, with labels that agree with the model.
    best = problem.solution()
    kept = problem.unlabeled @ best
    assert float(label_gradient(problem, best, kept).norm()) < 1e-9 * float(scale)
    assert float(problem.unlabeled_gradient(best, kept).norm()) < 1e-12 * (1 + float(best.norm()))


def test_proposition_2_in_classification(generator):
    """Algorithm 1 itself, the whole of a network and cross-entropy, which is linear in y but not convex in theta.

    ``g_l = g_u`` is attainable, as unlabeled and labeled inputs are the same and the labels soft. At the label logits
    that attain it, the labels rest at any theta, and theta moves by ``g_u + T g_l = (1 + T) g_l``: a fixed point has
    ``g_l = 0``.
    """
    model, make_inputs = mlp(generator)
    inputs = make_inputs(6)
    targets = torch.randn(6, 3, generator=generator, dtype=torch.float64).softmax(-1)

    def gradients(w: Tensor) -> tuple[Tensor, Tensor]:
        """Of the label logits, by the method, and of theta."""
        method = LabelGradientAlignment(6, 3, how="jvp", dtype=torch.float64, **NO_AVERAGE)
        state = method.state_dict()
        state["update.table.values"] = w.clone()
        method.load_state_dict(state)
        index = torch.arange(6)
        refined = method.refine(model=model, unlabeled=inputs, holdout=inputs, targets=targets, index=index)
        g_u = flatten(loss_gradient(model, inputs, refined.labels))
        return method.state_dict()["update.table.exp_avg"] / (1 - 0.9), g_u

    for _ in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        g_l = flatten(loss_gradient(model, inputs, targets))
        resting, g_u = gradients(targets.log())
        moving, _ = gradients(torch.zeros(6, 3, dtype=torch.float64))
        assert float(resting.norm()) < 1e-9 * float(moving.norm())
        assert_close(g_u, g_l)
        assert float(g_l.norm()) > 1e-3, "so this theta is no fixed point"
    # Where the model predicts the targets, g_l = 0, and both rest.
    with torch.no_grad():
        targets = forward(model, inputs).softmax(-1)
    resting, g_u = gradients(targets.log())
    assert float(g_u.norm()) < 1e-12
    assert float(resting.norm()) < 1e-9 * float(moving.norm())


@pytest.mark.parametrize("correlated", [False, True])
def test_proposition_3_the_fixed_point_is_the_supervised_one(generator, correlated):
    """Where L is convex, theta of the fixed point is the minimum of the labeled loss: what the iteration ends at."""
    eigenvalues = 0.5 + torch.rand(2, 3, generator=generator, dtype=torch.float64)
    b = torch.randn(3, generator=generator, dtype=torch.float64)
    problem = uncorrelated(*eigenvalues, b, int(torch.randint(2**31, (), generator=generator)))
    if correlated:
        mix = torch.eye(3, dtype=torch.float64) + 0.1 * orthonormal(3, 3, generator)
        problem = Regression(problem.labeled @ mix, problem.targets, problem.unlabeled @ mix)
    theta = descend(problem, 600, rate=0.3, label_rate=0.3 * len(problem.unlabeled), epsilon=1.0)[-1]
    assert_close(theta, problem.solution(), 1e-8)
    assert float(problem.labeled_gradient(theta).norm()) < 1e-8 * float(b.norm())
