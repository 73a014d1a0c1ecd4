"""CUDA graphs of the steps of a method: one launch in place of ten or more."""

import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import replace
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from fastmeta.capture import Outputs
from fastmeta.methods.base import Method
from fastmeta.methods.batch import Batch, as_outputs
from fastmeta.state import parts
from fastmeta.updates import Refined

Computed = Refined | Tensor
AnyMethod = TypeVar("AnyMethod", bound=Method)
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_FUNCTIONS = (FunctionType, MethodType, BuiltinFunctionType, partial, type)


class Recorder(Protocol):
    """Records what a function does to the device."""

    def record(self, function: Callable[[], Computed], device: torch.device) -> tuple[Computed, Callable[[], None]]:
        """The tensors of the function's result, and a replay: each call repeats the work and overwrites them."""


class CudaRecorder:
    """A CUDA graph. Recording it runs nothing on the device."""

    def record(self, function: Callable[[], Computed], device: torch.device) -> tuple[Computed, Callable[[], None]]:
        """See :class:`Recorder`."""
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as a data loader's, may use CUDA meanwhile.
        with torch.cuda.device(device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
            result = function()
        return result, graph.replay


def graph(method: AnyMethod, *, copy: bool = True, keep: int = 8, recorder: Recorder | None = None) -> AnyMethod:
    """Have a method's steps on a GPU captured in CUDA graphs and replayed.

    ``method.refine`` is called as before. The first call with batches of some shapes and with some settings runs
    eagerly, on buffers of its own; the second is captured; every later one copies its batch into the buffers and
    replays the graph. So a shape that comes once, as at the end of an epoch, is never captured, and no step is computed
    twice.

    Tables, moments and averages are updated in place by a replay. What depends on the caller's autograd graph (the
    surrogate of :class:`fastmeta.L2I`'s V2, the labeled loss of :class:`fastmeta.LabelGradientAlignment`) is computed
    outside. A setting that is changed (``method.step``), another phase of an interval, or a loaded state is captured
    anew; torch's own settings and :func:`fastmeta.use_impl` are those at the time of the capture. A solver in the step
    runs twice the iterations that the step before took; those after convergence have no effect: see
    :func:`fastmeta.ops.solve_hessian`. Call it on one stream.

    Args:
        method: any :class:`fastmeta.Method`; its graphs are kept in it.
        copy: return copies. False saves these launches, and the results are valid only until the next call.
        keep: the most combinations of shapes and settings whose buffers and graphs are kept.
        recorder: takes the place of CUDA's, in tests.

    Returns:
        The method.

    Raises:
        ValueError: ``keep < 1``; in ``refine``, the method has a ``process_group`` or is given a model.
        RuntimeError: in ``refine``, the tensors are not on a GPU, or the step cannot be captured.

    >>> import fastmeta
    >>> method = fastmeta.graph(fastmeta.MetaGradient())
    >>> method.step
    0.1
    """
    if keep < 1:
        raise ValueError(f"keep must be >= 1, got {keep}")
    method._graphs = Graphs(copy, keep, recorder)
    return method


class Graphs:
    """The graphs of one method.

    Args:
        copy: see :func:`graph`.
        keep: see :func:`graph`.
        recorder: None: CUDA's.
    """

    def __init__(self, copy: bool, keep: int, recorder: Recorder | None) -> None:
        self._options = copy, keep, recorder
        self._copy = copy
        self._keep = keep
        self._recorder = recorder
        self._steps: OrderedDict[Hashable, _Step] = OrderedDict()
        self._warned = False

    def __reduce__(self) -> Any:
        # A copy of the method, or one from a file, captures its own.
        return Graphs, self._options

    def refine(self, method: Method, batch: Batch) -> Refined:
        """One step of the method."""
        if method.process_group is not None:
            raise ValueError("process_group must be None for fastmeta.graph: one process might capture, another replay")
        if batch.model is not None:
            raise ValueError("model must be None for fastmeta.graph: a captured step works on tape.outputs(logits)")
        device = as_outputs(batch.unlabeled, "unlabeled").logits.device
        if self._recorder is None and device.type != "cuda":
            raise RuntimeError(f"fastmeta.graph captures CUDA graphs, got tensors on {device}; leave it out there")
        tensors, settings = describe(method)
        key = _signature(batch), method.phase(), tuple(settings.items())
        if key not in self._steps:
            method._check(batch)
            self._make_room(method)
            self._steps[key] = _Step(batch, device)
        self._steps.move_to_end(key)
        step = self._steps[key]
        with torch.autocast(device.type, enabled=False):
            computed = step.run(method, batch, tensors, self._recorder or CudaRecorder())
            if self._copy:
                computed = _map(Tensor.clone, computed)
            if isinstance(computed, Tensor):
                return method._finish(computed, batch.imputed(method.inner_loss, on_graph=True), batch)
            return method._finish(computed, computed.labels, batch)

    def _make_room(self, method: Method) -> None:
        if len(self._steps) < self._keep:
            return
        self._steps.popitem(last=False)
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"{type(method).__name__} has come in more than keep={self._keep} combinations of shapes and settings; "
                "the CUDA graphs used longest ago are given up and captured again when they come back",
                RuntimeWarning,
                stacklevel=5,
            )


