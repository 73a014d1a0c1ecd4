"""``python -m bench step``: one small run from end to end, its gate, its goals and its report."""

import json

import pytest
import torch

from bench import goals
from bench.__main__ import main
from bench.clock import Clock
from bench.step import alignment, command, gate, measure, published, report, task
from bench.step.variants import EVERY, PLAIN, StepVariant, for_gpu, variants
from fastmeta.models import WideResNet

TINY = task.Network("tiny", lambda: WideResNet(10, depth=10, width=1), pixels=12, labeled=4, unlabeled=4)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What a run on a small network leaves in its folder."""
    folder = tmp_path_factory.mktemp("step")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "NETWORKS", {"cpu": (TINY,), "cuda": ()})
        patch.setattr(command, "NAMES", ["tiny"])
        code = main(["step", "--rounds", "1", "--batch", "4", "--threads", "1", "--out", str(folder)])
    assert code == 0
    return folder, json.loads((folder / "step.json").read_text())


def test_every_step_is_measured_and_right(results):
    (network,) = results[1]["networks"]
    steps = {row["name"]: row for row in network["steps"]}
    assert [row["name"] for row in network["steps"] if row["schedule"] == "plain"] == list(PLAIN)
    for variant in variants():
        row = steps[variant.name]
        assert row["status"] == "measured"
        assert row["ratio"] == pytest.approx(row["median_us"] / steps[variant.plain]["median_us"])  # one round
        assert row["peak_bytes"] > 0
        assert (row["error"] < gate.TOLERANCE) if variant.same_as else "error" not in row
    assert {row["name"] for row in network["derivatives"]} == {"forward", *derivative_hows()}


def derivative_hows():
    return ("double_backward", "jvp", "finite_difference", "forward_difference", "last_layer")


def test_the_arithmetic_is_that_of_the_passes_one_can_count(results):
    """F of each step; the linear layer and the first layer, which needs no gradient of the images, are small change."""
    (network,) = results[1]["networks"]
    passes = {row["name"]: row["passes"] for row in network["steps"]}
    expected = {
        "Mean Teacher": 7,
        "FixMatch": 9,
        "FixMatch, separate passes": 7,
        "pseudo-labels": 7,
        "table labels": 6,
        "L2I V2, last_layer, fused": 7,
        "L2I V2, last_layer, alternating": 11,
        "L2I V2, two views, last_layer, alternating": 12,
        "L2I V2, jvp, fused": 10,  # labeled 3, teacher 1, forward mode 3, unlabeled 3
        "L2I V2, jvp, alternating": 15,  # 7, hold-out 3, forward mode that keeps its graph 3, pull-back 2
        "MetaGradient, last_layer, fused": 7,
        "MetaGradient, last_layer, alternating": 8,
        "MetaGradient, jvp, fused": 9,
        "MetaGradient, jvp, alternating": 12,
        "MetaGradient, finite_difference, published": 12,
        "ExampleWeights, last_layer, fused": 9,
        "ExampleWeights, identity, jvp, fused": 10,
        "LabelGradientAlignment, last_layer, fused": 6,
        "LabelGradientAlignment, jvp, fused": 9,
    }
    assert {name: passes[name] for name in expected} == pytest.approx(expected, rel=0.07)


def test_weights_that_rarely_move_cost_next_to_nothing(results):
    (network,) = results[1]["networks"]
    steps = {row["name"]: row for row in network["steps"]}
    update, between = (steps[f"ExampleWeights{which}, last_layer, fused"] for which in ("", ", between updates"))
    amortized = steps[f"ExampleWeights, every {EVERY} steps, last_layer, fused"]
    assert amortized["ratio"] == pytest.approx((update["ratio"] + (EVERY - 1) * between["ratio"]) / EVERY)
    assert amortized["status"] == "computed"


def test_the_run_writes_tables_and_a_picture(results):
    folder, written = results
    text = (folder / "step.md").read_text()
    assert (folder / "step.png").stat().st_size > 10_000
    assert text == report.markdown(written)
    assert "| MetaGradient | jvp | alternating | pseudo-labels | 1" in text
    assert len(written["goals"]["tiny"]) == len([*goals.of_steps(written["networks"][0])])


def test_the_gate_finds_a_wrong_step(monkeypatch):
    chosen = [v for v in variants() if v.name == "LabelGradientAlignment, jvp, fused"]
    assert max(gate.errors(TINY, chosen).values()) < gate.TOLERANCE
    monkeypatch.setattr(alignment, "EPSILON", 1.01 * published.EPSILON)
    errors = gate.errors(TINY, chosen)
    assert errors["LabelGradientAlignment, jvp, fused"] > 1e3 * gate.TOLERANCE


def test_a_wrong_step_is_not_timed_and_one_that_fails_does_not_end_the_run(monkeypatch):
    def broken(network, batch):
        raise NotImplementedError("no such thing\nand more")

    chosen = [
        StepVariant("wrong", "jvp", "fused", "table labels", published.PublishedMetaGradient, "right"),
        StepVariant("failing", "jvp", "fused", "table labels", broken),
    ]
    monkeypatch.setattr(measure.gate, "errors", lambda network, variants, device: {chosen[0].name: 2e-3})
    monkeypatch.setattr(measure, "derivatives", lambda *arguments: [])
    network = measure.measure_network(TINY, chosen, measure.Settings(rounds=1))
    wrong, failing = network["steps"][-2:]
    assert (wrong["status"], "median_us" in wrong) == ("wrong", False)
    assert (failing["status"], failing["reason"]) == ("failed", "NotImplementedError: no such thing")
    assert {goal.met for goal in goals.of_steps(network)} == {None}
    lines = report.markdown(made_up([network])).splitlines()
    assert "| wrong | jvp | fused | table labels | wrong | 2e-03 |" in lines
    assert "- failing, jvp, fused: failed, NotImplementedError: no such thing." in lines


def made_up(networks):
    keys = ("cpu", "threads", "torch_cpu_capability", "torch", "fastmeta", "git_commit", "date")
    return {"environment": dict.fromkeys(keys, "?"), "settings": {"rounds": 1}, "networks": networks}


def row(method, how, schedule, ratio, memory=1.0, status="measured"):
    return {
        "name": f"{method}, {how}, {schedule}",
        "method": method,
        "how": how,
        "schedule": schedule,
        "ratio": ratio,
        "memory_ratio": memory,
        "status": status,
    }


def test_goals_are_judged_by_their_worst_case():
    network = {
        "network": "made up",
        "steps": [
            {"name": "Mean Teacher", "schedule": "plain", "status": "measured"} | dict.fromkeys(("method", "how"), ""),
            row("L2I V2", "last_layer", "fused", 1.02),
            row("LabelGradientAlignment", "last_layer", "fused", 1.11),
            row("ExampleWeights", "last_layer", "alternating", 9.0),  # of no goal
            row("ExampleWeights, every 100 steps", "last_layer", "fused", 9.0, status="computed"),
            row("MetaGradient", "last_layer", "alternating", 1.2),
            row("L2I V1, two views", "last_layer", "alternating", 1.71),
            row("L2I V2", "last_layer", "alternating", 1.5),
            row("L2I V2", "jvp", "fused", 1.4, memory=1.6),
            row("L2I V2, two views", "jvp", "alternating", 2.3),
            row("L2I V2", "double_backward", "published", 2.9, memory=3.0),
        ],
        "derivatives": [{"name": "jvp", "mode": "train", "ratio": 2.4}, {"name": "jvp", "mode": "eval", "ratio": 1.8}],
    }
    verdicts = {goal.name: (goal.worst, goal.met) for goal in goals.of_steps(network)}
    assert verdicts == {
        "last layer, fused: L2I, weights, alignment": (("LabelGradientAlignment, last_layer, fused", 1.11), False),
        "last layer: Meta-Gradient": (("MetaGradient, last_layer, alternating", 1.2), True),
        "last layer, alternating: L2I": (("L2I V1, two views, last_layer, alternating", 1.71), False),
        "exact by jvp, fused: L2I": (("L2I V2, jvp, fused", 1.4), True),
        "exact by jvp, fused: Meta-Gradient": (None, None),
        "exact by jvp, alternating: L2I": (("L2I V2, two views, jvp, alternating", 2.3), False),
        "exact by jvp, alternating: Meta-Gradient": (None, None),
        "exact by jvp: peak memory": (("L2I V2, jvp, fused", 1.6), False),
        "label_gradient by jvp over one forward": (("train mode", 2.4), False),
    }
    table = report.goals_table({"networks": [network]})
    assert "| made up | exact by jvp, fused: L2I | <= 2.00x | 1.40x: L2I V2, jvp, fused | yes |" in table
    assert "| made up | exact by jvp, fused: Meta-Gradient | <= 1.60x |  |  |" in table


def test_no_step_has_such_a_name(capsys):
    assert main(["step", "--methods", "nothing"]) == 2
    assert "No step" in capsys.readouterr().err


class PretendClock(Clock):
    """A GPU's clock on the CPU: graphs and autocast aside, what is measured there is measured here."""

    device = "cpu"

    def host_syncs(self, call):
        return 0


