import json
import os
import signal
import statistics
import subprocess
import sys
import time
import traceback

import pytest
import torch

tyro = pytest.importorskip("tyro")

import fastmeta  # noqa: E402
from fastmeta import cli  # noqa: E402
from fastmeta.training.doctor import availability, doctor  # noqa: E402
from fastmeta.training.recipes import BASE_RECIPES, METHODS  # noqa: E402

ENVIRONMENT = {**os.environ, "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
LIMIT = 300  # s; a machine may be busy


def command(*arguments):
    return [sys.executable, "-m", "fastmeta", *map(str, arguments)]


def run(*arguments, **options):
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, env=ENVIRONMENT, timeout=LIMIT, **options
    )


# Those with plots of their own, and one of each kind of passes.
COMPARED = ("none", "l2i", "example-weights", "label-gradient-alignment", "impute-and-weight", "l2i-jvp-alternating")


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    out = tmp_path_factory.mktemp("compare")
    arguments = ("compare", "--steps", 4, "--seeds", 2, "--workers", 2, "--out", out, "--methods", *COMPARED)
    return arguments, out, run(*arguments)


def test_compare_writes_everything(comparison):
    _, out, finished = comparison
    assert finished.returncode == 0, finished.stderr
    config = json.loads((out / "config.json").read_text())
    assert len(config["runs"]) == 2 * len(COMPARED)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert {(row["method"], row["seed"]) for row in rows} == {(method, seed) for method in COMPARED for seed in (0, 1)}
    assert all(0 <= row["test_error_average"] <= 1 for row in rows)
    pytest.importorskip("matplotlib")
    for plot in ("errors", "differences", "weights", "labels"):
        assert (out / f"{plot}.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_is_what_the_runs_say(comparison):
    _, out, finished = comparison
    results = json.loads((out / "results.json").read_text())
    assert (results["finished"], results["planned"]) == (2 * len(COMPARED),) * 2
    seconds = results["step_seconds"]
    for method in COMPARED:
        folders = [out / "runs" / "fixmatch" / method / f"seed-{seed}" for seed in (0, 1)]
        alone = [out / "runs" / "fixmatch" / "none" / f"seed-{seed}" for seed in (0, 1)]
        errors = [json.loads((folder / "results.json").read_text())["test_error"] for folder in folders]
        base = [json.loads((folder / "results.json").read_text())["test_error"] for folder in alone]
        name = "fixmatch " if method == "none" else f"  + {method} "
        line = next(line for line in finished.stdout.splitlines() if line.startswith(name))
        words = line.removeprefix(name).replace("[", "").replace("]", "").replace(",", "").split()
        assert words[0] == f"{100 * statistics.mean(errors):.1f}"
        assert words[1] == f"{100 * statistics.stdev(errors):.1f}"
        if method == "none":
            assert words[2] == f"{1000 * seconds['fixmatch']:.1f}"
            continue
        own = seconds[f"fixmatch + {method}"]
        assert words[5:] == [f"{1000 * own:.1f}", f"{own / seconds['fixmatch']:.2f}", "2"]
        differences = [100 * (error - other) for error, other in zip(errors, base, strict=True)]
        half = 12.706205 * statistics.stdev(differences) / 2**0.5  # t with one degree of freedom
        mean = statistics.mean(differences)
        assert words[2:5] == [f"{mean:+.1f}", f"{mean - half:+.1f}", f"{mean + half:+.1f}"]


def test_the_same_command_trains_nothing_again(comparison, capsys):
    arguments, out, _ = comparison
    model = out / "runs" / "fixmatch" / "l2i" / "seed-0" / "model.pt"
    written = model.stat().st_mtime_ns
    assert cli.main(list(map(str, arguments))) == 0
    assert "12 runs, 12 of them finished before" in capsys.readouterr().out
    assert model.stat().st_mtime_ns == written


def test_other_settings_in_the_same_folder_are_refused(comparison, capsys):
    _, out, _ = comparison
    assert cli.main(["compare", "--steps", "5", "--seeds", "1", "--out", str(out)]) == 2
    assert "steps=4 (now 5); give another --out" in capsys.readouterr().err


def wait_for(condition, process, seconds=LIMIT):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "ended too early"
        assert time.monotonic() < end, "never happened"
        time.sleep(0.02)


def test_ctrl_c_leaves_a_readable_partial_result_and_the_same_command_goes_on(tmp_path):
    arguments = ("compare", "--base", "supervised", "--steps", 200, "--seeds", 4, "--workers", 2, "--out", tmp_path)
    process = subprocess.Popen(
        command(*arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        start_new_session=True,
    )
    first = tmp_path / "runs" / "supervised" / "none" / "seed-0" / "results.json"
    wait_for(first.exists, process)
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to the whole group
    output, errors = process.communicate(timeout=LIMIT)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    results = json.loads((tmp_path / "results.json").read_text())
    assert 1 <= results["finished"] < results["planned"] == 4
    assert f"stopped with {results['finished']} of 4 runs finished; the same command continues" in output
    assert "test error %" in output
    error = json.loads(first.read_text())["test_error"]
    assert cli.main([*map(str, arguments), "--workers", "1"]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["finished"] == 4
    assert results["runs"][0]["test_error"] == error


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["compare", "--labels-per-class", "500"],
            ["--labels-per-class must be at most 111, because class 0 has 134", "got 500"],
        ),
        (
            ["train", "--labels-per-class", "500"],
            ["--labels-per-class must be at most 111, because class 0 has 134", "got 500"],
        ),
        (
            ["compare", "--out", "/dev/null/here"],
            ["--out must be a folder that can be written to, got '/dev/null/here'"],
        ),
        (["train", "--out", "/dev/null"], ["--out must be a folder that can be written to, got '/dev/null'"]),
        (["compare", "--labels-per-class", "0"], ["--labels-per-class must be at least 1, got 0"]),
        (["compare", "--seeds", "0"], ["--seeds must be at least 1, got 0"]),
        (["compare", "--steps", "0"], ["--steps must be at least 1, got 0"]),
        (["compare", "--workers", "0"], ["--workers must be at least 1, got 0"]),
        (["compare", "--base", "supervised", "--methods", "l2i"], ["--methods must be none for base supervised"]),
        (["compare", "--device", "cuda"], ["device must be cpu"]),
        (["compare", "--full", "--base", "supervised"], ["--full must be given without base"]),
        (
            ["train", "--optimizer.learning-rate", "-1"],
            ["--optimizer.learning-rate must be above 0 and finite, got -1.0"],
        ),
        (
            ["train", "--base-settings", "threshold"],
            ["--base-settings must be written as setting=value, got 'threshold'"],
        ),
        (["train", "--base", "supervised", "--method", "l2i"], ["--method must be none for base supervised"]),
    ],
)
def test_bad_values_say_what_was_expected(arguments, words, tmp_path, monkeypatch, capsys):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("cuda is a good value here")
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("fastmeta: error: ")
    assert captured.err.count("\n") == 1
    for word in words:
        assert word in captured.err
    assert list(tmp_path.iterdir()) == []