class _Step:
    """Buffers for batches of one signature, and from the second call on the graph that works on them."""

    def __init__(self, batch: Batch, device: torch.device) -> None:
        self._batch = replace(batch, **{name: _buffers(value, device) for name, value in vars(batch).items()})
        self._device = device
        self._inputs = _by_dtype(self._batch)
        self._ran = False
        self._result: Computed | None = None
        self._replay: Callable[[], None] | None = None
        self._state: dict[str, Tensor] = {}

    @torch.no_grad()
    def run(self, method: Method, batch: Batch, state: dict[str, Tensor], recorder: Recorder) -> Computed:
        """The device's part of the step, on the buffers; the result is overwritten by the next call."""
        for buffers, sources in zip(self._inputs, _by_dtype(batch), strict=True):
            torch._foreach_copy_(buffers, sources, non_blocking=True)
        if not self._ran:
            computed = self._compute(method)
            self._ran = True
            return computed
        if self._replay is None or not _same(state, self._state):
            self._record(method, state, recorder)
        assert self._replay is not None
        assert self._result is not None
        self._replay()
        return self._result

    def _compute(self, method: Method) -> Computed:
        return method._step(*method._problem(self._batch.imputed(method.inner_loss, on_graph=False), self._batch))

    def _record(self, method: Method, state: dict[str, Tensor], recorder: Recorder) -> None:
        name, settings = type(method).__name__, describe(method)[1]
        self._replay = None
        try:
            result, replay = recorder.record(lambda: self._compute(method), self._device)
        except Exception as error:
            cause: BaseException = error
            while cause.__context__ is not None:  # ending a failed capture raises too
                cause = cause.__context__
            raise RuntimeError(f"a step of {name} cannot be captured in a CUDA graph: {cause}") from error
        after, settings_after = describe(method)
        if not _same(state, after):
            changed = [path for path in {**state, **after} if state.get(path) is not after.get(path)]
            raise RuntimeError(
                f"a step of {name} cannot be captured in a CUDA graph: it replaces {', '.join(changed)}; a tensor that "
                "lives from step to step must be updated in place"
            )
        if settings != settings_after:
            changed = [path for path, value in settings_after.items() if settings.get(path) != value]
            raise RuntimeError(
                f"a step of {name} cannot be captured in a CUDA graph: it changes {', '.join(changed)}, which a replay "
                "would not; keep it in a tensor"
            )
        # The graph writes to the state's tensors: they must live as long as the graph.
        self._result, self._replay, self._state = result, replay, state


def describe(method: Method) -> tuple[dict[str, Tensor], dict[str, Hashable]]:
    """The tensors and the settings of a method and its parts by name, without its number of calls."""
    tensors: dict[str, Tensor] = {}
    settings: dict[str, Hashable] = {}
    seen: set[int] = set()

    def visit(path: str, value: Any) -> None:
        if isinstance(value, Tensor):
            tensors[path] = value
        elif isinstance(value, (*_PLAIN, *_FUNCTIONS)):
            settings[path] = value
        elif id(value) in seen:
            settings[path] = id(value)
        else:
            seen.add(id(value))
            for name, item in _items(value):
                visit(f"{path}.{name}" if path else name, item)

    seen.add(id(method._graphs))
    visit("", method)
    return tensors, settings


def _items(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, nn.Module):
        return parts(value)
    if isinstance(value, dict):
        return ((str(key), item) for key, item in value.items())
    if isinstance(value, list | tuple | set | frozenset):
        return ((str(place), item) for place, item in enumerate(value))
    return iter(getattr(value, "__dict__", {}).items())


def _same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(tensor is second[path] for path, tensor in first.items())


def _signature(batch: Batch) -> Hashable:
    """Everything a graph depends on in this batch, except the values in its tensors."""
    return tuple((name, _form(value)) for name, value in vars(batch).items())


def _form(value: Any) -> Hashable:
    if isinstance(value, Tensor):
        return value.shape, value.dtype
    if isinstance(value, Outputs):
        # The layer's parameters are not copied: a method may read them, at these addresses.
        places = tuple(None if tensor is None else tensor.data_ptr() for tensor in (value.weight, value.bias))
        return _form(value.features), _form(value.logits), places
    return None if value is None else id(value)


def _buffers(value: Any, device: torch.device) -> Any:
    """The same value with buffers in place of the tensors that change from step to step."""
    if isinstance(value, Tensor):
        return torch.empty_like(value, device=device, memory_format=torch.contiguous_format).detach()
    if isinstance(value, Outputs):
        return value._replace(features=_buffers(value.features, device), logits=_buffers(value.logits, device))
    return value


def _by_dtype(batch: Batch) -> list[list[Tensor]]:
    """The tensors that change from step to step, in one list for each dtype: each is copied by one launch."""
    found: dict[torch.dtype, list[Tensor]] = {}
    for value in vars(batch).values():
        changing = value[:2] if isinstance(value, Outputs) else (value,)
        for tensor in changing:
            if isinstance(tensor, Tensor):
                found.setdefault(tensor.dtype, []).append(tensor.detach())
    return list(found.values())


def _map(function: Callable[[Tensor], Tensor], computed: Computed) -> Computed:
    if isinstance(computed, Tensor):
        return function(computed)
    return Refined(*(function(tensor) for tensor in computed))
