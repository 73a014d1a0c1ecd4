"""TorchScript inside a model: it runs operator by operator, so that every derivative goes through.

After two calls TorchScript's executor replaces parts of a graph by kernels with a backward pass of their own. These
drop the tangents of forward mode without a word.
"""

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch

# A copy of the graph, which the executor has not optimized, for every function and method.
_copies: "weakref.WeakKeyDictionary[Any, Any]" = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def unoptimized_script() -> Iterator[None]:
    """In the block, functions and modules of TorchScript that are called from Python run unoptimized.

    The user's own are left as they are: dropping what was compiled for them would make their next calls slow.
    """
    classes: Any = (torch.jit.ScriptFunction, torch._C.ScriptMethod)
    calls = [cls.__call__ for cls in classes]
    for cls, call in zip(classes, calls, strict=True):
        cls.__call__ = _run(call, calls[0])
    try:
        yield
    finally:
        for cls, call in zip(classes, calls, strict=True):
            cls.__call__ = call


def _run(call: Any, call_of_function: Any) -> Any:
    def run(function: Any, *args: Any, **kwargs: Any) -> Any:
        method = isinstance(function, torch._C.ScriptMethod)
        expected = function.schema.arguments[method:]
        rest = expected[len(args) :]
        known = {argument.name for argument in rest}
        missing = [a.name for a in rest if a.name not in kwargs and not a.has_default_value()]
        if len(args) > len(expected) or missing or not known.issuperset(kwargs):
            return call(function, *args, **kwargs)  # raises
        if function not in _copies:
            _copies[function] = torch._C._create_function_from_graph(function.name, function.graph.copy())
        values = [kwargs.get(argument.name, argument.default_value) for argument in rest]
        owner = [function.owner] if method else []
        with torch.jit.optimized_execution(False):
            return call_of_function(_copies[function], *owner, *args, *values)

    return run
