"""One-layer networks against the closed forms of Learning to Impute, Appendix B (numbers of the journal version).

As printed, Eq. (7) has a sign slip: its losses are log-likelihoods without the minus, so that ``theta*`` is a step
*away* from the labels. In Eq. (8) the same missing minus comes twice, in ``dl/dtheta*`` and in ``dtheta*/dz``, and
cancels: Eq. (9) and (11) are right, for the ``theta*`` of the negative log-likelihood. Eq. (12) to (15),
regression, are right as printed.
"""

import pytest
import torch
from cases import Draw
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fastmeta import L2I

LOSSES = {"logistic": "binary_cross_entropy", "linear": "mse"}
hows = pytest.mark.parametrize("how", ["last_layer", "jvp", "double_backward"])
tasks = pytest.mark.parametrize("task", list(LOSSES))


class OneLayer:
    """``Phi(x) = sigma(theta^T x)`` or ``theta^T x``, with T, U and H; ``x_u + noise`` is what the labels come from."""

    def __init__(self, draw: Draw, task: str, sizes: tuple[int, int, int, int]) -> None:
        self.task, self.rate = task, 0.05
        (width, self.t, self.u, self.h) = sizes
        self.model = nn.Linear(width, 1, bias=False).double()
        self.theta = draw.normal(width)
        self.model.weight.data.copy_(self.theta)
        self.x_t, self.x_u, self.x_h = (draw.normal(n, width) for n in sizes[1:])
        self.noise = 0.3 * draw.normal(self.u, width)
        binary = task == "logistic"
        self.y_t, self.y_h = (draw.classes(n, 2).double() if binary else draw.normal(n) for n in (self.t, self.h))

    def phi(self, x: Tensor, theta: Tensor) -> Tensor:
        return (x @ theta).sigmoid() if self.task == "logistic" else x @ theta

    @property
    def z(self) -> Tensor:
        return self.phi(self.x_u + self.noise, self.theta)

    def theta_star(self, sign: float = 1.0) -> Tensor:
        """Eq. (7), with the minus of a negative log-likelihood (``sign=-1``: as printed), and Eq. (12)."""
        towards = (self.phi(self.x_t, self.theta) - self.y_t) @ self.x_t
        towards = towards + (self.phi(self.x_u, self.theta) - self.z) @ self.x_u
        return self.theta - sign * (1 if self.task == "logistic" else 2) * self.rate * towards

    def holdout_gap(self, theta_star: Tensor) -> Tensor:
        """``sum_H (Phi(x; theta*) - y) x^T x_u`` for each u, times eta (logistic) or 4 eta (linear)."""
        gap = (self.phi(self.x_h, theta_star) - self.y_h) @ self.x_h @ self.x_u.T
        return (1 if self.task == "logistic" else 4) * self.rate * gap

    def refine(self, method: L2I, **labels: Tensor):
        return method.refine(
            model=self.model,
            unlabeled=self.x_u,
            holdout=self.x_h,
            targets=self.y_h.unsqueeze(1),
            labeled=self.x_t,
            labeled_targets=self.y_t.unsqueeze(1),
            **labels,
        )

    def method(self, variant: str, how: str, **options) -> L2I:
        return L2I(
            variant,
            how=how,
            inner_loss=LOSSES[self.task],
            outer_loss=LOSSES[self.task],
            reduction="sum",
            outer_reduction="sum",
            rate=self.rate,
            look_ahead=True,
            labeled_weight=1.0,
            unit_length=False,
            **options,
        )


def assert_close(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    assert float((actual - expected).norm()) <= 1e-9 * float(expected.norm()) + 1e-15


sizes = st.tuples(st.integers(1, 8), *[st.integers(1, 6)] * 3)


@tasks
@hows
@settings(max_examples=15, deadline=None)
@given(sizes=sizes, seed=st.integers(0, 2**31))
def test_labels_as_parameters(task, how, sizes, seed):
    """Eq. (11) with (10), and Eq. (15) with (14)."""
    net = OneLayer(Draw(torch.Generator().manual_seed(seed)), task, sizes)
    method = net.method("V1", how, label_space="probabilities", project=False, label_step=0.7)
    expected = net.z - 0.7 * net.holdout_gap(net.theta_star())
    assert_close(net.refine(method, labels=net.z.unsqueeze(1)).labels.squeeze(1), expected)


@tasks
@hows
@settings(max_examples=15, deadline=None)
@given(sizes=sizes, seed=st.integers(0, 2**31))
def test_labels_as_the_output_of_the_model(task, how, sizes, seed):
    """Eq. (9) and Eq. (13), added up over the unlabeled examples; z is imputed from ``x_u + noise``."""
    net = OneLayer(Draw(torch.Generator().manual_seed(seed)), task, sizes)
    z = net.model(net.x_u + net.noise)
    z = z.sigmoid() if task == "logistic" else z
    refined = net.refine(net.method("V2", how, weight=1.0), labels=z)
    got = torch.autograd.grad(refined.loss, net.model.weight)[0].squeeze(0)
    slope = net.z * (1 - net.z) if task == "logistic" else torch.ones_like(net.z)
    assert_close(got, (net.holdout_gap(net.theta_star()) * slope) @ (net.x_u + net.noise))


def test_equation_7_as_printed_is_a_step_away_from_the_labels(draw):
    net = OneLayer(draw, "logistic", (5, 6, 6, 6))
    right, printed = net.theta_star(), net.theta_star(sign=-1.0)

    def loss(theta: Tensor) -> Tensor:
        pairs = ((net.x_t, net.y_t), (net.x_u, net.z))
        return sum(nn.functional.binary_cross_entropy(net.phi(x, theta), y, reduction="sum") for x, y in pairs)

    rate = net.rate / 10
    small = {sign: net.theta + rate / net.rate * (net.theta_star(sign) - net.theta) for sign in (1.0, -1.0)}
    assert float(loss(small[1.0])) < float(loss(net.theta)) < float(loss(small[-1.0]))
    # With it Eq. (11) is another number: the two signs of Eq. (8) cancel, those of theta* do not.
    gap, slip = net.holdout_gap(right), net.holdout_gap(printed)
    assert float((gap - slip).norm()) > 1e-3 * float(gap.norm())
