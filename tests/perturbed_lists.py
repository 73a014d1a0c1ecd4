"""Lists of tensors for the tests of perturbed, and their bits."""

import pytest
import torch
from cases import DEVICE
from torch import Tensor

from fastmeta.ops.perturbed import MOVE

IMPLS = MOVE.implementations(DEVICE)
KERNELS = IMPLS[1:]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
BITS = {torch.float64: torch.int64, torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
SHAPES = [(), (0,), (1,), (3, 5), (17,), (1023,), (1025,), (16384,), (129, 127), (40000,), (7,)]
impls = pytest.mark.parametrize("impl", IMPLS)
kernels = pytest.mark.parametrize("impl", KERNELS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def normal(generator, *shape: int, dtype=torch.float32) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(dtype).to(DEVICE)


def draw(generator, dtype=torch.float64, shapes=SHAPES) -> list[Tensor]:
    return [normal(generator, *shape, dtype=dtype) for shape in shapes]


def copy(tensors: list[Tensor]) -> list[Tensor]:
    return [t.detach().clone() for t in tensors]


def bits(tensors: list[Tensor]) -> list[Tensor]:
    return [t.detach().clone().contiguous().view(BITS[t.dtype]) for t in tensors]


def assert_bits(tensors: list[Tensor], expected: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(bits(tensors), expected, strict=True))
