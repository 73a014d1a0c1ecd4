"""Launches at the cost of a lookup: what depends on the tensors' layout is worked out once for each layout."""

import contextlib
from collections.abc import Callable, Hashable, Iterator
from functools import wraps
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
import triton
from torch import Tensor

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")
Plan = TypeVar("Plan")

INTERPRETED: bool = triton.knobs.runtime.interpret
if INTERPRETED:
    from fastmeta.triton_kernels import _interpreter

    _interpreter.repair()
_MOST_PLANS = 4096  # of one operator; a loop whose batch size varies must not grow them without end


class Recorded(NamedTuple):
    """A launch that was asked for while :func:`recording`."""

    kernel: Any
    grid: tuple[int, int, int]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    options: dict[str, int]


_recorded: list[Recorded] | None = None


@contextlib.contextmanager
def recording() -> Iterator[list[Recorded]]:
    """Collect launches instead of making them, so that they can be compiled where there is no GPU."""
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before


class Launch:
    """One kernel with its grid and constants, for arguments of one layout.

    The first call goes through Triton's compiler; later ones straight to the compiled kernel, whose specialization
    (alignment of the pointers, integers) is the same because the layout is.

    Args:
        kernel: a function under ``triton.jit`` whose last parameters are the constants.
        grid: number of programs along each axis.
        constants: compile-time constants by name, in the kernel's order.
        num_warps: warps in a program.
        num_stages: depth of the software pipeline.
        max_registers: of a thread; where it is given, the assembler does not spill to fit one more program on a
            processor.
    """

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        constants: dict[str, Any],
        *,
        num_warps: int = 4,
        num_stages: int = 2,
        max_registers: int | None = None,
    ) -> None:
        names = tuple(kernel.arg_names[-len(constants) :]) if constants else ()
        assert names == tuple(constants), f"constants must be the last parameters {names}, got {tuple(constants)}"
        self.kernel = kernel
        self.grid: tuple[int, int, int] = (*grid, 1, 1)[:3]  # type: ignore[assignment]
        self.constants = constants
        self.options = {"num_warps": num_warps, "num_stages": num_stages}
        if max_registers is not None:
            self.options["maxnreg"] = max_registers
        self._constants = tuple(constants.values())
        self._straight: Callable[..., None] | None = None

    def __call__(self, *arguments: Any) -> None:
        if self._straight is not None and _recorded is None:
            self._straight(*arguments, *self._constants)
            return
        if _recorded is not None:
            _recorded.append(Recorded(self.kernel, self.grid, arguments, self.constants, self.options))
            return
        compiled = self.kernel[self.grid](*arguments, **self.constants, **self.options)
        if not INTERPRETED:
            self._straight = _straight(compiled, self.grid)


def _straight(compiled: Any, grid: tuple[int, int, int]) -> Callable[..., None]:
    """The compiled kernel as a function of its arguments, constants included."""
    runner = compiled[grid]
    launcher = compiled.run
    scratch = [getattr(launcher, f"{kind}_scratch_size", None) for kind in ("global", "profile")]
    # Lists of a profiler's functions; they grow in place.
    hooks = triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook
    before, after = (getattr(hook, "calls", None) for hook in hooks)
    if not triton.__version__.startswith("3.6.") or scratch != [0, 0] or before is None or after is None:
        return runner
    # What the runner does, but for looking up the device: the plan is of this one.
    launch, function, metadata = launcher.launch, compiled.function, compiled.packed_metadata
    options = launcher.launch_cooperative_grid, launcher.launch_pdl
    x, y, z = grid
    device = triton.runtime.driver.active.get_current_device()
    stream = triton.runtime.driver.active.get_current_stream

    def straight(*arguments: Any) -> None:
        if before or after:
            runner(*arguments)
        else:
            launch(x, y, z, stream(device), function, *options, None, None, metadata, None, None, None, *arguments)

    return straight


def layout(*tensors: Tensor | None) -> tuple[Hashable, ...]:
    """Everything a plan may depend on: shapes, strides, dtypes, and whether addresses are multiples of 16 bytes."""
    # A list: it takes half the time of a generator.
    return tuple([None if t is None else (t.shape, t.stride(), t.dtype, t.data_ptr() % 16 == 0) for t in tensors])


MISSING: Any = object()
"""No plan yet: where None is one, and a second look for the key would cost what a launch does."""
_every_plan: list["Plans[Any]"] = []


class Plans(dict[Hashable, Plan]):
    """Plans of one operator by device and layout."""

    def __init__(self) -> None:
        super().__init__()
        _every_plan.append(self)

    def keep(self, key: Hashable, plan: Plan) -> Plan:
        """Store a plan and return it."""
        if len(self) >= _MOST_PLANS:
            self.clear()
        self[key] = plan
        return plan


def forget_plans() -> None:
    """Have every operator plan anew: what the plans were made from has changed."""
    for plans in _every_plan:
        plans.clear()


# Past these keys the library's products keep the dtype of their operands.
_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCPU
)


def on_device(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Decorates an operator: it runs on its first argument's device and, under autocast, in its arguments' dtype."""

    @wraps(function)
    def call(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        first: Any = args[0]
        elsewhere = first.is_cuda and first.get_device() != torch.cuda.current_device()
        if not elsewhere and not torch._C._is_any_autocast_enabled():
            return function(*args, **kwargs)
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch._C._ExcludeDispatchKeyGuard(_AUTOCAST))
            if elsewhere:
                stack.enter_context(torch.cuda.device(first.device))
            return function(*args, **kwargs)

    return call


def precision(dtype: torch.dtype) -> str:
    """``input_precision`` of float32 products: TF32 where torch's own setting for CUDA allows it."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
