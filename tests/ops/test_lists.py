"""Lists of tensors past the dispatcher: the same bits as through it, and nothing that must be seen goes that way."""

import sys

import pytest
import torch
from cases import DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st
from perturbed_lists import assert_bits, bits, copy, draw, dtypes
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from fastmeta import _extension, use_impl
from fastmeta.ops import _in_place, _lists, alignment_direction, perturbed
from fastmeta.ops.alignment_direction import OPERATOR

pytestmark = [
    pytest.mark.usefixtures("on_device"),
    pytest.mark.skipif(_lists.KERNELS is None, reason="not built for this torch"),
]
NUMBERS = {"decay": 0.9, "decay_norm": 0.7, "epsilon": 0.1}
kernels = pytest.mark.parametrize("impl", OPERATOR.implementations(DEVICE)[1:])
Lists = list[list[Tensor]]


def lists_of(generator, dtype=torch.float32, shapes=((), (0,), (3, 5), (1025,), (40000,))) -> Lists:
    lists = [draw(generator, dtype, shapes) for _ in range(4)]
    lists[3] = [q.abs() for q in lists[3]]
    return lists


def strided(tensor: Tensor) -> Tensor:
    return torch.stack([tensor] * 2, -1)[..., 1]


def points(params: list[Tensor], direction: list[Tensor], impl: str | None) -> list[Tensor]:
    with perturbed(params, direction, 0.3, impl=impl) as perturbation:
        plus = copy(params)
        perturbation.flip()
        return [perturbation.epsilon, *plus, *copy(params)]


@pytest.fixture
def refused(monkeypatch):
    """How often each function was asked and said no."""
    real, counts = _lists.KERNELS, {"align": 0, "backup_bytes": 0, "perturb": 0}

    class Counting:
        def __getattr__(self, name):
            function = getattr(real, name)

            def call(*arguments):
                result = function(*arguments)
                if name in counts:
                    counts[name] += result is None
                return result

            return call

    monkeypatch.setattr(_lists, "KERNELS", Counting())
    return counts


@kernels
@dtypes
@pytest.mark.parametrize("layout", ["contiguous", "mixed"])
def test_both_ways_give_the_same_bits(impl, dtype, layout, generator, monkeypatch, refused):
    lists = lists_of(generator, dtype)
    if layout == "mixed":
        lists[0][2], lists[2][4], lists[1][3] = strided(lists[0][2]), strided(lists[2][4]), lists[1][3].flip(0)
    again = [copy(tensors) for tensors in lists]
    if layout == "mixed":
        again[0][2], again[2][4] = strided(again[0][2]), strided(again[2][4])
    here = alignment_direction(*lists, **NUMBERS, impl=impl)
    moved = points(lists[2], lists[0], impl)
    assert refused == {"align": 0, "backup_bytes": 0, "perturb": 0}
    monkeypatch.setattr(_lists, "KERNELS", None)
    there = alignment_direction(*again, **NUMBERS, impl=impl)
    assert_bits(here, bits(there))
    assert_bits(lists[2] + lists[3], bits(again[2] + again[3]))
    expected = points(again[2], again[0], impl)
    if layout == "contiguous":
        assert_bits(moved, bits(expected))
    else:  # the sum in epsilon runs in another order
        torch.testing.assert_close(moved, expected)


SPECIAL = {
    "negative view": lambda t: torch._neg_view(-t),
    "negative imaginary part": lambda t: torch.complex(t, -t).conj().imag,
    "subclass": lambda t: t.as_subclass(type("Own", (Tensor,), {})),
    "integers": lambda t: t.long(),
    "not a tensor": lambda t: t.tolist(),
}


@kernels
@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("which", range(4))
def test_special_tensors_go_through_the_dispatcher(impl, kind, which, generator, refused):
    lists = lists_of(generator, shapes=((4,), (3,)))
    plain = [copy(tensors) for tensors in lists]
    lists[which][1] = SPECIAL[kind](lists[which][1])
    if kind in ("integers", "not a tensor"):
        with pytest.raises(TypeError, match=r"\[1\] must be"):
            alignment_direction(*lists, **NUMBERS, impl=impl)
        assert_bits(lists[2][:1] + lists[3][:1], bits(plain[2][:1] + plain[3][:1]))
    elif kind.startswith("negative") and which >= 2:  # torch itself refuses to write into such a list
        with pytest.raises(RuntimeError, match="mutable TensorLists with negation inputs"):
            alignment_direction(*lists, **NUMBERS, impl=impl)
    else:
        got = alignment_direction(*lists, **NUMBERS)
        torch.testing.assert_close(list(got), alignment_direction(*plain, **NUMBERS), check_device=False)
        for mine, other in zip(lists[2:], plain[2:], strict=True):
            torch.testing.assert_close([t.as_subclass(Tensor) for t in mine], other)
    assert refused["align"] == 1


