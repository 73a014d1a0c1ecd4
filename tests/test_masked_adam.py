"""masked_adam_ against torch.optim.Adam on one row at a time, and the kernel against float64."""

import itertools

import pytest
import torch
from guarded import guarded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastmeta.dispatch import use_impl
from fastmeta.ops import masked_adam_
from fastmeta.ops.masked_adam import OPERATOR

IMPLS = OPERATOR.implementations()
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
HYPER = {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-3}
# Each hexadecimal digit of the kernel's powers, and what lies beyond them.
COUNTS = (0, 1, 14, 15, 16, 255, 256, 4095, 4096, 65533, 65534, 65535, 70000, 2**31 - 2)
impls = pytest.mark.parametrize("impl", IMPLS)


class State:
    """A table and its statistics; random unless told."""

    def __init__(self, shape, generator, dtype=torch.float64, statistics=None, started=True):
        def normal():
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        self.table = normal().to(dtype)
        self.exp_avg = (normal() * started).to(statistics or dtype)
        self.exp_avg_sq = (normal().square() * started).to(statistics or dtype)
        self.steps = torch.zeros(shape[0], dtype=torch.int32)
        if started and shape[0]:
            self.steps += torch.tensor(COUNTS, dtype=torch.int32)[
                torch.randint(len(COUNTS), (shape[0],), generator=generator)
            ]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.table, self.exp_avg, self.exp_avg_sq, self.steps

    def copy(self, *dtypes: torch.dtype) -> "State":
        copied = object.__new__(State)
        kept = [t.dtype for t in self.tensors]
        for name, tensor, dtype in zip(
            ("table", "exp_avg", "exp_avg_sq", "steps"), self.tensors, dtypes or kept, strict=True
        ):
            setattr(copied, name, tensor.clone().to(dtype))
        return copied

    def step(self, index, grad, impl=None, **changed):
        arguments = {**HYPER, **changed}
        return masked_adam_(self.table, index, grad, self.exp_avg, self.exp_avg_sq, self.steps, **arguments, impl=impl)

    def assert_same(self, other: "State") -> None:
        for mine, theirs in zip(self.tensors, other.tensors, strict=True):
            assert torch.equal(mine.nan_to_num(9e4), theirs.nan_to_num(9e4))


