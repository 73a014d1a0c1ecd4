"""``python -m bench gpu`` around its measurements: phases, their time, the tests' and the sanitizer's outcomes."""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import choices, files, gate, goals, operators
from bench.__main__ import main
from bench.clock import DeviceLost
from bench.gpu import cache, command, phases, sanitizer, small_pass
from bench.inputs import Shape
from bench.ops import cases
from bench.step import command as step

ROOT = Path(__file__).parents[2]
PASSED = {"status": "passed", "reason": "", "seconds": 1.0, "limit_s": 9.0, "tail": ""}


def python(code: str, tmp_path: Path, **options) -> phases.Phase:
    given = {"name": "phase", "seconds": 20.0, "log": tmp_path / "log.txt"} | options
    return phases.Phase(command=[sys.executable, "-c", code], **given)


def run_one(phase: phases.Phase) -> dict:
    return phases.run_together([phase], ROOT)[phase.name]


def test_without_a_gpu_it_says_so_and_exits_2(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["gpu", str(tmp_path / "out")]) == 2
    said = capsys.readouterr()
    assert said.err == f"No GPU: torch {torch.__version__} sees no CUDA device.\n"
    assert said.out == ""
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [["--phases", "nothing"], ["--operators", "softmax"], ["--dtypes", "int8"]])
def test_arguments_are_checked(arguments, tmp_path, capsys):
    with pytest.raises(SystemExit) as refused:
        main(["gpu", str(tmp_path), *arguments])
    assert refused.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_the_command_runs_before_fastmeta_is_built_and_needs_no_tyro():
    """The first phase builds the extension; the machine it is for has no tyro."""
    blocked = "import sys; sys.modules['tyro'] = None\n"
    before = "import bench.__main__, bench.gpu.command, bench.gpu.report, bench.plot\n"
    before += "assert 'fastmeta' not in sys.modules\n"
    measuring = "import bench.operators, bench.step.command, bench.gpu.small_pass, bench.environment"
    subprocess.run([sys.executable, "-W", "ignore", "-c", blocked + before + measuring], cwd=ROOT, check=True)


def test_the_choices_are_the_cases():
    assert set(choices.OPERATORS) == {case.operator for case in cases("cuda")}
    assert set(choices.DTYPES) == set(operators.DTYPES)
    parser = argparse.ArgumentParser()
    choices.add_choices(parser)
    options = parser.parse_args(["--shapes", "768, 512", "head", "--dtypes", "float32", "--quick"])
    again = parser.parse_args(choices.as_arguments(options))
    assert vars(again) == {**vars(options), "operators": list(choices.OPERATORS)}
    chosen = operators.chosen(options, "cuda")
    assert {case.label for case, _ in chosen} > {"768, 512, 200", "1024, 768, 30522, head"}
    assert {dtypes for _, dtypes in chosen} == {(torch.float32,)}
    both = operators.chosen(parser.parse_args(["--operators", "label_gradient"]), "cpu")
    assert {dtypes for _, dtypes in both} == {(torch.bfloat16, torch.float32)}


def test_the_order_of_the_cases():
    parser = argparse.ArgumentParser()
    choices.add_choices(parser)
    chosen = operators.chosen(parser.parse_args([]), "cuda")
    keys = [case.key(dtypes[0]) for case, dtypes in chosen]
    known = operators.recorded()
    new = [place for place, key in enumerate(keys) if key not in known]
    old = [place for place, key in enumerate(keys) if key in known]
    large = [place for place, (case, dtypes) in enumerate(chosen) if case.is_large and "float32" in keys[place]]
    assert old
    assert min(large) > max(old)  # what takes seconds a call is last
    assert max(place for place in new if place not in large) < min(old)  # what was never measured is first
    assert set(goals.SHAPES) < {case.label for case in cases("cuda")}


