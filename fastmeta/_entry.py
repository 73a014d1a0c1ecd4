"""The plans of an operator by layout, and the way to them that spends no time in Python (csrc/entry/entry.cpp)."""

from collections.abc import Hashable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fastmeta import _extension

NATIVE = "native"
"""The plan of layouts that the native functions of the CUDA library serve."""
OPERATORS = {
    "per_example_dot": 1,
    "label_gradient": 2,
    "last_layer_gradient": 1,
    "hessian_vector_product": 2,
    "feature_similarity": 2,
    "finite_difference_labels": 2,
    "masked_adam_": 6,
}
"""Those that have an entry, and how many numbers follow their tensors."""
_MOST_PLANS = 4096

_every_entry: list[Any] = []


def entry(name: str, programs_on: str = "cuda") -> Any:
    """The plans of an operator.

    Called with its arguments (the tensors and then the numbers of the schema), it runs the native function or the plan
    that serves them, or answers NotImplemented.

    Args:
        name: the operator's.
        programs_on: device whose tensors are served by plans; ``"cpu"`` where a GPU is pretended.
    """
    new: Any = None
    if hasattr(_extension._C, "Entry") and _extension._C.has_exchange_api():
        try:
            new = _extension._C.Entry(name, programs_on, _extension.cuda_natives())
        except (RuntimeError, ValueError):  # a torch that cannot allocate for it, an operator younger than the build
            new = None
    if new is None:
        new = SlowEntry()
    _every_entry.append(new)
    return new


@cache
def of(name: str) -> Any:
    """The entry of the public operator, where no implementation is named."""
    return entry(name)


def forget() -> None:
    """Have every operator plan anew: what the plans were made from has changed."""
    for each in _every_entry:
        each.forget()


class SlowEntry:
    """Plans by layout where torch does not let C read its tensors: whoever finds one runs it."""

    native = (False, False)

    def __init__(self) -> None:
        self._plans: dict[Hashable, Any] = {}

    def __call__(self, *arguments: Any) -> Any:
        """No call is served here."""
        return NotImplemented

    def __len__(self) -> int:
        return len(self._plans)

    def find(self, *arguments: Any) -> Any:
        """The plan kept for arguments like these, or None."""
        return self._plans.get(_key(arguments))

    def keep(self, *arguments_and_plan: Any) -> bool:
        """Keep a plan, the last argument, for arguments like these."""
        if len(self._plans) >= _MOST_PLANS:  # a loop whose batch size varies must not grow them without end
            self.forget()
        self._plans[_key(arguments_and_plan[:-1])] = arguments_and_plan[-1]
        return True

    def forget(self) -> None:
        """Forget every plan."""
        self._plans.clear()


def _key(arguments: tuple[Any, ...]) -> Hashable:
    # Of the numbers, those of an enum and flags choose a plan, and whether a float is 0.
    layouts = [
        (a.shape, a.stride(), a.dtype, a.device, a.data_ptr() % 16)
        if isinstance(a, Tensor)
        else (a if not isinstance(a, float) else a != 0)
        for a in arguments
    ]
    return (torch.backends.cuda.matmul.fp32_precision, *layouts)
