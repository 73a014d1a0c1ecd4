"""Lets Triton 3.6's interpreter run loops whose bounds are arguments, under NumPy 2.4 and later."""

from typing import Any

from triton.runtime import interpreter

_patch_tensor = interpreter._patch_lang_tensor


def _with_index(tensor: type, scope: Any) -> None:
    _patch_tensor(tensor, scope)
    # It holds a scalar in an array of one element, from which NumPy 2.4 makes no index.
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


def repair() -> None:
    """Have a scalar of the interpreter serve as an index again."""
    interpreter._patch_lang_tensor = _with_index
