"""The benchmark harness: its statistics, its floors, its refusal, and one small run from end to end."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import gate, inputs, measure, memory, plot, report, roofline, run_ops, timing
from bench.__main__ import main
from bench.case import Case, Problem, Variant, distance_to
from bench.ops import CASES, OPERATORS, STEMS
from fastmeta import ops

FUNCTIONS = {name for name in ops.__all__ if name.islower()} - {"free_workspace"}
CEILINGS = roofline.Ceilings({"float32": 2e11, "bfloat16": 4e11}, {10**6: 1e11, 10**8: 4e10})


class Clock:
    """A sampler that takes the given seconds in turn; `contended` says which samples other processes disturbed."""

    def __init__(self, seconds, contended=()):
        self.seconds, self.contended, self.order = dict(seconds), list(contended), []

    def __call__(self, timed, calls):
        self.order.append(timed.call)
        return self.seconds[timed.call], bool(self.contended) and self.contended.pop(0)


def test_rounds_alternate_in_order_and_samples_are_long_enough():
    first, second = timing.Timed(lambda: None), timing.Timed(lambda: 1)
    clock = Clock({first.call: 1e-3, second.call: 1e-2})
    timings = timing.interleave([first, second], rounds=4, min_sample_s=5e-3, sampler=clock)
    assert clock.order[-8:] == [first.call, second.call, second.call, first.call] * 2
    assert [t.calls for t in timings] == [5, 1]
    assert [t.samples_us for t in timings] == [[1000.0] * 4, [10000.0] * 4]


def test_a_slow_call_gets_fewer_samples_but_three():
    slow, slower = timing.Timed(lambda: None), timing.Timed(lambda: 1)
    clock = Clock({slow.call: 0.2, slower.call: 5.0})
    timings = timing.interleave([slow, slower], rounds=9, budget_s=1.0, sampler=clock)
    assert [len(t.samples_us) for t in timings] == [5, 3]


def test_contended_samples_are_taken_again_until_the_retries_are_used_up():
    one = timing.Timed(lambda: None)
    disturbed = timing.interleave([one], rounds=3, sampler=Clock({one.call: 1.0}, [False, True, True]))
    assert (disturbed[0].rejected, disturbed[0].contended, len(disturbed[0].samples_us)) == (2, 0, 3)
    always = timing.interleave([one], rounds=3, sampler=Clock({one.call: 1.0}, [True] * 99))
    assert (always[0].rejected, always[0].contended, len(always[0].samples_us)) == (3, 3, 3)


def test_median_and_quartiles():
    taken = timing.Timing(1, [5.0, 1.0, 2.0, 100.0, 3.0])
    assert taken.median_us == 3.0
    assert taken.quartiles_us == (2.0, 5.0)
    assert timing.Timing(1, [4.0]).quartiles_us == (4.0, 4.0)


def test_a_sample_measures_the_call_under_its_grad_mode():
    seen = []
    seconds, _ = timing.take_sample(timing.Timed(lambda: seen.append(torch.is_grad_enabled()), grad=True), 3)
    assert seen == [True] * 4
    assert 0 < seconds < 1


def test_floor_is_the_slower_of_arithmetic_and_memory():
    flops = roofline.Cost(flops=2e6, bytes=10)
    assert CEILINGS.floor_us(flops, "float32") == pytest.approx(10.0)
    assert CEILINGS.floor_us(flops, "bfloat16") == pytest.approx(5.0)
    assert CEILINGS.floor_us(roofline.Cost(0, 1e6), "float32") == pytest.approx(10.0)  # in cache
    assert CEILINGS.floor_us(roofline.Cost(0, 1e6, working_set=1e8), "float32") == pytest.approx(25.0)
    assert CEILINGS.floor_us(roofline.Cost(0, 4e9), "float32") == pytest.approx(1e5)  # beyond every copy measured


def test_a_dtype_without_fast_instructions_is_held_to_float32():
    slow = roofline.Ceilings({"float32": 2e11, "bfloat16": 1e10}, CEILINGS.copy)
    assert slow.floor_us(roofline.Cost(2e6, 0), "bfloat16") == pytest.approx(10.0)


def test_two_passes_join_to_the_better_of_each():
    other = roofline.Ceilings({"float32": 3e11, "bfloat16": 1e11}, {10**6: 2e10, 10**8: 5e10})
    joined = roofline.best_of(CEILINGS, other)
    assert joined == roofline.Ceilings({"float32": 3e11, "bfloat16": 4e11}, {10**6: 1e11, 10**8: 5e10})


def test_ceilings_are_measured():
    measured = roofline.measure_ceilings(rounds=3, gemm_size=128)
    assert set(measured.gemm) == {"float32", "bfloat16"}
    assert all(0 < rate < 1e13 for rate in (*measured.gemm.values(), *measured.copy.values()))


def test_peak_memory_counts_what_is_held_at_once():
    x = torch.ones(1000, 1000)

    def two_at_once():
        return ((x + 1) + 1).sum()

    assert 8_000_000 <= memory.peak_bytes(two_at_once) < 8_001_000
    assert memory.peak_bytes(lambda: x.add_(1)) < 1000


@pytest.mark.parametrize(
    ("network", "tensors", "numbers"), [("ResNet-50", 161, 25_557_032), ("WRN-28-2", None, 1_467_610)]
)
def test_parameter_shapes_are_the_networks(network, tensors, numbers):
    shapes = inputs.NETWORKS[network]()
    assert tensors is None or len(shapes) == tensors
    assert sum(torch.Size(shape).numel() for shape in shapes) == numbers


def test_every_operator_has_cases():
    assert {case.operator for case in CASES} == set(OPERATORS) == FUNCTIONS
    for operator, stem in STEMS.items():
        function = getattr(ops, operator)
        assert function.__module__ == f"fastmeta.ops.{stem}"


JUNIT = """<testsuites><testsuite>
<testcase classname="tests.test_ops" name="test_shapes[label_gradient-float32]"/>
<testcase classname="tests.test_ops" name="test_shapes[per_example_dot-float32]"><failure message="no"/></testcase>
<testcase classname="tests.test_hvp" name="test_symmetric"/>
<testcase classname="tests.test_ops" name="test_odd[per_example_dot]"><skipped/></testcase>
{more}</testsuite></testsuites>"""
ASKED = ("label_gradient", "per_example_dot", "hessian_vector_product", "perturbed")


def test_a_failure_is_the_named_operators(tmp_path):
    (tmp_path / "report.xml").write_text(JUNIT.format(more=""))
    verdicts = gate.judge(tmp_path / "report.xml", ASKED, STEMS)
    assert [verdicts[name].green for name in ASKED] == [True, False, True, False]
    assert verdicts["per_example_dot"].reason == (
        "1 of 1 tests fail, first tests.test_ops::test_shapes[per_example_dot-float32]"
    )
    assert verdicts["perturbed"].reason == "it has no tests"


def test_a_failure_that_names_no_operator_is_everybodys(tmp_path):
    more = '<testcase classname="tests.test_ops" name="test_import"><error message="no"/></testcase>'
    (tmp_path / "report.xml").write_text(JUNIT.format(more=more))
    assert not any(verdict.green for verdict in gate.judge(tmp_path / "report.xml", ASKED, STEMS).values())


def tiny_case(wrong: bool = False) -> Case:
    x = torch.linspace(0, 1, 64)

    def build(dtype):
        y = x.to(dtype)
        variants = [
            Variant("fastmeta", lambda: y * 2, "fastmeta"),
            Variant("eager", lambda: y + y, "eager"),
            Variant("half of it", lambda: y[:32] * 2, examples=32),
            Variant("broken", lambda: y * (3 if wrong else 2)),
            Variant("missing", lambda: y.no_such_method()),
        ]
        return Problem(variants, distance_to(2 * y.double(), rows=64), roofline.Cost(64, 512), 1e-2, 64)

    return Case("label_gradient", "64", build, note="A note.")


def measure_tiny(**options):
    dtypes = (torch.float32, torch.bfloat16)
    case = measure.measure_case(tiny_case(**options), dtypes, measure.Settings(3, 1e-4, 0.1))
    measure.add_floors(case, CEILINGS)
    return case


def test_a_measured_case_has_what_the_report_needs():
    case = json.loads(json.dumps(measure_tiny()))
    by_name = {(v["name"], v["dtype"]): v for v in case["variants"]}
    ours = by_name["fastmeta", "float32"]
    assert ours["median_us"] > 0
    assert ours["quartiles_us"][0] <= ours["median_us"] <= ours["quartiles_us"][1]
    assert ours["times_floor"] == pytest.approx(ours["median_us"] / case["cost"]["float32"]["floor_us"])
    assert ours["peak_bytes"] >= 64 * 4
    assert ours["samples"] == 3
    half = by_name["half of it", "float32"]
    assert half["extrapolated"] == {"measured_examples": 32, "all_examples": 64}
    assert "peak_bytes" not in half
    missing = by_name["missing", "bfloat16"]
    assert missing["status"] == "failed"
    assert "no_such_method" in missing["reason"]
    assert "median_us" not in missing


def test_share_of_contended_samples():
    variants = [{"median_us": 1, "samples": 3, "contended_samples": n} for n in (0, 3)]
    assert report.contended_share({"cases": [{"variants": [*variants, {"status": "failed"}]}]}) == 0.5


def test_a_variant_that_computes_something_else_is_not_timed():
    broken = next(v for v in measure_tiny(wrong=True)["variants"] if v["name"] == "broken")
    assert broken["status"] == "wrong"
    assert "median_us" not in broken


@pytest.fixture
def run_tiny(monkeypatch, tmp_path):
    """`python -m bench ops` on the tiny case, its tests green or red."""

    def run(green: bool) -> SimpleNamespace:
        verdict = gate.Verdict(3, () if green else ("tests.test_ops::test_shapes",))
        monkeypatch.setattr(run_ops, "CASES", [tiny_case()])
        monkeypatch.setattr(gate, "run_tests", lambda operators, stems: dict.fromkeys(operators, verdict))
        monkeypatch.setattr(roofline, "measure_ceilings", lambda: CEILINGS)
        status = main(["ops", "--operators", "label_gradient", "--rounds", "3", "--out", str(tmp_path)])
        results = json.loads((tmp_path / "ops.json").read_text())
        return SimpleNamespace(status=status, results=results, folder=tmp_path)

    return run


def test_a_run_writes_json_tables_and_a_picture(run_tiny, capsys):
    done = run_tiny(green=True)
    assert done.status == 0
    assert done.results["schema_version"] == report.SCHEMA_VERSION
    assert {"cpu", "threads", "torch", "git_commit", "date", "fastmeta_build"} <= done.results["environment"].keys()
    assert done.results["ceilings"]["gemm_gflops"]["float32"] == 200
    gain = report.speed_up(done.results["cases"][0], report.measured(done.results["cases"][0], "eager")[0])
    assert gain is not None
    assert f"{gain:.2f}x" in (done.folder / "ops.md").read_text()
    assert (done.folder / "ops.png").read_bytes().startswith(b"\x89PNG")
    assert "A note." in (done.folder / "ops.md").read_text()
    assert "| label_gradient | 64 |" in capsys.readouterr().out


def test_red_tests_leave_no_figure(run_tiny, capsys):
    done = run_tiny(green=False)
    assert done.status == 1
    assert done.results["cases"] == []
    printed = capsys.readouterr().out + (done.folder / "ops.md").read_text()
    assert printed.count("**label_gradient: not measured, 1 of 4 tests fail, first tests.test_ops::test_shapes.**") == 2
    assert "| label_gradient" not in printed
    assert not (done.folder / "ops.png").exists()


def test_unknown_shape_is_refused(capsys):
    assert main(["ops", "--shapes", "3 by 5"]) == 2
    assert "No case" in capsys.readouterr().err


def test_picture_of_nothing_is_none(tmp_path: Path):
    assert plot.draw({"cases": [], "environment": {}}, tmp_path) is None
