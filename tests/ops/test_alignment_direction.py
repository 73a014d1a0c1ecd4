"""alignment_direction against the gradient of the paper's distance, and the kernel against float64."""

import itertools

import pytest
import torch
from cases import DEVICE
from guarded import guarded
from hypothesis import given, settings
from hypothesis import strategies as st
from poison import poisoned_memory
from torch import Tensor

from fastmeta.ops import alignment_direction
from fastmeta.ops.alignment_direction import OPERATOR

pytestmark = pytest.mark.usefixtures("on_device")
IMPLS = OPERATOR.implementations(DEVICE)
KERNELS = IMPLS[1:]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
NUMBERS = {"decay": 0.9, "decay_norm": 0.7, "epsilon": 0.1}
# Empty, single, around a vector, a tile and a unit of the kernel, and a scalar.
SHAPES = [(), (0,), (1,), (3, 5), (17,), (1023,), (1024,), (5, 205), (2, 0, 3), (16384,), (129, 127), (40000,), (7,)]
impls = pytest.mark.parametrize("impl", IMPLS)
kernels = pytest.mark.parametrize("impl", KERNELS)
Lists = list[list[Tensor]]


def draw(shapes, generator, dtype=torch.float64, averages=None) -> Lists:
    def normal():
        cpu = (torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu") for shape in shapes)
        return [t.to(DEVICE) for t in cpu]

    gradients = [[t.to(dtype) for t in normal()] for _ in range(2)]
    fourth = [t.square().to(averages or dtype) for t in normal()]
    return [*gradients, [t.to(averages or dtype) for t in normal()], fourth]


def copy(lists: Lists, dtype: torch.dtype | None = None) -> Lists:
    return [[t.clone().to(dtype or t.dtype) for t in tensors] for tensors in lists]


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.double().flatten() for t in tensors])


def call(lists: Lists, impl: str, **changed) -> list[Tensor]:
    return alignment_direction(*lists, **{**NUMBERS, **changed}, impl=impl)


