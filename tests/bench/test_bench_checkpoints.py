"""The cost of checkpoints: the equation by simulation, and a run on tiny nets."""

import random

import pytest

from bench import checkpoints, files
from bench.__main__ import main


def simulated(length, interval, save, restart, mean, seed):
    """Wall time of one run with failures drawn one by one; they may come during a save and a restart, too."""
    draw = random.Random(seed)
    wall, failure = 0.0, draw.expovariate(1 / mean)
    for _ in range(round(length / interval)):
        begin = wall
        while failure < begin + interval + save:
            begin = failure
            failure = begin + draw.expovariate(1 / mean)
            while failure < begin + restart:
                begin = failure
                failure = begin + draw.expovariate(1 / mean)
            begin += restart
        wall = begin + interval + save
    return wall


def test_expected_wall_time_is_the_mean_of_simulated_runs():
    length, save, restart, mean = 100.0, 1.0, 3.0, 20.0
    for interval in (2.0, 5.0, 25.0):
        found = [simulated(length, interval, save, restart, mean, seed) for seed in range(3000)]
        expected = checkpoints.wall_seconds(length, interval, save, restart, mean)
        assert sum(found) / len(found) == pytest.approx(expected, rel=0.04)


def test_a_run_prints_a_table_and_the_best_interval_is_the_best(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(checkpoints, "RUNS", ((0.01, 1.0), (1.0, 1.0)))
    assert main(["checkpoints", "--largest", "0.5", "--rounds", "2", "--out", str(tmp_path)]) == 0
    (row,) = files.read(tmp_path / "checkpoints.json")["runs"]
    assert row["parameters"] == 10_000
    assert row["bytes"] > 12 * row["parameters"]
    assert "| 0.01M |" in capsys.readouterr().out
    slow = checkpoints.losses({"save_seconds": 5.0, "read_seconds": 5.0}, step_seconds=1.0)
    length, best = 1e5, slow["best_interval_steps"]
    losses = {
        factor: checkpoints.wall_seconds(length, factor * best, 5.0, 65.0) - length
        for factor in (0.5, 0.9, 1.0, 1.1, 2)
    }
    assert min(losses, key=losses.__getitem__) == 1.0
    assert slow["hours_lost_at_best"] == pytest.approx(losses[1.0] / 3600)
    assert slow["hours_lost_without"] > 10 * slow["hours_lost"]["10000"]
