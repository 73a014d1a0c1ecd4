"""Experiments on Label Gradient Alignment."""

import pytest
import torch
from quick_experiments import run_quickly
from torch import nn
from torch.nn import functional

from fastmeta.reproduce import lga_linear, lga_spheres


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


def test_principal_components_of_the_unlabeled_data_are_learned_first(tmp_path):
    """Fig. 1, and the table says so."""
    cells, table = run_quickly("lga-linear", tmp_path)
    steps = cells[0]["steps_to_90_percent"]
    assert steps == sorted(steps, reverse=True)
    assert steps[0] > 2 * steps[-1]
    assert cells[0]["change_by_others"] < 1e-12
    assert "| larger λ unlabeled is learned faster (Fig. 1), at X^T y / n = 1 | yes" in table


def test_points_have_the_lengths_of_their_class():
    """Eq. (14)."""
    places, classes = lga_spheres.points(4000, 50, torch.Generator().manual_seed(0))
    lengths = places.norm(dim=1)
    for c in range(5):
        above = lengths[classes == c] - c
        near, far = above < 0.25 + 1e-5, above > 0.75 - 1e-5
        assert bool((near ^ far).all())
        assert bool((above > -1e-5).all() and (above < 1 + 1e-5).all())
        share = float(near.float().mean())
        assert share == (0 if c == 0 else 1 if c == 4 else pytest.approx(0.5, abs=0.1))


def test_the_principal_eigenvector_is_that_of_the_dense_hessian():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    x, y = torch.randn(40, 3), torch.randint(3, (40,))
    names, values = zip(*model.named_parameters(), strict=True)
    sizes = [value.numel() for value in values]

    def loss(vector):
        parts = [part.view_as(like) for part, like in zip(vector.split(sizes), values, strict=True)]
        logits = torch.func.functional_call(model, dict(zip(names, parts, strict=True)), (x,))
        return functional.cross_entropy(logits, y)

    dense = torch.autograd.functional.hessian(loss, lga_spheres.flat(values).detach())
    largest = torch.linalg.eigh(dense).eigenvectors[:, -1]
    principal = lga_spheres.PrincipalEigenvector(model, x, y)
    for _ in range(2):  # the second search starts from the first's result
        found = principal.find()
        assert lga_spheres.alignment(found, largest) > 0.999
        assert float(found.norm()) == pytest.approx(1, abs=1e-5)


def test_labels_of_the_spheres_come_right_as_the_net_learns(tmp_path):
    cells, table = run_quickly("lga-spheres", tmp_path)
    assert [cell["arm"] for cell in cells] == list(lga_spheres.ARMS)
    found = cells[1]["measured"]
    assert found[-1]["right_labels"] > 22  # 20 by chance
    assert found[-1]["loss"] < found[0]["loss"]
    assert all(0 < row["alignment"] <= 1 for row in found)
    assert "| one trial (" in table