@impls
def test_is_the_gradient_of_the_normalized_distance(impl, generator):
    lists = draw([(4,), (3, 2)], generator)
    before = copy(lists)
    directions = call(lists, impl)
    for i, direction in enumerate(directions):
        g_l, g_u, m, q = (tensors[i] for tensors in before)
        mean = 0.9 * m + 0.1 * g_l
        v = (mean - g_u).requires_grad_()
        fourth = (0.7 * q + 0.3 * v**4).detach()
        distance = (v**2 / (0.1 + fourth.sqrt())).sum()
        torch.testing.assert_close(direction, torch.autograd.grad(distance, v)[0], rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(lists[2][i], mean, rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(lists[3][i], fourth, rtol=1e-13, atol=1e-13)


@impls
@pytest.mark.parametrize(
    ("dtype", "averages"),
    [(d, None) for d in DTYPES] + [(torch.bfloat16, torch.float32), (torch.float16, torch.float32)],
)
def test_error_against_float64_truth(impl, dtype, averages, generator):
    lists = draw(SHAPES, generator, dtype, averages)
    truth, eager = copy(lists, torch.float64), copy(lists)
    true = [call(truth, "reference"), truth[2], truth[3]]
    plain = [call(eager, "reference"), eager[2], eager[3]]
    with poisoned_memory():
        results = [call(lists, impl), lists[2], lists[3]]
    unit = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    # What an error of one unit in the terms of v becomes.
    size = (flat(truth[2]).abs() + flat(truth[1]).abs()).clamp_min(1)
    scales = 2 * size / (0.1 + flat(truth[3]).sqrt()) + flat(true[0]).abs(), size, size**4 + flat(truth[3])
    for got, expected, exact, scale in zip(results, plain, true, scales, strict=True):
        assert [g.shape for g in got] == [torch.Size(s) for s in SHAPES]
        assert [g.dtype for g in got] == [e.dtype for e in expected]
        assert all(g.is_contiguous() for g in got)
        allowed = 2 * ((flat(expected) - flat(exact)).abs() / scale).max() + 4 * unit
        assert ((flat(got) - flat(exact)).abs() / scale).max() <= allowed


@kernels
@given(shapes=st.lists(st.lists(st.integers(0, 15), max_size=3), max_size=8), seed=st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_kernel_equals_reference_for_any_shapes(impl, shapes, seed):
    mine = draw(shapes, torch.Generator("cpu").manual_seed(seed))
    other = copy(mine)
    torch.testing.assert_close(call(mine, impl), call(other, "reference"), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(mine[2:], other[2:], rtol=1e-12, atol=1e-13)


@impls
def test_larger_than_the_cache(impl, generator):
    lists = draw([(1_500_000,)], generator, torch.float32)
    expected = copy(lists)
    torch.testing.assert_close(call(lists, impl), call(expected, "reference"))
    torch.testing.assert_close(lists[2:], expected[2:])


@impls
def test_several_dtypes_in_one_list(impl, generator):
    parts = [draw([(300,)], generator, dtype) for dtype in DTYPES]
    together = [
        list(itertools.chain(*(part[k] for part in copy_))) for copy_ in [[*map(copy, parts)]] for k in range(4)
    ]
    expected = [call(part, impl)[0] for part in parts]
    for got, alone in zip(call(together, impl), expected, strict=True):
        assert torch.equal(got, alone)


@impls
def test_any_strides(impl, generator):
    plain = draw([(6, 5, 4, 3), (40, 50), (4, 5)], generator, torch.float32)
    strided = copy(plain)
    for tensors in strided:  # one layout for all, without gaps
        tensors[0] = tensors[0].to(memory_format=torch.channels_last)
    strided[2][1] = strided[2][1].T.contiguous().T
    strided[0][1] = torch.stack([strided[0][1]] * 2, -1)[..., 1]
    plain[1][2] = plain[1][2][:1].expand(4, 5).clone()
    strided[1][2] = plain[1][2][:1].expand(4, 5)
    directions, expected = call(strided, impl), call(plain, impl)
    torch.testing.assert_close(directions, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(strided[2:], plain[2:], rtol=1e-6, atol=1e-6)
    assert strided[2][1].stride() == (1, 40)


@pytest.mark.skipif(DEVICE != "cpu", reason="memory of the CPU")
@impls
@pytest.mark.parametrize("edge", ["start", "end"])
def test_stays_within_its_memory(impl, edge, generator):
    plain = draw([(5,), (1030,), (33, 3)], generator, torch.float32)
    inside = [[guarded(t, edge) for t in tensors] for tensors in plain]
    for got, expected in zip(call(inside, impl), call(plain, impl), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.skipif(DEVICE != "cpu", reason="about threads of the CPU")
@kernels
def test_result_does_not_depend_on_threads(impl, generator):
    lists = draw([(50_000,), (3,), (70_001,)], generator, torch.float32)
    threads, results = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            mine = copy(lists)
            results.append(torch.cat([*call(mine, impl), *mine[2], *mine[3]]))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@impls
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_stays_where_it_came_from(impl, value, generator):
    lists = draw([(100,), (50,)], generator, torch.float32)
    lists[1][1][7] = value
    directions = call(lists, impl)
    assert directions[1].isnan().nonzero().tolist() == [[7]]
    assert not directions[0].isnan().any()
    assert all(t.isfinite().all() for t in lists[2])
    assert (~lists[3][1].isfinite()).nonzero().tolist() == [[7]]


@impls
def test_limits_of_the_numbers(impl, generator):
    lists = draw([(20,)], generator)
    before = copy(lists)
    (direction,) = call(lists, impl, decay=1.0, decay_norm=0.0, epsilon=0.0)
    assert torch.equal(lists[2][0], before[2][0])
    # 2 v / sqrt(v^4)
    torch.testing.assert_close(direction, 2 / (before[2][0] - before[1][0]), rtol=1e-12, atol=0)


@impls
def test_result_is_new_memory(impl, generator):
    lists = draw([(5,), (6,)], generator)
    first = call(lists, impl)
    kept = [t.clone() for t in first]
    averages = copy(lists[2:])
    for tensor in call(copy(lists), impl) + first[1:]:
        tensor.fill_(7)
    assert torch.equal(first[0], kept[0])
    torch.testing.assert_close(lists[2:], averages, rtol=0, atol=0)


@impls
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_out_takes_the_directions(impl, dtype, generator):
    lists = draw(SHAPES, generator, dtype)
    other, out = copy(lists), [torch.full_like(t, 7) for t in lists[0]]
    out[3] = torch.zeros(5, 3, dtype=dtype, device=DEVICE).T
    places = [t.data_ptr() for t in out]
    got = call(lists, impl, out=tuple(out))
    assert all(mine is given for mine, given in zip(got, out, strict=True))
    assert [t.data_ptr() for t in out] == places
    for mine, new in zip(got + lists[2] + lists[3], call(other, impl) + other[2] + other[3], strict=True):
        assert torch.equal(mine, new)


@impls
def test_backward_through_what_was_in_out_raises(impl, generator):
    lists = draw([(5,)], generator)
    x, out = torch.ones(5, dtype=torch.float64, requires_grad=True), [torch.ones(5, dtype=torch.float64)]
    loss = (x * out[0]).sum()
    call(lists, impl, out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@impls
def test_bad_out_is_named_before_memory_is_touched(impl, generator):
    lists = draw([(5,), (6,)], generator)
    before = copy(lists)
    good = [torch.empty_like(t) for t in lists[0]]
    for out, error, words in (
        (good[:1], ValueError, "out must have 2 tensors like grads_labeled, got 1"),
        ([good[0], good[0]], ValueError, r"out\[1\] must be the shape of grads_labeled\[1\] = \[6\], got \[5\]"),
        ([good[0], good[1].float()], TypeError, r"out\[1\] must be float64 like grads_labeled\[1\], got float32"),
        ([good[0], None], TypeError, r"out\[1\] must be a tensor, got NoneType"),
        ([good[0], lists[0][1]], ValueError, r"out\[1\] and grads_labeled\[1\] must not share memory"),
        ([good[0], lists[3][1]], ValueError, r"ema_fourth\[1\] and out\[1\] must not share memory"),
        ([good[0], good[0][:1].expand(6)], ValueError, r"out\[1\] must have memory of its own"),
    ):
        with pytest.raises(error, match=words):
            call(lists, impl, out=out)
    good[1].requires_grad_()
    with pytest.raises(RuntimeError, match=r"works in place and is not differentiable|records a derivative"):
        call(lists, impl, out=good)
    torch.testing.assert_close(lists, before, rtol=0, atol=0)


@impls
def test_empty_lists(impl):
    assert call([[], [], [], []], impl, out=[]) == []
    assert call([[], [], [], []], impl) == []


@impls
def test_shared_memory_is_refused(impl, generator):
    lists = draw([(5,), (6,)], generator)
    before = copy(lists)
    for change in (
        [lists[0], lists[1], lists[2], lists[2]],
        [lists[0], lists[1], lists[0], lists[3]],
        [lists[0], lists[3], lists[2], lists[3]],
        [[t[:5] for t in tensors] for tensors in (lists[0], lists[1], [lists[2][1], lists[2][1]], lists[3])],
    ):
        with pytest.raises(ValueError, match="must not share memory"):
            call(change, impl)
    with pytest.raises(ValueError, match=r"ema_fourth\[0\] must have memory of its own"):
        call([[torch.ones(5)], [torch.ones(5)], [torch.ones(5)], [torch.ones(1).expand(5)]], impl)
    torch.testing.assert_close(lists, before, rtol=0, atol=0)
    call([lists[0], lists[0], lists[2], lists[3]], impl)  # both gradients are only read


ONE = [torch.ones(3, device=DEVICE)]


@impls
@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"grads_unlabeled": []}, ValueError, "grads_unlabeled must have 1 tensors like grads_labeled, got 0"),
        ({"ema_fourth": ONE * 2}, ValueError, "ema_fourth must have 1 tensors like grads_labeled, got 2"),
        ({"grads_unlabeled": [torch.ones(4)]}, ValueError, r"grads_unlabeled\[0\] .* = \[3\], got \[4\]"),
        ({"ema_labeled": [torch.ones(3, 1)]}, ValueError, r"ema_labeled\[0\] .* = \[3\], got \[3, 1\]"),
        ({"ema_fourth": [torch.ones(1)]}, ValueError, r"ema_fourth\[0\] .* = \[3\], got \[1\]"),
        ({"grads_labeled": [torch.ones(3).long()]}, TypeError, r"grads_labeled\[0\] must be float32, bfloat16"),
        ({"grads_labeled": [None]}, TypeError, r"grads_labeled\[0\] must be a tensor, got NoneType"),
        ({"grads_unlabeled": [torch.ones(3).half()]}, TypeError, r"grads_unlabeled\[0\] must be float32 like"),
        ({"ema_labeled": [torch.ones(3).double()]}, TypeError, r"ema_labeled\[0\] must be float32 like"),
        ({"ema_fourth": [torch.ones(3).bfloat16()]}, TypeError, r"ema_fourth\[0\] must be float32 like ema_labeled"),
        ({"decay": 1.5}, ValueError, r"decay must be in \[0.0, 1.0\], got 1.5"),
        ({"decay_norm": -0.1}, ValueError, "decay_norm must be in"),
        ({"epsilon": float("inf")}, ValueError, "epsilon must be finite"),
        ({"epsilon": -1e-9}, ValueError, "epsilon must be >= 0"),
        ({"epsilon": "small"}, TypeError, "epsilon must be a number"),
    ],
)
def test_bad_argument_is_named_before_memory_is_touched(impl, changes, error, words):
    arguments = {
        "grads_labeled": [torch.ones(3)],
        "grads_unlabeled": [torch.zeros(3)],
        "ema_labeled": [torch.zeros(3)],
        "ema_fourth": [torch.zeros(3)],
        **NUMBERS,
    } | changes
    with pytest.raises(error, match=words):
        alignment_direction(**arguments, impl=impl)
    for name in {"ema_labeled", "ema_fourth"} - changes.keys():
        assert torch.equal(arguments[name][0], torch.zeros(3))


@impls
@pytest.mark.parametrize("which", range(4))
def test_no_derivative(impl, which, generator):
    lists = draw([(5,)], generator)
    lists[which][0].requires_grad_()
    with pytest.raises(RuntimeError, match=r"works in place and is not differentiable|records a derivative"):
        call(lists, impl)
    with torch.no_grad():
        (direction,) = call(lists, impl)
    assert not direction.requires_grad


@impls
def test_backward_through_the_old_average_raises(impl, generator):
    lists = draw([(5,)], generator)
    x = torch.ones(5, dtype=torch.float64, requires_grad=True)
    loss = (x * lists[2][0]).sum()
    call(lists, impl)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.skipif(not KERNELS, reason="no kernel")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype, generator):
    lists = draw([(5,), (2, 3)], generator, dtype)
    out = [torch.zeros_like(t) for t in lists[0]]
    torch.library.opcheck(torch.ops.fastmeta.alignment_direction_.default, (*lists, out, 0.9, 0.7, 0.1))