def test_a_phase_that_passes_and_one_that_fails(tmp_path):
    good = run_one(python("print('fine')", tmp_path))
    assert (good["status"], good["reason"], good["tail"], good["starts"]) == ("passed", "", "", 1)
    bad = run_one(python("print('x' * 9000); raise SystemExit('it broke')", tmp_path))
    assert (bad["status"], bad["reason"]) == ("failed", "exit status 1")
    assert bad["tail"].endswith("it broke\n")
    assert len(bad["tail"]) == phases.TAIL
    assert "ended by signal 9" in run_one(python("import os; os.kill(os.getpid(), 9)", tmp_path))["reason"]


def test_a_program_that_is_not_there(tmp_path):
    missing = phases.Phase("phase", ["/no/such/program"], 9.0, tmp_path / "log.txt")
    assert run_one(missing)["status"] == "failed"


def test_a_phase_out_of_time_ends_with_its_children(tmp_path):
    pid = tmp_path / "pid"
    child = "import subprocess, sys, time\nprint('partial', flush=True)\n"
    child += (
        f"open({str(pid)!r}, 'w').write(str(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
    )
    child += ".pid))\ntime.sleep(60)"
    record = run_one(python(child, tmp_path, seconds=1.5))
    assert record["status"] == "timed out"
    assert record["tail"] == "partial\n"
    assert record["seconds"] < 10
    for _ in range(50):  # until whoever inherits it has reaped it
        status = Path(f"/proc/{pid.read_text()}/stat")
        if not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("the child still runs")


def test_a_crash_is_started_again_and_told_how_it_ended(tmp_path):
    progress = tmp_path / "progress"
    code = f"""
import os, pathlib
if pathlib.Path({str(progress)!r}).exists():
    print(os.environ["FASTMETA_BENCH_PREVIOUS_END"])
else:
    pathlib.Path({str(progress)!r}).write_text("begun")
    os.abort()
"""
    record = run_one(python(code, tmp_path, attempts=3, progress=progress))
    assert record["status"] == "passed"
    assert record["starts"] == 2
    assert record["reason"] == "started again after: ended by signal 6"
    assert "ended by signal 6" in (tmp_path / "log.txt").read_text()
    always = run_one(python("raise SystemExit(7)", tmp_path, attempts=2, progress=progress))
    assert (always["status"], always["starts"]) == ("failed", 2)
    assert always["reason"] == "exit status 7; exit status 7"


def test_a_process_that_hangs_is_started_again(tmp_path):
    progress = tmp_path / "progress"
    code = f"""
import pathlib, time
path = pathlib.Path({str(progress)!r})
if not path.exists():
    path.write_text("begun")
    time.sleep(60)
"""
    record = run_one(python(code, tmp_path, attempts=2, progress=progress, stall_s=0.7))
    assert record["status"] == "passed"
    assert "no progress for 1 s" in record["reason"]


def test_phases_run_beside_each_other(tmp_path):
    meet = "import pathlib, time\n(pathlib.Path({0!r}) / {1!r}).touch()\n"
    meet += "while not (pathlib.Path({0!r}) / {2!r}).exists(): time.sleep(0.05)"
    pair = [
        python(meet.format(str(tmp_path), one, other), tmp_path, name=one, log=tmp_path / f"{one}.txt")
        for one, other in (("first", "second"), ("second", "first"))
    ]
    refreshed: list[int] = []
    records = phases.run_together(pair, ROOT, lambda: refreshed.append(1), every_s=0.05)
    assert [record["status"] for record in records.values()] == ["passed", "passed"]
    assert refreshed


def options(tmp_path: Path, **given) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    parsed = parser.parse_args([str(tmp_path / "out")])
    return argparse.Namespace(**(vars(parsed) | given))


