"""The stated rule of the forms: what it picks, how it is overruled, and what it picks of what was measured."""

import json
import runpy
from pathlib import Path

import pytest

pytest.importorskip("triton")
from fastmeta.triton_kernels import _rule

MEASURED = Path(__file__).parents[2] / "bench/results/nvidia-h200/forms.json"


def test_small_heads_are_fused_and_the_rest_is_the_librarys():
    for shape in ((256, 128, 33), (448, 128, 100), (2048, 512, 64)):
        assert _rule.form(*shape, aligned=True, multiplies=True) == "fused"
        assert _rule.form(*shape, aligned=False, multiplies=True) == "rows"
        assert _rule.form(*shape, aligned=True, multiplies=False) == "rows"
    for shape in ((768, 512, 200), (1 << 16, 2048, 100), (4096, 2048, 1000), (8192, 2048, 128256)):
        assert _rule.form(*shape, aligned=True, multiplies=True) == "rows"


def test_force():
    for form in _rule.FORMS:
        with _rule.force(form):
            assert _rule.form(768, 512, 200, aligned=False, multiplies=True) == form
            with _rule.force("rows"):
                assert _rule.form(4, 8, 8, aligned=True, multiplies=True) == "rows"
            assert _rule.form(4, 8, 8, aligned=True, multiplies=True) == form
            assert _rule.form(4, 8, 8, aligned=True, multiplies=False) == "rows"
    assert _rule.form(4, 8, 8, aligned=True, multiplies=True) == "fused"
    with pytest.raises(ValueError, match="must be one of rows, fused, got 'flash'"), _rule.force("flash"):
        pass


@pytest.mark.parametrize(("given", "rows"), [(None, 256), ("3", 3)])
def test_the_limit_of_slabs_is_read_from_the_environment(monkeypatch, given, rows):
    monkeypatch.delenv("FASTMETA_SLAB_MB", raising=False)
    if given is not None:
        monkeypatch.setenv("FASTMETA_SLAB_MB", given)
    again = runpy.run_path(_rule.__file__)  # a module of its own: the variable is read when it is imported
    assert again["slab_rows"](10**6, 1 << 20) == rows


def test_the_choice_among_what_was_measured():
    """Device times of every form on a card: at worst 1.6 times the fastest, 1.1 times on average."""
    ratios = {}
    for row in json.loads(MEASURED.read_text())["rows"]:
        if len(row["us"]) == 1:
            continue
        n, d, c = row["shape"]
        chosen = _rule.form(n, d, c, aligned=True, multiplies=row["operator"] != "last_layer_gradient")
        ratios[row["operator"], row["dtype"], n] = row["us"][chosen] / min(row["us"].values())
    assert len(ratios) >= 9
    assert max(ratios.values()) <= 1.6, ratios
    assert sum(ratios.values()) / len(ratios) <= 1.1, ratios
