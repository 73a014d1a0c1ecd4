"""Ablations that are runs of the trainer, and the error of a finite difference."""

import copy

import pytest
import torch
from quick_experiments import run_quickly
from torch import nn

from fastmeta.reproduce import fd_radius, l2i_ablations, meta_ablation, runs
from fastmeta.training.build import load_images, resolve, split_of


def test_the_error_of_a_difference_is_that_of_its_definition():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)).train()
    x_l, y_l, x_u = torch.randn(8, 4), torch.arange(8) % 3, torch.randn(5, 4)
    found = fd_radius.errors_at(model, x_l, y_l, x_u)
    assert model.training
    exact = copy.deepcopy(model).double().eval()
    parameters = list(exact.parameters())
    loss = nn.functional.cross_entropy(exact(x_l.double()), y_l)
    v = torch.autograd.grad(loss, parameters)
    norm = torch.cat([value.flatten() for value in v]).norm()

    def probabilities(step):
        with torch.no_grad():
            moved = copy.deepcopy(exact)
            for parameter, value in zip(moved.parameters(), v, strict=True):
                parameter += step * value
            return moved(x_u.double()).softmax(1)

    def difference(radius):
        step = radius / norm
        return (probabilities(step) - probabilities(-step)) / (2 * step)

    derivative = difference(1e-5)
    assert found["norm"] == pytest.approx(float(norm), rel=1e-4)
    for radius, error in zip(fd_radius.RADII[-2:], found["differences"][-2:], strict=True):
        expected = float((difference(radius) - derivative).norm() / derivative.norm())
        assert error == pytest.approx(expected, rel=0.05, abs=1e-4)


def test_the_table_of_radii_has_every_stage(tmp_path):
    (cell,), table = run_quickly("fd-radius", tmp_path)
    assert [at["stage"] for at in cell["found"]] == [0, 4]
    for at in cell["found"]:
        assert at["forward_mode"] < 1e-5
        assert at["differences"][-1] > at["differences"][4]  # longer than published
        assert f"| digits | {at['stage']} | 1 |" in table


def test_the_ablation_of_meta_gradient_has_its_four_rows(tmp_path):
    cells, table = run_quickly("meta-ablation", tmp_path)
    assert {(cell["method"], cell["changes"]["base_settings"]["mix_up"]) for cell in cells} == {
        ("none", False),
        ("none", True),
        ("meta-gradient-published", False),
        ("meta-gradient-published", True),
    }
    for name in ("neither", "meta", "mix-up", "both"):
        assert f"| {name} | " in table
    assert "7.78" in table


def test_an_ablation_tells_what_helps_and_what_does_not():
    rows = [
        {**cell, "error": {"none": 30.0, "meta-gradient-published": 20.0}[cell["method"]] + cell["seed"] * 0.5}
        for cell in meta_ablation.cells(quick=False)
    ]
    table = meta_ablation.table(rows)
    assert "| the meta-gradient helps alone | -10.0 [-10.0, -10.0]: helps |" in table
    assert "| mix-up helps alone | +0.0 [+0.0, +0.0]: no difference shown |" in table


def test_a_separate_holdout_set_has_labels_of_the_joint_one_and_all_else_is_the_same(monkeypatch):
    arms = {l2i_ablations.holdout_arm(cell): cell for cell in l2i_ablations.holdout_cells(quick=True)}
    assert {cell["changes"].get("holdout_batch") for cell in arms.values()} == {None, 20, 40, 80}
    apart = arms.pop("separate, 3 + 2 labels a class")
    seen = []

    def look(config):
        images = load_images(config)
        resolved = resolve(config, images)
        return seen.append((images, resolved.method_settings, split_of(resolved, images)))

    monkeypatch.setattr(runs, "figures_of", look)
    l2i_ablations.measure_holdout(**apart)
    for cell in arms.values():
        l2i_ablations.measure_holdout(**cell)
    (images, settings, split), *others = seen
    assert settings["holdout"] == "part"
    for part, each in ((split.labeled, 3), (split.holdout, 2)):
        assert images.targets[part].bincount().tolist() == [each] * 10
    for _, settings, joint in others:
        assert settings.get("holdout") in (None, "labeled")
        assert not len(joint.holdout)
        assert sorted([*split.labeled.tolist(), *split.holdout.tolist()]) == sorted(joint.labeled.tolist())
        for part in ("unlabeled", "validation", "test"):
            assert getattr(split, part).equal(getattr(joint, part)), part


def test_exact_and_approximate_rules_stand_beside_each_other():
    errors = {"none": 20.0, "l2i-jvp": 11.0, "l2i": 12.0}
    rows = [
        {**cell, "error": errors[cell["method"]] + cell["seed"], "cpu_seconds": {"l2i": 3.0}.get(cell["method"], 4.0)}
        for cell in l2i_ablations.exact_cells(quick=False)
    ]
    table = l2i_ablations.exact_table(rows)
    assert (
        "| digits, 1 a class, mean-teacher | 8 | 23.5 ± 2.4 | 14.5 ± 2.4 | 15.5 ± 2.4 "
        "| +1.0 [+1.0, +1.0]: exact is better | 0.75 |" in table
    )


def test_hold_out_batches_are_compared_with_that_of_training():
    errors = {"FixMatch alone": 9.0, "joint, hold-out batch 40": 4.0, "separate, 3 + 2 labels a class": 4.0}
    rows = [
        {**cell, "error": errors.get(l2i_ablations.holdout_arm(cell), 3.0) + cell["seed"] * (cell["method"] == "none")}
        for cell in l2i_ablations.holdout_cells(quick=False)
    ]
    table = l2i_ablations.holdout_table(rows)
    assert "| digits | FixMatch alone | 8 | 12.5 ± 2.4 | +8.5 [+6.5, +10.5]: worse |  |" in table
    assert "| digits | joint, hold-out batch 20 | 8 | 3.0 ± 0.0 | -1.0 [-1.0, -1.0]: better | -0.3 |" in table
    assert "| 4.0 ± 0.0 | +0.0 [+0.0, +0.0]: no difference shown | +0.3 / 0.0 / 0.0 |" in table
