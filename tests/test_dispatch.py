"""Which implementation serves a call: by name, by block, by device, and without the extension."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from cases import CASES, Draw, map_tensors
from torch.utils._python_dispatch import TorchDispatchMode

import fastmeta
from fastmeta import _extension, dispatch, ops
from fastmeta.dispatch import Operator

cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
ROOT = Path(__file__).parents[1]


@pytest.fixture
def operator(monkeypatch):
    """An operator with a C++ kernel, whether or not the extension is built."""
    fake = Operator("operator_of_this_test", fake=lambda *args: None)
    fake._kernels = dict.fromkeys([("cpu", "cpp"), ("cpu", None)], lambda *args: "direct")
    fake._kernels["cuda", "cuda"] = fake._kernels["cuda", None] = lambda *args: "on the GPU"
    fake._dispatched = lambda *args: "dispatched"
    return fake


def chosen(operator: Operator, *tensors, impl=None) -> str:
    kernel = operator.select(impl, *tensors)
    return "reference" if kernel is None else kernel()


X = torch.ones(2, 2)


def test_a_plain_call_goes_straight_to_the_kernel(operator):
    assert chosen(operator, X, None) == "direct"
    assert chosen(operator, X, impl="cpp") == "direct"
    assert chosen(operator, X, impl="reference") == "reference"
    assert operator.implementations() == ("reference", "cpp", "cuda")
    assert operator.implementations("cpu") == ("reference", "cpp")


def test_where_a_derivative_is_tracked_the_reference_serves(operator):
    tracked = X.clone().requires_grad_()
    assert chosen(operator, X, tracked) == "reference"
    with torch.no_grad():
        assert chosen(operator, X, tracked) == "direct"
    assert chosen(operator, tracked.detach()) == "direct"
    assert chosen(operator, tracked, impl="cpp") == "dispatched"
    with torch.autograd.forward_ad.dual_level():
        assert chosen(operator, X) == "reference"
        with pytest.raises(RuntimeError, match="no forward-mode derivative"):
            chosen(operator, X, impl="cpp")
    inside = []
    torch.func.vmap(lambda x: inside.append(chosen(operator, x)) or x)(X)
    assert inside == ["reference"]


def test_a_mode_or_subclass_that_watches_sees_the_call(operator):
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    class Subclass(torch.Tensor):
        pass

    with Watch():
        assert chosen(operator, X) == "dispatched"
        assert chosen(operator, X, impl="cpp") == "dispatched"
    assert chosen(operator, X.as_subclass(Subclass)) == "dispatched"
    assert chosen(operator, torch.nn.Parameter(X, requires_grad=False)) == "direct"


def test_other_devices(operator):
    meta = X.to("meta")
    assert chosen(operator, meta) == "reference"
    assert chosen(operator, X, meta) == "reference"
    with pytest.raises(RuntimeError, match=r"impl='cpp' needs CPU tensors, got one on meta"):
        chosen(operator, X, meta, impl="cpp")


@cases
def test_unknown_and_missing_implementations(case, draw):
    arguments = case.arguments(draw, (3, 4, 2), case.losses[0], case.variants[0])
    with pytest.raises(ValueError, match="impl must be one of reference, cpp, cuda, triton, got 'fast'"):
        case.call(arguments, "fast")
    for name in {"cuda", "triton"}.difference(case.operator.implementations()):
        with pytest.raises(RuntimeError, match=f"{case.name} has no '{name}' implementation"):
            case.call(arguments, name)
        with fastmeta.use_impl(name), pytest.raises(RuntimeError, match=name):
            case.call(arguments)
    with pytest.raises(ValueError, match=r"impl must be one of .* got ''"):
        case.call(arguments, "")


@cases
def test_without_a_kernel_cpp_says_how_to_build(case, draw, monkeypatch):
    monkeypatch.setattr(case.operator, "_kernels", {})
    monkeypatch.setattr(case.operator, "entry", _extension.SlowEntry())
    monkeypatch.setattr(_extension, "REASON", f"not loaded; {_extension.HOW_TO_BUILD}")
    arguments = case.arguments(draw, (3, 4, 2), case.losses[0], case.variants[0])
    assert case.operator.implementations() == ("reference",)
    with pytest.raises(RuntimeError, match="pip install --no-build-isolation"):
        case.call(arguments, "cpp")
    for got, want in zip(case.call(arguments), case.call(arguments, "reference"), strict=True):
        assert torch.equal(got, want)


@cases
def test_on_the_meta_device_the_reference_gives_shapes(case, draw):
    for variant in case.variants:
        plain = case.arguments(draw, (3, 4, 2), case.losses[0], variant)
        arguments = map_tensors(lambda t: t.to("meta"), plain)
        for got, want in zip(case.call(arguments), case.call(plain), strict=True):
            assert got.is_meta
            assert (got.shape, got.dtype) == (want.shape, want.dtype)
        if "cpp" in case.operator.implementations():
            with pytest.raises(RuntimeError, match="got one on meta"):
                case.call(arguments, "cpp")


class TestUseImpl:
    def test_nests_and_restores(self, operator):
        with fastmeta.use_impl("reference"):
            assert chosen(operator, X) == "reference"
            with fastmeta.use_impl("cpp"):
                assert chosen(operator, X) == "direct"
                assert chosen(operator, X, impl="reference") == "reference", "the argument wins"
            assert chosen(operator, X) == "reference"
            assert chosen(operator, X, impl="cpp") == "direct"
        assert chosen(operator, X) == "direct"

    def test_restores_after_an_error(self, operator):
        with pytest.raises(KeyError), fastmeta.use_impl("reference"):
            raise KeyError
        assert chosen(operator, X) == "direct"

    def test_never_falls_back(self, operator):
        with fastmeta.use_impl("cpp"):
            with pytest.raises(RuntimeError, match="needs CPU tensors"):
                chosen(operator, X.to("meta"))
            assert chosen(operator, X.clone().requires_grad_()) == "dispatched"

    def test_unknown_name(self):
        expected = "impl must be one of reference, cpp, cuda, triton, got 'fast'"
        with pytest.raises(ValueError, match=expected), fastmeta.use_impl("fast"):
            pass
        with pytest.raises(ValueError, match="got None"), fastmeta.use_impl(None):
            pass

    def test_another_thread_is_not_concerned(self, operator):
        seen = []
        entered, checked = threading.Event(), threading.Event()

        def other():
            entered.wait(10)
            seen.append(chosen(operator, X))
            with fastmeta.use_impl("cpp"):
                checked.set()
                seen.append(chosen(operator, X))

        thread = threading.Thread(target=other)
        thread.start()
        with fastmeta.use_impl("reference"):
            entered.set()
            assert checked.wait(10)
            assert chosen(operator, X) == "reference"
        thread.join()
        assert seen == ["direct", "direct"]
        assert dispatch._override.name is None


def test_a_call_reaches_what_use_impl_names(draw):
    features, logits, targets, direction = (draw.normal(*shape) for shape in ((5, 4), (5, 3), (5, 3), (3, 4)))
    with fastmeta.use_impl("reference"):
        got = ops.per_example_dot(features, logits, targets, direction)
    assert torch.equal(got, ops.per_example_dot(features, logits, targets, direction, impl="reference"))


def test_a_dispatch_mode_sees_one_call(generator):
    """FLOP counters, fake tensors and their like must not be bypassed."""
    names: list[str] = []

    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    for case in CASES:
        if "cpp" not in case.operator.implementations():
            continue
        arguments = case.arguments(Draw(generator, torch.float32), (3, 4, 2), case.losses[0], case.variants[0])
        names.clear()
        with Log():
            case.call(arguments)
        assert names == [f"fastmeta.{case.name}.default"]


WITHOUT_EXTENSION = """
import sys, warnings

class Hide:
    def find_spec(self, name, path=None, target=None):
        if name == "fastmeta._C":
            raise ImportError("hidden by the test")

sys.meta_path.insert(0, Hide())
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import fastmeta
    import fastmeta.ops
    import torch
    result = fastmeta.ops.per_example_dot(torch.ones(1, 3), torch.zeros(1, 2), torch.tensor([0]), torch.ones(2, 3))
assert result.tolist() == [0.0], result
ours = [str(w.message) for w in caught if "fastmeta" in str(w.message)]
assert len(ours) == 1, ours
assert "pip install --no-build-isolation -e ." in ours[0] and "hidden by the test" in ours[0], ours
assert "\\n" not in ours[0], ours
assert fastmeta._extension.build_info() is None
try:
    fastmeta.ops.per_example_dot(torch.ones(1, 3), torch.zeros(1, 2), torch.tensor([0]), torch.ones(2, 3), impl="cpp")
except RuntimeError as error:
    assert "pip install --no-build-isolation -e ." in str(error), error
    print("done")
"""


def test_without_the_extension():
    got = subprocess.run(
        [sys.executable, "-c", WITHOUT_EXTENSION], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert got.stdout.strip() == "done", got.stderr