def test_time_that_a_phase_leaves_goes_to_those_behind_it(tmp_path):
    shares = {names: (kept, most) for names, kept, most in command.GROUPS}
    assert sum(kept for kept, _ in shares.values()) <= 1
    assert command.BUDGET_S < 8 * 60
    assert command.QUICK_S < 4 * 60
    asked = options(tmp_path, phases=("build", "operators", "step"))
    limits = dict(command._limits(asked, time.monotonic()))  # the groups take no time here
    for names in limits:
        assert limits[names] == pytest.approx(shares[names][1] * command.BUDGET_S, abs=1)
    late = dict(command._limits(asked, time.monotonic() - 250))
    kept = {names: share * command.BUDGET_S for names, (share, _) in shares.items()}
    left = command.BUDGET_S - 250
    assert late["operators",] == pytest.approx(left - kept["step",], abs=1)
    quick = dict(command._limits(options(tmp_path, quick=True), time.monotonic()))
    assert quick["tests",] == pytest.approx(shares["tests",][1] * command.QUICK_S, abs=1)
    short = options(tmp_path, phases=("operators", "step"), budget=10.0)
    assert next(iter(command._limits(short, time.monotonic() - 9)))[1] == pytest.approx(1 * 0.26 / 0.39, abs=0.2)
    assert next(iter(command._limits(short, time.monotonic() - 20)))[1] == 0.0


def test_what_compiles_and_what_fills_the_card_are_alone():
    groups = [names for names, _, _ in command.GROUPS]
    order = [name for names in groups for name in names]
    assert set(order) == set(command.PHASES)
    assert ("compile",) in groups
    assert groups[-1] == ("large",)
    assert order.index("compile") < order.index("tests") < order.index("memcheck") < order.index("operators")


def test_a_run_goes_on_after_a_failure_and_writes_what_it_has(tmp_path, capsys):
    asked = options(tmp_path, phases=("build", "environment", "tests", "memcheck", "step"))
    write = "import json, pathlib; path = pathlib.Path({!r}); path.parent.mkdir(exist_ok=True)\n"

    def tests(plan, seconds):
        line = json.dumps({"test": "tests/test_hvp.py::test_a", "outcome": "failed", "message": "assert 1 == 2"})
        code = (
            write.format(str(plan.part("outcomes.jsonl"))) + f"path.write_text({line!r} + chr(10)); raise SystemExit(1)"
        )
        return [python(code, plan.work, name="tests", log=plan.log("tests"))]

    def step(plan, seconds):
        rows = [{"name": "FixMatch", "schedule": "plain", "status": "measured", "median_us": 1500.0}]
        done = {"networks": [{"network": "tiny", "device": "cuda", "steps": rows, "derivatives": []}]}
        code = "import pathlib; pathlib.Path({!r}).mkdir(parents=True)\n".format(str(plan.part("step")))
        code += f"pathlib.Path({str(plan.part('step') / 'step.json')!r}).write_text({json.dumps(done)!r})"
        return [python(code, plan.work, name="step", log=plan.log("step"))]

    def build(plan, seconds):
        return [python("raise SystemExit('no compiler')", plan.work, name="build", log=plan.log("build"))]

    def environment(plan, seconds):
        raise ImportError("nothing is built")

    makers = {"build": build, "environment": environment, "tests": tests, "step": step}
    assert command.run_phases(asked, makers | {"memcheck": lambda plan, seconds: []}) == 1
    results = json.loads((tmp_path / "out" / "gpu.json").read_text())
    statuses = {name: record["status"] for name, record in results["phases"].items()}
    assert statuses == {
        "build": "failed",
        "environment": "failed",
        "tests": "failed",
        "memcheck": "skipped",
        "step": "passed",
    }
    assert results["phases"]["build"]["tail"] == "no compiler\n"
    assert results["phases"]["environment"]["reason"] == "ImportError: nothing is built"
    assert results["tests"]["failed"] == [{"test": "tests/test_hvp.py::test_a", "message": "assert 1 == 2"}]
    assert results["tests"]["operators"]["hessian_vector_product"]["failed"] == 1
    assert "===== build\nno compiler" in (tmp_path / "out" / "log.txt").read_text()
    assert "tests/test_hvp.py::test_a: assert 1 == 2" in (tmp_path / "out" / "gpu.md").read_text()
    printed = capsys.readouterr().out
    assert "| FixMatch | 1.50 |" in printed
    assert printed.rstrip().endswith("s in all.")


