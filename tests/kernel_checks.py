"""Errors against float64 truth, and the same values behind other strides.

The budget is relative to PyTorch: the error may be twice that of the same formula in eager PyTorch and the same dtype,
both in units of ``error_scale``. The truth is the reference in float64, which test_ops_reference.py holds to autograd.
"""

import torch
from cases import Case, tensors, to
from poison import poisoned_memory
from torch import Tensor


def accumulation(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def assert_within_budget(case: Case, got: list[Tensor], arguments: dict, note: str) -> None:
    """Each entry's error against twice eager's worst, in units of ``error_scale`` and beyond rounding the result once.

    Nothing here is more precise than float64: there eager's error in float32, in units of its own rounding, stands for
    it, and once more for that of the truth.
    """
    dtype = got[0].dtype
    double = dtype == torch.float64
    truth = case.call(to(arguments, torch.float64), "reference")
    eager = case.call(to(arguments, torch.float32) if double else arguments, "reference")
    exact = case.call(to(to(arguments, torch.float32), torch.float64), "reference") if double else truth
    assert len(got) == len(eager) == len(truth)
    for i, (g, e, x, t, s) in enumerate(zip(got, eager, exact, truth, case.error_scale(arguments), strict=True)):
        where = f"result {i} of {note}"
        assert g.shape == t.shape, where
        assert g.dtype == dtype, where
        assert g.is_contiguous(), where
        if not t.numel():
            continue
        s = s.maximum(t.abs()) + torch.finfo(torch.float64).tiny
        info = torch.finfo(dtype)
        unit = torch.finfo(accumulation(dtype)).eps
        error = (g.double() - t).abs() - info.eps / 2 * t.abs() - info.smallest_normal * info.eps
        assert not error.isnan().any(), f"NaN in {where}"
        of_eager = ((e.double() - x).abs() / s).max()
        if double:
            of_eager *= 1.5 * unit / torch.finfo(torch.float32).eps
        worst, allowed = (error / s).max(), 2 * of_eager + 8 * unit
        assert worst <= allowed, f"{where}: error {worst:.3g}, allowed {allowed:.3g} (eager {of_eager:.3g})"


def check(case: Case, arguments: dict, impl: str, note: str, plain: dict | None = None) -> None:
    """``plain``: the same values in plain memory, for the eager run and the truth."""
    plain = arguments if plain is None else plain
    before = [t.clone() for t in tensors(arguments)]
    versions = [t._version for t in tensors(arguments)]
    with poisoned_memory():
        got = case.call(arguments, impl)
    for tensor, old, version in zip(tensors(arguments), before, versions, strict=True):
        assert tensor._version == version, f"an argument was written to: {note}"
        assert torch.equal(tensor.nan_to_num(), old.nan_to_num()), f"an argument changed: {note}"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert_within_budget(case, got, plain, note)
    torch.set_num_threads(threads)


def strided(tensor: Tensor, kind: str) -> Tensor:
    """The same values behind other strides; whatever lies between them is NaN."""
    if not tensor.is_floating_point():  # classes [N]
        if kind != "column-step":
            return tensor
        wide = tensor.new_full((2 * len(tensor),), -(2**40))
        wide[::2] = tensor
        return wide[::2]
    if tensor.dim() == 0:
        return tensor
    *rows, columns = tensor.shape
    nan = float("nan")
    if kind == "transposed":
        return tensor.mT.contiguous().mT if tensor.dim() == 2 else tensor
    if kind == "row-stride":
        view = tensor.new_full((*rows, columns + 5), nan)[..., 2 : 2 + columns]
    elif kind == "column-step":
        view = tensor.new_full((*rows, 3 * columns), nan)[..., ::3]
    elif kind == "row-step":
        view = tensor.new_full((2 * tensor.shape[0], *tensor.shape[1:]), nan)[1::2]
    else:  # an odd address
        view = tensor.new_full((tensor.numel() + 1,), nan)[1:].view(tensor.shape)
    view.copy_(tensor)
    return view