def test_paired_ratios_have_a_spread_and_the_method_alone_bounds_them():
    rows = [
        {"name": "plain", "schedule": "plain", "median_us": 100.0, "peak_bytes": 10},
        {"name": "x", "plain": "plain", "schedule": "fused", "median_us": 150.0, "peak_bytes": 10, "refine_us": 2.0},
    ]
    measure._add_ratios(rows, {"plain": [100.0, 200.0, 50.0], "x": [102.0, 204.0, 52.0]})  # rounds fast and slow
    assert rows[1]["ratio"] == pytest.approx(1.02)
    assert rows[1]["ratio_quartiles"] == pytest.approx((1.02, 1.03))
    assert rows[1]["bound"] == pytest.approx(1.02)


def test_a_gpus_steps():
    """Last layers, each in a graph too, and the whole model: in every way where the network is small."""
    small, large = (for_gpu(network) for network in task.NETWORKS["cuda"])
    for found in (small, large):
        graphs = [v for v in found if v.graph]
        assert {v.method for v in graphs} >= {"L2I V1", "L2I V2", "MetaGradient", "ExampleWeights"}
        assert len({v.name for v in found}) == len(found)
        assert any(v.how == "jvp" for v in found)
    assert {v.how for v in small} > {v.how for v in large}
    quick = for_gpu(task.NETWORKS["cuda"][0], quick=True)
    assert {v.name for v in quick} == {v.name for v in large}
    assert {v.name for v in variants()} <= {v.name for v in small}


