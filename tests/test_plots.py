import json

import pytest

matplotlib = pytest.importorskip("matplotlib")
from PIL import Image  # noqa: E402

from fastmeta.training.reports.plots import _STYLES, _weights, write_plots  # noqa: E402

METHODS = [name for name, (_, line) in _STYLES.items() if line == "-"]  # each with a color of its own


def errors(folder, steps, methods, bases=("fixmatch",)):
    rows = [
        {"base": base, "method": method, "seed": seed, "step": step, "test_error_average": 0.2 + 0.1 * seed}
        for base in bases
        for method in methods
        for seed in range(2)
        for step in steps
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "results.json").write_text(json.dumps({"runs": [], "table": []}))
    assert [path.name for path in write_plots(folder)] == ["errors.png"]
    with Image.open(folder / "errors.png") as image:
        return image.convert("RGB")


def pixels(image, color):
    wanted = tuple(int(color[place : place + 2], 16) for place in (1, 3, 5))
    return sum(count for count, found in image.getcolors(1 << 24) if found == wanted)


@pytest.mark.parametrize("steps", [[4], [4, 8], range(50, 1001, 50)])
def test_every_method_is_drawn_however_few_its_evaluations(tmp_path, steps):
    image = errors(tmp_path, steps, METHODS)
    for method in METHODS:
        assert pixels(image, _STYLES[method][0]) > 30, method


def test_a_panel_has_one_method_and_the_base(tmp_path):
    from matplotlib import pyplot

    shown = []
    close, pyplot.close = pyplot.close, shown.append
    try:
        errors(tmp_path, [50, 100], METHODS, ("fixmatch", "vat"))
    finally:
        pyplot.close = close
    panels = [axes for axes in shown[0].axes if axes.get_visible()]
    assert len(panels) == 2 * (len(METHODS) - 1)
    assert all(len(axes.lines) == 2 for axes in panels)
    assert all(axes.get_ylim() == panels[0].get_ylim() and axes.get_ylim()[1] > 30 for axes in panels)
    close(shown[0])


def test_each_method_has_its_own_histograms_of_weights(tmp_path):
    from matplotlib import pyplot

    details = {
        (base, "example-weights", 0): {"weights": weights, "imputed": [1, 2], "target": [1, 3]}
        for base, weights in (("fixmatch", [0.5, 1.5]), ("vat", [0.7, 1.9]))
    }
    shown = []
    close, pyplot.close = pyplot.close, shown.append
    try:
        _weights(tmp_path, details)
    finally:
        pyplot.close = close
    titles = " ".join(axes.get_title() for axes in shown[0].axes)
    for words in ("fixmatch + example-weights", "mean 0.50", "mean 1.50", "vat + example-weights", "mean 0.70", "1.90"):
        assert words in titles
    close(shown[0])


@pytest.mark.parametrize(("methods", "says"), [(["l2i"], False), (["none", "l2i"], True)])
def test_the_title_speaks_of_the_base_where_it_is_drawn_and_fits(tmp_path, methods, says):
    from matplotlib import pyplot

    shown = []
    close, pyplot.close = pyplot.close, shown.append
    try:
        errors(tmp_path, [50, 100], methods)
    finally:
        pyplot.close = close
    (figure,) = shown
    title = figure._suptitle
    assert ("the base alone" in title.get_text()) == says
    figure.canvas.draw()
    extent = title.get_window_extent()
    assert extent.x0 >= 0
    assert extent.x1 <= figure.bbox.width
    close(figure)
