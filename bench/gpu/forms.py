"""fastmeta's forms of an operator: its own choice, and every implementation and Triton form that can be named."""

from functools import partial
from importlib import import_module
from typing import Any

from bench.gpu.case import Form
from fastmeta import _kernels

MAIN = "fastmeta"  # what a user gets
# The operators whose Triton forms `python -m bench gpu` forces; the others have one.
_FORCED = frozenset(_kernels.TRITON) - {"finite_difference_labels"}


def _operator(name: str) -> Any:
    return import_module(f"fastmeta.ops.{_kernels.TRITON[name]}").OPERATOR


def offered(operator: str, num_classes: int, device: str) -> list[Form]:
    """Forms of a last-layer operator; one that the shape does not have raises when it is called."""
    forms = [Form(MAIN)]
    names = _operator(operator).implementations(device)
    if "cpp" in names:
        forms.append(Form("cpp", "cpp"))
    if "cuda" in names and num_classes <= _kernels.NARROW_OUTPUTS:
        forms.append(Form("cuda", "cuda"))
    if "triton" in names and operator in _FORCED:
        triton = import_module("fastmeta.triton_kernels._forms")
        forms += [Form(f"triton {name}", "triton", partial(triton.force, name)) for name in triton.FORMS]
    return forms


def chosen(operator: str, shape: tuple[int, int, int], dtype: Any, head: bool, measured: list[str]) -> str | None:
    """The measured form that the cost model chooses; None where the model does not cover the operator."""
    if "cuda" in measured:
        return "cuda"  # up to 32 classes on a GPU
    names = [name.removeprefix("triton ") for name in measured if name.startswith("triton ")]
    if not names:
        return None
    try:
        triton = import_module("fastmeta.triton_kernels._forms")
        return f"triton {triton.choose(operator, *shape, dtype, head, offered=names)}"
    except (KeyError, ValueError):
        return None