def test_the_methods_part_is_timed_on_what_a_step_gave_it():
    row = {}
    step = next(v for v in variants() if v.name == "ExampleWeights, last_layer, fused").make(
        TINY, task.random_batch(TINY)
    )
    method = step.method
    measure._refine_alone(row, step, PretendClock())
    assert row["refine_us"] > 0
    assert row["refine_host_syncs"] == 0
    assert step.method is method


def test_what_would_begin_too_late_is_left_out():
    chosen = [v for v in variants() if v.name == "MetaGradient, last_layer, fused"]
    network = measure.measure_network(TINY, chosen, measure.Settings(rounds=1, seconds=1e-3))
    assert network["steps"][-1]["reason"] == "no time was left"
    assert network["derivatives"] == []
    assert "no time was left" in report.markdown(made_up([network]))


def test_a_step_in_a_graph(monkeypatch):
    captured = []
    monkeypatch.setattr("fastmeta.graph", lambda method: captured.append(method) or method)
    chosen = [v for v in for_gpu(TINY) if v.name == "MetaGradient, last_layer, fused, graph"]
    network = measure.measure_network(TINY, chosen, measure.Settings(rounds=2))
    (row,) = [row for row in network["steps"] if row["schedule"] == "fused"]
    assert captured
    assert "passes" not in row
    assert len(row["ratio_quartiles"]) == 2