def test_results_have_a_place_of_their_own(monkeypatch):
    given = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(command, "run_phases", lambda options: given.append(options.folder) or 0)
    assert main(["gpu"]) == 0
    assert given == [ROOT / "bench/results/nvidia-h200"]


def test_the_commands_of_the_real_phases(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    plan = command.Plan(tmp_path, options(tmp_path, quick=True), tmp_path / "caches")
    monkeypatch.delenv("FASTMETA_CUDA_ARCHITECTURES", raising=False)
    made = {name: maker(plan, 100.0) for name, maker in command.MAKERS.items()}
    assert made["build"][0].command[1:] == ["setup.py", "-q", "build_ext", "--inplace"]
    assert made["build"][0].environment["FASTMETA_CUDA_ARCHITECTURES"] == "90"
    assert made["operators"][0].attempts > 1
    assert made["operators"][0].command.count("--compiled") == 1
    assert len(made["compile"]) == command.PROCESSES
    assert all(phase.environment.items() >= cache.environment(tmp_path / "caches").items() for phase in made["step"])
    tests = made["tests"][0]
    assert tests.environment["FASTMETA_TEST_DEVICE"] == "cuda"
    named = [argument for argument in tests.command if ".py" in argument]
    names = {Path(argument.partition("::")[0]).name for argument in named}
    assert names >= {"test_ops_kernels.py", "test_masked_adam.py", "test_graph.py", "test_solve_on_gpu.py"}
    apart = command.HOST_TESTS | {Path(command.LARGE).name}
    assert apart <= {path.name for path in (ROOT / "tests").rglob("*.py")}
    assert (ROOT / "tests" / command.LARGE).is_file()
    assert not names & apart
    for name in command.ON_A_GPU:
        file, _, test = name.partition("::")
        assert f"def {test}(" in (ROOT / "tests" / file).read_text()
    suffix = command.sysconfig.get_config_var("EXT_SUFFIX")
    brought = command.Plan(tmp_path, plan.options, plan.caches, [f"_C{suffix}", "_C_cuda.so"])
    assert "setup.py" not in command.MAKERS["build"](brought, 100.0)[0].command
    kernels = command.Plan(tmp_path, plan.options, plan.caches, ["_C_cuda.so"])
    assert command.MAKERS["build"](kernels, 100.0)[0].environment["FASTMETA_CUDA"] == "0"


def test_json_has_no_nan(tmp_path):
    files.write(tmp_path / "a" / "x.json", {"error": float("nan"), 3: [float("inf"), 1.5]})
    assert files.read(tmp_path / "a" / "x.json") == {"error": "nan", "3": ["inf", 1.5]}
    (tmp_path / "x.json").write_text('{"cut o')
    assert files.read(tmp_path / "x.json") is None
    assert files.read(tmp_path / "nothing.json") is None


TESTS = """
import pytest
def test_good(): pass
def test_bad(): assert 1 == 2
@pytest.mark.skip(reason="no room")
def test_skipped(): pass
def test_broken_context(): raise RuntimeError("CUDA error: an illegal memory access was encountered")
def test_never_reached(): pass
"""


def test_outcomes_are_written_as_they_come(tmp_path):
    (tmp_path / "test_label_gradient_here.py").write_text(TESTS)
    written = tmp_path / "outcomes.jsonl"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "bench.pytest_outcomes", "--rootdir", tmp_path, tmp_path],
        cwd=tmp_path,
        env=os.environ | gate.environment(written),
        capture_output=True,
        check=False,
    )
    assert done.returncode == 3  # a process with a broken context ends itself
    with written.open("a") as file:
        file.write('{"test": "cut o')
    found = gate.summarize([written], choices.STEMS)
    assert found["passed"] == 1
    assert [one["test"].rpartition("::")[2] for one in found["failed"]] == ["test_bad", "test_broken_context"]
    assert "assert 1 == 2" in found["failed"][0]["message"]
    assert found["skipped"] == {"Skipped: no room": 1}
    verdict = found["operators"]["label_gradient"]
    assert (verdict["passed"], verdict["failed"]) == (1, 2)
    assert gate.summarize([tmp_path / "nothing"], choices.STEMS)["passed"] == 0


