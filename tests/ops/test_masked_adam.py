"""masked_adam_ against torch.optim.Adam on one row at a time, and the kernels against float64."""

import pytest
import torch
from cases import DEVICE, DTYPES
from guarded import guarded
from hypothesis import given, settings
from hypothesis import strategies as st
from masked_adam_state import IMPLS, State, impls, kernels, normal, rows_of

pytestmark = pytest.mark.usefixtures("on_device")


@impls
@pytest.mark.parametrize("columns", [(), (3,)])
def test_each_row_is_an_adam_of_its_own(impl, columns, generator):
    state = State((5, *columns), generator, started=False)
    rows = [row.clone().requires_grad_() for row in state.table]
    optimizers = [torch.optim.Adam([row], lr=0.05, betas=(0.8, 0.95), eps=1e-3) for row in rows]
    for _ in range(20):
        index = rows_of(5, 4, generator)
        grad = normal(
            (
                4,
                *columns,
            ),
            generator,
        )
        state.step(index, grad, impl, low=-0.8, high=0.9)
        for row in index.unique().tolist():
            rows[row].grad = grad[index == row].sum(0)
            optimizers[row].step()
            rows[row].data.clamp_(-0.8, 0.9)
        touched = torch.bincount(index, minlength=5) > 0
        torch.testing.assert_close(state.table[touched], torch.stack(rows).detach()[touched], rtol=1e-12, atol=1e-13)
    counts = [int(o.state[r]["step"]) if o.state else 0 for o, r in zip(optimizers, rows, strict=True)]
    assert state.steps.tolist() == counts