@impls
@pytest.mark.parametrize("columns", [(), (3,)])
def test_each_row_is_an_adam_of_its_own(impl, columns, generator):
    state = State((5, *columns), generator, started=False)
    rows = [row.clone().requires_grad_() for row in state.table]
    optimizers = [torch.optim.Adam([row], lr=0.05, betas=(0.8, 0.95), eps=1e-3) for row in rows]
    for _ in range(20):
        index = torch.randint(5, (4,), generator=generator)
        grad = torch.randn(4, *columns, generator=generator, dtype=torch.float64)
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
    index = torch.randint(shape[0], (2 * shape[0] // 3,), generator=generator)
    grad = torch.randn(len(index), *shape[1:], generator=generator, dtype=torch.float64).to(dtype)
    truth.step(index, grad.double(), "reference", high=1.5)
    eager.step(index, grad, "reference", high=1.5)
    state.step(index, grad, impl, high=1.5)
    assert torch.equal(state.steps, truth.steps)
    for got, plain, true in zip(state.tensors[:3], eager.tensors[:3], truth.tensors[:3], strict=True):
        unit = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
        scale = true.abs() + 1
        allowed = 2 * ((plain.double() - true).abs() / scale).max() + 4 * unit
        assert ((got.double() - true).abs() / scale).max() <= allowed


@given(
    rows=st.integers(1, 40),
    columns=st.sampled_from([None, 1, 2, 5, 300]),
    count=st.integers(0, 700),
    seed=st.integers(),
)
@settings(max_examples=40, deadline=None)
def test_kernel_equals_reference_for_any_shape(rows, columns, count, seed):
    if "cpp" not in IMPLS:
        pytest.skip("no kernel")
    generator = torch.Generator().manual_seed(seed % 2**31)
    shape = (rows,) if columns is None else (rows, columns)
    mine = State(shape, generator)
    other = mine.copy()
    index = torch.randint(rows, (count,), generator=generator)
    grad = torch.randn(count, *shape[1:], generator=generator, dtype=torch.float64)
    mine.step(index, grad, "cpp", low=-1.0)
    other.step(index, grad, "reference", low=-1.0)
    for a, b in zip(mine.tensors, other.tensors, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@impls
def test_repeated_row_takes_one_step_with_the_sum(impl, generator):
    mine = State((6, 2), generator)
    other = mine.copy()
    grad = torch.randn(5, 2, generator=generator, dtype=torch.float64)
    mine.step(torch.tensor([3, 1, 3, 3, 1]), grad, impl)
    other.step(torch.tensor([1, 3]), torch.stack([grad[1] + grad[4], grad[0] + grad[2] + grad[3]]), impl)
    for a, b in zip(mine.tensors, other.tensors, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


@impls
def test_result_does_not_depend_on_threads(impl, generator):
    state = State((4000, 10), generator, torch.float32)
    index = torch.randint(4000, (20000,), generator=generator)
    grad = torch.randn(20000, 10, generator=generator)
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


@impls
@pytest.mark.parametrize("bad", [-1, 6, -(2**63), 2**63 - 1])
def test_row_out_of_range_leaves_everything_as_it_was(impl, bad, generator):
    state = State((6,), generator)
    before = state.copy()
    with pytest.raises(IndexError, match=rf"index must be rows in \[0, 6\), got {bad}"):
        state.step(torch.tensor([0, 2, bad, 1]), torch.ones(4, dtype=torch.float64), impl)
    state.assert_same(before)


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
    grad = torch.randn(150, *columns, generator=generator)
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
    index = torch.randint(37, (50,), generator=generator)
    grad = torch.randn(shape[1:], generator=generator, dtype=torch.float64)
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
    index, grad = torch.randint(50, (30,), generator=generator), torch.randn(30, generator=generator)
    together.step(index, grad, impl)
    plain.step(index, grad, impl)
    together.assert_same(plain)


@impls
@pytest.mark.parametrize("edge", ["start", "end"])
def test_stays_within_its_memory(impl, edge, generator):
    plain = State((100, 3), generator, torch.float32)
    inside = plain.copy()
    for name in ("table", "exp_avg", "exp_avg_sq", "steps"):
        setattr(inside, name, guarded(getattr(plain, name), edge))
    index, grad = torch.tensor([99, 0, 50]), torch.randn(3, 3, generator=generator)
    inside.step(guarded(index, edge), guarded(grad, edge), impl)
    plain.step(index, grad, impl)
    inside.assert_same(plain)


@impls
def test_shared_memory_is_refused(impl, generator):
    state = State((8,), generator)
    before = state.copy()
    index, grad = torch.tensor([1]), torch.ones(1, dtype=torch.float64)
    for name, other in (("exp_avg", state.table), ("exp_avg_sq", state.exp_avg)):
        shared = state.copy()
        shared.table, shared.exp_avg = state.table, state.exp_avg
        setattr(shared, name, other)
        with pytest.raises(ValueError, match="must not share memory"):
            shared.step(index, grad, impl)
    with pytest.raises(ValueError, match="table and grad must not share memory"):
        state.step(index, state.table[3:4], impl)
    expanded = state.copy()
    expanded.exp_avg = torch.zeros(1, dtype=torch.float64).expand(8)
    with pytest.raises(ValueError, match="exp_avg must have memory of its own"):
        expanded.step(index, grad, impl)
    state.assert_same(before)


@impls
@pytest.mark.parametrize("shape", [(0,), (4,), (0, 3), (4, 3), (4, 0)])
def test_no_rows(impl, shape, generator):
    state = State(shape, generator)
    before = state.copy()
    index = torch.zeros(0, dtype=torch.int64)
    assert state.step(index, torch.zeros(0, *shape[1:], dtype=torch.float64), impl) is state.table
    state.assert_same(before)


FLOAT = torch.float32


@impls
@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"index": torch.tensor([0.0, 1.0])}, TypeError, "index must be int64, got float32"),
        ({"index": torch.tensor([[0, 1]])}, ValueError, r"index must be 1-D \[n\], got 2-D \[1, 2\]"),
        ({"index": [0, 1]}, TypeError, "index must be int64, got list"),
        ({"grad": torch.ones(3)}, ValueError, r"grad must be \[n\] = \[2\], got \[3\]"),
        ({"grad": torch.ones(2, 1)}, ValueError, r"grad must be \[n\] = \[2\], got \[2, 1\]"),
        ({"grad": torch.ones(2, dtype=torch.float64)}, TypeError, "grad must be float32 like table, got float64"),
        ({"table": torch.ones(2, 2, 2)}, ValueError, r"table must be \[M\] or \[M, C\], got 3-D"),
        ({"table": torch.ones(5, dtype=torch.int32)}, TypeError, "table must be float32, bfloat16"),
        ({"exp_avg": torch.zeros(4)}, ValueError, r"exp_avg must be the shape of table = \[5\], got \[4\]"),
        (
            {"exp_avg": torch.zeros(5, dtype=torch.float64)},
            TypeError,
            "exp_avg must be float32 like table, got float64",
        ),
        ({"exp_avg_sq": torch.zeros(5).half()}, TypeError, "exp_avg_sq must be float32 like exp_avg, got float16"),
        ({"steps": torch.zeros(5)}, TypeError, "steps must be int32, got float32"),
        ({"steps": torch.zeros(6, dtype=torch.int32)}, ValueError, r"steps must be \[M\] = \[5\], got \[6\]"),
        ({"lr": float("nan")}, ValueError, "lr must be finite"),
        ({"lr": "fast"}, TypeError, "lr must be a number"),
        ({"betas": (1.0, 0.9)}, ValueError, r"betas\[0\] must be in \[0, 1\)"),
        ({"betas": (0.9, -0.1)}, ValueError, r"betas\[1\] must be in"),
        ({"eps": -1.0}, ValueError, "eps must be >= 0"),
        ({"low": 1.0, "high": 0.0}, ValueError, "low must be <= high"),
        ({"low": float("nan")}, ValueError, "low must be finite"),
        ({"table": torch.ones(5, device="meta")}, ValueError, "table, got|on meta|like table"),
    ],
)
def test_bad_argument_is_named_before_memory_is_touched(impl, changes, error, words):
    arguments = {
        "table": torch.ones(5),
        "index": torch.tensor([0, 1]),
        "grad": torch.ones(2),
        "exp_avg": torch.zeros(5),
        "exp_avg_sq": torch.zeros(5),
        "steps": torch.zeros(5, dtype=torch.int32),
        "lr": 0.1,
    } | changes
    before = {name: v.clone() for name, v in arguments.items() if isinstance(v, Tensor) and not v.is_meta}
    if "meta" in str(changes) and impl != "reference":
        error, words = RuntimeError, "needs CPU tensors"
    with pytest.raises(error, match=words):
        masked_adam_(**arguments, impl=impl)
    assert all(torch.equal(arguments[name], tensor) for name, tensor in before.items())


