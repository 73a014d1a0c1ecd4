import base64
import csv
import fnmatch
import html
import io
import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from picture_runs import CLASSES, train_on, write_pictures
from PIL import Image

from fastmeta import cli
from fastmeta.training.files import read_json, read_jsonl, write_json
from fastmeta.training.reports import report
from fastmeta.training.reports.figures import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, panel
from fastmeta.training.reports.intervals import error_interval
from fastmeta.training.reports.report import report_html, write_report
from fastmeta.training.reports.run_folder import read_run
from fastmeta.training.reports.sections import confusion_of
from fastmeta.training.reports.thumbnails import SIDE, address_of

VOID = {"meta", "img", "br", "link", "input"}


class Page(HTMLParser):
    """The elements of a page; it fails where they do not nest."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.text = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data.strip())

    def of(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("report")


@pytest.fixture(scope="module")
def pictures(folder):
    return write_pictures(folder / "data")


@pytest.fixture(scope="module")
def weighted(folder, pictures):
    return train_on(pictures, folder / "weighted")


@pytest.fixture(scope="module")
def changed(folder, pictures):
    return train_on(pictures, folder / "changed", method="meta-gradient", seed=1)


def page_of(*runs):
    text = report_html([read_run(run) for run in runs])
    return text, Page(text)


def copy_of(run, folder, **files):
    """The run with other files; None removes one."""
    shutil.copytree(run, folder)
    for name, text in files.items():
        path = folder / name.replace("_", ".")
        path.unlink()
        if text is not None:
            path.write_text(text)
    return folder


def table_of(rows):
    text = io.StringIO()
    table = csv.DictWriter(text, rows[0])
    table.writeheader()
    table.writerows(rows)
    return text.getvalue()


def test_the_page_stands_alone_and_takes_names_for_text(weighted, changed):
    text, page = page_of(weighted, changed)
    tags = {tag for tag, _ in page.elements}
    assert "script" not in tags
    assert "link" not in tags
    assert "i" not in tags  # a class is named <i>two
    assert html.escape(CLASSES[2]) in text
    assert all(image["src"].startswith("data:image/") for image in page.of("img"))
    assert not re.search(r"(https?:)?//\w", re.sub(r"data:[^\"]*", "", text.replace(str(weighted), "")))
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    identifiers = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))
    for anchor in page.of("a"):
        assert anchor["href"].removeprefix("#") in identifiers
    assert "prefers-color-scheme: dark" in text
    assert "width=device-width" in text
    assert "None" not in page.text
    assert not page.text.count("nan")


def test_the_figures_are_those_of_the_run(weighted):
    _, page = page_of(weighted)
    results = read_json(weighted / "results.json")
    timing = read_jsonl(weighted / "timing.jsonl")
    shown = page.text[page.text.index("test error") :]
    assert shown[:20].count(f"{100 * results['test_error']:.2f}%") == 1
    low, high = error_interval(round(24 * results["test_error"]), 24)
    assert f"95%: {100 * low:.2f} to {100 * high:.2f}, 24 test images" in shown
    assert shown[shown.index("labeled images") :][:3] == ["labeled images", "20", "41 unlabeled"]
    seconds = sorted(row["seconds_per_step"] for row in timing)
    assert f"{500 * (seconds[1] + seconds[2]):.3g} ms" in shown
    wait = sum(row["wait_share"] for row in timing) / 4
    assert f"{100 * wait:.1f}%" in shown
    assert "fixmatch + impute-and-weight, linear, data" in page.text


def test_the_interval_is_wilsons():
    """Its ends are the rates p that a share of 3 of 20 is 1.96 standard errors of p away from."""
    for end in error_interval(3, 20):
        assert abs(3 / 20 - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / 20), rel=1e-5)
    assert error_interval(0, 20)[0] == 0
    assert error_interval(20, 20)[1] == 1


def test_a_curve_is_where_its_values_are():
    figure = panel("error", [[(0, 0.0), (50, 0.25), (75, math.nan), (100, 0.5)], [], [(50, None), (100, 0.5)]])
    first, second = figure.lines
    assert (first.run, second.run) == (0, 2)
    bottom, top = HEIGHT - BOTTOM, TOP
    assert first.pieces == (f"{LEFT},{bottom} {(LEFT + WIDTH - RIGHT) / 2:g},{(bottom + top) / 2:g}",)
    assert first.end == second.end == (WIDTH - RIGHT, top)
    assert second.pieces == ()  # one point: the dot at its end
    assert [(tick.text, tick.at) for tick in figure.y_ticks] == [
        (text, pytest.approx(bottom - share * (bottom - top), abs=0.06))
        for text, share in (("0", 0), ("0.2", 0.4), ("0.4", 0.8))
    ]
    assert panel("error", [[(5, None)], []]) is None


def test_a_long_curve_is_thinned_and_keeps_its_end():
    curve = [(step, 1 / (1 + step)) for step in range(10_007)]
    line = panel("loss", [curve]).lines[0]
    assert len(line.pieces[0].split()) <= 200
    assert line.text == "9.99e-05"
    constant = panel("loss", [[(1, 0.0), (2, 0.0)]])
    assert constant.lines[0].end == (WIDTH - RIGHT, HEIGHT - BOTTOM)


def test_settings_that_differ(weighted, changed):
    _, page = page_of(weighted, changed)
    rows = page.text[page.text.index("Settings that differ") :]
    rows = rows[: rows.index("weighted", 10)]
    words = [word for word in rows if word]
    assert words[words.index("method") :][:3] == ["method", "impute-and-weight", "meta-gradient"]
    assert words[words.index("seed") :][:3] == ["seed", "0", "1"]
    assert "steps" not in words
    assert "Settings that differ" not in page_of(weighted)[1].text


def test_the_confusion_matrix(weighted):
    _, page = page_of(weighted)
    counts = read_json(weighted / "results.json")["confusion"]["counts"]
    words = [word for word in page.text[page.text.index("Confusion on the test images") :] if word]
    start = words.index("A row is a true class, a column what is predicted.") + 5
    for row, counted in enumerate(counts):
        assert words[start + 5 * row] == read_run(weighted).classes[row]
        assert words[start + 5 * row + 1 : start + 5 * row + 5] == [str(count or "·") for count in counted]


def test_many_classes_have_their_most_confused_pairs(tmp_path, weighted):
    counts = torch.eye(30, dtype=torch.int64) * 5
    counts[3, 7], counts[8, 2], counts[9, 2] = 2, 4, 2
    counts[9, 9] = 1
    classes = [f"class {place}" for place in range(30)]
    confusion = confusion_of({"confusion": {"part": "test", "counts": counts.tolist()}}, classes)
    assert confusion.rows == ()
    assert confusion.pairs == (
        ("class 8", "class 2", 4, 4 / 9),
        ("class 9", "class 2", 2, 2 / 3),
        ("class 3", "class 7", 2, 2 / 7),
    )
    results = read_json(weighted / "results.json")
    results["confusion"]["counts"] = counts.tolist()
    config = read_json(weighted / "config.json")
    config["record"]["classes"] = classes
    run = copy_of(weighted, tmp_path / "run", results_json=json.dumps(results), config_json=json.dumps(config))
    _, page = page_of(run)
    words = [word for word in page.text if word]
    assert words[words.index("class 8") :][:4] == ["class 8", "class 2", "4", "44.4%"]


def cards(page, title):
    """The pictures, and their words, below a headline that begins like that."""
    texts = [word for word in page.text if word]
    start = next(place for place, word in enumerate(texts) if word.startswith(title))
    return texts[start:]


def test_lowest_weights_with_their_pictures(weighted):
    _, page = page_of(weighted)
    rows = [row for row in read_run(weighted).unlabeled() if float(row["weight"]) < 1]
    rows.sort(key=lambda row: float(row["weight"]))
    assert rows
    words = cards(page, "Lowest learned weights")
    first = words.index(f"weight {float(rows[0]['weight']):.3f}")
    assert words[first - 1] == rows[0]["label"]
    assert words[first + 1 : first + 3] == [f"truth {rows[0]['truth']}", rows[0]["path"]]
    shown = rows[:24]
    known = [row for row in shown if row["truth"]]
    wrong = sum(row["label"] != row["truth"] for row in known)
    assert any(f"Of the {len(known)} shown" in word and f"{wrong}\nare labeled wrongly" in word for word in words)
    low = sum(float(row["weight"]) < 0.5 for row in read_run(weighted).unlabeled())
    assert any(f"{low} of 41 weights are below 0.5" in word for word in words)
    # The pixels of the first picture that can be read are those of its file.
    readable = [row["path"] for row in shown if not row["path"].endswith("broken.png")]
    source = page.of("img")[0]["src"]
    picture = Image.open(io.BytesIO(base64.b64decode(source.removeprefix("data:image/png;base64,"))))
    assert np.array_equal(np.asarray(picture), np.asarray(Image.open(readable[0])))
    assert len(page.of("img")) == len(readable)


def test_labels_that_changed_most(changed):
    _, page = page_of(changed)
    rows = [row for row in read_run(changed).unlabeled() if row["label_change"]]
    assert len(rows) > 3
    rows.sort(key=lambda row: -float(row["label_change"]))
    words = cards(page, "Labels that the method changed most")
    order = [word for word in words if word in {row["path"] for row in rows}]
    assert order == [row["path"] for row in rows[:24]]
    assert f"{rows[0]['label_before']} → {rows[0]['label_after']}" in words
    assert f"change {float(rows[0]['label_change']):.2f}" in words
    assert "Lowest learned weights" not in page.text


def test_without_changes_labels_are_held_against_the_base(tmp_path, weighted):
    """The base alone took two images for other classes, one of them with more confidence."""
    rows = list(read_run(weighted).unlabeled())
    assert not any(row["label_change"] for row in rows)
    names = read_run(weighted).classes
    for place, confidence in ((5, "0.6"), (9, "0.9")):
        label = names.index(rows[place]["label"])
        rows[place] |= {"label": names[(label + 1) % 4], "confidence": confidence}
    alone = copy_of(weighted, tmp_path / "alone", unlabeled_csv=table_of(rows))
    write_json(alone / "config.json", {**read_json(alone / "config.json"), "method": "none"})
    words = cards(page_of(weighted, alone)[1], "Labels that became others than those of alone")
    order = [word for word in words if word in {row["path"] for row in rows}]
    assert order[:2] == [rows[9]["path"], rows[5]["path"]]
    after = next(row for row in read_run(weighted).unlabeled() if row["path"] == rows[9]["path"])["label"]
    assert words[2] == f"{rows[9]['label']} → {after}"
    other = copy_of(alone, tmp_path / "other")
    write_json(other / "config.json", {**read_json(alone / "config.json"), "seed": 5})
    assert "Labels that became others" not in report_html([read_run(weighted), read_run(other)])


def test_the_balance_of_classes(weighted, pictures):
    _, page = page_of(weighted)
    words = cards(page, "Classes among labeled images and imputed labels")
    rows = list(read_run(weighted).unlabeled())
    for name in read_run(weighted).classes:
        imputed = sum(row["label"] == name for row in rows)
        true = sum(row["truth"] == name for row in rows)
        known = sum(row["truth"] != "" for row in rows)
        place = words.index(name)
        assert words[place + 1 : place + 5] == [
            str(len(list((pictures / "train" / name).iterdir()))),
            str(imputed),
            f"{100 * imputed / len(rows):.1f}%",
            f"{100 * true / known:.1f}%",
        ]


def test_unreadable_files_are_named(weighted):
    _, page = page_of(weighted)
    words = cards(page, "1 unreadable file")
    assert re.fullmatch(r".*broken\.png: no picture that Pillow can read", words[1])


def test_without_its_images_a_run_has_paths_and_a_note(tmp_path, weighted):
    config = read_json(weighted / "config.json")
    config["data"] = str(tmp_path / "gone")
    run = copy_of(weighted, tmp_path / "run", config_json=json.dumps(config))
    _, page = page_of(run)
    assert not page.of("img")
    assert any(word.startswith("no pictures: the data cannot be opened any more") for word in page.text)
    assert next(read_run(run).unlabeled())["path"] in page.text
    assert "?" in page.text  # labeled images of a class


def test_an_unfinished_run_and_damaged_files(tmp_path, weighted, changed):
    """What is missing is left out; the rest is there."""
    first, second, *_ = (weighted / "metrics.jsonl").read_text().splitlines()
    going = copy_of(
        weighted,
        tmp_path / "going",
        results_json=None,
        unlabeled_csv=None,
        timing_jsonl=None,
        metrics_jsonl=f"{first}\n{second[:40]}",  # killed as it wrote
    )
    table = (changed / "unlabeled.csv").read_text()
    damaged = copy_of(
        changed,
        tmp_path / "damaged",
        unlabeled_csv=table.replace("label_change", "other"),
        results_json=json.dumps({"test_error": 0.5, "confusion": {"part": "test", "counts": "no"}}),
    )
    text, page = page_of(going, damaged)
    assert "not finished" in page.text
    assert "step 5" in page.text
    assert "of 20" in page.text
    assert any("the confusion matrix could not be shown" in word for word in page.text)
    assert any("the unlabeled images could not be shown: KeyError" in word for word in page.text)
    assert "test error" in re.findall("<figcaption>(.*?)</figcaption>", text)
    (tmp_path / "new").mkdir()
    shutil.copy(weighted / "config.json", tmp_path / "new")
    assert "step 0" in page_of(tmp_path / "new")[1].text


def test_errors_of_imputed_labels_need_the_truth(tmp_path, weighted):
    captions = re.compile("<figcaption>(.*?)</figcaption>")
    assert "imputed labels that are wrong" in captions.findall(page_of(weighted)[0])
    rows = list(read_run(weighted).unlabeled())
    run = copy_of(weighted, tmp_path / "run", unlabeled_csv=table_of([{**row, "truth": ""} for row in rows]))
    shown = captions.findall(page_of(run)[0])
    assert "imputed labels that are wrong" not in shown
    assert "test error" in shown


def test_training_leaves_a_report_in_its_folder(weighted):
    text = (weighted / "report.html").read_text()
    assert Page(text).of("svg")
    assert "1 run" in text


def test_the_template_is_installed():
    root = Path(report.__file__).parents[3]
    patterns = re.search(r'^fastmeta = \["(.*)"\]$', (root / "pyproject.toml").read_text(), re.MULTILINE)[1]
    templates = list((root / "fastmeta").rglob("*.jinja"))
    assert templates
    for template in templates:
        name = str(template.relative_to(root / "fastmeta"))
        assert any(fnmatch.fnmatch(name, pattern) for pattern in patterns.split('", "'))


def test_the_command(tmp_path, weighted, changed, capsys):
    out = tmp_path / "new" / "report.html"
    assert cli.main(["report", str(weighted), str(changed), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert "<h1>2 runs</h1>" in out.read_text()
    for arguments, message in (
        ([tmp_path], f"{tmp_path}: no run of fastmeta train"),
        ([], "runs must be at least one folder, got none"),
        ([weighted, "--out", tmp_path], f"--out must be a file that can be written, got {tmp_path}"),
    ):
        assert cli.main(["report", *map(str, arguments)]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_runs_with_one_name_are_told_apart(tmp_path, weighted):
    runs = [copy_of(weighted, tmp_path / name / "seed-0") for name in ("a", "b")]
    _, page = page_of(*runs)
    assert {"a/seed-0", "b/seed-0"} <= set(page.text)


def test_many_runs_of_large_pictures_stay_small(tmp_path, weighted, monkeypatch):
    """Noise compresses worst."""
    monkeypatch.setattr("fastmeta.training.reports.report.open_images", lambda path, **options: Noise())
    rows = list(read_run(weighted).unlabeled())
    table = table_of([{**rows[0], "path": f"noise[{place}]", "weight": place / 1000} for place in range(100)])
    runs = [copy_of(weighted, tmp_path / str(number), unlabeled_csv=table) for number in range(24)]
    out = tmp_path / "report.html"
    write_report(runs, out)
    assert len(Page(out.read_text()).of("img")) == 24 * 10
    assert out.stat().st_size < 3e6


class Noise:
    """Large pictures."""

    fingerprint = "other"

    picture = torch.randint(0, 256, (1, 3, 256, 256), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)

    def __len__(self):
        return 100

    def get(self, places):
        return self.picture.roll(int(places[0]), dims=2)

    def describe(self, place):
        return f"noise[{place}]"


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_a_thumbnail_has_the_pictures_shape(channels):
    source = address_of(torch.rand(channels, 200, 300))
    picture = Image.open(io.BytesIO(base64.b64decode(source.split(",")[1])))
    assert picture.size == (SIDE, 64)
    assert picture.mode == ("RGB" if channels >= 3 else "L")


def test_nothing_is_left_of_a_page_that_cannot_be_written(tmp_path, weighted, monkeypatch):
    out = tmp_path / "report.html"
    out.write_text("before")

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_report([weighted], out)
    assert [path.name for path in Path(tmp_path).iterdir()] == ["report.html"]
    assert out.read_text() == "before"
