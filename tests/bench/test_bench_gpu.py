"""What ``python -m bench gpu`` measures: its cases, floors and progress, on the CPU and with made-up times."""

import json
import time
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from cases import DEVICE

from bench import case as cases
from bench import clock as clocks
from bench import files, floors, kernels, measure, operators, rows
from bench.case import Case, Cost, Gemm, Variant, Workload, distance_to
from bench.files import Progress
from bench.floors import Ceilings
from bench.inputs import Shape
from bench.ops import LAST_LAYER, feature_similarity, finite_difference_labels, last_layer
from fastmeta.models import WideResNet

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="it is what runs there")
F32, BF16 = torch.float32, torch.bfloat16
QUICK = measure.Settings(rounds=3, min_sample_s=1e-4, budget_s=0.01)
CEILINGS = Ceilings({"float32": 1e12, "bfloat16": 2e12}, {10**4: 1e9, 10**6: 5e8}, {"stream": 10.0, "graph": 1.5})


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Clock(clocks.Clock):
    """Every call takes 10 us on the stream and 4 us in a graph; one that must not be captured raises."""

    def sampler(self, timed, calls):
        return 1e-6 * getattr(timed.call, "us", 10.0), False

    def capture(self, call, calls):
        if getattr(call, "waits", False):
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        replay = partial(int, 1)
        replay.us = 4.0 * calls
        return replay

    def host_us(self, call):
        return 7.0

    def peak_bytes(self, call):
        return 1024

    def host_syncs(self, call):
        return 0