@impls
@pytest.mark.parametrize("name", ["table", "grad", "exp_avg"])
def test_no_derivative(impl, name, generator):
    state = State((5,), generator)
    index, grad = torch.tensor([2]), torch.ones(1, dtype=torch.float64)
    tensor = grad if name == "grad" else getattr(state, name)
    tensor.requires_grad_()
    before = state.table.detach().clone()
    with pytest.raises(RuntimeError, match="works in place and is not differentiable"):
        state.step(index, grad, impl)
    assert torch.equal(state.table, before)
    with torch.no_grad():
        state.step(index, grad, impl)
    assert not torch.equal(state.table, before)


@impls
def test_backward_through_the_old_table_raises(impl, generator):
    state = State((5,), generator)
    x = torch.ones(5, dtype=torch.float64, requires_grad=True)
    loss = (x * state.table).sum()
    state.step(torch.tensor([2]), torch.ones(1, dtype=torch.float64), impl)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_block_chooses_the_implementation(generator):
    state = State((5,), generator)
    with use_impl("reference"):
        state.step(torch.tensor([2]), torch.ones(1, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="cuda"):
        state.step(torch.tensor([2]), torch.ones(1, dtype=torch.float64), "cuda")


@pytest.mark.skipif("cpp" not in IMPLS, reason="no kernel")
@pytest.mark.parametrize("columns", [(), (3,)])
def test_opcheck(columns, generator):
    for dtype, bound in itertools.product((torch.float32, torch.bfloat16), (None, 0.5)):
        state = State((6, *columns), generator, dtype)
        grad = torch.randn(2, *columns, generator=generator).to(dtype)
        arguments = (state.table, torch.tensor([1, 4]), grad, *state.tensors[1:], 0.1, 0.9, 0.99, 1e-8, bound, 1.0)
        torch.library.opcheck(torch.ops.fastmeta.masked_adam_.default, arguments)
