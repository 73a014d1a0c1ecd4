"""Run by test_model_function_surroundings.py in processes of their own."""

import copy
import sys

import pytest
import torch
from whole_model_nets import NETS

import fastmeta

WAYS = ("jvp", "double_backward", "finite_difference", "forward_difference")
BACKEND = "aot_eager"
GENERATOR = torch.Generator()


def case(name):
    model, make_inputs = NETS[name](GENERATOR)
    inputs = make_inputs(5)
    direction = {
        name: torch.randn(p.shape, generator=GENERATOR, dtype=p.dtype)
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    return model, inputs, direction


def run(model, inputs):
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def seeded(function):
    torch.manual_seed(1)
    return function()


def seeded_gradient(model, inputs, direction, how):
    return seeded(lambda: fastmeta.label_gradient(model, inputs, direction, how=how))


def around():
    """torch.compile of a caller: the graph breaks there, the numbers are the same, and so is the random state after."""
    for name in ("conv", "text", "tied"):
        model, inputs, direction = case(name)
        for how in WAYS:
            torch._dynamo.reset()

            def caller(inputs, model=model, direction=direction, how=how):
                before = torch.rand(2)
                return 2 * fastmeta.label_gradient(model, inputs, direction, how=how), before, torch.rand(2)

            compiled = torch.compile(caller, backend=BACKEND)
            expected = seeded(lambda caller=caller, inputs=inputs: caller(inputs))
            for _ in range(2):
                got = seeded(lambda compiled=compiled, inputs=inputs: compiled(inputs))
                torch.testing.assert_close(got, expected)
    torch._dynamo.reset()
    whole = torch.compile(lambda x: fastmeta.label_gradient(model, x, direction), backend=BACKEND, fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="do not compile with fullgraph=True"):
        whole(inputs)


def around_refine():
    """The same for a method that is given the model."""
    model, inputs, _ = case("conv")
    targets = torch.tensor([0, 1, 2, 0, 1])
    results = []
    for compiled in (False, True):
        method = fastmeta.L2I.from_preset("paper", how="jvp")

        def step(x, method=method):
            return method.refine(model=model, unlabeled=x.sin(), holdout=x, targets=targets)

        refine = torch.compile(step, backend=BACKEND) if compiled else step
        results.append(seeded(lambda refine=refine: refine(inputs)))
    torch.testing.assert_close(tuple(results[1]), tuple(results[0]))


def compiled_model():
    """By its own names, with the prefix, or by those of the module inside; also once it has run compiled."""
    for name in ("conv", "text", "tied"):
        model, inputs, direction = case(name)
        compiled = torch.compile(model, backend=BACKEND)
        run(compiled, inputs)
        for how in WAYS:
            expected = seeded_gradient(model, inputs, direction, how)
            for prefix in ("", "_orig_mod."):
                renamed = {prefix + name: value for name, value in direction.items()}
                got = seeded_gradient(compiled, inputs, renamed, how)
                torch.testing.assert_close(got, expected, rtol=0, atol=0)


def compiled_part():
    """It would lose the tangents, could not be differentiated twice, and would draw other dropout masks."""
    model, inputs, direction = case("conv")
    compiled = copy.deepcopy(model)
    compiled.body = torch.compile(compiled.body, backend=BACKEND)
    renamed = {name.replace("body.", "body._orig_mod."): value for name, value in direction.items()}
    run(compiled, inputs)
    for how in WAYS:
        expected = seeded_gradient(model, inputs, direction, how)
        got = seeded_gradient(compiled, inputs, renamed, how)
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


def compiled_in_place():
    """``module.compile()`` leaves the module's type as it is; afterwards it runs compiled again."""
    model, inputs, direction = case("conv")
    compiled = copy.deepcopy(model)
    counter = torch._dynamo.testing.CompileCounterWithBackend(BACKEND)
    compiled.compile(backend=counter)
    compiled.body.compile(backend=counter)
    for how in WAYS:
        expected = seeded_gradient(model, inputs, direction, how)
        got = seeded_gradient(compiled, inputs, direction, how)
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert counter.frame_count == 0
    run(compiled, inputs)
    assert counter.frame_count > 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    GENERATOR.manual_seed(int(sys.argv[2]))
    for name in sys.argv[1].split():
        torch._dynamo.reset()
        print(name)
        globals()[name]()
    print("done")
