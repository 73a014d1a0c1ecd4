"""Run by test_executor.py without Triton's interpreter: programs on a GPU that is not there (bench/fake_driver.py).

Prints one JSON object for each question: what did not hold.
"""

import json
from typing import Any

import torch
import triton
import triton.language as tl

from bench import fake_driver, host
from fastmeta import _C, _extension
from fastmeta.dispatch import OPERATORS
from fastmeta.triton_kernels import _launch
from fastmeta.triton_kernels._program import Buffer, Number, Program, Ref, launch

failures: list[str] = []


@triton.jit
def scaled(x_ptr, y_ptr, absent_ptr, out_ptr, rows, stride, wide, one, factor, shift, block: tl.constexpr):
    place = tl.program_id(0) * block + tl.arange(0, block)
    inside = place < rows
    x = tl.load(x_ptr + place * stride, inside) * tl.load(y_ptr + place * one, inside)
    tl.store(out_ptr + place, x * factor + shift + wide.to(tl.float32), inside)


def expect(condition: bool, note: str) -> None:
    if not condition:
        failures.append(note)


def program(scratch: bool = True) -> Program:
    """Two launches: one from two inputs to scratch memory, one from there and an input to the result."""
    middle = Ref("scratch", 1, 8)

    def step(x: Ref, out: Ref, rows: int) -> Any:
        numbers = (Number(1, 2.0), 0.25)
        arguments = (x, Ref("input", 1), None, out, rows, 3, 1 << 40, 1, *numbers)
        return launch(scaled, (4, 2), arguments, {"block": 64}, num_warps=2)

    steps = (step(Ref("input", 0), middle, 100), step(middle, Ref("output", 0, 1), 96))
    buffers = (Buffer((5,), torch.bfloat16), Buffer((120,), torch.float32))
    return Program((Buffer((10, 12), torch.float32),), buffers, steps)


def tensors() -> tuple[torch.Tensor, ...]:
    return torch.rand(320), torch.rand(320)[1:121]  # the second at an address that 16 does not divide


def bits(value: float) -> int:
    return int.from_bytes(torch.tensor(value).numpy().tobytes(), "little")


def parameters() -> None:
    """What the driver is given is what Triton's own launcher gives it."""
    x, y = tensors()
    executable = _launch.compile(program(), (x, y), (7.0, 1.5))
    types = [8, 8, 8, 4, 4, 8, 4, 4, 8, 8]  # x y out rows stride wide factor shift, and two addresses of scratch memory
    seen = fake_driver.parameters(len(types))
    masks = [(1 << 8 * size) - 1 for size in types]
    before = fake_driver.launched().number
    (out,) = _launch.run(executable, (x, y), (7.0, 1.5))
    ours = [value & mask for value, mask in zip(seen[: len(types)], masks, strict=True)]
    expect(fake_driver.launched().number == before + 2, "two launches")
    expect(fake_driver.launched()[1:3] == ((4, 2, 1), 64), "grid and threads")
    expect(out.shape == (10, 12) and out.dtype == torch.float32, "the result")
    expect(ours[2] == out.data_ptr() + 4, "the result, four bytes on")
    expect(ours[0] % 64 == 32, "scratch memory: 8 entries into a buffer")
    wanted = [ours[0], y.data_ptr(), ours[2], 96, 3, 1 << 40, bits(3.0), bits(0.25), 0, 0]
    expect(ours == wanted, f"{ours}, not {wanted}")
    memory = torch.empty(200)
    scaled[(4, 2, 1)](memory, y, None, out.view(-1)[1:], 96, 3, 1 << 40, 1, 3.0, 0.25, block=64, num_warps=2)
    fake_driver.parameters(0)
    tritons = [value & mask for value, mask in zip(seen[: len(types)], masks, strict=True)]
    expect(tritons[1:] == ours[1:], f"Triton passes {tritons}, the executor {ours}")
    expect(fake_driver.launched()[1:] == ((4, 2, 1), 64, fake_driver.launched().shared), "Triton's grid")


def compiling_launches_nothing() -> None:
    before = fake_driver.launched().number
    executable = _launch.compile(program(), tensors(), (7.0, 1.5))
    expect(isinstance(executable, _C.Program), "compiled")
    expect(fake_driver.launched().number == before, "no launch")


def hooks() -> None:
    """A profiler's hooks are called around each launch, with the kernel's name."""
    executable = _launch.compile(program(), tensors(), (7.0, 1.5))
    seen: list[tuple[str, str]] = []

    def enter(metadata: Any) -> None:
        seen.append(("enter", metadata.get()["name"]))

    def leave(metadata: Any) -> None:
        seen.append(("leave", metadata.get()["name"]))

    knobs = triton.knobs.runtime
    knobs.launch_enter_hook.add(enter)
    knobs.launch_exit_hook.add(leave)
    _launch.run(executable, tensors(), (7.0, 1.5))
    knobs.launch_enter_hook.remove(enter)
    knobs.launch_exit_hook.remove(leave)
    expect(seen == [("enter", "scaled"), ("leave", "scaled")] * 2, f"hooks saw {seen}")
    _launch.run(executable, tensors(), (7.0, 1.5))
    expect(len(seen) == 4, "hooks are gone")