BEGUN, DONE = sanitizer.BEGUN, sanitizer.DONE
VERDICTS = [
    (PASSED, f"{BEGUN}\n{DONE}\n========= ERROR SUMMARY: 0 errors\n", "passed", "ERROR SUMMARY: 0 errors"),
    (
        PASSED,
        f"{BEGUN}\n{DONE}\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n",
        "passed",
        "0 hazards",
    ),
    (PASSED, f"{BEGUN}\n========= ERROR SUMMARY: 0 errors\n", "failed", "0 errors"),  # the pass did not come to its end
    (PASSED, f"{BEGUN}\n{DONE}\n", "failed", "no summary"),
    (
        PASSED,  # its own word counts, and the worst of several processes
        f"{BEGUN}\n{DONE}\n========= ERROR SUMMARY: 3 errors\n========= ERROR SUMMARY: 0 errors\n",
        "failed",
        "ERROR SUMMARY: 3 errors",
    ),
    (
        PASSED | {"status": "failed", "reason": "exit status 1"},
        f"{BEGUN}\n{DONE}\n========= ERROR SUMMARY: 0 errors\n",
        "passed",
        "ERROR SUMMARY: 0 errors",
    ),
    (
        PASSED | {"status": "failed", "reason": "exit status 1"},
        "========= COMPUTE-SANITIZER\n========= Error: Device not supported. Please refer to ...\n",
        "skipped",
        "did not run here: Error: Device not supported",
    ),
    (
        PASSED | {"status": "failed", "reason": "exit status 1"},
        "Traceback (most recent call last):\nImportError: no fastmeta\n",
        "failed",
        "exit status 1",
    ),
    (PASSED | {"status": "timed out", "reason": "ended after 9 s"}, f"{BEGUN}\n", "timed out", "ended after 9 s"),
]


@pytest.mark.parametrize(("record", "output", "status", "reason"), VERDICTS)
def test_verdict_of_the_sanitizer(record, output, status, reason):
    judged = sanitizer.judged(record, output)
    assert judged["status"] == status
    assert reason in judged["reason"]


