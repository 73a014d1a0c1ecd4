"""Every kind of differentiation through an operator is right or raises. It is never silently zero.

PyTorch passes forward-mode tangents through a registered operator as zeros; the tests of jvp would see it.
"""

from collections.abc import Callable

import pytest
import torch
from cases import CASE_LOSS_IDS, CASE_LOSSES, CASES, Arguments, Case, Draw, map_tensors
from torch import Tensor
from torch.autograd import forward_ad

from fastmeta import Head, use_impl

case_losses = pytest.mark.parametrize(("case", "loss"), CASE_LOSSES, ids=CASE_LOSS_IDS)
cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
raw_cases = pytest.mark.parametrize(
    "case", [case for case in CASES if "cpp" in case.operator.implementations()], ids=lambda case: case.name
)
SHAPE = (4, 3, 3)


def floating(arguments: Arguments) -> list[str]:
    return [n for n, v in arguments.items() if isinstance(v, Tensor) and v.is_floating_point()]


def of(case: Case, arguments: Arguments, name: str, impl: str | None = None) -> Callable[[Tensor], Tensor]:
    """The operator as a function of one argument; several results in one vector."""

    def function(value: Tensor) -> Tensor:
        return torch.cat([r.flatten() for r in case.call(arguments | {name: value}, impl)])

    return function


def smooth(case: Case, draw: Draw, loss: str | None) -> Arguments:
    """Arguments away from the kinks: nothing of a projected label is near 0."""
    arguments = case.arguments(draw, SHAPE, loss, case.variants[0])
    if case.name == "finite_difference_labels":
        arguments |= {
            "labels": 1 + draw.uniform(SHAPE[0], SHAPE[2]),
            "epsilon": torch.tensor(0.9).double(),
            "step": 0.1,
        }
    return arguments


