"""The poison of uninitialized memory works on every way a kernel gets memory; without this proof it proves nothing."""

import ctypes
from pathlib import Path

import pytest
import torch
from cases import DTYPES
from poison import GLIBC, JUNK_FILL, poisoned_memory

SIZES = (1, 3, 17, 1000, 100_000)


def is_poison(values: torch.Tensor) -> bool:
    return bool((values.isnan() | (values.abs().double() > 1e37)).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_torch_empty(dtype, size):
    torch.zeros(size, dtype=dtype)  # freed at once: a block of this size, full of plausible numbers
    with poisoned_memory():
        assert torch.empty(size, dtype=dtype).isnan().all()
        assert torch.ones(2, dtype=dtype).new_empty(size).isnan().all()


@pytest.mark.skipif(JUNK_FILL is None, reason="this torch hides the switch of its CPU allocator")
@pytest.mark.parametrize("size", SIZES)
def test_stable_abi_allocation(size):
    """``aoti_torch_empty_strided``, through which the kernels get their outputs."""
    torch_cpu = ctypes.CDLL(str(next(Path(torch.__file__).parent.glob("lib/libtorch_cpu.*"))))
    handle, data = ctypes.c_void_p(), ctypes.c_void_p()
    sizes, strides = (ctypes.c_int64 * 1)(size), (ctypes.c_int64 * 1)(1)
    with poisoned_memory():
        status = torch_cpu.aoti_torch_empty_strided(
            ctypes.c_int64(1), sizes, strides, torch_cpu.aoti_torch_dtype_float32(), 0, 0, ctypes.byref(handle)
        )
    assert status == 0
    assert torch_cpu.aoti_torch_get_data_ptr(handle, ctypes.byref(data)) == 0
    values = torch.frombuffer((ctypes.c_float * size).from_address(data.value), dtype=torch.float32)
    assert is_poison(values)
    torch_cpu.aoti_torch_delete_tensor_object(handle)


@pytest.mark.skipif(GLIBC is None, reason="mallopt(M_PERTURB) is glibc's")
def test_scratch_memory():
    """``operator new`` with an alignment ends in ``aligned_alloc``."""
    libc = ctypes.CDLL(None)
    libc.aligned_alloc.restype = ctypes.c_void_p
    libc.aligned_alloc.argtypes = [ctypes.c_size_t, ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    with poisoned_memory():
        address = libc.aligned_alloc(64, 4096)
    for dtype, kind in ((torch.float32, ctypes.c_float), (torch.float64, ctypes.c_double)):
        buffer = (kind * 64).from_address(address + 1024)
        assert is_poison(torch.frombuffer(buffer, dtype=dtype))
    libc.free(address)


def test_poison_ends_with_the_block():
    with poisoned_memory():
        pass
    assert not torch.are_deterministic_algorithms_enabled()
    assert JUNK_FILL is None or not JUNK_FILL.value
