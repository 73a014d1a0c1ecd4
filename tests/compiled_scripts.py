"""Run by test_compile.py in processes of their own: torch.compile keeps state between calls."""

import sys
from collections.abc import Callable

import pytest
import torch
from cases import CASES, Case, Draw
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import fastmeta
from fastmeta import Head

GENERATOR = torch.Generator().manual_seed(int(sys.argv[2]) if __name__ == "__main__" and len(sys.argv) > 2 else 0)
BACKEND = "aot_eager"


def has_kernel(case: Case) -> bool:
    return "cpp" in case.operator.implementations()


def arguments_of(case: Case, variant: str | None = None, dtype: torch.dtype = torch.float64) -> dict:
    return case.arguments(
        Draw(GENERATOR, dtype), (6, 5, 4), case.losses[0], case.variants[0] if variant is None else variant
    )


def assert_same(got: list[Tensor], want: list[Tensor]) -> None:
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


def one_opaque_call(backend: str = BACKEND, chosen: tuple[Case, ...] = CASES) -> None:
    """No graph break, the operator in the graph as one node, the same numbers."""
    for case in chosen:
        for variant in case.variants if backend == BACKEND else case.variants[:1]:
            torch._dynamo.reset()
            counter = CompileCounterWithBackend(backend)
            compiled = torch.compile(lambda arguments, case=case: case.call(arguments), fullgraph=True, backend=counter)
            arguments = arguments_of(case, variant)
            assert_same(compiled(arguments), case.call(arguments, "reference"))
            # Beside a float64 tensor without dimensions torch 2.13 compiles an empty graph first.
            graphs = [graph for graph in counter.graphs if len(graph.graph.nodes)]
            assert len(graphs) == 1
            calls = [node.target for node in graphs[0].graph.nodes if node.op == "call_function"]
            ours = [target for target in calls if "fastmeta" in str(target)]
            expected = [getattr(torch.ops.fastmeta, case.name).default] if has_kernel(case) else []
            assert ours == expected, (case.name, variant, calls)


def inductor() -> None:
    one_opaque_call("inductor", CASES[:2])


def named_cpp() -> None:
    for case in CASES:
        if has_kernel(case):
            arguments = arguments_of(case)
            compiled = torch.compile(lambda a, case=case: case.call(a, "cpp"), fullgraph=True, backend=BACKEND)
            assert_same(compiled(arguments), case.call(arguments, "cpp"))


def dynamic_shapes() -> None:
    case = CASES[1]
    compiled = torch.compile(lambda a: case.call(a), fullgraph=True, backend=BACKEND, dynamic=True)
    for n in (6, 7, 12):
        arguments = case.arguments(Draw(GENERATOR), (n, 5, 4), "cross_entropy", "bias")
        assert_same(compiled(arguments), case.call(arguments))


def gradients() -> None:
    """With a derivative to track the reference is traced, and differentiated."""
    for case in CASES:
        arguments = arguments_of(case)
        name = next(iter(arguments))
        value = arguments[name].clone().requires_grad_()

        def total(x: Tensor, case=case, arguments=arguments, name=name) -> Tensor:
            return sum(result.sin().sum() for result in case.call(arguments | {name: x}))

        expected = torch.autograd.grad(total(value), value)[0]
        got = torch.autograd.grad(torch.compile(total, fullgraph=True, backend=BACKEND)(value), value)[0]
        torch.testing.assert_close(got, expected)
        assert expected.abs().max() > 0


def transforms() -> None:
    """jvp, grad, vmap and a dual level inside compiled code: right."""
    for case in CASES:
        arguments = arguments_of(case)
        name = next(iter(arguments))
        value = arguments[name]
        tangent = Draw(GENERATOR).normal(*value.shape)

        def function(x: Tensor, case=case, arguments=arguments, name=name) -> Tensor:
            return torch.cat([result.flatten() for result in case.call(arguments | {name: x})]).sin()

        for transformed in (
            lambda x, function=function, tangent=tangent: torch.func.jvp(function, (x,), (tangent,))[1],
            lambda x, function=function: torch.func.grad(lambda v: function(v).sum())(x),
            lambda x, function=function: torch.func.vmap(function)(torch.stack([x, 2 * x])),
        ):
            torch._dynamo.reset()
            expected = transformed(value)
            assert expected.abs().max() > 0
            torch.testing.assert_close(torch.compile(transformed, fullgraph=True, backend=BACKEND)(value), expected)