@case_losses
def test_gradcheck(case, loss, draw):
    """First and second derivatives, reverse and forward mode, in every argument at once."""
    arguments = smooth(case, draw, loss)
    names = floating(arguments)
    values = [arguments[name].clone().requires_grad_() for name in names]

    def function(*changed: Tensor) -> tuple[Tensor, ...]:
        return tuple(case.call(arguments | dict(zip(names, changed, strict=True))))

    assert torch.autograd.gradcheck(function, values, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, values, check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.parametrize("name", ["last_layer_gradient", "per_example_dot", "label_gradient"])
def test_gradcheck_through_a_head(name, draw):
    case = next(case for case in CASES if case.name == name)
    arguments = case.arguments(draw, SHAPE, "cross_entropy", "head bias")
    parameters = [part.clone().requires_grad_() for part in arguments["logits"]]
    assert torch.autograd.gradcheck(lambda *head: tuple(case.call(arguments | {"logits": Head(*head)})), parameters)


@case_losses
def test_forward_mode(case, loss, draw):
    """func.jvp and a dual level against the derivative by reverse mode."""
    arguments = smooth(case, draw, loss)
    for name in floating(arguments):
        function, value = of(case, arguments, name), arguments[name]
        tangent = draw.normal(*value.shape)
        expected = torch.autograd.functional.jacobian(function, value).reshape(-1, value.numel()) @ tangent.flatten()
        torch.testing.assert_close(torch.func.jvp(function, (value,), (tangent,))[1], expected)
        for grad in (True, False):
            with forward_ad.dual_level(), torch.set_grad_enabled(grad):
                moved = forward_ad.unpack_dual(function(forward_ad.make_dual(value, tangent))).tangent
                # None where the argument does not enter: the logits of mse.
                torch.testing.assert_close(torch.zeros_like(expected) if moved is None else moved, expected)
        _, linear = torch.func.linearize(function, value)
        torch.testing.assert_close(linear(tangent), expected)


@cases
def test_compositions_of_transforms(case, draw):
    """vmap, grad, jvp of grad, grad of jvp, vmap of jvp."""
    arguments = smooth(case, draw, case.losses[0])
    for name in floating(arguments):
        value = arguments[name]
        function = of(case, arguments, name)
        tangents = torch.stack([draw.normal(*value.shape) for _ in range(3)])
        weight = draw.normal(*function(value).shape)

        def scalar(x: Tensor, function=function, weight=weight) -> Tensor:
            return (weight * function(x)).sum().sin()

        batch = torch.stack([value, value + 0.1 * tangents[0]])
        torch.testing.assert_close(torch.func.vmap(function)(batch), torch.stack([function(x) for x in batch]))
        tracked = value.clone().requires_grad_()
        grad = torch.autograd.grad(scalar(tracked), tracked, create_graph=True)[0]
        torch.testing.assert_close(torch.func.grad(scalar)(value), grad)
        hessian = torch.func.hessian(scalar)(value).reshape(value.numel(), -1)
        expected = (hessian @ tangents.reshape(3, -1).T).T.reshape(tangents.shape)
        again = torch.autograd.grad(grad, tracked, tangents[0])[0] if grad.requires_grad else torch.zeros_like(value)
        torch.testing.assert_close(again, expected[0])

        def product(t: Tensor, scalar=scalar, value=value) -> Tensor:
            return torch.func.jvp(torch.func.grad(scalar), (value,), (t,))[1]

        torch.testing.assert_close(torch.func.vmap(product)(tangents), expected)
        reversed_order = torch.func.grad(lambda x: torch.func.jvp(scalar, (x,), (tangents[0],))[1])  # noqa: B023
        torch.testing.assert_close(reversed_order(value), expected[0])


@cases
def test_half_and_single_precision_differentiate_too(case, generator):
    for dtype in (torch.float32, torch.bfloat16):
        arguments = smooth(case, Draw(generator, dtype), case.losses[0])
        for name in floating(arguments):
            value = arguments[name].clone().requires_grad_()
            grad = torch.autograd.grad(of(case, arguments, name)(value).sum(), value)[0]
            assert grad.dtype == value.dtype
            assert grad.isfinite().all()


@raw_cases
def test_the_kernel_refuses_forward_mode(case, draw):
    arguments = smooth(case, draw, case.losses[0])
    operator = getattr(torch.ops.fastmeta, case.name)
    for name in floating(arguments):
        value = arguments[name]
        tangent = torch.ones_like(value)

        def raw(x: Tensor, name=name) -> Tensor:
            result = operator(*case.raw(arguments | {name: x}))
            return result[0] if isinstance(result, tuple) else result

        for function in (of(case, arguments, name, "cpp"), raw):
            with pytest.raises(RuntimeError, match="no forward-mode derivative"):
                torch.func.jvp(function, (value,), (tangent,))
            with pytest.raises(RuntimeError, match="no forward-mode derivative"):
                torch.func.jacfwd(function)(value)
            with pytest.raises(RuntimeError, match=r"no forward-mode derivative|not differentiable"):
                torch.func.jvp(torch.func.grad(lambda x: function(x).sum()), (value,), (tangent,))  # noqa: B023
            with pytest.raises(RuntimeError, match="no forward-mode derivative"):
                torch.func.vmap(lambda t: torch.func.jvp(function, (value,), (t,))[1])(tangent.expand(2, *value.shape))  # noqa: B023
            with forward_ad.dual_level(), pytest.raises(RuntimeError, match="no forward-mode derivative"):
                function(forward_ad.make_dual(value, tangent))
            refused = pytest.raises(RuntimeError, match="no forward-mode derivative")
            with torch.no_grad(), forward_ad.dual_level(), refused:
                function(forward_ad.make_dual(value, tangent))
        with use_impl("cpp"), pytest.raises(RuntimeError, match="no forward-mode derivative"):
            torch.func.jvp(of(case, arguments, name), (value,), (tangent,))


@raw_cases
def test_forward_mode_through_a_head_of_the_kernel(case, draw):
    if "head" not in " ".join(case.variants):
        pytest.skip("takes no head")
    arguments = case.arguments(draw, SHAPE, case.losses[0], "head bias")
    head = arguments["logits"]
    operator = getattr(torch.ops.fastmeta, case.name)
    for function in (
        lambda w: operator(*case.raw(arguments | {"logits": Head(w, head.bias)})),
        lambda w: case.call(arguments | {"logits": Head(w, head.bias)}, "cpp"),
    ):
        with pytest.raises(RuntimeError, match="no forward-mode derivative"):
            torch.func.jvp(function, (head.weight,), (head.weight,))


@raw_cases
def test_backward_reaching_the_kernel_raises(case, draw):
    arguments = smooth(case, draw, case.losses[0])
    operator = getattr(torch.ops.fastmeta, case.name)
    for name in floating(arguments):
        value = arguments[name].clone().requires_grad_()
        raw = operator(*case.raw(arguments | {name: value}))
        for results in (case.call(arguments | {name: value}, "cpp"), raw if isinstance(raw, tuple) else (raw,)):
            for result in results:
                if not result.numel():
                    continue
                assert result.requires_grad, "detached without a word, the derivative would be zero"
                with pytest.raises(RuntimeError, match=f"fastmeta::{case.name} is not differentiable"):
                    result.sum().backward()
        with torch.no_grad():
            assert not case.call(arguments | {name: value}, "cpp")[0].requires_grad
        with pytest.raises(RuntimeError, match=r"not differentiable|no forward-mode derivative"):
            torch.func.grad(lambda x: of(case, arguments, name, "cpp")(x).sum())(arguments[name])  # noqa: B023
        with pytest.raises(RuntimeError, match=f"fastmeta::{case.name} is not differentiable"):
            torch.func.grad(lambda x: first(operator(*case.raw(arguments | {name: x}))))(arguments[name])  # noqa: B023


def first(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    return (result[0] if isinstance(result, tuple) else result).sum()


@raw_cases
def test_vmap_over_the_kernel_is_right(case, draw):
    arguments = smooth(case, draw, case.losses[0])
    operator = getattr(torch.ops.fastmeta, case.name)
    name = floating(arguments)[0]
    batch = torch.stack([arguments[name], 2 * arguments[name]])
    got = torch.func.vmap(lambda x: first(operator(*case.raw(arguments | {name: x}))))(batch)
    expected = torch.stack([of(case, arguments, name)(x)[: 10**6] for x in batch])
    if case.name in ("last_layer_gradient", "hessian_vector_product"):
        expected = torch.stack([case.call(arguments | {name: x})[0].flatten() for x in batch])
    torch.testing.assert_close(got, expected.sum(-1))
    with pytest.raises(RuntimeError, match="vmap rule"):
        torch.func.vmap(of(case, arguments, name, "cpp"))(batch)


@raw_cases
def test_checkpoint_and_saved_tensors(case, draw):
    arguments = smooth(case, draw, case.losses[0])
    name = floating(arguments)[0]
    function, value = of(case, arguments, name), arguments[name].clone().requires_grad_()
    expected = torch.autograd.grad(function(value).sum(), value)[0]
    for reentrant in (True, False):
        output = torch.utils.checkpoint.checkpoint(function, value, use_reentrant=reentrant)
        value.grad = None
        output.sum().backward()
        torch.testing.assert_close(value.grad, expected)


def test_arguments_that_require_grad_are_unharmed_by_the_kernel(draw):
    """A kernel called without a graph leaves no graph behind and no tensor changed."""
    for case in CASES:
        arguments = map_tensors(
            lambda t: t.clone().requires_grad_() if t.is_floating_point() else t, smooth(case, draw, case.losses[0])
        )
        with torch.no_grad():
            assert all(result.grad_fn is None for result in case.call(arguments))
