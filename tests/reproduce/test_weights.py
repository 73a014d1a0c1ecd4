"""Experiments on weights of unlabeled examples."""

import pytest
import torch
from quick_experiments import run_quickly

from fastmeta.reproduce import points_in_the_plane as plane
from fastmeta.reproduce import weights_runtime as runtime


@pytest.mark.parametrize("name", ["linear", "circles", "moons"])
def test_the_truth_is_what_the_points_are_drawn_from(name):
    places, classes = plane.points(name, 500, seed=1)
    right = ((plane.truth(name, places) > 0).long() == classes).float().mean()
    assert right == 1 if name == "linear" else right > 0.97  # the noise moves a few over the boundary


def test_parts_are_of_the_papers_sizes_balanced_and_apart():
    task = plane.Task("moons", 3)
    parts = [(task.x_l, task.y_l), (task.x_v, task.y_v), (task.x_u, task.y_u)]
    assert [len(x) for x, _ in parts] == [10, 30, 1000]
    assert all(int(y.sum()) == len(y) // 2 for _, y in parts)
    assert len(torch.cat([x for x, _ in parts]).unique(dim=0)) == 1040


def test_points_with_wrong_labels_lose_weight():
    """One outer step after a start from which pseudo-labels are wrong on half a moon."""
    task = plane.Task("moons", 0)
    run = plane.Run(task, plane.WEIGHTS, 0)
    for _ in range(4):
        run.step()
    wrong = (run.margin(task.x_u) > 0).long() != task.y_u
    assert 20 < int(wrong.sum()) < 500
    assert float(run.weights[wrong].mean()) < float(run.weights[~wrong].mean()) - 0.2


def test_the_table_of_points_in_the_plane_has_every_arm(tmp_path):
    (cell,), table = run_quickly("weights-circles", tmp_path)
    for arm, error in cell["errors"].items():
        assert f"| {arm} | {error:.1f} |" in table
    first = cell["weights"][0]
    assert first["wrong_among_lowest"] > first["wrong"]
    assert "| per-example weights beat a single weight" in table


def test_the_table_of_times_has_every_form(tmp_path):
    (cell,), table = run_quickly("weights-runtime", tmp_path)
    assert set(cell["seconds_of"]) == set(runtime.PAPER)
    for form, seconds in cell["seconds_of"].items():
        assert seconds > 0
        assert f"| {form} | {seconds:.3g} s |" in table


def test_every_form_of_the_influence_is_the_per_example_gradient_against_a_direction():
    """With H = I: the first step of Adam moves a weight against the sign of the influence, Eq. (6)."""
    forms = runtime.Forms(depth=10, fraction=64)
    serial, vectorized = forms.one_by_one(), forms.vectorized()
    for name, gradients in serial.items():
        torch.testing.assert_close(vectorized[name], gradients, atol=1e-5, rtol=1e-3)
    loss = torch.nn.functional.cross_entropy(forms.model(forms.x_v), forms.y_v)
    against = torch.autograd.grad(loss, list(forms.model.parameters()))
    dots = sum(rows.flatten(1) @ v.flatten() for rows, v in zip(serial.values(), against, strict=True))
    last = serial["fc.weight"].flatten(1) @ against[-2].flatten() + serial["fc.bias"] @ against[-1]
    for form, expected in ((runtime.WHOLE, dots), ("last layer, H = I", last)):
        moved = forms.by_name[form]() - 1
        torch.testing.assert_close(moved, 0.01 * expected.sign(), atol=1e-4, rtol=0)
