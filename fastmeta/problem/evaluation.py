"""Evaluates a model without changing it: its state is restored, and every evaluation draws the same random numbers."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize

Mode = Literal["train", "eval"]
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

# Why torch.compile must not trace an evaluation.
TRACELESS = (
    "it sets and puts back state of the process, which a graph does not hold; do not compile with fullgraph=True"
)


def eager(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """The function without a graph of autograd, outside ``torch.inference_mode``, and not traced by torch.compile.

    A compiled caller has a graph break here and continues after it.
    """

    @functools.wraps(function)
    def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return torch.compiler.disable(run, reason=TRACELESS)


class RandomState:
    """Torch's random state at one moment, of the CPU and of the CUDA devices among those named."""

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._cpu = torch.get_rng_state()
        self._cuda = {device: torch.cuda.get_rng_state(device) for device in devices if device.type == "cuda"}

    def is_current(self) -> bool:
        """Whether no random number has been drawn since."""
        on_cuda = (state.equal(torch.cuda.get_rng_state(device)) for device, state in self._cuda.items())
        return self._cpu.equal(torch.get_rng_state()) and all(on_cuda)

    def restore(self) -> None:
        """Set torch's random state back to it."""
        torch.set_rng_state(self._cpu)
        for device, state in self._cuda.items():
            torch.cuda.set_rng_state(state, device)


class Evaluator:
    """Evaluates a module at other parameters and on copies of its buffers, always from the same random state.

    Args:
        module: the module. Its parts are looked up once; they must not be exchanged while this is in use.
        mode: ``train`` or ``eval`` for the evaluations; None: as the module stands.

    Raises:
        ValueError: the module changes its own parameters.
    """

    def __init__(self, module: nn.Module, mode: Mode | None) -> None:
        self._module = module
        self._mode = mode
        self._modules = list(module.modules())
        for part in self._modules:
            if isinstance(part, (nn.Embedding, nn.EmbeddingBag)) and part.max_norm is not None:
                raise ValueError(f"model must not change its parameters as it runs, but {part} does: it has max_norm")
        names = {id(parameter): name for name, parameter in module.named_parameters()}  # one name of a tied parameter
        self._parameters: list[tuple[dict[str, Any], str, str]] = [
            (part._parameters, key, names[id(parameter)])
            for part in self._modules
            for key, parameter in part._parameters.items()
            if parameter is not None
        ]
        self._buffers: list[tuple[dict[str, Any], str, Tensor]] = [
            (part._buffers, key, buffer)
            for part in self._modules
            for key, buffer in part._buffers.items()
            if buffer is not None
        ]
        self._recurrent = any(isinstance(part, nn.RNNBase) for part in self._modules)
        self._devices = {parameter.device for parameter in module.parameters()}
        self._random = RandomState(self._devices)

    @contextlib.contextmanager
    def evaluation(self, parameters: Mapping[str, Tensor], *, derivative: bool = False) -> Iterator[None]:
        """In the block, the module has these parameters.

        Run backward passes in it, too: activation checkpointing calls the module again.

        Args:
            parameters: theta by name; one that is left out stays the module's own.
            derivative: use only kernels that have a forward-mode derivative and can be differentiated twice.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._same_randomness())
            stack.enter_context(self._in_mode())
            stack.enter_context(self._at(parameters))
            # Compiled parts would draw other dropout masks and lose tangents.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(_settings())
            if derivative:
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
                if self._recurrent:
                    stack.enter_context(torch.backends.cudnn.flags(enabled=False))
                    stack.enter_context(_without_mkldnn())
            yield

    @contextlib.contextmanager
    def _same_randomness(self) -> Iterator[None]:
        before = RandomState(self._devices)
        self._random.restore()
        try:
            yield
        finally:
            before.restore()

    @contextlib.contextmanager
    def _in_mode(self) -> Iterator[None]:
        before = [part.training for part in self._modules]
        try:
            if self._mode is not None:
                self._module.train(self._mode == "train")
            yield
        finally:
            # A module may do more in train() than set the flag.
            if self._module.training != before[0]:
                self._module.train(before[0])
            for part, training in zip(self._modules, before, strict=True):
                if part.training != training:
                    part.training = training

    @contextlib.contextmanager
    def _at(self, parameters: Mapping[str, Tensor]) -> Iterator[None]:
        owns = [values[key] for values, key, _ in self._parameters]
        copies: dict[int, Tensor] = {}  # a buffer under two names stays one tensor
        try:
            for values, key, name in self._parameters:
                if name in parameters:
                    values[key] = parameters[name]
            for values, key, buffer in self._buffers:
                if id(buffer) not in copies:
                    copies[id(buffer)] = buffer.detach().clone()
                values[key] = copies[id(buffer)]
            yield
        finally:
            for (values, key, _), own in zip(self._parameters, owns, strict=True):
                values[key] = own
            for values, key, buffer in self._buffers:
                values[key] = buffer


@contextlib.contextmanager
def _settings() -> Iterator[None]:
    """Without the fast path of transformer layers, which has no derivative, and without caches of weights."""
    fast_path, cache = torch.backends.mha.get_fastpath_enabled(), torch.is_autocast_cache_enabled()
    parametrized = parametrize._cache_enabled
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        # The cache would keep casts of old parameters until the caller leaves autocast.
        torch.set_autocast_cache_enabled(False)
        parametrize._cache_enabled = 0  # the caller may be in parametrize.cached(), with other parameters' weights
        yield
    finally:
        parametrize._cache_enabled = parametrized
        torch.set_autocast_cache_enabled(cache)
        torch.backends.mha.set_fastpath_enabled(fast_path)


def _without_mkldnn() -> contextlib.AbstractContextManager[None]:
    is_now = torch.backends.mkldnn
    return is_now.flags(False, deterministic=is_now.deterministic, allow_tf32=is_now.allow_tf32, fp32_precision=None)
