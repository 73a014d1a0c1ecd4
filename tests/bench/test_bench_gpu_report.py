"""``python -m bench gpu``: what it writes, from made-up figures; the CUDA clock's calls; the step's loop."""

import contextlib
import json
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import gpu_records
import pytest

from bench import clock as clocks
from bench import environment, files, goals, plot
from bench.case import Variant
from bench.gpu import report
from bench.ops import cases
from bench.report import METHOD
from bench.step import report as step_report

PHASES = {"tests": {"status": "timed out", "reason": "ended after 140 s", "seconds": 140.0}}
SOME = [
    case
    for case in cases("cuda")
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


def cells_of(text: str, *words: str) -> dict[str, str]:
    """Cells of that row by the names of their columns."""
    lines = text.splitlines()
    place = next(i for i, line in enumerate(lines) if line.startswith("| " + " | ".join(words) + " |"))
    header = next(i for i in range(place, 0, -1) if set(lines[i]) <= set("| -")) - 1
    rows = [[cell.strip() for cell in lines[i].strip("|").split("|")] for i in (header, place)]
    return dict(zip(*rows, strict=True))


def test_a_row_has_what_the_records_say(results):
    text = report.terminal(results)
    record = next(r for r in results["operators"] if r["key"] == "label_gradient (768, 512, 200) bfloat16")
    ours, eager = (next(v for v in record["variants"] if v["name"] == name) for name in ("fastmeta", "eager"))
    row = cells_of(text[text.index("Operators:") :], "label_gradient", "768, 512, 200", "bfloat16")
    assert row["time"] == f"{ours['stream_us']:.3g} us"
    assert row["first quartile"] == row["time"]
    assert row["graph"] == f"{ours['graph_us']:.3g} us"
    assert row["x floor"] == f"{ours['times_floor']:.2f}x"
    assert row["products alone"] == f"{record['cost']['gemm_us']:.3g} us"
    assert row["launches"] == "2"
    assert row["host us"] == "11.0"
    assert row["over eager"] == f"{eager['stream_us'] / ours['stream_us']:.2f}x"
    assert row["over eager, graphs"] == f"{eager['graph_us'] / ours['graph_us']:.2f}x"
    assert row["over compile / max-autotune"].count("x") == 2
    assert row["over best other"].endswith("vmap(grad)")
    assert row["flop/B, achieved"].endswith("B/s") or row["flop/B, achieved"].endswith("FLOP/s")


def test_what_was_not_measured_stays_empty_and_is_named(results):
    text = report.terminal(results)
    cells = line_of(text[text.index("Operators:") :], "label_gradient", "1, 1, 1", "float32")
    assert cells[3] == "OutOfMemoryError: 9 GB"
    assert not any(cells[4:])
    assert "noise, third quartile over 1.3 times the first" in text
    assert "the process died in it: exit status 70" in text
    assert "no time was left for 1 cases: per_example_dot (1, 2, 3) float32" in text
    assert "func.jvp: OutOfMemoryError: no" in text
    assert "Other: not measured, no torchvision." in text
    assert "Tests on the device: 1 passed, 1 failed, 1 skipped." in text
    assert "hessian_vector_product (1 tests fail)" in text
    assert "| tests | timed out | 140 | ended after 140 s |" in text
    assert text.splitlines()[-1] == "321 s in all."


def test_the_choice_of_a_form_is_shown(results):
    text = report.terminal(results)
    forms = cells_of(text[text.index("Forms:") :], "per_example_dot", "768, 512, 200", "float32")
    assert forms["best"] in ("triton rows", "triton flash")
    assert forms["chosen over best"].endswith("x")
    assert "triton flash" in forms["every form: stream (graph)"]


def test_the_markdown_says_where_and_how(results):
    text = results["markdown"]
    assert "A GPU (compute capability 9.0" in text
    assert "4100 GB/s" in text
    assert "fastmeta 0.1.0 at 0123456789" in text
    assert "## Goals" in text
    assert "## masked_adam_" not in text  # nothing was measured
    assert METHOD["cuda"] in text
    assert "an empty launch 2.50 us on the stream" in text


def test_nothing_at_all_makes_a_report(tmp_path):
    empty = report.collect(tmp_path, {}, 1.0)
    report.write(empty, tmp_path)
    report.draw(empty, tmp_path)
    assert [goal["met"] for goal in empty["goals"]] == [None] * len(empty["goals"])
    assert not list(tmp_path.glob("*.png"))
    assert (tmp_path / "gpu.md").read_text().startswith("# GPU")


def test_goals_take_the_worst(results):
    found = {goal.name: goal for goal in goals.of_operators(results)}
    eager = found["(768, 512, 200) and below: times faster than eager, no graphs"]
    assert len(eager.found) == 8  # four operators, two dtypes
    assert eager.met
    sums = found["last_layer_gradient at (4096, 2048, 1000)"]
    assert list(sums.found) == ["last_layer_gradient (4096, 2048, 1000) bfloat16"]
    assert "40 us" in report.terminal(results)
    shares = found["(4096, 2048, 1000) bfloat16: products alone and row bytes at copy speed over the call"]
    record = next(r for r in results["operators"] if r["key"] == "label_gradient (4096, 2048, 1000) bfloat16")
    ours = next(v for v in record["variants"] if v["name"] == "fastmeta")
    parts = record["cost"]["gemm_us"] + record["cost"]["row_us"]
    assert shares.found[record["key"]] == pytest.approx(parts / ours["graph_us"])
    heads = found["a head in slabs at (8192, 2048, 128256): memory over its logits'"]
    assert set(heads.found) == {f"per_example_dot (8192, 2048, 128256, head) {d}" for d in ("bfloat16", "float32")}
    lists = found["lists of tensors, 25.6M parameters: share of the copy bandwidth"]
    assert len(lists.found) == 3
    few = goals.Goal("launches", 2, {"a": 2, "b": 3}, at_least=False)
    assert (few.worst, few.met) == (("b", 3), False)
    much = goals.Goal("share", 0.85, {"a": 0.9, "b": 0.5})
    assert (much.worst, much.met) == (("b", 0.5), False)


def test_a_step_is_judged_by_its_bound_where_noise_hides_the_rest(results):
    wide, resnet = results["steps"]["networks"]
    weights = {goal.name: goal for goal in goals.of_steps(resnet)}["ExampleWeights at interval 1"]
    assert weights.required == 1.01
    assert weights.worst[1] == pytest.approx(1 + 0.12 / 240)  # the ratio is 1.02 or so, the method takes 120 us
    assert weights.met
    assert {goal.name: goal for goal in goals.of_steps(wide)}["ExampleWeights at interval 1"].required == 1.03
    quiet = {"ratio": 1.02, "ratio_quartiles": [1.015, 1.025], "bound": 1.001}
    assert goals.judged(quiet) == 1.02
    text = step_report.markdown(results["steps"])
    assert "bfloat16 autocast" in text
    assert "ExampleWeights, graph" in text
    assert "64 labeled and 320 unlabeled images of 224 x 224 pixels" in text


def test_pictures(results, tmp_path, monkeypatch, capsys):
    drawn = plot.draw(results, tmp_path, "operators") + plot.draw_steps(results["steps"], tmp_path)
    assert [path.name for path in drawn] == ["operators.png", "operators-roofline.png", "step.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)
    monkeypatch.setitem(sys.modules, "bench.plot", None)
    monkeypatch.delattr("bench.plot")
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
        monkeypatch.setattr(clocks, "torch", SimpleNamespace(cuda=fake))
        return fake

    return install


def test_the_cuda_clock_times_between_events(cuda):
    fake = cuda()
    clock = clocks.CudaClock()
    seconds, contended = clock.sampler(Variant("", fake.call), 5)
    assert (seconds, contended) == (1e-3, False)
    assert fake.log == ["synchronize", "event"]
    assert clock.host_us(fake.call) is not None
    assert fake.calls == 5 + clocks.HOST_CALLS * clocks.HOST_REPEATS
    assert clock.peak_bytes(fake.call) == 250


def test_entering_a_form_costs_no_measured_time(cuda):
    fake = cuda()
    seconds, _ = clocks.CudaClock().sampler(Variant("", fake.call, around=lambda: contextlib.ExitStack()), 5)
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


def test_the_records_of_the_tests_cover_every_case(tmp_path: Path):
    gpu_records.write_parts(tmp_path, cases("cuda"))
    found = report.collect(tmp_path / "parts", {}, 1.0)
    assert len(found["operators"]) == 1 + sum(len(case.dtypes) for case in cases("cuda"))
    assert all(goal["met"] is not None for goal in found["goals"])
