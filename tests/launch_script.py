"""Run by test_launch.py without Triton's interpreter: every operator's launches on a GPU that is not there.

Prints one JSON object for each question: what held, and what did not.
"""

import json
import sys
from typing import Any

import torch
from torch import Tensor

from bench import fake_driver, specimens
from bench.host_cost import operator, register_on_cpu
from fastmeta import _kernels, ops
from fastmeta.triton_kernels import _forms, _launch

Arguments = tuple[Any, ...]
jit_runs = 0
reached: list[Arguments] = []  # what Triton's launcher was given
specializations: dict[int, tuple[_launch.Launch, Any]] = {}
changed: list[str] = []
failures: list[str] = []
calls = 0


def watch() -> None:
    """Count the calls of Triton's JIT, keep the launcher's arguments, and compare specializations."""
    from triton.runtime.jit import JITFunction

    run, init, call = JITFunction.run, fake_driver._Launcher.__init__, _launch.Launch.__call__

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        global jit_runs
        jit_runs += 1
        return run(self, *args, **kwargs)

    def kept(self: Any, src: Any, metadata: Any) -> None:
        init(self, src, metadata)
        launch = self.launch

        def recorded(*args: Any) -> None:
            reached.append(args)
            launch(*args)

        self.launch = recorded

    def compared(self: _launch.Launch, *arguments: Any) -> None:
        call(self, *arguments)
        *_, binder = self.kernel.device_caches[0]
        _, now, _ = binder(*arguments, **self.constants, **self.options)
        _, first = specializations.setdefault(id(self), (self, now))
        if now != first:
            changed.append(f"{self.kernel.fn.__name__}: {first} became {now}")

    JITFunction.run, fake_driver._Launcher.__init__, _launch.Launch.__call__ = counted, kept, compared  # type: ignore


def tensor(shape: tuple[int, ...], dtype: torch.dtype, aligned: bool) -> Tensor:
    """Zeros, at an odd address and with an odd stride if not aligned."""
    like = specimens._tensor(shape, dtype, aligned)
    if not shape:
        return torch.ones((), dtype=dtype)
    memory = torch.zeros(like.untyped_storage().nbytes() // dtype.itemsize, dtype=dtype)
    return memory.as_strided(shape, like.stride(), like.storage_offset())


def run(name: str, given: Arguments) -> list[Arguments]:
    """What one call gave the launcher."""
    global calls
    before = fake_driver.launched().number
    reached.clear()
    specimens.function(name)(*given)
    calls += 1
    if fake_driver.launched().number - before != len(reached):
        failures.append(f"{name}: {len(reached)} launches, {fake_driver.launched().number - before} in the driver")
    return list(reached)


def same(first: Arguments, again: Arguments, inputs: set[int]) -> bool:
    """Equal but for the hooks and for tensors made by the call."""
    if len(first) != len(again) or first[:10] != again[:10]:
        return False
    for a, b in zip(first[13:], again[13:], strict=True):
        if isinstance(a, Tensor) != isinstance(b, Tensor):
            return False
        if isinstance(a, Tensor):
            if a.data_ptr() in inputs and a.data_ptr() != b.data_ptr():
                return False
        elif a != b:
            return False
    return True


def straight_path() -> None:
    """The second call is the first one's launches without Triton's JIT."""
    for name in _kernels.TRITON:
        for form in _forms.FORMS:
            for head, dtype in ((False, torch.float32), (True, torch.bfloat16)):
                variant = specimens.Variant(head=head and name != "hessian_vector_product")
                given = specimens.arguments(name, (300, 40, 50), dtype, variant, tensor)
                inputs = {t.data_ptr() for t in given if isinstance(t, Tensor)}
                with _forms.force(form), _forms.slab_limit(130 * 50 * 8):
                    try:
                        first = run(name, given)
                    except ValueError as error:
                        if "has no form" not in str(error):
                            raise
                        continue
                    before = jit_runs
                    again = run(name, given)
                note = f"{name} {form} {dtype}"
                if jit_runs != before:
                    failures.append(f"{note}: through the JIT again")
                if len(first) != len(again) or not all(map(same, first, again, [inputs] * len(first))):
                    failures.append(f"{note}: other arguments")
    failures.extend(changed)


def new_plans() -> None:
    """Another alignment, stride, dtype or shape is planned anew; the same one is not, whatever its scalars."""
    plans = {name: sys.modules[f"fastmeta.triton_kernels.{_kernels.TRITON[name]}"]._PLANS for name in _kernels.TRITON}
    for name in _kernels.TRITON:
        shape, half, single = (48, 32, 16), torch.bfloat16, torch.float32
        aligned, odd = specimens.Variant(), specimens.Variant(aligned=False)
        _launch.forget_plans()
        layouts = [
            (shape, single, aligned),
            (shape, single, odd),
            (shape, half, aligned),
            ((48, 32, 15), half, aligned),
        ]
        for count, (size, dtype, variant) in enumerate(layouts, 1):
            given = specimens.arguments(name, size, dtype, variant, tensor)
            run(name, given)
            run(name, given)
            if len(plans[name]) != count:
                failures.append(f"{name}: {len(plans[name])} plans for {count} layouts")
    failures.extend(changed)


def scalars() -> None:
    """An integer where a float is meant, a 1 above all, is not compiled into the kernel."""
    f, h = torch.zeros(48, 16), torch.zeros(48, 32)
    v, b = torch.zeros(16, 32), torch.zeros(16)
    for value in (1, 0.5, 0, 16, 3):
        ops.label_gradient(h, f, v, b, scale=value, impl="triton")
        ops.hessian_vector_product(h, f, v, b, damping=value, impl="triton")
        ops.feature_similarity(h, h, f, scale=value, impl="triton")
        ops.finite_difference_labels(f, f, f, torch.ones(()), step=value, impl="triton")
    failures.extend(changed)
    if not specializations:
        failures.append("nothing was launched")


def selected() -> None:
    """``impl="triton"`` of the public operators reaches these launches."""
    for name in _kernels.TRITON:
        if "triton" not in operator(name).implementations("cpu"):
            failures.append(name)


def hooks() -> None:
    """A profiler's hook is called."""
    import triton

    f, seen = torch.zeros(48, 16), []
    hook = triton.knobs.runtime.launch_enter_hook
    for expected in (0, 1, 1):
        if expected:
            hook.add(seen.append)
        seen.clear()
        ops.finite_difference_labels(f, f, f, torch.ones(()), step=0.5, impl="triton")
        if len(seen) != expected:
            failures.append(f"{len(seen)} calls of the hook, {expected} expected")


if __name__ == "__main__":
    fake_driver.activate()
    register_on_cpu()
    watch()
    for question in (straight_path, new_plans, scalars, selected, hooks):
        failures.clear()
        changed.clear()
        question()
        print(json.dumps({"question": question.__name__, "calls": calls, "failures": failures}), flush=True)
