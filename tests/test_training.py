import copy
import dataclasses
import importlib
import json
import math
import threading

import pytest
import torch
from torch import nn

from fastmeta.data import load_digits
from fastmeta.training import (
    CompareConfig,
    ConfigMismatch,
    ExponentialMovingAverage,
    Run,
    RunConfig,
    compare,
    grid,
    train,
)
from fastmeta.training.compare import notes
from fastmeta.training.files import read_json, read_jsonl, write_checkpoint, write_json
from fastmeta.training.intervals import mean_and_deviation, t_interval
from fastmeta.training.recipes import METHODS
from fastmeta.training.refinements import LargestRefinements
from fastmeta.training.summary import summarize, table
from fastmeta.training.timing import interleaved_seconds
from fastmeta.training.workers import Job, WorkerError

SMALL = {"steps": 9, "labeled_batch": 10, "unlabeled_batch": 12, "evaluate_every": 3, "checkpoint_every": 4}
TIMES = ("seconds_per_step",)


@pytest.fixture(scope="module")
def digits():
    return load_digits()


def without_times(rows):
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def tensors(folder):
    return torch.load(folder / "model.pt", weights_only=True)


def assert_same_run(folder, other):
    first, second = tensors(folder), tensors(other)
    assert first.keys() == second.keys()
    assert all(first[name].equal(second[name]) for name in first)
    rows = [read_jsonl(place / "metrics.jsonl") for place in (folder, other)]
    assert without_times(rows[0]) == without_times(rows[1])
    assert read_json(folder / "details.json") == read_json(other / "details.json")
    results = [read_json(place / "results.json") for place in (folder, other)]
    assert without_times(results[:1]) == without_times(results[1:])


class Killed(BaseException):
    """Stands for a kill: nothing is saved when it happens."""


@pytest.mark.parametrize(
    ("base", "method"),
    [
        ("supervised", "none"),
        ("pseudo-label", "none"),
        ("mean-teacher", "l2i"),
        ("vat", "none"),
        ("vat", "label-gradient-alignment"),
        *(("fixmatch", name) for name in METHODS),
    ],
)
def test_resume_after_a_kill_is_bit_exact(tmp_path, digits, base, method):
    config = RunConfig(base=base, method=method, seed=1, **SMALL)
    train(config, tmp_path / "whole", dataset=digits)

    def kill(step):
        if step == 7:  # after the checkpoint at 4 and the evaluation at 6
            raise Killed

    with pytest.raises(Killed):
        train(config, tmp_path / "killed", dataset=digits, on_step=kill)
    assert [row["step"] for row in read_jsonl(tmp_path / "killed" / "metrics.jsonl")] == [3, 6]
    steps = []
    train(config, tmp_path / "killed", dataset=digits, on_step=steps.append)
    assert steps == [4, 5, 6, 7, 8, 9]
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_stopping_checkpoints_at_the_step_reached(tmp_path, digits):
    config = RunConfig(**SMALL)
    train(config, tmp_path / "whole", dataset=digits)
    seen = []
    stopped = train(
        config, tmp_path / "stopped", dataset=digits, on_step=seen.append, should_stop=lambda: len(seen) > 5
    )
    assert stopped is None
    resumed = []
    train(config, tmp_path / "stopped", dataset=digits, on_step=resumed.append)
    assert resumed[0] == seen[-1] == 5
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


def test_training_leaves_the_callers_random_state_and_threads_alone(tmp_path, digits):
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    train(RunConfig(**SMALL), tmp_path, dataset=digits)
    assert torch.get_rng_state().equal(state)
    assert torch.get_num_threads() == threads


def test_a_finished_run_is_only_read(tmp_path, digits):
    config = RunConfig(**SMALL)
    first = train(config, tmp_path, dataset=digits)
    written = (tmp_path / "model.pt").stat().st_mtime_ns
    assert train(config, tmp_path, dataset=digits) == first
    assert (tmp_path / "model.pt").stat().st_mtime_ns == written


def test_a_folder_with_other_settings_is_refused(tmp_path, digits):
    train(RunConfig(**SMALL), tmp_path, dataset=digits)
    with pytest.raises(ConfigMismatch, match=r"labels=1 \(now 2\)"):
        train(RunConfig(labels=2, **SMALL), tmp_path, dataset=digits)


def test_runs_of_one_seed_are_paired(digits):
    alone = Run(RunConfig(seed=2, **SMALL), digits)
    refined = Run(RunConfig(seed=2, method="example-weights", **SMALL), digits)
    for first, second in zip(alone.model.parameters(), refined.model.parameters(), strict=True):
        assert first.equal(second)
    for step in (0, 5):
        first, second = alone.batch(step), refined.batch(step)
        for name in ("labeled", "targets", "weak", "second", "index"):
            assert getattr(first, name).equal(getattr(second, name))
        assert first.holdout is None
        assert len(second.holdout) == 30
    other = Run(RunConfig(seed=3, **SMALL), digits)
    assert not other.batch(0).weak.equal(alone.batch(0).weak)