def test_the_small_pass_calls_every_kernel(capsys, monkeypatch):
    small = ((Shape(5, 6, 7), torch.float32), (Shape(6, 9, 40), torch.bfloat16))  # Triton's interpreter is slow
    monkeypatch.setattr(small_pass, "PASSES", small)
    assert small_pass.main(["--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert said.index(BEGUN) < said.index(DONE)
    assert int(said.split(DONE)[0].split()[-5]) > 30


def test_finding_the_sanitizer(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "compute-sanitizer").touch()
    assert sanitizer.find() == str(tmp_path / "bin" / "compute-sanitizer")
    assert not sanitizer.is_wrapper(sys.executable)
    said = sanitizer.command("compute-sanitizer", "memcheck")
    assert said[said.index("--launch-timeout") + 1] == "0"
    assert "application-only" in said
    (tmp_path / "python").write_text("#!/bin/sh")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert "all" in sanitizer.command("compute-sanitizer", "memcheck")


def test_the_measuring_processes_understand_their_commands(tmp_path, monkeypatch):
    plan = command.Plan(tmp_path, options(tmp_path, quick=True, dtypes=["float32"], operators=["label_gradient"]))
    files.write(plan.shares()[0], ["a/torch.compile"])
    taken = []

    def measured(cases, progress, clock, settings, deadline, *, compiled):
        progress.finish({"key": "key", "shape": "1"})
        taken.append((cases, settings, deadline - time.monotonic(), compiled))

    monkeypatch.setattr(operators, "clock_for", lambda device: None)
    monkeypatch.setattr(operators, "measure_all", measured)
    monkeypatch.setattr(operators, "count_launches", lambda *arguments: None)
    phase = command.MAKERS["operators"](plan, 100.0)[0]
    assert operators.main(phase.command[phase.command.index("bench.operators") + 1 :]) == 0
    (cases, settings, left, compiled), *_ = taken
    assert {case.operator for case, _ in cases} == {"label_gradient"}
    assert {dtypes for _, dtypes in cases} == {(torch.float32,)}
    assert settings == operators.QUICK
    assert 100 - command._START_S - operators._LAUNCHES_S - 5 < left < 100 - command._START_S
    assert compiled == {"a/torch.compile"}
    assert phase.progress.exists()
    assert files.read(plan.part("operators.json"))["cases"] == [{"key": "key", "shape": "1"}]

    shares = []
    monkeypatch.setattr(operators, "compile_all", lambda cases, share, shares_, *rest: shares.append((share, shares_)))
    for phase in command.MAKERS["compile"](plan, 100.0):
        assert operators.main(phase.command[phase.command.index("bench.operators") + 1 :]) == 0
    assert shares == [(share, command.PROCESSES) for share in range(command.PROCESSES)]

    def network(name, variants, settings, clock):
        taken.append((len(variants), settings.rounds))
        raise ImportError("No module named 'torchvision'\nmore")

    taken.clear()
    monkeypatch.setattr(step, "clock_for", lambda device: None)
    monkeypatch.setattr(step, "measure_network", network)
    phase = command.MAKERS["step"](plan, 100.0)[0]
    assert main(phase.command[phase.command.index("bench") + 1 :]) == 1
    assert [rounds for _, rounds in taken] == [5, 5]
    found = files.read(plan.part("step") / "step.json")
    assert list(found["failed"].values()) == ["ImportError: No module named 'torchvision'"] * 2


def test_a_lost_device_is_an_exit_status_that_starts_again(tmp_path, monkeypatch):
    def lost(*arguments, **options):
        raise DeviceLost("CUDA error")

    monkeypatch.setattr(operators, "clock_for", lambda device: None)
    monkeypatch.setattr(operators, "measure_all", lost)
    arguments = ["--out", str(tmp_path / "x.json"), "--until", str(time.time() + 9)]
    assert operators.main(arguments) == operators.DEVICE_LOST != 0


def test_the_archive_brings_caches_and_libraries(tmp_path):
    old, new, root, other = (tmp_path / name for name in ("old", "new", "root", "other"))
    for tree in (root, other):
        (tree / "csrc").mkdir(parents=True)
        (tree / "fastmeta").mkdir()
        (tree / "csrc/a.h").write_text("int a;")
    (root / "fastmeta/_C_cuda.so").write_text("code")
    kernel = old / "triton/ABC"
    kernel.mkdir(parents=True)
    (kernel / "rows.cubin").write_text("cubin")
    (kernel / "lock").touch()
    (kernel / "tmp.pid_1").mkdir()
    group = {"child_paths": {"rows.cubin": str(kernel / "rows.cubin")}}
    (kernel / "__grp__rows.json").write_text(json.dumps(group))
    assert cache.unpack(tmp_path / "none.tar.gz", new, other) == []
    assert cache.pack(tmp_path / "a.tar.gz", old, root) > 0
    assert cache.unpack(tmp_path / "a.tar.gz", new, other) == ["_C_cuda.so"]
    assert (other / "fastmeta/_C_cuda.so").read_text() == "code"
    moved = json.loads((new / "triton/ABC/__grp__rows.json").read_text())["child_paths"]
    assert Path(moved["rows.cubin"]).read_text() == "cubin"
    assert Path(moved["rows.cubin"]).is_relative_to(new)
    assert not (new / "triton/ABC/lock").exists()
    (other / "csrc/a.h").write_text("int b;")  # other sources: the kernels' own keys hold theirs, a library has none
    (other / "fastmeta/_C_cuda.so").unlink()
    assert cache.unpack(tmp_path / "a.tar.gz", tmp_path / "again", other) == []
    assert not (other / "fastmeta/_C_cuda.so").exists()
    cache.pack(tmp_path / "quick.tar.gz", old, root, built=False)
    assert cache.unpack(tmp_path / "quick.tar.gz", tmp_path / "quick", root) == []