def entries() -> None:
    """A kept program is run for its layout and for no other."""
    entry = _extension.new_entry("finite_difference_labels", "cpu")
    f, epsilon = torch.rand(16, 8), torch.ones(())
    arguments = (f, f, f, epsilon, 0.5, True)
    expect(entry(*arguments) is NotImplemented, "nothing is kept yet")
    one = Program(
        (Buffer((16, 8), torch.float32),),
        (),
        (
            program()
            .steps[0]
            ._replace(
                arguments=(Ref("input", 0), Ref("input", 1), None, Ref("output", 0), 128, 1, 1 << 40, 1, Number(0), 0.0)
            ),
        ),
    )
    entry.keep(*arguments, _launch.compile(one, arguments[:4], arguments[4:]))
    result = entry(*arguments)
    expect(torch.is_tensor(result) and result.shape == (16, 8), f"got {result}")
    expect(torch.is_tensor(entry(*arguments[:4], 0.25, True)), "another step, the same program")
    for other in (
        (*arguments[:5], False),
        (f[1:], f[1:], f[1:], epsilon, 0.5, True),
        (f.bfloat16(), f, f, epsilon, 0.5, True),
        (f.t().contiguous().t(), f, f, epsilon, 0.5, True),
        (torch.rand(129)[1:].view(16, 8), f, f, epsilon, 0.5, True),
    ):
        expect(entry(*other) is NotImplemented, "another layout")
    expect(entry.find(*arguments) is not None and len(entry) == 1, "found")
    entry.keep(f[1:], f[1:], f[1:], epsilon, 0.5, True, _extension.NATIVE)
    expect(entry(f[1:], f[1:], f[1:], epsilon, 0.5, True) is NotImplemented, "no native function here")
    entry.forget()
    expect(entry(*arguments) is NotImplemented and len(entry) == 0, "forgotten")


def operators() -> None:
    """The second call of a layout plans and compiles nothing, and enqueues what the first one did."""
    planned: list[Any] = []
    compile_program = _launch.compile

    def counted(*arguments: Any) -> Any:
        planned.append(arguments)
        return compile_program(*arguments)

    _launch.compile = counted
    for name in (name for name, each in OPERATORS.items() if each.triton):
        for dtype in (torch.bfloat16, torch.float32):
            for shape in ((48, 32, 40), (300, 40, 300)):
                call, arguments = host.calls(name, shape, dtype)
                dispatcher = OPERATORS[name]
                before = dispatcher.entry
                dispatcher.entry = _C.Entry(name, "cpu")
                note = f"{name} {dtype} {shape}"
                planned.clear()
                seen = enqueued()
                slow = OPERATORS[name].planned(dispatcher.entry)(*arguments)
                first = enqueued()
                fast = call()
                second = enqueued()
                expect(len(planned) == 1 and len(dispatcher.entry) == 1, f"{note}: planned {len(planned)} times")
                expect(sum(first) > sum(seen), f"{note}: nothing was launched")
                difference = [b - a for a, b in zip(seen, first, strict=True)]
                expect(difference == [b - a for a, b in zip(first, second, strict=True)], f"{note}: other launches")
                expect(shapes(slow) == shapes(fast), f"{note}: {shapes(fast)}, not {shapes(slow)}")
                dispatcher.entry = before
    _launch.compile = compile_program


def enqueued() -> tuple[int, int]:
    return fake_driver.launched().number, fake_driver.products()


def shapes(results: Any) -> list[Any]:
    tensors = [results] if isinstance(results, torch.Tensor) else results
    return [(tensor.shape, tensor.dtype) for tensor in tensors]


def numbers() -> None:
    """An integer where a float is meant, a 1 above all, is not compiled into the kernel."""
    for name, place in (("label_gradient", 8), ("feature_similarity", 3), ("finite_difference_labels", 4)):
        arguments = list(host.calls(name, (48, 32, 40), torch.float32)[1])
        entry = _C.Entry(name, "cpu")
        kernel = OPERATORS[name].planned(entry)
        for value in (1, 0.5, 0, 16, 3):
            arguments[place] = value
            kernel(*arguments)
            expect(entry(*arguments) is not NotImplemented, f"{name} with {value}")
        expect(len(entry) == 1, f"{name}: {len(entry)} plans for one layout")
    entry = _C.Entry("hessian_vector_product", "cpu")
    arguments = list(host.calls("hessian_vector_product", (48, 32, 40), torch.float32)[1])
    for damping in (0, 0.5, 1, 0.0):
        OPERATORS["hessian_vector_product"].planned(entry)(*arguments[:-1], damping)
    expect(len(entry) == 2, f"{len(entry)} plans for no damping and some")


def precision() -> None:
    """Float32 products in TF32 are another plan."""
    arguments = host.calls("feature_similarity", (48, 32, 40), torch.float32)[1]
    entry = _C.Entry("feature_similarity", "cpu")
    OPERATORS["feature_similarity"].planned(entry)(*arguments)
    expect(entry(*arguments) is not NotImplemented, "planned")
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    expect(entry(*arguments) is NotImplemented, "not planned for TF32")
    torch.backends.cuda.matmul.fp32_precision = before
    expect(entry(*arguments) is not NotImplemented, "as before")
    half = [a.bfloat16() if isinstance(a, torch.Tensor) else a for a in arguments]
    OPERATORS["feature_similarity"].planned(entry)(*half)
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    expect(entry(*half) is not NotImplemented, "of no concern to bfloat16")
    torch.backends.cuda.matmul.fp32_precision = before


def errors() -> None:
    """The driver's error is raised, in words."""
    fake_driver.parameters(0)
    executable = _C.Program(0, 0, (), (0, torch.uint8), (("launch", 0, (1, 1, 1), 32, 0, ()),), (([], []), print))
    try:
        executable.run((), (), 0, -1)
        failures.append("no error")
    except RuntimeError as error:
        expect("CUDA refuses a launch: no kernel" in str(error), str(error))


if __name__ == "__main__":
    fake_driver.activate()
    for question in (parameters, compiling_launches_nothing, hooks, entries, operators, numbers, precision, errors):
        failures.clear()
        question()
        print(json.dumps({"question": question.__name__, "failures": failures}), flush=True)
