import importlib
import math

import pytest
from short_runs import assert_same_run, small

from fastmeta.data import load_digits
from fastmeta.training import CompareConfig, RunConfig, Trainer, compare, grid
from fastmeta.training.build import record_of
from fastmeta.training.checkpoints import Checkpoints
from fastmeta.training.compare import notes
from fastmeta.training.files import write_json
from fastmeta.training.recipes import METHODS
from fastmeta.training.reports.intervals import mean_and_deviation, t_interval
from fastmeta.training.reports.summary import summarize, table
from fastmeta.training.side_by_side import WorkerError
from fastmeta.training.timing import interleaved_seconds
from fastmeta.training.workers import Job


def test_interval_by_hand():
    values = [0.01, 0.04, -0.02]
    deviation = math.sqrt(sum((value - 0.01) ** 2 for value in values) / 2)
    interval = t_interval(values)
    assert interval.mean == pytest.approx(0.01)
    assert interval.high - interval.mean == pytest.approx(4.302653 * deviation / math.sqrt(3), rel=1e-6)
    assert interval.mean - interval.low == pytest.approx(4.302653 * deviation / math.sqrt(3), rel=1e-6)
    assert mean_and_deviation(values) == (pytest.approx(0.01), pytest.approx(deviation))
    assert t_interval([0.3]).low is None
    assert mean_and_deviation([0.3]) == (0.3, None)


def run_result(method, seed, test_error, seconds, base="fixmatch"):
    return {
        "base": base,
        "method": method,
        "seed": seed,
        "labels": 1,
        "test_error": test_error,
        "validation_error": test_error,
        "seconds_per_step": seconds,
    }


def test_summary_pairs_by_seed_and_ignores_the_unpaired():
    runs = [
        run_result("none", 0, 0.20, 0.010),
        run_result("none", 1, 0.10, 0.020),
        run_result("l2i", 1, 0.08, 0.030),
        run_result("l2i", 0, 0.10, 0.011),
        run_result("l2i", 2, 0.50, 0.900),  # the base has not finished this seed
        run_result("none", 0, 0.60, 0.001, base="mean-teacher"),
    ]
    rows = {(row["base"], row["method"]): row for row in summarize(runs, {"fixmatch": 0.04, "fixmatch + l2i": 0.05})}
    row = rows["fixmatch", "l2i"]
    assert row["difference"] == pytest.approx((-0.02 - 0.10) / 2)
    half = 12.7062 * math.sqrt(((-0.02 + 0.06) ** 2 + (-0.10 + 0.06) ** 2) / 1) / math.sqrt(2)
    assert row["difference_high"] == pytest.approx(-0.06 + half, rel=1e-5)
    assert (row["seconds_per_step"], row["step_ratio"]) == (0.05, pytest.approx(1.25))
    assert row["test_error"] == pytest.approx((0.08 + 0.10 + 0.50) / 3)
    assert rows["fixmatch", "none"]["difference"] is None
    assert rows["mean-teacher", "none"]["test_error_sd"] is None
    assert rows["mean-teacher", "none"]["seconds_per_step"] == 0.001
    assert [row["step_ratio"] for row in summarize(runs, {})] == [None] * 3


def test_table_prints_percent_and_leaves_unknowns_blank():
    runs = [run_result("none", 0, 0.25, 1.0), run_result("l2i", 0, 0.2, 1.0)]
    text = table(summarize(runs, {"fixmatch": 0.0123, "fixmatch + l2i": 0.0246}))
    lines = text.splitlines()
    assert lines[2].split() == ["fixmatch", "25.0", "12.3", "1"]
    assert lines[3].split() == ["+", "l2i", "20.0", "-5.0", "24.6", "2.00", "1"]


def test_steps_are_timed_in_turn(monkeypatch, tmp_path, digits):
    order, clock = [], [0.0]

    def step(trainer):
        order.append(trainer.method is not None)
        clock[0] += len(order)

    monkeypatch.setattr(Trainer, "train_step", step)
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    jobs = [Job(RunConfig(method=method, **small()), tmp_path) for method in ("none", "l2i")]
    assert interleaved_seconds(jobs, digits, rounds=3) == [13.0, 14.0]  # of 11, 13, 15 and 12, 14, 16: five warm up
    assert order == [False, True] * 8


def test_grid_is_seeds_outside_and_skips_what_supervised_cannot_do():
    runs = grid(["supervised", "fixmatch"], ["none", "l2i"], [0, 1], steps=5)
    assert [(run.seed, run.arm) for run in runs] == [
        (seed, arm) for seed in (0, 1) for arm in ("supervised", "fixmatch", "fixmatch + l2i")
    ]
    assert all(run.steps == 5 for run in runs)


def test_notes_say_what_is_not_its_papers_algorithm():
    """A base that makes labels hard, with a method whose paper trains on soft ones."""
    split = {"labeled": 10, "unlabeled": 1107, "validation": 200, "test": 450, "holdout": 30}
    results = {"runs": [{"split": split}], "support_vector_test_error": {"0": 0.3}}

    def lines(base: str, *methods: str) -> str:
        return "\n".join(notes([RunConfig(base=base, method=method) for method in methods], results))

    text = lines("fixmatch", "none", "l2i", "label-gradient-alignment", "meta-gradient-jvp")
    assert "label-gradient-alignment, meta-gradient-jvp: not the paper's algorithm" in text
    assert "python -m fastmeta.examples.label_gradient_alignment, python -m fastmeta.examples.meta_gradient" in text
    config = RunConfig(base="pseudo-label", base_settings={"soft": True}, method="label-gradient-alignment-published")
    soft = "\n".join(notes([config], results))
    for text in (lines("fixmatch", "none", "l2i"), lines("mean-teacher", "meta-gradient"), soft):
        assert "not the paper's" not in text
    for recipe in METHODS.values():
        assert recipe.example is None or importlib.import_module(f"fastmeta.examples.{recipe.example}")


def test_a_failing_run_names_itself(tmp_path):
    runs = grid(["fixmatch"], ["none"], [0, 1], **small())
    broken = tmp_path / "runs/fixmatch/none/seed-1"
    write_json(broken / "config.json", record_of(runs[1], load_digits()))
    Checkpoints(broken / "checkpoints").save(4, {"trainer": {}, "rows": []})
    with pytest.raises(WorkerError, match="fixmatch, seed 1:"):
        compare(CompareConfig(runs, tmp_path, workers=2), quiet=True)


def test_number_of_workers_changes_no_result(tmp_path):
    runs = grid(["fixmatch"], ["none", "l2i"], [0], **small())
    compare(CompareConfig(runs, tmp_path / "one", workers=1), quiet=True)
    compare(CompareConfig(runs, tmp_path / "two", workers=2), quiet=True)
    for method in ("none", "l2i"):
        place = f"runs/fixmatch/{method}/seed-0"
        assert_same_run(tmp_path / "one" / place, tmp_path / "two" / place)