def kernel_under_compiled_jvp() -> None:
    """A kernel named explicitly raises there as well."""
    for case in CASES:
        if not has_kernel(case):
            continue
        arguments = arguments_of(case)
        name = next(iter(arguments))
        operator = getattr(torch.ops.fastmeta, case.name)
        for function in (
            lambda x, case=case, arguments=arguments, name=name: case.call(arguments | {name: x}, "cpp")[0],
            lambda x, case=case, arguments=arguments, name=name, op=operator: op(*case.raw(arguments | {name: x})),
        ):
            torch._dynamo.reset()
            compiled = torch.compile(
                lambda x, f=function: torch.func.jvp(f, (x,), (x,))[1], fullgraph=True, backend=BACKEND
            )
            try:
                compiled(arguments[name])
            except Exception:
                continue
            raise AssertionError(f"{case.name}: forward mode through the kernel did not raise")


def use_impl() -> None:
    """A block around compiled code, or in it, chooses; a block left does not linger."""
    case = CASES[1]
    arguments = arguments_of(case)
    counter = CompileCounterWithBackend(BACKEND)
    compiled = torch.compile(lambda a: case.call(a), fullgraph=True, backend=counter)

    def ours() -> list[str]:
        nodes = counter.graphs[-1].graph.nodes
        return [str(node.target) for node in nodes if "fastmeta.per_example_dot" in str(node.target)]

    compiled(arguments)
    assert len(ours()) == has_kernel(case)
    with fastmeta.use_impl("reference"):
        assert_same(compiled(arguments), case.call(arguments))
    assert not ours(), "compiled before the block, and used in it"
    assert counter.frame_count == 1 + has_kernel(case)

    def inside(a: dict) -> list[Tensor]:
        with fastmeta.use_impl("reference"):
            return case.call(a)

    assert_same(torch.compile(inside, fullgraph=True, backend=counter)(arguments), case.call(arguments))
    assert not ours()
    compiled(arguments)


def errors() -> None:
    """A wrong shape is worded by the same check; a class out of range is found when the kernel runs."""
    case = CASES[1]
    good = arguments_of(case, "classes bias")
    compiled = torch.compile(lambda a: case.call(a), backend=BACKEND)
    for bad, word in (({"features": good["features"][:, :-1]}, "direction_weight"), ({"loss": "hinge"}, "loss")):
        torch._dynamo.reset()
        with pytest.raises(Exception, match=word):
            compiled(good | bad)
    torch._dynamo.reset()
    compiled(good)
    for outside in (-1, 4):
        wrong = good["targets"].clone()
        wrong[3] = outside
        if has_kernel(case):
            with pytest.raises((RuntimeError, ValueError), match="targets"):
                compiled(good | {"targets": wrong})


def head_in_a_module() -> None:
    """In a compiled model: parameters that require grad, under no_grad."""
    layer = torch.nn.Linear(5, 4).double()
    draw = Draw(GENERATOR)
    h, y, v = draw.normal(6, 5), draw.classes(6, 4), draw.normal(4, 5)

    def function(h: Tensor) -> Tensor:
        with torch.no_grad():
            return fastmeta.ops.per_example_dot(h, Head(layer.weight, layer.bias), y, v)

    torch.testing.assert_close(torch.compile(function, fullgraph=True, backend=BACKEND)(h), function(h))


def steps_of_methods() -> None:
    """Whole steps from a cold start, averages and tables included; after some steps nothing is compiled anew."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    x_l, x_u, labels, targets = torch.randn(4, 6), torch.randn(5, 6), torch.randn(5, 3), torch.randint(3, (4,))

    def step(method: fastmeta.Method, strong: Tensor) -> tuple[Tensor, ...]:
        imputed = (labels + 0 * model(strong)).softmax(-1)
        with fastmeta.capture_features(model) as tape:
            logits_l, logits_u = model(x_l), model(strong)
        return method.refine(
            unlabeled=tape.outputs(logits_u),
            holdout=tape.outputs(logits_l),
            targets=targets,
            labels=imputed,
            index=torch.arange(5),
        )

    makers: dict[str, Callable[[], fastmeta.Method]] = {
        "LabelGradientAlignment": lambda: fastmeta.LabelGradientAlignment(10, 3),
        "L2I": fastmeta.L2I,
        "ExampleWeights": lambda: fastmeta.ExampleWeights(10, interval=2, inverse_hessian="identity"),
    }
    for name, make in makers.items():
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("inductor" if name == "LabelGradientAlignment" else BACKEND)
        methods, compiled = (make(), make()), torch.compile(step, backend=counter)
        frames = []
        for count in range(7):
            strong = x_u + 0.1 * count
            expected, got = step(methods[0], strong), compiled(methods[1], strong)
            for one, other in zip(got, expected, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
            frames.append(counter.frame_count)
        assert frames[4] == frames[6], (name, frames)
        states = methods[0].state_dict(), methods[1].state_dict()
        assert states[0].keys() == states[1].keys()
        for key, value in states[0].items():
            torch.testing.assert_close(states[1][key], value, rtol=1e-4, atol=1e-5)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[1].split():
        torch._dynamo.reset()
        print(name)
        globals()[name]()
    print("done")
