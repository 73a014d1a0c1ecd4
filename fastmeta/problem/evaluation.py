"""Evaluates a model without changing it: its state is restored, and every evaluation draws the same random numbers."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Literal, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import _global_backward_hooks, _global_backward_pre_hooks
from torch.nn.utils import parametrize

from fastmeta.problem.checkpointing import differentiable_checkpoints
from fastmeta.problem.module_state import ModuleState
from fastmeta.problem.random_state import RandomState
from fastmeta.problem.scripted import unoptimized_script

Mode = Literal["train", "eval"]
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

WHY_NOT_TRACED = (
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

    return torch.compiler.disable(run, reason=WHY_NOT_TRACED)


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
        self._state = ModuleState(module)
        for part in self._state.parts:
            if isinstance(part, (nn.Embedding, nn.EmbeddingBag)) and part.max_norm is not None:
                raise ValueError(f"model must not change its parameters as it runs, but {part} does: it has max_norm")
        self._recurrent = any(isinstance(part, nn.RNNBase) for part in self._state.parts)
        self._devices = {parameter.device for parameter in module.parameters()}
        self._random = self._random_state()

    def _random_state(self) -> RandomState:
        return RandomState(self._devices, self._state.generators)

    @property
    def frozen(self) -> Mapping[str, Tensor]:
        """Parameters of the module and of those that it hides which do not require grad."""
        return self._state.frozen

    def has_backward_hooks(self) -> bool:
        """Whether a backward pass would call hooks of modules."""
        everywhere = _global_backward_hooks or _global_backward_pre_hooks
        return bool(everywhere) or any(part._backward_hooks or part._backward_pre_hooks for part in self._state.parts)

    @contextlib.contextmanager
    def evaluation(
        self, parameters: Mapping[str, Tensor], *, derivative: bool = False, on_graph: bool = False
    ) -> Iterator[None]:
        """In the block, the module has these parameters.

        Run backward passes in it, too: activation checkpointing calls the module again.

        Args:
            parameters: theta by name; one that is left out stays the module's own.
            derivative: use only kernels that have a forward-mode derivative and can be differentiated twice.
            on_graph: the graph outlives the block. Where the module's mode in the block is another than its own, a
                checkpointed block would be recomputed in the wrong one: its activations are kept.
        """
        other_mode = self._mode is not None and any(
            part.training != (self._mode == "train") for part in self._state.parts
        )
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._same_randomness())
            stack.enter_context(self._in_mode())
            if on_graph:
                stack.enter_context(self.same_gradients())
            stack.enter_context(self._at(parameters))
            # Compiled parts would draw other dropout masks and lose tangents.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(_settings())
            stack.enter_context(differentiable_checkpoints(straight=on_graph and other_mode))
            if derivative:
                stack.enter_context(unoptimized_script())
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
                if self._recurrent:
                    stack.enter_context(torch.backends.cudnn.flags(enabled=False))
                    stack.enter_context(_without_mkldnn())
            yield

    @contextlib.contextmanager
    def _same_randomness(self) -> Iterator[None]:
        before = self._random_state()
        self._random.restore()
        try:
            yield
        finally:
            before.restore()

    @contextlib.contextmanager
    def _in_mode(self) -> Iterator[None]:
        before = [part.training for part in self._state.parts]
        try:
            if self._mode is not None:
                self._module.train(self._mode == "train")
            yield
        finally:
            # A module may do more in train() than set the flag.
            if self._module.training != before[0]:
                self._module.train(before[0])
            for part, training in zip(self._state.parts, before, strict=True):
                if part.training != training:
                    part.training = training

    @contextlib.contextmanager
    def _at(self, parameters: Mapping[str, Tensor]) -> Iterator[None]:
        held = {**self._state.frozen, **parameters}
        before, versions = self._state.snapshot(), _versions(held)
        try:
            self._state.replace(parameters)
            yield
        finally:
            self._state.put_back(before)
        for name, version in _versions(held).items():
            if version != versions[name]:
                raise ValueError(f"model must not change its parameters as it runs, but it has changed {name}")

    @contextlib.contextmanager
    def same_gradients(self) -> Iterator[None]:
        """A model that calls ``backward`` itself, for an energy, would add to ``.grad``."""
        before = [(parameter, parameter.grad) for parameter in self._module.parameters() if parameter.is_leaf]
        try:
            for parameter, _ in before:
                parameter.grad = None
            yield
        finally:
            for parameter, gradient in before:
                parameter.grad = gradient


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


def _versions(parameters: Mapping[str, Tensor]) -> dict[str, int]:
    """They count changes in place."""
    return {name: value._version for name, value in parameters.items() if not value.is_inference()}


def _without_mkldnn() -> contextlib.AbstractContextManager[None]:
    is_now = torch.backends.mkldnn
    return is_now.flags(False, deterministic=is_now.deterministic, allow_tf32=is_now.allow_tf32, fp32_precision=None)