def test_wide_resnet_is_that_of_the_papers():
    model = WideResNet(10).to(memory_format=torch.channels_last)
    assert sum(p.numel() for p in model.parameters()) == 1_467_610
    images = torch.randn(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    assert model.blocks(model.stem(images)).shape == (2, 128, 8, 8)
    assert model(images).shape == (2, 10)
    slopes = torch.autograd.grad(model(images).sum(), list(model.parameters()))
    assert all(bool(slope.isfinite().all()) and bool(slope.any()) for slope in slopes)
    with pytest.raises(ValueError, match="depth must be 6 k"):
        WideResNet(10, depth=20)


TINY = Shape(7, 9, 21)
OPERATORS = [pytest.param(o, id=o.name + "-head" * o.from_head) for o in LAST_LAYER]


@pytest.fixture
def uncompiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


def errors(workload: Workload) -> dict[str, float]:
    found = {}
    for variant in workload.variants:
        with variant.entered():
            found[variant.name] = workload.error(variant.result())
    return found


@pytest.mark.parametrize("operator", OPERATORS)
def test_every_variant_computes_the_same(operator, uncompiled, monkeypatch):
    for module in (cases, last_layer):  # as on a GPU
        monkeypatch.setattr(module, "compile_modes", lambda dtype, device: cases.COMPILE_MODES)
    for dtype in (F32, BF16):
        workload = last_layer.build(operator, TINY, dtype, "cpu")
        found = errors(workload)
        assert {"fastmeta", "eager", "torch.compile", rows.MAX_AUTOTUNE} <= found.keys()
        assert all(error <= workload.tolerance for error in found.values()), found
    flops = 2 * TINY.n * TINY.d * TINY.c
    assert workload.cost.flops == sum(gemm.flops for gemm in operator.products(TINY))
    assert workload.cost.flops % flops == 0
    assert workload.cost.row_bytes >= 2 * 2 * TINY.n * TINY.c


def test_forms_that_can_be_named():
    names = [form.name for form in kernels.offered("label_gradient", 21, "cpu")]
    assert names[0] == "fastmeta"
    assert {"triton rows", "triton fused"} <= set(names)  # in the interpreter
    assert "cuda" not in [form.name for form in kernels.offered("label_gradient", 33, "cpu")]
    wide = [form.name for form in kernels.offered("label_gradient", 1000, "cpu")]
    assert wide == ["fastmeta", "triton rows"]
    assert kernels.offered("finite_difference_labels", 21, "cpu")[-1].name == "triton"


def test_a_wrong_result_is_seen_in_any_row(uncompiled, monkeypatch):
    monkeypatch.setattr(last_layer, "_CHUNK", 40)  # the truth of sums comes in blocks of rows
    dot, gradient = LAST_LAYER[0], LAST_LAYER[2]
    workload = last_layer.build(dot, TINY, F32, "cpu")
    right = workload.variants[0].call()
    for row in range(TINY.n):
        wrong = right.clone()
        wrong[row] += 1
        assert workload.error(wrong) > workload.tolerance
    workload = last_layer.build(gradient, TINY, F32, "cpu")
    weight, bias = workload.variants[0].call()
    assert workload.error((weight, bias)) <= workload.tolerance
    assert workload.error((weight, bias + 0.1)) > workload.tolerance


@pytest.mark.parametrize("shape", [TINY, Shape(40, 6, 9)], ids=str)
def test_the_other_operators_cases(shape, uncompiled):
    for dtype in (F32, BF16):
        for workload in (
            feature_similarity.build(shape, dtype, "cpu"),
            finite_difference_labels.build(shape.n, shape.c, dtype, "cpu"),
        ):
            assert all(error <= workload.tolerance for error in errors(workload).values())


def test_the_rows_that_are_checked_are_at_both_ends():
    assert cases.checked_rows(5, 1000, "cpu").tolist() == [0, 1, 2, 3, 4]
    rows_checked = cases.checked_rows(10**6, 2**25, "cpu")
    assert rows_checked.tolist() == [0, 1, 10**6 - 2, 10**6 - 1]


def test_arguments_rotate_beyond_the_cache(monkeypatch):
    taken = []
    rotation = cases.Rotation(taken.append, [(1,), (2,), (3,)])
    for _ in range(4):
        rotation()
    rotation.first()
    assert taken == [1, 2, 3, 1, 1]
    monkeypatch.setattr(cases, "l2_bytes", lambda device: 60e6)
    assert cases.number_of_sets(36e6, "cuda") == 5
    assert cases.number_of_sets(1e3, "cuda") == cases.MAX_SETS
    assert cases.number_of_sets(8e9, "cuda") == 1
    monkeypatch.setattr(cases, "l2_bytes", lambda device: 5_000)
    sets = last_layer.build(LAST_LAYER[0], TINY, F32, "cpu").variants[0].call.sets
    assert len(sets) > 1
    assert not torch.equal(sets[0][0], sets[1][0])


@pytest.mark.parametrize("kind", ["nn", "nt", "tn"])
def test_a_product_has_its_operands_as_the_operator_has_them(kind):
    gemm = Gemm(5, 7, 11, kind)
    a, b = gemm.operands(BF16, "cpu")
    assert (a @ b).shape == (5, 11)
    assert a.is_contiguous() == (kind != "tn")
    assert b.is_contiguous() == (kind != "nt")
    assert gemm.flops == 2 * 5 * 7 * 11


def test_ceilings_and_products_are_measured_without_the_hosts_part():
    measured = floors.measure_ceilings(Clock(), copy_bytes=(1000, 10**6), gemm_size=64)
    assert measured.copy == pytest.approx({1000: 1000 / 4e-6, 10**6: 1e6 / 4e-6})
    assert measured.gemm["float32"] == pytest.approx(2 * 64**3 / 4e-6)
    products = floors.Products(Clock())
    assert products.us(Gemm(8, 8, 8, "nt"), F32) == pytest.approx(4)


class Call:
    def __init__(self, result, us=10.0, waits=False):
        self.result, self.us, self.waits = result, us, waits

    def __call__(self):
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


def problem_of(*variants: Variant) -> Case:
    def build(dtype, device):
        gemm = Gemm(3, 4, 5, "nt")
        return Workload(list(variants), distance_to(torch.ones(3)), Cost(0, 100, 5000, (gemm, gemm), 3000), 1e-3)

    return Case("label_gradient", "3, 4, 5", build, shape=(3, 4, 5))


def test_a_case_is_checked_timed_and_set_against_its_floor():
    around = []

    class Forced(nullcontext):
        def __enter__(self):
            around.append(1)

    right = torch.ones(3)
    case = problem_of(
        Variant("fastmeta", Call(right, 12.0), "fastmeta"),
        Variant("triton rows", Call(right, 10.0), "fastmeta", around=Forced),
        Variant("eager", Call(right, 30.0, waits=True), "eager"),
        Variant("long", Call(right, 5000.0), "peer"),
        Variant("loop", Call(right, 20.0), "peer", graph=False),
        Variant("wrong", Call(2 * right), "peer"),
        Variant("absent", Call(MemoryError("9 GB\nmore")), "peer"),
        Variant("late", Call(right), "compile"),
    )
    announced: list[str] = []
    clock = Clock()
    (record,) = measure.measure_case(
        case, [F32], clock, floors.Products(clock), QUICK, left_out={"late": "no time"}, announce=announced.append
    )
    CEILINGS.apply(record)
    record = json.loads(json.dumps(record))
    by_name = {variant["name"]: variant for variant in record["variants"]}
    ours, cost = by_name["fastmeta"], record["cost"]
    assert (ours["stream_us"], ours["graph_us"], ours["host_us"], ours["peak_bytes"]) == pytest.approx((12, 4, 7, 1024))
    assert ours["host_syncs"] == 0
    assert (cost["floor_us"], cost["floor_stream_us"], cost["bound"]) == (1.5, 10.0, "launch")
    assert (cost["copy_us"], cost["gemm_us"], cost["row_us"]) == pytest.approx((0.1, 8.0, 3.0))
    assert ours["times_floor"] == pytest.approx(4 / 1.5)
    assert ours["stream_times_floor"] == pytest.approx(1.2)
    assert by_name["eager"]["graph_reason"] == "RuntimeError: operation not permitted when stream is capturing"
    assert "graph_us" not in by_name["eager"]
    assert "graph_us" not in by_name["loop"]
    assert rows.device_us(by_name["long"]) == 5000.0
    assert by_name["wrong"]["status"] == "wrong"
    assert by_name["absent"]["reason"] == "MemoryError: 9 GB"
    assert (by_name["late"]["status"], by_name["late"]["reason"]) == ("left out", "no time")
    assert "stream_us" not in by_name["wrong"]
    assert rows.best_form(record) == ("triton rows", pytest.approx(1.2))
    assert len(around) >= 3  # the check, the samples, the graph
    assert announced[0] == "inputs"
    assert {"fastmeta", "timing", "eager: graph"} <= set(announced)


def test_samples_that_scatter_are_flagged():
    assert not rows.is_noisy({"quartiles_us": [10.0, 12.9]})
    assert rows.is_noisy({"quartiles_us": [10.0, 13.1]})
    assert min(settings.rounds for settings in (measure.SETTINGS["cuda"], measure.QUICK)) >= 15


def test_what_no_record_holds_is_measured_first(tmp_path):
    files.write(
        tmp_path / "a card/gpu.json",
        {"operators": [{"key": "x", "main": "a", "variants": []}, {"key": "y", "main": "a"}]},
    )
    assert operators.recorded(tmp_path) == set()
    known = {
        "key": "label_gradient (256, 128, 10) float32",
        "main": "fastmeta",
        "variants": [{"name": "fastmeta", "role": "fastmeta", "stream_us": 1}],
    }
    files.write(tmp_path / "a card/gpu.json", {"operators": [known]})
    assert operators.recorded(tmp_path) == {known["key"]}
    here = operators.recorded()
    assert "label_gradient (256, 128, 10) bfloat16" in here
    assert not [key for key in here if key.startswith(("solve_hessian", "feature_similarity"))]


def run(tmp_path, case, **given):
    progress = Progress(tmp_path / "operators.json")
    options = {"deadline": time.monotonic() + 60, "ceilings": CEILINGS} | given
    operators.measure_all([(case, (F32,))], progress, Clock(), QUICK, **options)
    return json.loads((tmp_path / "operators.json").read_text())


def good(name: str = "fastmeta") -> Case:
    return problem_of(Variant(name, Call(torch.ones(3)), "fastmeta"), Variant("other", Call(torch.ones(3)), "eager"))


def test_a_run_goes_on_after_the_variant_it_died_in(tmp_path, monkeypatch):
    key = good().key(F32)
    (tmp_path / "operators.running.json").write_text(json.dumps([key, "other: graph"]))
    monkeypatch.setenv("FASTMETA_BENCH_PREVIOUS_END", "ended by signal 11")
    results = run(tmp_path, good())
    variants = {variant["name"]: variant for variant in results["cases"][0]["variants"]}
    assert variants["fastmeta"]["status"] == "measured"
    assert variants["other"]["reason"] == "the process died in it: ended by signal 11"
    assert results["crashed"][key] == {"other: graph": "the process died in it: ended by signal 11"}
    assert files.read(tmp_path / "operators.running.json") is None
    again = run(tmp_path, good("renamed"))  # what is there is not measured again
    assert again["cases"] == results["cases"]


def test_a_crash_outside_any_variant_costs_the_case(tmp_path):
    (tmp_path / "operators.running.json").write_text(json.dumps([good().key(F32), "timing"]))
    assert run(tmp_path, good())["cases"][0]["failed"] == "timing: the process died in it: ended"


def test_what_time_does_not_allow_stays_empty(tmp_path):
    results = run(tmp_path, good(), deadline=time.monotonic() - 1)
    assert (results["cases"], results["unfinished"]) == ([], [good().key(F32)])


def test_inputs_that_do_not_fit_leave_the_others(tmp_path):
    def build(dtype, device):
        raise torch.OutOfMemoryError("9 GB")

    results = run(tmp_path, Case("label_gradient", "1, 1, 1", build))
    assert results["cases"][0]["failed"] == "OutOfMemoryError: 9 GB"


def test_a_lost_device_ends_the_process(tmp_path, monkeypatch):
    def lost(device):
        raise clocks.DeviceLost("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(measure, "ensure_healthy", lost)
    broken = problem_of(Variant("fastmeta", Call(RuntimeError("CUDA error")), "fastmeta"))
    with pytest.raises(clocks.DeviceLost):
        run(tmp_path, broken)
    assert files.read(tmp_path / "operators.running.json") == [broken.key(F32), "fastmeta"]


def test_only_what_is_compiled_is_measured(tmp_path):
    case = problem_of(*[Variant(name, Call(torch.ones(3)), "compile") for name in cases.COMPILE_MODES])
    done = tmp_path / "compiled.json"
    operators.compile_all([(case, (F32,))], 0, 1, done, time.monotonic() + 60, "cpu")
    keys = set(json.loads(done.read_text()))
    assert keys == {f"{case.key(F32)}/{name}" for name in cases.COMPILE_MODES}
    statuses = [
        v["status"]
        for v in run(tmp_path, case, compiled=keys - {f"{case.key(F32)}/torch.compile"})["cases"][0]["variants"]
    ]
    assert statuses == ["left out", "measured"]
    large = Case("label_gradient", "large", case.build, shape=(2**14, 2**12, 2**10))
    operators.compile_all([(large, (BF16,))], 0, 1, done, time.monotonic() + 60, "cpu")
    assert json.loads(done.read_text()) == [f"{large.key(BF16)}/torch.compile"]  # its tuning would take too long
    operators.compile_all([(case, (F32,))], 1, 2, tmp_path / "other.json", time.monotonic() + 60, "cpu")
    assert not (tmp_path / "other.json").exists()  # it was in the other share


def test_launches_are_counted_where_there_is_a_profiler(tmp_path, capsys):
    run(tmp_path, good())
    progress, clock, given = Progress(tmp_path / "operators.json"), Clock(), [(good(), (F32,))]

    def no_profiler(call):
        raise RuntimeError("CUPTI is not there")

    clock.kernels = no_profiler
    operators.count_launches(given, progress, clock, time.monotonic() + 60)
    assert "Launches are not counted: RuntimeError: CUPTI is not there" in capsys.readouterr().out
    clock.kernels = lambda call: ["gemm", "rows"]
    operators.count_launches(given, progress, clock, time.monotonic() - 1)
    assert "launches" not in progress.cases[0]["variants"][0]
    operators.count_launches(given, progress, clock, time.monotonic() + 60)
    variant = files.read(tmp_path / "operators.json")["cases"][0]["variants"][0]
    assert (variant["launches"], variant["kernels"]) == (2, ["gemm", "rows"])
