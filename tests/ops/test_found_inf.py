"""found_inf: a step that is not finite writes nothing, and a GPU is not waited for."""

import pytest
import torch
from cases import DEVICE
from device_tensors import no_wait, on_device, pretends_a_gpu
from torch import Tensor

from fastmeta.ops import alignment_direction, masked_adam_
from fastmeta.ops.found_inf import found_inf

VALUES = [torch.nan, torch.inf, -torch.inf]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def table_of(columns: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    table, m, v = (torch.rand(9, *columns, dtype=dtype, device=DEVICE) for _ in range(3))
    return [table, m, v, torch.randint(5, (9,), dtype=torch.int32, device=DEVICE)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 2, 9])
def test_what_is_found(dtype: torch.dtype, count: int) -> None:
    gradients = [torch.randn(3, place + 1, device=DEVICE).to(dtype) for place in range(count)]
    for power in (2, 4):
        assert not bool(found_inf(gradients, power))
        for value in VALUES:
            for place in {0, count - 1}:
                bad = [gradient.clone() for gradient in gradients]
                bad[place][1, 0] = value
                assert bool(found_inf(bad, power))
    assert not bool(found_inf([torch.zeros(0, 3)], 2))


@pytest.mark.parametrize("impl", [None, "reference"])
@pytest.mark.parametrize("columns", [(), (4,)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_adam(impl: str | None, columns: tuple[int, ...], dtype: torch.dtype) -> None:
    index = torch.tensor([3, 0, 8, 3], device=DEVICE)
    gradient = torch.randn(4, *columns, device=DEVICE).to(dtype)
    plain, finite, skipped = (table_of(columns, dtype) for _ in range(3))
    for other in (finite, skipped):
        for tensor, value in zip(other, plain, strict=True):
            tensor.copy_(value)
    before = [tensor.clone() for tensor in skipped]
    masked_adam_(plain[0], index, gradient, *plain[1:], lr=0.1, impl=impl)
    zero = torch.zeros((), device=DEVICE)
    masked_adam_(finite[0], index, gradient, *finite[1:], lr=0.1, found_inf=zero, impl=impl)
    masked_adam_(skipped[0], index, gradient * torch.nan, *skipped[1:], lr=0.1, found_inf=zero / 0, impl=impl)
    assert all(map(torch.equal, plain, finite))
    assert all(map(torch.equal, before, skipped))


@pretends_a_gpu
@pytest.mark.parametrize("columns", [(), (4,)])
def test_masked_adam_on_a_gpu_does_not_wait(columns: tuple[int, ...]) -> None:
    index = torch.tensor([3, 0, 8, 3])
    gradient = torch.randn(4, *columns)
    plain, other = (table_of(columns, torch.float64) for _ in range(2))
    for tensor, value in zip(other, plain, strict=True):
        tensor.copy_(value)
    masked_adam_(plain[0], index, gradient.double(), *plain[1:], lr=0.1, impl="reference")
    device = [on_device(tensor) for tensor in other]
    with no_wait():
        for wrong in (True, False):
            given = on_device((gradient * torch.nan if wrong else gradient).double())
            found = found_inf([given], 2)
            masked_adam_(device[0], on_device(index), given, *device[1:], lr=0.1, found_inf=found, impl="reference")
    assert all(map(torch.equal, plain, other))


@pretends_a_gpu
@pytest.mark.parametrize("on_gpu", [True, False])
@pytest.mark.parametrize("given_out", [True, False])
def test_alignment_direction(on_gpu: bool, given_out: bool) -> None:
    shapes = [(3, 4), (5,)]
    lists = [[torch.rand(shape) for shape in shapes] for _ in range(4)]
    other = [[tensor.clone() for tensor in tensors] for tensors in lists]
    options = {"decay": 0.9, "decay_norm": 0.8, "epsilon": 0.1, "impl": "reference"}
    expected = alignment_direction(*lists, **options)
    if on_gpu:
        other = [[on_device(tensor) for tensor in tensors] for tensors in other]
    kept = [tensor.clone() for tensors in other[2:] for tensor in tensors]
    bad = [other[0], [other[1][0], other[1][1] * torch.inf]]
    out = [torch.empty_like(tensor) for tensor in other[0]] if given_out else None
    found = found_inf([*bad[0], *bad[1]], 4)
    directions = alignment_direction(*bad, *other[2:], **options, out=out, found_inf=found)
    assert all(bool(direction.isnan().all()) for direction in directions)
    assert all(map(torch.equal, kept, [tensor for tensors in other[2:] for tensor in tensors]))
    found = found_inf([*other[0], *other[1]], 4)
    directions = alignment_direction(*other, **options, out=out, found_inf=found)
    assert all(map(torch.equal, expected, directions))
    assert all(map(torch.equal, lists[2] + lists[3], other[2] + other[3]))