def test_settings_that_do_not_fit_leave_no_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "--labeled-batch", "5", "--machine.accumulation", "2", "--out", "new/run"]) == 2
    assert "--labeled-batch must be a multiple of machine.accumulation, 2, got 5" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_default_folder_is_named_after_the_data(tmp_path):
    assert cli._stem("digits") == "digits"
    assert cli._stem("huggingface:owner/birds") == "birds"
    assert cli._stem(str(tmp_path / "photos" / ".." / "photos" / ".")) == "photos"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--base", "ladder"], ["ladder", "--base", "supervised", "pseudo-label"]),
        (["--labels-per-class", "few"], ["--labels-per-class", "few"]),
        (["--methods", "maml"], ["maml", "--methods", "l2i"]),
        (["--rounds", "3"], ["--rounds"]),
    ],
)
def test_bad_flags_are_named(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as leaving:
        cli.main(["compare", *arguments])
    assert leaving.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert all(word in captured.err for word in words)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_refused_before_any_training(tmp_path, monkeypatch, capsys):
    def no_space(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryFile", no_space)
    assert cli.main(["compare", "--out", str(tmp_path / "a" / "b")]) == 2
    captured = capsys.readouterr()
    words = f"--out must be a folder that can be written to, got '{tmp_path}/a/b': No space left on device"
    assert captured.err == f"fastmeta: error: {words}\n"
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == []


def test_version_and_help_say_what_there_is(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"fastmeta {fastmeta.__version__}, torch {torch.__version__}\n"
    with pytest.raises(SystemExit) as leaving:
        cli.main(["compare", "--help"])
    assert leaving.value.code == 0
    words = capsys.readouterr().out
    for word in (*BASE_RECIPES, *METHODS, "(default: 7)"):
        assert word in words.replace("\n", " ")


def test_doctor_agrees_with_the_operators():
    report = doctor()
    found = availability()
    assert {"label_gradient", "hessian_vector_product", "masked_adam_", "perturbed"} <= set(found)
    assert all(row["reference"] for row in found.values())
    features, logits, direction = torch.ones(2, 3), torch.ones(2, 4), torch.ones(4, 3)
    for implementation, there in found["label_gradient"].items():
        if there:
            fastmeta.ops.label_gradient(features, logits, direction, impl=implementation)
        else:
            with pytest.raises(RuntimeError):
                fastmeta.ops.label_gradient(features, logits, direction, impl=implementation)
            assert f"no {implementation} for " in report


MODELS = """
import torch

def good():
    return torch.nn.Linear(3, 2), torch.ones(4, 3), torch.tensor([0, 1, 0, 1])

class Detached(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x) + super().forward(x).detach()

def wrong():
    return Detached(3, 2), torch.ones(4, 3)

def alone():
    return torch.nn.Linear(3, 2)

def of_width(width):
    return torch.nn.Linear(3, width), torch.ones(4, 3)

def broken():
    raise ValueError("no weights here")
"""


def test_doctor_verifies_a_model(tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "models.py").write_text(MODELS)
    good = run("doctor", "--model", "mine.models:good", cwd=tmp_path)
    assert (good.returncode, good.stderr) == (0, "")
    assert "use how='jvp'" in good.stdout
    assert cli.main(["doctor", "--model", f"{tmp_path}/mine/models.py:wrong"]) == 1
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "wrong: your own backward pass" in captured.out


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("models", "--model must be package.module:function or file.py:function, got 'models'"),
        ("nowhere:good", "--model must name a module that can be imported from"),
        ("nowhere.py:good", "--model must name a file that exists, got 'nowhere.py'"),
        ("models.py:better", "--model must name a function of models.py, got 'better'"),
        (
            "models.py:alone",
            "--model must name a function that returns (model, inputs) or (model, inputs, targets)",
        ),
        ("models.py:of_width", "--model must name a function that takes no argument, got 'models.py:of_width'"),
    ],
)
def test_doctor_says_what_a_model_must_be(name, words, tmp_path, monkeypatch, capsys):
    (tmp_path / "models.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["doctor", "--model", name]) == 2
    assert f"fastmeta: error: {words}" in capsys.readouterr().err


def test_an_error_of_the_models_own_code_keeps_its_traceback(tmp_path, monkeypatch):
    (tmp_path / "models.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        RuntimeError, match=r"the code of models.py:broken raised ValueError: no weights here"
    ) as raised:
        cli.main(["doctor", "--model", "models.py:broken"])
    assert traceback.extract_tb(raised.value.__cause__.__traceback__)[-1].name == "broken"


def test_training_imports_without_the_command_lines_packages():
    code = (
        "import sys; sys.modules['tyro'] = None; sys.modules['matplotlib'] = None\n"
        "import fastmeta.training, fastmeta.ssl, fastmeta.data, fastmeta.models\n"
    )
    finished = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT, timeout=LIMIT
    )
    assert finished.returncode == 0, finished.stderr
