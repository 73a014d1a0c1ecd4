"""The frame of every experiment."""

import json
from typing import Any

import pytest

from fastmeta import cli
from fastmeta.reproduce import EXPERIMENTS
from fastmeta.reproduce.experiment import Experiment, commit, markdown
from fastmeta.training.reports.drawing import pyplot


def squares(measured: list[int], numbers: tuple[int, ...] = (1, 2, 3)) -> Experiment:
    """Squares of numbers; those that are computed are added to ``measured``."""

    def measure(number: int, names: list[str]) -> dict[str, Any]:
        measured.append(number)
        if number == 13:
            raise KeyboardInterrupt
        return {"square": number**2}

    return Experiment(
        name="squares",
        paper="Euclid, Elements",
        cells=lambda quick: [{"number": number, "names": ["a"]} for number in numbers[: 1 if quick else None]],
        measure=measure,
        table=lambda rows: markdown(["n", "n^2"], [[row["number"], row["square"]] for row in rows]),
        draw=lambda rows: {"figure": pyplot().subplots()[0]},
    )


def test_an_experiment_leaves_figures_table_and_picture(tmp_path):
    squares([]).run(tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert [cell["measured"] for cell in results["cells"]] == [{"square": 1}, {"square": 4}, {"square": 9}]
    assert all(cell["commit"] == commit() and cell["date"] and cell["seconds"] >= 0 for cell in results["cells"])
    assert set(results["machine"]) == {"processor", "cores", "torch", "fastmeta"}
    table = (tmp_path / "table.md").read_text()
    assert "Euclid" in table
    assert "| 3 | 9 |" in table
    assert (tmp_path / "figure.png").read_bytes()[1:4] == b"PNG"


def test_a_cell_is_measured_once_whatever_comes_between(tmp_path):
    measured: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        squares(measured, (1, 13, 2)).run(tmp_path)
    assert measured == [1, 13]
    squares(measured, (3, 1, 2)).run(tmp_path)  # another order; 13 is gone
    assert measured == [1, 13, 3, 2]
    squares(measured, (3, 1, 2)).run(tmp_path)
    assert measured == [1, 13, 3, 2]
    assert [cell["settings"]["number"] for cell in json.loads((tmp_path / "results.json").read_text())["cells"]] == [
        3,
        1,
        2,
    ]


def test_a_quick_version_says_so_and_leaves_the_other_alone(tmp_path):
    full, quick = tmp_path / "full", tmp_path / "quick"
    squares([]).run(full)
    squares([]).run(quick, quick=True)
    before = (full / "results.json").read_bytes()
    with pytest.raises(ValueError, match=r"out must be another folder than that of the full version, got .*full"):
        squares([]).run(full, quick=True)
    assert (full / "results.json").read_bytes() == before
    with pytest.raises(ValueError, match=r"out must be another folder than that of a quick version, got .*quick"):
        squares([]).run(quick)
    assert "whose figures mean nothing" not in (full / "table.md").read_text()
    assert "whose figures mean nothing" in (quick / "table.md").read_text()


def test_no_cell_is_begun_after_the_time_is_up_and_none_is_lost(tmp_path):
    measured: list[int] = []
    squares(measured, (2,)).run(tmp_path)
    squares(measured, (1, 2, 3)).run(tmp_path, minutes=1e-9)
    assert measured == [2]
    assert "1 of 3 cells" in (tmp_path / "table.md").read_text()


def test_one_cell_by_itself(tmp_path):
    measured: list[int] = []
    squares(measured).run(tmp_path, only=["number=2"])
    assert measured == [2]
    squares(measured).run(tmp_path)
    assert measured == [2, 1, 3]
    with pytest.raises(ValueError, match=r"only must be settings of a cell, as number=1 names=.*, got number=7"):
        squares(measured).run(tmp_path, only=["number=7"])


def test_what_cannot_be_run_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="minutes must be > 0, got 0"):
        squares([]).run(out, minutes=0)
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ImportError, match="matplotlib is not installed"):
        squares([]).run(out)
    assert not out.exists()


def test_the_command_line_lists_and_runs_them(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(EXPERIMENTS, "lga-linear", squares([]))
    assert cli.main(["reproduce"]) == 0
    assert "Euclid, Elements" in capsys.readouterr().out
    monkeypatch.chdir(tmp_path)
    assert cli.main(["reproduce", "lga-linear", "--quick"]) == 0
    assert "1 of 1 cells" in (tmp_path / "runs/reproduced/lga-linear-quick/table.md").read_text()


def test_every_experiment_has_its_own_name():
    assert all(name == experiment.name for name, experiment in EXPERIMENTS.items())
