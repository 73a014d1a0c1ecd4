"""Repairs of Triton 3.6's interpreter: loops whose bounds are arguments (NumPy 2.4 and later), bfloat16, and its time.

Half of the time went into replacing the functions of ``triton.language`` by interpreted ones at every call of a device
function (``@triton.jit`` called by ``@triton.jit``); once a launch is enough.
"""

from functools import cache
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_patch_language = interpreter._patch_lang
_patch_tensor = interpreter._patch_lang_tensor
_cast = InterpreterBuilder.cast_impl
_dot = InterpreterBuilder.create_dot


def _with_index(tensor: type, scope: Any) -> None:
    _patch_tensor(tensor, scope)
    # The interpreter holds a scalar in an array of one element, which NumPy 2.4 refuses as an index.
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


@cache
def _modules(function: Any) -> tuple[Any, ...]:
    """The modules of triton.language among a kernel's globals."""
    return tuple(module for module in (tl, tl.core) if any(value is module for value in function.__globals__.values()))


def _patch_once(function: Any) -> Any:
    if all(not tl.core.is_builtin(module.load) for module in _modules(function)):
        return interpreter._LangPatchScope()  # already replaced; nothing to put back
    return _patch_language(function)


def _widened(bits: np.ndarray) -> np.ndarray:
    """Bfloat16, which the interpreter keeps as 16 bits, in float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _narrowed(values: np.ndarray) -> np.ndarray:
    """The nearest bfloat16, ties to even, as the GPU rounds; the interpreter cuts the digits off."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1)).astype(np.uint32)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16).reshape(values.shape)


def _cast_impl(builder: InterpreterBuilder, source: TensorHandle, to: Any) -> TensorHandle:
    pair = source.dtype.scalar, to.scalar
    if pair == (tl.bfloat16, tl.float32):
        return TensorHandle(_widened(source.data), tl.float32)
    if pair == (tl.float32, tl.bfloat16):
        return TensorHandle(_narrowed(source.data), tl.bfloat16)
    return _cast(builder, source, to)


def _create_dot(builder: InterpreterBuilder, a: TensorHandle, b: TensorHandle, *rest: Any) -> TensorHandle:
    # The interpreter would multiply the bits of bfloat16 as integers.
    a, b = (TensorHandle(_widened(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
    return _dot(builder, a, b, *rest)


def repair() -> None:
    """Have the interpreter compute what the GPU would."""
    interpreter._patch_lang = _patch_once
    interpreter._patch_lang_tensor = _with_index
    InterpreterBuilder.cast_impl = _cast_impl
    InterpreterBuilder.create_dot = _create_dot
