"""Experiments on Label Gradient Alignment."""

import pytest
import torch

from fastmeta.reproduce import lga_linear


def by_hand(labeled: float, unlabeled: float, gradient: float, steps: int, rate: float) -> list[float]:
    """Eqs. (8) to (11) for one of five dimensions, X = sqrt(5 lambda) e_i, with epsilon_norm = 1e-3."""
    x_l, x_u, n = (5 * labeled) ** 0.5, (5 * unlabeled) ** 0.5, 5
    y_l, theta, y_u = n * gradient / x_l, 0.0, 0.0
    values = []
    for _ in range(steps):
        g_l = x_l * (x_l * theta - y_l) / n
        g_u = x_u * (x_u * theta - y_u) / n
        r = g_l - g_u
        theta, y_u = theta - rate * g_u, y_u - rate * r / (1e-3 + r**2) * (x_u / n)
        values.append(labeled * theta / gradient)
    return values


@pytest.mark.parametrize("gradient", [1.0, 0.1])
def test_a_regression_moves_by_the_papers_equations(gradient):
    labeled, unlabeled = torch.tensor([[0.5, 1.0, 2.0, 1.0, 1.0], [1.0, 1.0, 1.0, 0.25, 4.0]]).double()
    curves = lga_linear.train(labeled, unlabeled, gradient, 80, 0.002)
    for place in range(5):
        expected = by_hand(float(labeled[place]), float(unlabeled[place]), gradient, 80, 0.002)
        torch.testing.assert_close(curves[:, place], torch.tensor(expected, dtype=torch.float64))


def test_principal_components_of_the_unlabeled_data_are_learned_first():
    """Fig. 1, and the table says so."""
    settings = lga_linear.cells(quick=True)[0]
    row = {**settings, **lga_linear.measure(**settings)}
    steps = row["steps_to_90_percent"]
    assert steps == sorted(steps, reverse=True)
    assert steps[0] > 2 * steps[-1]
    assert row["change_by_others"] < 1e-12
    assert "| larger λ unlabeled is learned faster (Fig. 1), at X^T y / n = 1 | yes" in lga_linear.table([row])
