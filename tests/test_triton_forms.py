"""The cost model of the forms: its choices where there is no GPU, and the ways to overrule it."""

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")
from fastmeta.triton_kernels import _forms, _launch

HALF, SINGLE = torch.bfloat16, torch.float32
OPERATORS = ("per_example_dot", "label_gradient", "last_layer_gradient", "hessian_vector_product")
SMALL, MIDDLE, LARGE = (256, 128, 10), (768, 512, 200), (1024, 2048, 1000)


@pytest.fixture(autouse=True)
def one_chip(monkeypatch):
    """The same machine wherever the tests run."""
    monkeypatch.setattr(_forms, "chip", lambda: _forms.CHIPS[90])


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("dtype", [SINGLE, HALF], ids=str)
def test_small_shapes_are_fused_and_large_ones_use_the_library(operator, dtype):
    assert _forms.choose(operator, *SMALL, dtype) == "fused"
    assert _forms.choose(operator, *LARGE, dtype) == "rows"
    for shape in ((4096, 2048, 1000), (8192, 2048, 128256)):
        assert _forms.choose(operator, *shape, dtype) == "rows"


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("dtype", [SINGLE, HALF], ids=str)
def test_two_launches_at_most_where_the_host_is_the_limit(dtype, head):
    for shape in (SMALL, (448, 128, 100), MIDDLE):
        assert _forms.choose("last_layer_gradient", *shape, dtype, head) in ("rows", "fused")
        if head:
            for operator in OPERATORS[:3]:
                assert _forms.choose(operator, *shape, dtype, head) in ("fused", "flash")
        assert _forms.choose("hessian_vector_product", *shape, dtype) == "fused"


def test_many_classes_of_few_features_are_not_written():
    """Products of depth D against the traffic of N x C: the library wins from some depth on."""
    chosen = [_forms.choose("per_example_dot", 8192, d, 128256, HALF, head=True) for d in (64, 256, 2048)]
    assert chosen == ["flash", "flash", "rows"]
    assert _forms.choose("per_example_dot", 8192, 256, 128256, SINGLE, head=True) == "rows"  # products in float32


def test_empty_shapes_have_a_form():
    for operator in OPERATORS:
        for shape in [(0, 5, 3), (4, 0, 3), (3, 4, 0), (0, 0, 0)]:
            assert _forms.choose(operator, *shape, HALF) in _forms.FORMS


def test_small_slabs_cost_launches():
    shape = (8192, 2048, 30522)
    assert _forms.choose("label_gradient", *shape, HALF) == "rows"
    with _forms.slab_limit(1 << 20):
        assert _forms.choose("label_gradient", *shape, HALF) == "flash"


def test_only_what_is_offered_is_chosen():
    assert _forms.choose("label_gradient", *SMALL, HALF, offered=("rows",)) == "rows"
    assert _forms.choose("label_gradient", *SMALL, HALF, offered=("rows", "flash")) in ("rows", "flash")
    assert _forms.choose("hessian_vector_product", *SMALL, HALF, offered=("rows",)) == "rows"


def test_force():
    for form in _forms.FORMS:
        with _forms.force(form):
            assert all(_forms.choose(operator, *LARGE, HALF) == form for operator in OPERATORS)
            with _forms.force("rows"):
                assert _forms.choose(OPERATORS[0], *SMALL, HALF) == "rows"
            assert _forms.choose(OPERATORS[0], *SMALL, HALF) == form
    assert _forms.choose(OPERATORS[0], *SMALL, HALF) == "fused"
    with _forms.force("flash"), pytest.raises(ValueError, match=r"no form 'flash'.*only rows, fused"):
        _forms.choose(OPERATORS[0], *SMALL, HALF, offered=("rows", "fused"))
    with pytest.raises(ValueError, match="must be one of rows, fused, flash"), _forms.force("tiles"):
        pass


def test_a_change_of_settings_forgets_plans():
    plans: _launch.Plans[int] = _launch.Plans()
    for change in (_forms.force("rows"), _forms.slab_limit(5)):
        plans.keep("a", 1)
        with change:
            assert not plans
            plans.keep("a", 2)
        assert not plans


def test_slabs_of_rows():
    with _forms.slab_limit(1000):
        assert _forms.slab_rows(1000, 10) == 100
        assert _forms.slab_rows(50, 10) == 50
        assert _forms.slab_rows(50, 10**6) == 1
        assert _forms.slab_rows(1000, 3) == 256  # 333 rows fit
        assert _forms.slab_rows(0, 10) == 1
        assert _forms.slab_rows(5, 0) == 5


def test_the_limit_of_slabs_is_read_from_the_environment():
    script = "from fastmeta.triton_kernels import _forms; print(_forms.slab_rows(10**6, 1 << 20))"
    for given, rows in ((None, 256), ("3", 3)):
        environment = {name: value for name, value in os.environ.items() if name != "FASTMETA_SLAB_MB"}
        environment |= {"FASTMETA_SLAB_MB": given} if given else {}
        found = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
        assert found.stdout.split() == [str(rows)], found.stderr


def test_chips(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, table in {(8, 0): 80, (8, 9): 80, (9, 0): 90, (10, 3): 100, (12, 0): 100, (7, 5): 80}.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda one=capability: one)
        _forms.chip.cache_clear()
        assert _forms.chip() is _forms.CHIPS[table]
    _forms.chip.cache_clear()


def test_precision_of_float32_products():
    slow = _forms.costs("hessian_vector_product", *LARGE, SINGLE)
    fast = _forms.costs("hessian_vector_product", *LARGE, SINGLE, precision="tf32")
    assert all(fast[form] < slow[form] for form in _forms.FORMS)
    half = [_forms.costs("hessian_vector_product", *LARGE, HALF, precision=one) for one in ("ieee", "tf32")]
    assert half[0] == half[1]
