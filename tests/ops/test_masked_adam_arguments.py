"""masked_adam_: arguments that are refused, autograd, and what is registered."""

import itertools

import pytest
import torch
from cases import DEVICE
from masked_adam_state import KERNELS, State, impls, normal
from torch import Tensor

from fastmeta.dispatch import use_impl
from fastmeta.ops import masked_adam_

pytestmark = pytest.mark.usefixtures("on_device")


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
    } | {name: v.to(DEVICE) if isinstance(v, Tensor) and not v.is_meta else v for name, v in changes.items()}
    before = {name: v.clone() for name, v in arguments.items() if isinstance(v, Tensor) and not v.is_meta}
    if "meta" in str(changes) and impl != "reference":
        error, words = RuntimeError, "needs (CPU|CUDA) tensors"
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
    with pytest.raises(RuntimeError, match=r"works in place and is not differentiable|records a derivative"):
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
    with pytest.raises(RuntimeError, match="has no 'triton' implementation"):
        state.step(torch.tensor([2]), torch.ones(1, dtype=torch.float64), "triton")


@pytest.mark.skipif(not KERNELS, reason="no kernel")
@pytest.mark.parametrize("columns", [(), (3,)])
def test_opcheck(columns, generator):
    for dtype, bound in itertools.product((torch.float32, torch.bfloat16), (None, 0.5)):
        state = State((6, *columns), generator, dtype)
        grad = normal(
            (
                2,
                *columns,
            ),
            generator,
            dtype,
        )
        arguments = (state.table, torch.tensor([1, 4]), grad, *state.tensors[1:], 0.1, 0.9, 0.99, 1e-8, bound, 1.0)
        torch.library.opcheck(torch.ops.fastmeta.masked_adam_.default, arguments)