def test_a_negative_view_is_a_direction_with_its_sign(generator, refused):
    params, direction = draw(generator, torch.float32, [(4,), (3,)]), draw(generator, torch.float32, [(4,), (3,)])
    expected = points(params, direction, None)
    direction[1] = torch._neg_view(-direction[1])
    torch.testing.assert_close(points(params, direction, None), expected)
    assert refused["perturb"] == 1
    params[1] = torch._neg_view(-params[1])
    with pytest.raises(RuntimeError, match="mutable TensorLists with negation inputs"):
        points(params, direction, None)


class Seeing(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


def test_a_mode_sees_the_operators(generator):
    lists = lists_of(generator, shapes=((4,), (3,)))
    with Seeing() as mode:
        alignment_direction(*lists, **NUMBERS)
        points(lists[2], lists[0], None)
    for name in ("alignment_direction_", "perturb_epsilon", "perturb_", "perturb_restore_"):
        assert any(f"fastmeta.{name}.default" in seen for seen in mode.seen)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace")
def test_who_differentiates_or_names_another_implementation_is_not_passed_by(generator):
    assert _lists.unseen(None) is not None
    with forward_ad.dual_level():
        assert _lists.unseen(None) is None
    for impl in ("reference", "triton"):
        assert _lists.unseen(impl) is None
        with use_impl(impl):
            assert _lists.unseen(None) is None
    seen = []
    torch.func.vmap(lambda x: seen.append(_lists.unseen(None)) or x)(torch.ones(2))
    torch.jit.trace(lambda x: seen.append(_lists.unseen(None)) or x + 1, torch.ones(2), check_trace=False)
    torch.compile(lambda x: x + (0 if _lists.unseen(None) is None else 1), backend="eager")(torch.ones(2))
    assert seen == [None, None]


def test_another_torch_than_it_was_built_for_is_not_served(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "0.0")
    assert _lists._load() is None
    monkeypatch.undo()
    monkeypatch.setattr(_extension, "_C", None)
    assert _lists._load() is None


def events(function) -> int:
    """Calls that Python makes, its own functions and those in C."""
    count = 0

    def look(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(look)
    try:
        function()
    finally:
        sys.setprofile(before)
    return count


def test_python_does_nothing_for_each_tensor(generator):
    """So the work for 2,000 tensors is C's: one pass over them and one sort."""
    counts = []
    for number in (3, 2000):
        lists = lists_of(generator, shapes=[(2,)] * number)
        out = [torch.empty_like(t) for t in lists[0]]

        def work(lists=lists, out=out):
            alignment_direction(*lists, **NUMBERS, out=out)
            with perturbed(lists[2], lists[0], 0.1) as perturbation:
                perturbation.flip()

        work()  # the workspace
        counts.append(events(work))
    assert counts[0] == counts[1] < 200


def intervals(generator, number: int) -> list[Tensor]:
    """Random short runs and columns of one buffer."""
    buffer = torch.zeros(64, device="cpu")
    found = []
    for _ in range(number):
        begin, size, step = (int(torch.randint(high, (), generator=generator)) for high in (56, 5, 3))
        tensor = buffer[begin : begin + size]
        found.append(buffer.view(16, 4)[:, begin % 4] if step == 2 else tensor)
    return found


def in_pairs(writes: list[Tensor], reads: list[Tensor]) -> bool:
    """Whether each element is in one written tensor alone."""
    places = [
        {t.data_ptr() + 4 * offset for offset in (torch.arange(t.numel()) * (t.stride(0) if t.dim() else 0)).tolist()}
        for t in writes + reads
    ]
    return all(
        not (places[i] & places[j]) for i in range(len(writes)) for j in range(len(places)) if j > i or i >= len(writes)
    )


@given(seed=st.integers(0, 2**31), writes=st.integers(0, 4), reads=st.integers(0, 4))
@settings(max_examples=200, deadline=None)
def test_no_shared_element_is_overlooked(seed, writes, reads):
    generator = torch.Generator("cpu").manual_seed(seed)
    written, read = intervals(generator, writes), intervals(generator, reads)
    try:
        _in_place.disjoint([("w", t) for t in written], [("r", t) for t in read])
    except ValueError:
        return  # views whose ranges cross are refused even where no element is shared
    assert in_pairs(written, read)


@pytest.mark.parametrize("kind", ["apart", "columns", "read together"])
def test_disjoint_memory_of_many_tensors_is_known_without_looking_at_pairs(kind, monkeypatch):
    number, calls = 2000, []
    wide = torch.zeros(3, number, device="cpu")
    writes, reads = {
        "apart": (list(torch.zeros(number, 2, device="cpu")), []),
        "columns": ([wide[:, i] for i in range(number)], []),
        "read together": ([torch.zeros(2)], [wide] * number),
    }[kind]
    for name in ("_interleaved", "_width", "_end"):
        function = getattr(_in_place, name)
        monkeypatch.setattr(_in_place, name, lambda *a, function=function: calls.append(1) or function(*a))
    _in_place.disjoint([("w", t) for t in writes], [("r", t) for t in reads])
    assert len(calls) <= 4 * number
    if kind == "columns":
        twice = [(f"w{i}", t) for i, t in enumerate([*writes[:5], writes[1]])]
        with pytest.raises(ValueError, match=r"w1 and w5 must not share memory"):
            _in_place.disjoint(twice)