def test_batches_come_from_their_own_parts(digits, monkeypatch):
    monkeypatch.setattr("fastmeta.training.run.weak_augment", lambda images, generator: images)
    run = Run(RunConfig(seed=0, method="example-weights", labeled_view="weak", **SMALL), digits)
    batch = run.batch(4)
    unlabeled = run.split.unlabeled[batch.index]
    assert batch.weak.equal(digits.images[unlabeled])
    assert batch.holdout.equal(digits.images[run.split.holdout])
    assert batch.holdout_targets.equal(digits.targets[run.split.holdout])
    labeled = {
        (image.numpy().tobytes(), int(target)) for image, target in zip(batch.labeled, batch.targets, strict=True)
    }
    source = zip(digits.images[run.split.labeled], digits.targets[run.split.labeled], strict=True)
    assert labeled == {(image.numpy().tobytes(), int(target)) for image, target in source}


def test_weights_are_chosen_by_validation_error_only(digits):
    run = Run(RunConfig(**SMALL), digits)
    errors = iter([(0.5, 0.1), (0.4, 0.9), (0.4, 0.8), (0.6, 0.0)])
    queue = []

    def error(model, indices):
        if not queue:
            queue.extend(next(errors))
        return queue.pop(0)

    run._error = error
    run.train_step()
    run.evaluate()
    assert (run.best["validation_error"], run.best["test_error"], run.best["weights"]) == (0.4, 0.9, "average")
    run.train_step()
    run.evaluate()
    assert (run.best["validation_error"], run.best["test_error"], run.best["step"]) == (0.4, 0.8, 2)


def test_reported_errors_are_those_of_the_saved_weights(tmp_path, digits):
    config = RunConfig(seed=4, **{**SMALL, "steps": 30})
    results = train(config, tmp_path, dataset=digits)
    run = Run(config, digits)
    run.model.load_state_dict(tensors(tmp_path))
    run.model.eval()
    for part in ("validation", "test"):
        indices = getattr(run.split, part)
        wrong = run.model(digits.images[indices]).argmax(1) != digits.targets[indices]
        assert results[f"{part}_error"] == pytest.approx(wrong.float().mean().item())


def test_learns_something(tmp_path, digits):
    config = RunConfig(seed=0, labels=4, base="supervised", labeled_view="weak", steps=60)
    results = train(config, tmp_path, dataset=digits)
    assert results["validation_error"] < 0.5
    assert read_jsonl(tmp_path / "metrics.jsonl")[-1]["loss"] < 0.5 * math.log(10)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"base": "mixmatch"},
            "base must be one of supervised, pseudo-label, mean-teacher, fixmatch, vat, got 'mixmatch'",
        ),
        ({"method": "maml"}, "method must be one of none, l2i, .*, got 'maml'"),
        ({"base": "supervised", "method": "l2i"}, "method must be none for base supervised .*, got 'l2i'"),
        ({"labels": 0}, "labels must be at least 1, got 0"),
        ({"steps": -1}, "steps must be at least 1, got -1"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"learning_rate": math.nan}, "learning_rate must be above 0 and finite, got nan"),
        ({"weight_decay": -1.0}, "weight_decay must be at least 0 and finite, got -1.0"),
        ({"ema_decay": 1.0}, r"ema_decay must lie in \[0, 1\), got 1.0"),
    ],
)
def test_settings_name_what_is_wrong(settings, message):
    with pytest.raises(ValueError, match=message):
        RunConfig(**settings)


def test_average_of_weights_by_hand():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).double()
    average = ExponentialMovingAverage(model, decay=0.15)
    expected = [parameter.detach().clone() for parameter in model.parameters()]
    for update in range(5):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
            model[1].running_mean.add_(1)
        average.update()
        decay = min(0.15, (1 + update) / (10 + update))
        expected = [decay * old + (1 - decay) * new for old, new in zip(expected, model.parameters(), strict=True)]
    for got, wanted in zip(average.model.parameters(), expected, strict=True):
        assert torch.allclose(got, wanted, atol=1e-14)
    assert average.model[1].running_mean.equal(model[1].running_mean)
    assert not any(parameter.requires_grad for parameter in average.model.parameters())


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
    order = []

    def step(run):
        order.append(run.config.method)
        run.seconds.append(float(len(run.seconds)))

    monkeypatch.setattr(Run, "train_step", step)
    jobs = [Job(RunConfig(method=method, **SMALL), tmp_path) for method in ("none", "l2i")]
    assert interleaved_seconds(jobs, digits, rounds=3) == [6.0, 6.0]  # of 5, 6 and 7: five steps warm up
    assert order == ["none", "l2i"] * 8


def test_largest_refinements_keeps_each_image_at_its_largest():
    largest = LargestRefinements(capacity=2)
    before = torch.tensor([[1.0, 0.0]]).expand(3, 2)
    move = torch.tensor([[-1.0, 1.0]])
    largest.add(1, torch.tensor([4, 7, 9]), before, before + torch.tensor([[0.1], [0.3], [0.2]]) * move)
    largest.add(2, torch.tensor([4, 7, 9]), before, before + torch.tensor([[0.9], [0.1], [0.0]]) * move)
    assert [(row["index"], row["step"]) for row in largest.rows()] == [(4, 2), (7, 1)]
    assert largest.rows()[0]["after"] == pytest.approx([0.1, 0.9])
    again = LargestRefinements(capacity=2)
    again.load_state_dict(largest.state_dict())
    assert again.rows() == largest.rows()


