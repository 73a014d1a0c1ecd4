"""Tables and statistics for the tests of masked_adam_, and the implementations under test."""

import pytest
import torch
from cases import DEVICE
from torch import Tensor

from fastmeta.ops import masked_adam_
from fastmeta.ops.masked_adam import OPERATOR

IMPLS = OPERATOR.implementations(DEVICE)
KERNELS = IMPLS[1:]
HYPER = {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-3}
# Each hexadecimal digit of the kernel's powers, and what lies beyond them.
COUNTS = (0, 1, 14, 15, 16, 255, 256, 4095, 4096, 65533, 65534, 65535, 70000, 2**31 - 2)
impls = pytest.mark.parametrize("impl", IMPLS)
kernels = pytest.mark.parametrize("impl", KERNELS)


def normal(shape, generator, dtype=torch.float64):
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(dtype).to(DEVICE)


def rows_of(count, size, generator):
    """``size`` rows in ``[0, count)``."""
    return torch.randint(count, (size,), generator=generator, device="cpu").to(DEVICE)


class State:
    """A table and its statistics; random unless told."""

    def __init__(self, shape, generator, dtype=torch.float64, statistics=None, started=True):
        self.table = normal(shape, generator, dtype)
        self.exp_avg = (normal(shape, generator) * started).to(statistics or dtype)
        self.exp_avg_sq = (normal(shape, generator).square() * started).to(statistics or dtype)
        self.steps = torch.zeros(shape[0], dtype=torch.int32)
        if started and shape[0]:
            self.steps += torch.tensor(COUNTS, dtype=torch.int32)[rows_of(len(COUNTS), shape[0], generator)]

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

    def assert_close(self, other: "State") -> None:
        for mine, theirs in zip(self.tensors, other.tensors, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-11)