@impls
@pytest.mark.parametrize(
    ("dtype", "statistics"),
    [(d, None) for d in DTYPES] + [(torch.bfloat16, torch.float32), (torch.float16, torch.float32)],
)
@pytest.mark.parametrize("shape", [(3000,), (300, 7), (40, 600), (9, 1)])
def test_error_against_float64_truth(impl, dtype, statistics, shape, generator):
    state = State(shape, generator, dtype, statistics)
    truth = state.copy(torch.float64, torch.float64, torch.float64, torch.int32)
    eager = state.copy()
    index = rows_of(shape[0], 2 * shape[0] // 3, generator)
    grad = normal(
        (
            len(index),
            *shape[1:],
        ),
        generator,
        dtype,
    )
    truth.step(index, grad.double(), "reference", high=1.5)
    eager.step(index, grad, "reference", high=1.5)
    state.step(index, grad, impl, high=1.5)
    assert torch.equal(state.steps, truth.steps)
    for got, plain, true in zip(state.tensors[:3], eager.tensors[:3], truth.tensors[:3], strict=True):
        unit = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
        scale = true.abs() + 1
        allowed = 2 * ((plain.double() - true).abs() / scale).max() + 4 * unit
        assert ((got.double() - true).abs() / scale).max() <= allowed


@kernels
@given(
    rows=st.integers(1, 40),
    columns=st.sampled_from([None, 1, 2, 5, 300]),
    count=st.integers(0, 700),
    seed=st.integers(),
)
@settings(max_examples=40, deadline=None)
def test_kernel_equals_reference_for_any_shape(impl, rows, columns, count, seed):
    generator = torch.Generator("cpu").manual_seed(seed % 2**31)
    shape = (rows,) if columns is None else (rows, columns)
    mine = State(shape, generator)
    other = mine.copy()
    index = rows_of(rows, count, generator)
    grad = normal(
        (
            count,
            *shape[1:],
        ),
        generator,
    )
    mine.step(index, grad, impl, low=-1.0)
    other.step(index, grad, "reference", low=-1.0)
    mine.assert_close(other)


@kernels
@pytest.mark.parametrize("columns", [(), (1,), (5,), (33,)])
@pytest.mark.parametrize("count", [4096, 4097, 6000], ids=["searched", "sorted", "sorted-more"])
def test_many_positions(impl, columns, count, generator):
    """On a GPU the positions find their rows by search, or by sorting beyond 4,096."""
    mine = State((4000, *columns), generator)
    other = mine.copy()
    index, grad = rows_of(4000, count, generator), normal((count, *columns), generator)
    index[count // 2 :: 3] = 7  # one row many times
    mine.step(index, grad, impl, high=1.0)
    other.step(index, grad, "reference", high=1.0)
    mine.assert_close(other)


@impls
def test_repeated_row_takes_one_step_with_the_sum(impl, generator):
    mine = State((6, 2), generator)
    other = mine.copy()
    grad = normal(
        (
            5,
            2,
        ),
        generator,
    )
    mine.step(torch.tensor([3, 1, 3, 3, 1]), grad, impl)
    other.step(torch.tensor([1, 3]), torch.stack([grad[1] + grad[4], grad[0] + grad[2] + grad[3]]), impl)
    for a, b in zip(mine.tensors, other.tensors, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


@pytest.mark.skipif(DEVICE != "cpu", reason="about threads of the CPU")
@impls
def test_result_does_not_depend_on_threads(impl, generator):
    state = State((4000, 10), generator, torch.float32)
    index = rows_of(4000, 20000, generator)
    grad = normal(
        (
            20000,
            10,
        ),
        generator,
        torch.float32,
    )
    threads, results = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            results.append(state.copy())
            results[-1].step(index, grad, impl)
    finally:
        torch.set_num_threads(threads)
    results[0].assert_same(results[1])
    results[0].assert_same(results[2])


OUTSIDE = [-1, 6, -(2**63), 2**63 - 1]


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU does not wait to look")
@pytest.mark.parametrize("impl", [impl for impl in IMPLS if impl != "cuda"])
@pytest.mark.parametrize("bad", OUTSIDE)
def test_row_out_of_range_leaves_everything_as_it_was(impl, bad, generator):
    state = State((6,), generator)
    before = state.copy()
    with pytest.raises(IndexError, match=rf"index must be rows in \[0, 6\), got {bad}"):
        state.step(torch.tensor([0, 2, bad, 1]), torch.ones(4, dtype=torch.float64), impl)
    state.assert_same(before)


@pytest.mark.skipif("cuda" not in IMPLS, reason="no kernel")
@pytest.mark.parametrize("count", [4, 5000], ids=["searched", "sorted"])
@pytest.mark.parametrize("bad", OUTSIDE)
def test_on_a_gpu_a_row_out_of_range_is_left_out(bad, count, generator):
    mine = State((6,), generator)
    other = mine.copy()
    index, grad = rows_of(6, count, generator), normal((count,), generator)
    keep = torch.arange(count) % 4 != 2
    other.step(index[keep], grad[keep], "cuda")
    mine.step(torch.where(keep, index, bad), grad, "cuda")
    mine.assert_close(other)


@impls
def test_untouched_rows_are_neither_moved_nor_clamped(impl, generator):
    state = State((6,), generator)
    before = state.copy()
    state.step(torch.tensor([4]), torch.ones(1, dtype=torch.float64), impl, low=7.0, high=8.0)
    assert state.table[4] == 7
    rest = torch.tensor([0, 1, 2, 3, 5])
    for now, then in zip(state.tensors, before.tensors, strict=True):
        assert torch.equal(now[rest], then[rest])


@impls
@pytest.mark.parametrize("columns", [(), (4,)])
def test_nan_stays_where_it_came_from(impl, columns, generator):
    state = State((300, *columns), generator, torch.float32)
    index = torch.arange(0, 300, 2)
    grad = normal(
        (
            150,
            *columns,
        ),
        generator,
        torch.float32,
    )
    grad.view(-1)[17] = float("nan")
    expected = torch.zeros_like(state.table, dtype=torch.bool)
    expected[index] = grad.isnan()
    state.step(index, grad, impl, low=0.0, high=1.0)
    assert torch.equal(state.table.isnan(), expected)
    assert torch.equal(state.exp_avg.isnan(), expected)
    assert torch.equal(state.exp_avg_sq.isnan(), expected)


@impls
@pytest.mark.parametrize("shape", [(37,), (37, 5)])
def test_any_strides(impl, shape, generator):
    plain = State(shape, generator)
    index = rows_of(37, 50, generator)
    grad = normal(shape[1:], generator)
    strided = plain.copy()
    wide = torch.zeros(*shape, 2, dtype=torch.float64)
    for name in ("exp_avg", "exp_avg_sq"):
        setattr(strided, name, torch.stack([getattr(plain, name)] * 3, dim=len(shape) - 1).select(len(shape) - 1, 1))
    wide[..., 1] = plain.table
    strided.table = wide[..., 1]
    strided.steps = torch.stack([plain.steps, plain.steps], 1)[:, 0]
    strided.step(index.repeat_interleave(2)[::2], grad.expand(50, *shape[1:]), impl)
    plain.step(index, grad.expand(50, *shape[1:]).clone(), impl)
    strided.assert_same(plain)
    assert not wide[..., 0].any()


@impls
def test_columns_of_one_buffer(impl, generator):
    plain = State((50,), generator, torch.float32)
    buffer = torch.stack([plain.table, plain.exp_avg, plain.exp_avg_sq, torch.zeros(50)], 1)
    buffer.view(torch.int32)[:, 3] = plain.steps
    together = plain.copy()
    together.table, together.exp_avg, together.exp_avg_sq, _ = buffer.unbind(1)
    together.steps = buffer.view(torch.int32)[:, 3]
    index, grad = rows_of(50, 30, generator), normal((30,), generator, torch.float32)
    together.step(index, grad, impl)
    plain.step(index, grad, impl)
    together.assert_same(plain)


@pytest.mark.skipif(DEVICE != "cpu", reason="memory of the CPU")
@impls
@pytest.mark.parametrize("edge", ["start", "end"])
def test_stays_within_its_memory(impl, edge, generator):
    plain = State((100, 3), generator, torch.float32)
    inside = plain.copy()
    for name in ("table", "exp_avg", "exp_avg_sq", "steps"):
        setattr(inside, name, guarded(getattr(plain, name), edge))
    index, grad = (
        torch.tensor([99, 0, 50]),
        normal(
            (
                3,
                3,
            ),
            generator,
            torch.float32,
        ),
    )
    inside.step(guarded(index, edge), guarded(grad, edge), impl)
    plain.step(index, grad, impl)
    inside.assert_same(plain)


@impls
@pytest.mark.parametrize("shape", [(0,), (4,), (0, 3), (4, 3), (4, 0)])
def test_no_rows(impl, shape, generator):
    state = State(shape, generator)
    before = state.copy()
    index = torch.zeros(0, dtype=torch.int64)
    assert state.step(index, torch.zeros(0, *shape[1:], dtype=torch.float64), impl) is state.table
    state.assert_same(before)
