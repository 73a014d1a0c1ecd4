"""fastmeta's kernels as the benchmarks see them: the forms of an operator, and what a call would launch."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from importlib import import_module
from typing import Any

from bench.case import Form
from fastmeta import _kernels

MAIN = "fastmeta"  # what a user gets
FORMS = ("rows", "fused", "flash")
# The operators whose Triton forms can be forced; the others have one.
_FORCED = frozenset(_kernels.TRITON) - {"finite_difference_labels"}


def force(form: str) -> AbstractContextManager[Any]:
    """Calls take this Triton form; where the operator or the shape has none they raise "has no form"."""
    return import_module("fastmeta.triton_kernels._forms").force(form)


@contextmanager
def recording() -> Iterator[list[Any]]:
    """Collects the launches of Triton kernels in place of making them."""
    with import_module("fastmeta.triton_kernels._launch").recording() as launches:
        yield launches


def public(name: str) -> Any:
    """The operator's dispatcher, under the file name that it has in ``fastmeta/ops``."""
    return import_module(f"fastmeta.ops.{_kernels.TRITON[name]}").OPERATOR


def offered(operator: str, num_classes: int, device: str) -> list[Form]:
    """What a user gets, and every implementation and form that can be named beside it.

    A form that the shape does not have raises when it is called. What is ``cpp`` is what a user gets on the CPU.
    """
    forms = [Form(MAIN)]
    names = public(operator).implementations(device)
    if "cuda" in names and num_classes <= _kernels.NARROW_OUTPUTS:
        forms.append(Form("cuda", "cuda"))
    if "triton" in names and operator in _FORCED:
        forms += [Form(f"triton {name}", "triton", partial(force, name)) for name in FORMS]
    return forms