def test_grid_is_seeds_outside_and_skips_what_supervised_cannot_do():
    runs = grid(["supervised", "fixmatch"], ["none", "l2i"], [0, 1], steps=5)
    assert [(run.seed, run.arm) for run in runs] == [
        (seed, arm) for seed in (0, 1) for arm in ("supervised", "fixmatch", "fixmatch + l2i")
    ]
    assert all(run.steps == 5 for run in runs)


def test_number_of_workers_changes_no_result(tmp_path):
    runs = grid(["fixmatch"], ["none", "l2i"], [0], **SMALL)
    compare(CompareConfig(runs, tmp_path / "one", workers=1), quiet=True)
    compare(CompareConfig(runs, tmp_path / "two", workers=2), quiet=True)
    for method in ("none", "l2i"):
        place = f"runs/fixmatch/{method}/seed-0"
        assert_same_run(tmp_path / "one" / place, tmp_path / "two" / place)


def test_a_failing_run_names_itself(tmp_path):
    runs = grid(["fixmatch"], ["none"], [0, 1], **SMALL)
    broken = tmp_path / "runs/fixmatch/none/seed-1"
    write_json(broken / "config.json", runs[1].as_dict())
    write_checkpoint(broken / "checkpoint.pt", {"run": {}, "rows": []})
    with pytest.raises(WorkerError, match="fixmatch, seed 1:"):
        compare(CompareConfig(runs, tmp_path, workers=2), quiet=True)


def test_a_checkpoint_is_whole_or_absent(tmp_path):
    path = tmp_path / "checkpoint.pt"
    write_checkpoint(path, {"step": 1})
    with pytest.raises(Exception, match="pickle"):
        write_checkpoint(path, {"step": 2, "bad": threading.Lock()})
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_config_is_plain_json():
    config = RunConfig(seed=3)
    written = json.loads(json.dumps(config.as_dict()))
    assert written == config.as_dict()
    assert RunConfig(**{field.name: written[field.name] for field in dataclasses.fields(RunConfig)}) == config
    assert written["base_settings"] == {"threshold": 0.8, "weight": 1.0}


def test_a_changed_recipe_is_another_run(tmp_path, digits, monkeypatch):
    train(RunConfig(method="l2i", **SMALL), tmp_path, dataset=digits)
    changed = dataclasses.replace(METHODS["l2i"], settings={"weight": 0.1})
    monkeypatch.setitem(METHODS, "l2i", changed)
    with pytest.raises(ConfigMismatch, match="method_settings="):
        train(RunConfig(method="l2i", **SMALL), tmp_path, dataset=digits)


def test_an_update_of_the_methods_own_follows_the_bases(digits):
    """One alternating step by hand: the base alone, then the surrogate of L2I at the parameters it left."""
    run = Run(RunConfig(method="l2i-alternating", **SMALL), digits)
    alone = Run(RunConfig(**SMALL), digits)
    for name, value in alone.model.state_dict().items():
        assert run.model.state_dict()[name].equal(value)
    batch = alone.batch(0)
    alone.train_step()
    after_base = copy.deepcopy(alone.model.state_dict())
    refined = run.refiner.method.refine(
        model=alone.model, unlabeled=batch.weak, holdout=batch.labeled, targets=batch.targets, index=batch.index
    )
    alone.optimizer.zero_grad()
    refined.loss.backward()
    alone.optimizer.step()
    run.train_step()
    for name, value in alone.model.state_dict().items():
        torch.testing.assert_close(run.model.state_dict()[name], value, rtol=1e-6, atol=1e-7)
        if name.endswith("weight"):
            assert not value.equal(after_base[name])


def test_notes_say_what_is_not_its_papers_algorithm():
    """A base that makes labels hard, with a method whose paper trains on soft ones."""
    split = {"labeled": 10, "unlabeled": 1107, "validation": 200, "test": 450, "holdout": 30}
    results = {"runs": [{"split": split}], "support_vector_test_error": {"0": 0.3}}

    def lines(base: str, *methods: str) -> str:
        return "\n".join(notes([RunConfig(base=base, method=method) for method in methods], results))

    text = lines("fixmatch", "none", "l2i", "label-gradient-alignment", "meta-gradient-jvp")
    assert "label-gradient-alignment, meta-gradient-jvp: not the paper's algorithm" in text
    assert "python -m fastmeta.examples.label_gradient_alignment, python -m fastmeta.examples.meta_gradient" in text
    for text in (lines("fixmatch", "none", "l2i"), lines("mean-teacher", "meta-gradient")):
        assert "not the paper's" not in text
    for recipe in METHODS.values():
        assert recipe.example is None or importlib.import_module(f"fastmeta.examples.{recipe.example}")
