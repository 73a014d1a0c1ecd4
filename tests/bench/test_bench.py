"""The benchmark harness: its statistics, its floors, its refusal, and one small run from end to end."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import choices, clock, files, floors, gate, inputs, measure, operators, plot, report, rows
from bench.__main__ import main
from bench.case import Case, Cost, Variant, Workload, distance_to
from bench.clock import Timing, clock_for
from bench.ops import cases
from fastmeta import ops

FUNCTIONS = {name for name in ops.__all__ if name.islower()} - {"free_workspace"}
CEILINGS = floors.Ceilings({"float32": 2e11, "bfloat16": 4e11}, {10**6: 1e11, 10**8: 4e10})
RECORD = Path(__file__).parents[2] / "bench/results/amd-epyc-2-threads"


class Clock:
    """A sampler that takes the given seconds in turn; `contended` says which samples other processes disturbed."""

    def __init__(self, seconds, contended=()):
        self.seconds, self.contended, self.order = dict(seconds), list(contended), []

    def __call__(self, timed, calls):
        self.order.append(timed.call)
        return self.seconds[timed.call], bool(self.contended) and self.contended.pop(0)


def test_rounds_alternate_in_order_and_samples_are_long_enough():
    first, second = Variant("", lambda: None), Variant("", lambda: 1)
    times = Clock({first.call: 1e-3, second.call: 1e-2})
    timings = clock.interleave([first, second], rounds=4, min_sample_s=5e-3, sampler=times)
    assert times.order[-8:] == [first.call, second.call, second.call, first.call] * 2
    assert [t.calls for t in timings] == [5, 1]
    assert [t.samples_us for t in timings] == [[1000.0] * 4, [10000.0] * 4]


def test_a_slow_call_gets_fewer_samples_but_three():
    slow, slower = Variant("", lambda: None), Variant("", lambda: 1)
    times = Clock({slow.call: 0.2, slower.call: 5.0})
    timings = clock.interleave([slow, slower], rounds=9, budget_s=1.0, sampler=times)
    assert [len(t.samples_us) for t in timings] == [5, 3]


def test_contended_samples_are_taken_again_until_the_retries_are_used_up():
    one = Variant("", lambda: None)
    disturbed = clock.interleave([one], rounds=3, sampler=Clock({one.call: 1.0}, [False, True, True]))
    assert (disturbed[0].rejected, disturbed[0].contended, len(disturbed[0].samples_us)) == (2, 0, 3)
    always = clock.interleave([one], rounds=3, sampler=Clock({one.call: 1.0}, [True] * 99))
    assert (always[0].rejected, always[0].contended, len(always[0].samples_us)) == (3, 3, 3)


def test_median_and_quartiles():
    taken = Timing(1, [5.0, 1.0, 2.0, 100.0, 3.0])
    assert taken.median_us == 3.0
    assert taken.quartiles_us == [2.0, 5.0]
    assert Timing(1, [4.0]).quartiles_us == [4.0, 4.0]


def test_a_sample_measures_the_call_under_its_grad_mode():
    seen = []
    seconds, _ = clock.take_sample(Variant("", lambda: seen.append(torch.is_grad_enabled()), grad=True), 3)
    assert seen == [True] * 4
    assert 0 < seconds < 1


def floor_us(ceilings, flops, num_bytes, working_set=None, dtype="float32", graph=True):
    cost = {"flops": flops, "bytes": num_bytes, "working_set": working_set}
    return max(ceilings.parts_us(cost, dtype, graph=graph).values())


def test_floor_is_the_slowest_of_arithmetic_memory_and_a_launch():
    assert floor_us(CEILINGS, 2e6, 10) == pytest.approx(10.0)
    assert floor_us(CEILINGS, 2e6, 10, dtype="bfloat16") == pytest.approx(5.0)
    assert floor_us(CEILINGS, 0, 1e6) == pytest.approx(10.0)  # in cache
    assert floor_us(CEILINGS, 0, 1e6, working_set=1e8) == pytest.approx(25.0)
    assert floor_us(CEILINGS, 0, 4e9) == pytest.approx(1e5)  # beyond every copy measured
    launching = floors.Ceilings(CEILINGS.gemm, CEILINGS.copy, {"stream": 4.0, "graph": 1.0})
    assert floor_us(launching, 2, 10) == 1.0
    assert floor_us(launching, 2, 10, graph=False) == 4.0


def test_a_dtype_without_fast_instructions_is_held_to_float32():
    slow = floors.Ceilings({"float32": 2e11, "bfloat16": 1e10}, CEILINGS.copy)
    assert floor_us(slow, 2e6, 0, dtype="bfloat16") == pytest.approx(10.0)


def test_two_passes_join_to_the_better_of_each():
    other = floors.Ceilings({"float32": 3e11, "bfloat16": 1e11}, {10**6: 2e10, 10**8: 5e10})
    joined = CEILINGS.best_of(other)
    assert joined == floors.Ceilings({"float32": 3e11, "bfloat16": 4e11}, {10**6: 1e11, 10**8: 5e10})
    assert floors.Ceilings.from_json(json.loads(json.dumps(joined.as_json()))) == joined


def test_ceilings_are_measured():
    measured = floors.measure_ceilings(clock_for("cpu"), copy_bytes=(2**12, 2**16), gemm_size=128, rounds=3)
    assert set(measured.gemm) == {"float32", "bfloat16"}
    assert all(0 < rate < 1e13 for rate in (*measured.gemm.values(), *measured.copy.values()))


def test_peak_memory_counts_what_is_held_at_once():
    x = torch.ones(1000, 1000)

    def two_at_once():
        return ((x + 1) + 1).sum()

    assert 8_000_000 <= clock_for("cpu").peak_bytes(two_at_once) < 8_001_000
    assert clock_for("cpu").peak_bytes(lambda: x.add_(1)) < 1000


@pytest.mark.parametrize(
    ("network", "tensors", "numbers"), [("ResNet-50", 161, 25_557_032), ("WRN-28-2", None, 1_467_610)]
)
def test_parameter_shapes_are_the_networks(network, tensors, numbers):
    shapes = inputs.NETWORKS[network]()
    assert tensors is None or len(shapes) == tensors
    assert sum(torch.Size(shape).numel() for shape in shapes) == numbers


def test_every_operator_has_cases():
    for device in ("cpu", "cuda"):
        assert {case.operator for case in cases(device)} == set(choices.OPERATORS) == FUNCTIONS
    for operator, stem in choices.STEMS.items():
        function = getattr(ops, operator)
        assert function.__module__ == f"fastmeta.ops.{stem}"


OUTCOMES = (
    ("tests/test_ops.py::test_shapes[label_gradient-float32]", "passed"),
    ("tests/test_ops.py::test_shapes[per_example_dot-float32]", "failed"),
    ("tests/test_hvp.py::test_symmetric", "passed"),
    ("tests/test_ops.py::test_odd[perturbed]", "skipped"),
)
ASKED = ("label_gradient", "per_example_dot", "hessian_vector_product", "perturbed")
STEMS = {name: choices.STEMS[name] for name in ASKED}


def judged(path, *more):
    lines = [{"test": test, "outcome": outcome, "message": "no"} for test, outcome in (*OUTCOMES, *more)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"test": "cut o')
    return gate.summarize([path], STEMS)["operators"]


def test_a_failure_is_the_named_operators(tmp_path):
    verdicts = judged(tmp_path / "outcomes")
    assert [verdicts[name]["green"] for name in ASKED] == [True, False, True, False]
    assert verdicts["per_example_dot"]["reason"] == (
        "1 of 1 tests fail, first tests/test_ops.py::test_shapes[per_example_dot-float32]"
    )
    assert verdicts["perturbed"]["reason"] == "it has no tests"


def test_a_failure_of_the_common_tests_that_names_no_operator_is_everybodys(tmp_path):
    common = judged(tmp_path / "common", ("tests/test_ops.py::test_import", "failed"))
    assert not any(verdict["green"] for verdict in common.values())
    other = judged(tmp_path / "other", ("tests/test_graph.py::test_on_a_gpu", "failed"))
    assert other["label_gradient"]["green"]


def test_a_run_of_the_tests_that_cannot_begin_is_red(monkeypatch):
    monkeypatch.setattr(gate, "command", lambda *_: [sys.executable, "-c", "raise SystemExit(4)"])
    assert not any(verdict["green"] for verdict in gate.run_tests(ASKED, choices.STEMS)["operators"].values())


def tiny_case(wrong: bool = False) -> Case:
    x = torch.linspace(0, 1, 64)

    def build(dtype, device):
        y = x.to(dtype)
        variants = [
            Variant("fastmeta", lambda: y * 2, "fastmeta"),
            Variant("eager", lambda: y + y, "eager"),
            Variant("half of it", lambda: y[:32] * 2, examples=32),
            Variant("broken", lambda: y * (3 if wrong else 2)),
            Variant("missing", lambda: y.no_such_method()),
        ]
        return Workload(variants, distance_to(2 * y.double(), prefix=True), Cost(64, 512), 1e-2, 64)

    return Case("label_gradient", "64", build, note="A note.")


def measure_tiny(**options):
    cpu, dtypes = clock_for("cpu"), (torch.float32, torch.bfloat16)
    settings = measure.Settings(3, 1e-4, 0.1)
    records = measure.measure_case(tiny_case(**options), dtypes, cpu, floors.Products(cpu), settings)
    for record in records:
        CEILINGS.apply(record)
    return records


def test_a_measured_case_has_what_the_report_needs():
    float32, bfloat16 = json.loads(json.dumps(measure_tiny()))
    ours = rows.main_variant(float32)
    assert ours["stream_us"] > 0
    assert ours["quartiles_us"][0] <= ours["stream_us"] <= ours["quartiles_us"][1]
    assert ours["p20_p80_us"][0] <= ours["stream_us"] <= ours["p20_p80_us"][1]
    assert ours["times_floor"] == pytest.approx(ours["stream_us"] / float32["cost"]["floor_us"])
    assert ours["peak_bytes"] >= 64 * 4
    assert ours["samples"] == 3
    half = rows.named(float32, "half of it")
    assert half["extrapolated"] == {"measured_examples": 32, "all_examples": 64}
    assert "peak_bytes" not in half
    (missing,) = [variant for variant in bfloat16["variants"] if variant["name"] == "missing"]
    assert missing["status"] == "failed"
    assert "no_such_method" in missing["reason"]
    assert "stream_us" not in missing


def test_share_of_contended_samples():
    assert rows.contended_share([{"samples": 3, "contended_samples": n} for n in (0, 3)]) == 0.5


def test_a_variant_that_computes_something_else_is_not_timed():
    (broken,) = [variant for variant in measure_tiny(wrong=True)[0]["variants"] if variant["name"] == "broken"]
    assert broken["status"] == "wrong"
    assert "stream_us" not in broken


@pytest.fixture
def run_tiny(monkeypatch, tmp_path):
    """`python -m bench ops` on the tiny case, its tests green or red."""

    def run(green: bool) -> SimpleNamespace:
        verdict = {"green": green, "failed": not green, "passed": 3, "reason": "3 tests pass" if green else "they fail"}
        monkeypatch.setattr(operators, "cases", lambda device: [tiny_case()])
        monkeypatch.setattr(gate, "run_tests", lambda names, stems: {"operators": dict.fromkeys(names, verdict)})
        monkeypatch.setattr(operators, "measure_ceilings", lambda clock: CEILINGS)
        status = main(["ops", "--operators", "label_gradient", "--rounds", "3", "--out", str(tmp_path)])
        results = json.loads((tmp_path / "ops.json").read_text())
        return SimpleNamespace(status=status, results=results, folder=tmp_path)

    return run


def test_a_run_writes_json_tables_and_a_picture(run_tiny, capsys):
    done = run_tiny(green=True)
    assert done.status == 0
    assert done.results["schema_version"] == report.SCHEMA_VERSION
    assert {"cpu", "threads", "torch", "git_commit", "date", "fastmeta_build"} <= done.results["environment"].keys()
    assert done.results["shared"]["peak_flops"]["float32"] == 2e11
    record = done.results["operators"][0]
    gain = rows.over(record, rows.measured(record, "eager"))
    text = (done.folder / "ops.md").read_text()
    assert gain is not None
    assert f"{gain:.2f}x" in text
    assert "A note." in text
    assert "scaled to all of them" in text
    assert "over eager, graphs" not in text
    for name in ("ops.png", "ops-roofline.png"):
        assert (done.folder / name).read_bytes().startswith(b"\x89PNG")
    assert "| label_gradient | 64 | float32 |" in capsys.readouterr().out
    lines = (done.folder / "ops.csv").read_text().splitlines()
    assert lines[0].split(",") == list(report.COLUMNS)
    assert any(line.startswith("label_gradient,fastmeta,stream,64,float32,") for line in lines)


def test_red_tests_leave_no_figure(run_tiny, capsys):
    done = run_tiny(green=False)
    assert done.status == 1
    assert done.results["operators"] == []
    printed = capsys.readouterr().out + (done.folder / "ops.md").read_text()
    assert printed.count("**label_gradient: not measured, they fail.**") == 2
    assert "| label_gradient" not in printed
    assert not (done.folder / "ops.png").exists()


def test_unknown_shape_is_refused(capsys):
    assert main(["ops", "--shapes", "3 by 5"]) == 2
    assert "No case" in capsys.readouterr().err


def test_picture_of_nothing_is_none(tmp_path: Path):
    assert plot.draw({"operators": [], "environment": {}}, tmp_path, "ops") == []


def test_the_recorded_run_is_read_and_written_again(tmp_path):
    results = files.read(RECORD / "ops.json")
    written = operators.save(results, tmp_path)
    assert set(written) == {"ops.json", "ops.csv", "ops.md", "ops.png", "ops-roofline.png"}
    for name in ("ops.json", "ops.csv", "ops.md"):
        assert (tmp_path / name).read_text() == (RECORD / name).read_text()
