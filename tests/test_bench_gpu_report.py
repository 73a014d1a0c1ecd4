"""``python -m bench gpu``: what it writes, from made-up figures; the CUDA clock's calls; the step's loop."""

import contextlib
import json
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import gpu_records
import pytest
import torch

from bench.gpu import clock as clocks
from bench.gpu import environment, files, floors, goals, operators, plot, report, step
from bench.timing import Timed
from fastmeta.models import WideResNet

PHASES = {"tests": {"status": "timed out", "reason": "ended after 140 s", "seconds": 140.0}}
SOME = [
    case
    for case in operators.CASES
    if case.label in ("768, 512, 200", "4096, 2048, 1000", "8192, 2048, 128256, head", "32768, 1000", "ResNet-50")
]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("gpu")
    gpu_records.write_parts(folder, SOME)
    found = report.collect(folder / "parts", PHASES, 321.0)
    report.write(found, folder)
    assert json.loads((folder / "gpu.json").read_text()) == json.loads(json.dumps(found))
    return found | {"markdown": (folder / "gpu.md").read_text()}


def line_of(text: str, *words: str) -> list[str]:
    """Cells of the only row that begins with those words."""
    (line,) = [line for line in text.splitlines() if line.startswith("| " + " | ".join(words) + " |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_row_has_what_the_records_say(results):
    text = report.terminal(results)
    record = next(r for r in results["operators"] if r["key"] == "label_gradient (768, 512, 200) bfloat16")
    ours, eager = (next(v for v in record["variants"] if v["name"] == name) for name in ("fastmeta", "eager"))
    operators_table = text[text.index("Operators:") :]
    cells = line_of(operators_table, "label_gradient", "768, 512, 200", "bfloat16")
    row = dict(zip(report.OPERATOR_HEADER[3:9], cells[3:9], strict=True))
    assert row["stream"] == f"{ours['stream_us']:.3g} us"
    assert row["graph"] == f"{ours['graph_us']:.3g} us"
    assert row["x floor"] == f"{ours['times_floor']:.2f}x"
    assert row["launches"] == "2"
    assert row["host us"] == "11.0"
    assert cells[9] == f"{eager['stream_us'] / ours['stream_us']:.2f}x"
    assert cells[10] == f"{eager['graph_us'] / ours['graph_us']:.2f}x"
    assert cells[11].count("x") == 2
    assert cells[13].endswith("vmap(grad)")


def test_what_was_not_measured_stays_empty_and_is_named(results):
    text = report.terminal(results)
    cells = line_of(text[text.index("Operators:") :], "label_gradient", "1, 1, 1", "float32")
    assert cells[3] == "OutOfMemoryError: 9 GB"
    assert not any(cells[4:])
    assert "the process died in it: exit status 70" in text
    assert "no time was left for 1 cases: per_example_dot (1, 2, 3) float32" in text
    assert "func.jvp: OutOfMemoryError: no" in text
    assert "Other: not available, no torchvision" in text
    assert "Tests on the device: 1 passed, 1 failed, 1 skipped." in text
    assert "hessian_vector_product (1 tests fail)" in text
    assert "| tests | timed out | 140 | ended after 140 s |" in text
    assert text.splitlines()[-1] == "321 s in all."


def test_the_choice_of_a_form_is_shown(results):
    forms = line_of(report.terminal(results), "per_example_dot", "768, 512, 200", "float32", "triton rows")
    assert forms[5] == "1.02x"
    assert "triton flash" in forms[6]


def test_the_markdown_says_where_and_how(results):
    text = results["markdown"]
    assert "A GPU (compute capability 9.0" in text
    assert "4.10 TB/s" in text
    assert "fastmeta 0.1.0 at 0123456789" in text
    assert "## Goals" in text
    assert "## masked_adam_" not in text  # nothing was measured
    assert report.METHOD in text


def test_nothing_at_all_makes_a_report(tmp_path):
    empty = report.collect(tmp_path, {}, 1.0)
    report.write(empty, tmp_path)
    report.draw(empty, tmp_path)
    assert [goal["met"] for goal in empty["goals"]] == [None] * len(empty["goals"])
    assert not list(tmp_path.glob("*.png"))
    assert (tmp_path / "gpu.md").read_text().startswith("# GPU")


def test_goals_take_the_worst(results):
    found = {goal.name: goal for goal in goals.goals(results)}
    steps = found["a step with a last-layer method over the plain step"]
    ratios = [v["ratio"] for task in gpu_records.steps() for v in task["variants"] if v["method"]]
    assert steps.worst is not None
    assert steps.worst[1] == max(ratios)
    assert steps.met == (max(ratios) <= 1.03)
    eager = found["(768, 512, 200) and below: times faster than eager, no graphs"]
    assert len(eager.found) == 8  # four operators, two dtypes
    assert eager.met
    flash = found["(8192, 2048, 128256): flash form's share of cuBLAS's largest bfloat16 rate"]
    record = next(r for r in results["operators"] if r["key"].startswith("label_gradient (8192") and "bf" in r["key"])
    variant = next(v for v in record["variants"] if v["name"] == "triton flash")
    us = variant["stream_us"]  # too long for a graph
    assert flash.found["label_gradient (8192, 2048, 128256, head) bfloat16"] == pytest.approx(
        record["cost"]["flops"] / (us * 1e-6) / 7.5e14
    )
    lists = found["lists of tensors, 25.6M parameters: share of the copy bandwidth"]
    assert len(lists.found) == 3
    few = goals.Goal("launches", 2, {"a": 2, "b": 3}, at_least=False)
    assert (few.worst, few.met) == (("b", 3), False)
    much = goals.Goal("share", 0.85, {"a": 0.9, "b": 0.5})
    assert (much.worst, much.met) == (("b", 0.5), False)


def test_pictures(results, tmp_path, monkeypatch, capsys):
    drawn = plot.draw(results, tmp_path)
    assert [path.name for path in drawn] == ["operators.png", "step.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)
    monkeypatch.setitem(sys.modules, "bench.gpu.plot", None)
    monkeypatch.delattr("bench.gpu.plot")
    report.draw(results, tmp_path)
    assert "No pictures" in capsys.readouterr().err


class FakeCuda:
    """As much of ``torch.cuda`` as the clock calls; events are a millisecond apart for each call between them."""

    def __init__(self, capture_fails=False):
        self.log: list[str] = []
        self.capture_fails = capture_fails
        self.calls = 0
        cuda = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = cuda.calls

            def synchronize(self):
                cuda.log.append("event")

            def elapsed_time(self, end):
                return float(end.at - self.at)

        class Graph:
            def capture_begin(self):
                cuda.log.append("begin")

            def capture_end(self):
                cuda.log.append("end")
                if cuda.capture_fails:
                    raise RuntimeError("the capture was invalidated")

            def replay(self):
                cuda.log.append("replay")

        self.Event, self.CUDAGraph = Event, Graph
        stream = SimpleNamespace(wait_stream=lambda other: None)
        self.Stream = self.current_stream = lambda: stream
        self.memory_allocated, self.max_memory_allocated = lambda: 100, lambda: 350

    def stream(self, stream):
        return contextlib.nullcontext()

    def synchronize(self):
        self.log.append("synchronize")

    def reset_peak_memory_stats(self):
        self.log.append("reset")

    def set_sync_debug_mode(self, mode):
        self.log.append(mode)

    def call(self):
        self.calls += 1


@pytest.fixture
def cuda(monkeypatch):
    def install(**options) -> FakeCuda:
        fake = FakeCuda(**options)
        monkeypatch.setattr(clocks, "torch", SimpleNamespace(cuda=fake, set_grad_enabled=torch.set_grad_enabled))
        return fake

    return install


def test_the_cuda_clock_times_between_events(cuda):
    fake = cuda()
    clock = clocks.CudaClock()
    seconds, contended = clock.sampler(Timed(fake.call), 5)
    assert (seconds, contended) == (1e-3, False)
    assert fake.log == ["synchronize", "event"]
    assert clock.host_us(fake.call) is not None
    assert fake.calls == 5 + clocks.HOST_CALLS
    assert clock.peak_bytes(fake.call) == 250


def test_entering_a_form_costs_no_measured_time(cuda):
    fake = cuda()
    seconds, _ = clocks.CudaClock().sampler(Timed(fake.call, around=lambda: contextlib.ExitStack()), 5)
    assert seconds == 1e-3
    assert fake.calls == 6  # one before the first event


def test_the_cuda_clock_captures_warm_calls(cuda):
    fake = cuda()
    replay = clocks.CudaClock().capture(fake.call, 3)
    assert fake.calls == 2 + 3
    assert fake.log == ["synchronize", "begin", "end", "synchronize"]
    replay()
    assert fake.log[-1] == "replay"


def test_a_failed_capture_is_closed_and_says_its_own_error(cuda):
    fake = cuda(capture_fails=True)

    def call():
        if "begin" in fake.log:
            raise ValueError("it reads the device")

    with pytest.raises(ValueError, match="it reads the device"):
        clocks.CudaClock().capture(call, 3)
    assert fake.log[-1] == "end"


def test_waits_for_the_device_are_counted(cuda):
    fake = cuda()

    def call():
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("Synchronization debug mode does not yet detect all synchronizing operations", stacklevel=1)
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)

    assert clocks.CudaClock().host_syncs(call) == 2
    assert fake.log == ["warn", "default"]


def test_a_device_that_still_computes_is_healthy():
    clocks.ensure_healthy("cpu")
    with pytest.raises(clocks.DeviceLost):
        clocks.ensure_healthy("no such device")


def test_the_ceilings_of_this_machine():
    measured = floors.Floors(clocks.CpuClock(), copy_bytes=(2**12, 2**16), rounds=2)
    assert all(1e6 < rate < 1e13 for rate in measured.copy.values())
    assert 0 < measured.launch_us < 1e4
    assert 0 < measured.gemm_us(floors.Gemm(8, 8, 8, "nt"), torch.float32) < 1e5


def test_the_environment(tmp_path):
    out = tmp_path / "environment.json"
    assert environment.main(["--out", str(out)]) == 0
    found = files.read(out)
    assert found["packages"]["triton"]
    assert set(found["implementations"]) >= {"label_gradient", "masked_adam_"}
    assert {"cpp_missing", "cuda_missing", "triton_missing", "git_commit"} <= set(found)
    assert environment.output_of("no-such-program") is None
    assert environment.output_of(sys.executable, "-c", "print('said')") == "said"
    assert environment.output_of(sys.executable, "-c", "raise SystemExit(1)") is None


TINY = step.Task("tiny", lambda classes: WideResNet(classes, depth=10, width=1), 4, 6, 8, 10)


def test_the_steps_loop(monkeypatch):
    monkeypatch.setattr(step, "UNLABELED", 50)
    monkeypatch.setattr(step, "WARM_UP", 1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        task = step.measure_task(TINY, clocks.CpuClock(), 2, 0.1)
    finally:
        torch.set_num_threads(threads)
    assert task["task"] == "tiny, 8 px, B 4 + 6"
    assert [v["name"] for v in task["variants"]] == [step.PLAIN, *step.METHODS]
    assert not [v["reason"] for v in task["variants"] if "reason" in v]
    assert all(v["step_ms"] > 0 and v["ratio"] > 0 for v in task["variants"])
    assert task["variants"][0]["ratio"] == 1
    assert all(v["refine_us"] > 0 for v in task["variants"][1:])


def test_a_step_trains_and_every_method_takes_part(monkeypatch):
    monkeypatch.setattr(step, "THRESHOLD", 0.0)  # every unlabeled image counts
    losses = {}
    for name, _, make in step.trainings(TINY, "cpu", graphs=False):
        training = make()
        before = training.fc.weight.clone()
        losses[name] = float(training())
        assert not torch.equal(training.fc.weight, before)
    assert len(losses) == 6
    assert losses["L2I V2"] != losses[step.PLAIN]


def test_every_method_is_captured_too(monkeypatch):
    captured = []
    monkeypatch.setattr(step.fastmeta, "graph", lambda method: captured.append(method) or method)
    made = {name: make() for name, _, make in step.trainings(TINY, "cpu", graphs=True) if name.endswith(", graph")}
    assert [f"{name}, graph" for name in step.METHODS] == list(made)
    assert [training.meta for training in made.values()] == captured


def test_a_network_that_is_not_there_is_reported():
    def absent(classes):
        raise ImportError("No module named 'torchvision'")

    task = step.measure_task(step.Task("net", absent, 1, 1, 8, 10), clocks.CpuClock(), 2, 0.1)
    assert task == {
        "task": "net, 8 px, B 1 + 1",
        "failed": "ImportError: No module named 'torchvision'",
        "variants": [],
    }


def test_the_records_of_the_tests_cover_every_case(tmp_path: Path):
    gpu_records.write_parts(tmp_path, operators.CASES)
    found = report.collect(tmp_path / "parts", {}, 1.0)
    assert len(found["operators"]) == 1 + sum(len(case.dtypes) for case in operators.CASES)
    assert all(goal["met"] is not None for goal in found["goals"])
