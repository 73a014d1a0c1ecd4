"""perturbed: theta +- epsilon v as written, and the parameters back bit for bit whatever happens."""

import math

import pytest
import torch
from cases import DEVICE
from guarded import guarded
from hypothesis import given, settings
from hypothesis import strategies as st
from perturbed_lists import BITS, DTYPES, assert_bits, bits, copy, draw, dtypes, impls, kernels, normal
from torch import Tensor

from fastmeta.ops import _in_place, finite_difference_labels, perturbed

pytestmark = pytest.mark.usefixtures("on_device")


@impls
@dtypes
def test_both_points_against_float64(impl, dtype, generator):
    params, direction = draw(generator, dtype), draw(generator, dtype)
    start = copy(params)
    norm = math.sqrt(math.fsum(float(v.double().square().sum()) for v in direction))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    with perturbed(params, direction, 0.5, impl=impl) as perturbation:
        epsilon = perturbation.epsilon
        assert (epsilon.shape, epsilon.dtype) == ((), wide)
        torch.testing.assert_close(epsilon.double().item(), 0.5 / norm, rtol=8 * torch.finfo(wide).eps, atol=0)
        for sign in (1, -1, 1, -1):
            for theta, first, v in zip(params, start, direction, strict=True):
                true = first.double() + sign * epsilon.double() * v.double()
                rounding = torch.finfo(dtype).eps / 2 * true.abs() + torch.finfo(dtype).tiny
                slack = torch.finfo(wide).eps * (first.double().abs() + v.double().abs())
                assert ((theta.double() - true).abs() <= rounding + slack).all()
            perturbation.flip()
    assert_bits(params, bits(start))
    assert perturbation.epsilon is epsilon


@kernels
@given(shapes=st.lists(st.lists(st.integers(0, 15), max_size=3), max_size=8), seed=st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_kernel_equals_reference_for_any_shapes(impl, shapes, seed):
    generator = torch.Generator("cpu").manual_seed(seed)
    params, direction = draw(generator, shapes=shapes), draw(generator, shapes=shapes)
    start, points = bits(params), []
    for used in ("reference", impl):
        with perturbed(params, direction, 0.3, impl=used) as perturbation:
            plus = copy(params)
            perturbation.flip()
            points.append([perturbation.epsilon, *plus, *copy(params)])
        assert_bits(params, start)
    torch.testing.assert_close(points[0], points[1], rtol=1e-13, atol=1e-14)


@impls
@dtypes
def test_special_values_come_back_bit_for_bit(impl, dtype, generator):
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, torch.finfo(dtype).tiny / 4], dtype=dtype)
    payload = special.clone()
    payload.view(BITS[dtype])[4] += 5  # a NaN of another pattern
    params = [special, payload, normal(generator, 2000, dtype=dtype)]
    before = bits(params)
    with perturbed(params, [torch.ones_like(p) for p in params], 1e-6, impl=impl) as perturbation:
        perturbation.flip()
        assert params[0].isnan().tolist() == [False] * 4 + [True, False]
    assert_bits(params, before)


@impls
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("flips", [0, 1, 2])
def test_restored_after_an_exception(impl, error, flips, generator):
    params, direction = draw(generator, torch.float32), draw(generator, torch.float32)
    before = bits(params)
    with pytest.raises(error), perturbed(params, direction, 1.0, impl=impl) as perturbation:  # noqa: PT012
        for _ in range(flips):
            perturbation.flip()
        raise error
    assert_bits(params, before)
    with perturbed(params, direction, 1.0, impl=impl):
        assert not torch.equal(params[3].view(torch.int32), before[3])
    assert_bits(params, before)


@impls
def test_restored_when_entering_fails_halfway(impl, generator, monkeypatch):
    params, direction = draw(generator), draw(generator)
    before = bits(params)

    def interrupt(*arguments):
        raise KeyboardInterrupt

    if impl == "reference":
        copy_, calls = Tensor.copy_, []

        def fail_at_the_fifth(self, *arguments):
            calls.append(self)
            return interrupt() if len(calls) == 5 else copy_(self, *arguments)

        monkeypatch.setattr(Tensor, "copy_", fail_at_the_fifth)
    else:  # where a Ctrl-C during the kernel is raised: after it
        written, calls = _in_place.written, []
        monkeypatch.setattr(
            _in_place, "written", lambda t: calls.append(t) or (interrupt() if len(calls) == 1 else written(t))
        )
    with pytest.raises(KeyboardInterrupt), perturbed(params, direction, 1.0, impl=impl):
        raise AssertionError("not entered")
    monkeypatch.undo()
    assert len(calls) > 1
    assert_bits(params, before)


@impls
def test_wrong_use_raises_and_changes_nothing(impl, generator):
    params, direction = draw(generator), draw(generator)
    before = bits(params)
    perturbation = perturbed(params, direction, 0.1, impl=impl)
    with pytest.raises(RuntimeError, match="epsilon is known once the block is entered"):
        _ = perturbation.epsilon
    with pytest.raises(RuntimeError, match="flip\\(\\) is for inside the block"):
        perturbation.flip()
    with perturbation:
        inside = bits(params)
        with pytest.raises(RuntimeError, match="already entered"):
            perturbation.__enter__()
        assert_bits(params, inside)
    with pytest.raises(RuntimeError, match="flip\\(\\) is for inside the block"):
        perturbation.flip()
    assert_bits(params, before)
    with perturbation:  # again, after it was left
        assert_bits(params, inside)
    assert_bits(params, before)


@impls
def test_one_block_inside_another(impl, generator):
    params, direction = draw(generator), draw(generator)
    before = bits(params)
    with perturbed(params, direction, 0.1, impl=impl) as outer:
        once = bits(params)
        with perturbed(params, draw(generator), 0.2, impl=impl) as inner:
            inner.flip()
        assert_bits(params, once)
        outer.flip()
    assert_bits(params, before)


@impls
def test_a_parameter_with_other_memory_is_not_written(impl, generator):
    """``theta.data = ...`` inside the block: an error, no write into the memory it had, and the others restored."""
    params, direction = draw(generator, torch.float32), draw(generator, torch.float32)
    params = [torch.nn.Parameter(p) for p in params]
    before, graph = bits(params), params[3].square().sum()
    old, new = params[8].detach(), torch.full_like(params[8], 7)
    words = r"params\[8\] was given other memory inside the block"
    perturbation = perturbed(params, direction, 0.1, impl=impl)
    perturbation.__enter__()
    inside = old.clone()
    params[8].data = new
    moved = bits(params)
    with pytest.raises(RuntimeError, match=words):
        perturbation.flip()
    assert_bits(params, moved)
    with pytest.raises(RuntimeError, match=words):
        perturbation.__exit__(None, None, None)
    assert torch.equal(old, inside)
    assert (params[8] == 7).all()
    assert_bits(params[:8] + params[9:], before[:8] + before[9:])
    graph.backward()
    with perturbed(params, direction, 0.1, impl=impl):  # it can be entered again
        assert (params[8] != 7).any()


@impls
def test_a_direction_with_other_memory_is_not_read(impl, generator):
    theta, v = draw(generator, torch.float32, [(4,), (4,)])
    before, other = bits([theta]), torch.ones(4)
    with perturbed({"a": theta}, {"a": v}, 0.1, impl=impl) as perturbation:
        v.data = other
        with pytest.raises(RuntimeError, match=r"direction\['a'\] was given other memory inside the block"):
            perturbation.flip()
    assert_bits([theta], before)


@impls
def test_zero_direction_gives_a_zero_quotient(impl):
    weight = torch.eye(3)
    with perturbed([weight], [torch.zeros(3, 3)], 0.01, impl=impl) as perturbation:
        plus = weight.clone()
        perturbation.flip()
        minus = weight.clone()
    assert torch.equal(plus, weight)
    assert torch.equal(minus, weight)
    assert perturbation.epsilon.item() == torch.tensor(0.01).item()
    labels = torch.full((3, 3), 1 / 3)
    assert torch.equal(
        finite_difference_labels(plus, minus, labels, perturbation.epsilon, step=5.0, project=False), labels
    )


@impls
@dtypes
def test_extreme_directions_have_a_finite_epsilon(impl, dtype):
    tiny = torch.tensor([torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps, 0.0], dtype=dtype)
    large = torch.tensor([torch.finfo(dtype).max, 0.0], dtype=dtype)
    for v in (tiny, large if dtype != torch.float64 else large.sqrt() / 2):
        theta = torch.tensor([1.0, 2.0], dtype=dtype)
        with perturbed([theta], [v], 1.0, impl=impl) as perturbation:
            assert perturbation.epsilon.isfinite()
            assert theta.isfinite().all()
            assert theta[1] == 2
        assert theta.tolist() == [1, 2]


@impls
def test_nan_in_the_direction_shows(impl):
    theta = torch.ones(3)
    with perturbed([theta], [torch.tensor([1.0, math.nan, 0.0])], 0.1, impl=impl) as perturbation:
        assert perturbation.epsilon.isnan()
    assert theta.tolist() == [1, 1, 1]


@impls
def test_norm_keeps_its_digits(impl, generator):
    # In float32 the small entries would be lost beside the large one.
    direction = [torch.tensor([4096.0]), torch.full((2_000_000,), 1e-2)]
    exact = math.sqrt(4096.0**2 + 2_000_000 * float(torch.tensor(1e-2)) ** 2)
    with perturbed([torch.zeros(1), torch.zeros(2_000_000)], direction, 1.0, impl=impl) as perturbation:
        assert abs(perturbation.epsilon.item() * exact - 1) < 1e-7


@pytest.mark.skipif(DEVICE != "cpu", reason="about threads of the CPU")
@kernels
def test_result_does_not_depend_on_threads(impl, generator):
    params, direction = draw(generator, torch.float32), draw(generator, torch.float32)
    threads, results = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            with perturbed(params, direction, 0.1, impl=impl) as perturbation:
                results.append([perturbation.epsilon, *copy(params)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@impls
def test_larger_than_the_cache(impl, generator):
    params, direction = draw(generator, torch.float32, [(4_000_000,)]), draw(generator, torch.float32, [(4_000_000,)])
    start = copy(params)
    with perturbed(params, direction, 10.0, impl=impl) as perturbation:
        torch.testing.assert_close(params[0], start[0] + perturbation.epsilon * direction[0])
        perturbation.flip()
        torch.testing.assert_close(params[0], start[0] - perturbation.epsilon * direction[0])
    assert_bits(params, bits(start))


@impls
def test_several_dtypes_in_one_list(impl, generator):
    params = [p for dtype in DTYPES for p in draw(generator, dtype, [(30,), (5, 7)])]
    direction = [torch.ones_like(p) for p in params]
    before = bits(params)
    with perturbed(params, direction, 1.0, impl=impl) as perturbation:
        assert perturbation.epsilon.dtype == torch.float64
        torch.testing.assert_close(perturbation.epsilon.item(), 1 / math.sqrt(4 * 65))
        for theta, start in zip(params, before, strict=True):
            expected = start.view(theta.dtype).double() + perturbation.epsilon
            eps = 2 * torch.finfo(theta.dtype).eps
            torch.testing.assert_close(theta.double(), expected, rtol=eps, atol=eps)
    assert_bits(params, before)


@impls
def test_any_strides(impl, generator):
    base = normal(generator, 6, 5, 4, 3)
    apart = normal(generator, 9, 8)
    params = [base.to(memory_format=torch.channels_last), apart[::2, 1::3], normal(generator, 4, 6).T]
    direction = [normal(generator, 6, 5, 4, 3), torch.ones(1).expand(5, 3), torch.ones(6, 4)]
    before, between = bits(params), apart.clone()
    with perturbed(params, direction, 1.0, impl=impl) as perturbation:
        torch.testing.assert_close(params[0], base + perturbation.epsilon * direction[0])
        perturbation.flip()
        torch.testing.assert_close(params[1], between[::2, 1::3] - perturbation.epsilon)
        torch.testing.assert_close(params[2], before[2].view(torch.float32) - perturbation.epsilon)
    assert_bits(params, before)
    assert torch.equal(apart, between)


@pytest.mark.skipif(DEVICE != "cpu", reason="memory of the CPU")
@impls
@pytest.mark.parametrize("edge", ["start", "end"])
def test_stays_within_its_memory(impl, edge, generator):
    shapes = [(5,), (1030,), (33, 3)]
    params = [guarded(p, edge) for p in draw(generator, torch.float32, shapes)]
    direction = [guarded(v, edge) for v in draw(generator, torch.float32, shapes)]
    before = bits(params)
    with perturbed(params, direction, 1.0, impl=impl) as perturbation:
        perturbation.flip()
    assert_bits(params, before)


@impls
def test_module_by_names(impl):
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2)).eval()
    inputs = torch.randn(5, 4)
    params = dict(model.named_parameters())
    direction = dict(zip(params, torch.autograd.grad(model(inputs).square().sum(), params.values()), strict=True))
    with perturbed(params, dict(reversed(direction.items())), 0.1, impl=impl) as perturbation, torch.no_grad():
        plus = model(inputs)
    moved = {name: p.detach() + perturbation.epsilon * direction[name] for name, p in params.items()}
    torch.testing.assert_close(plus, torch.func.functional_call(model, moved, inputs).detach())
    assert all(p.requires_grad and p.is_leaf for p in params.values())


@impls
def test_autograd_sees_the_parameters_as_they_are(impl):
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    earlier = weight.square().sum()
    with perturbed([weight], [torch.ones(2)], 0.1, impl=impl) as perturbation:
        stale, fresh = weight.square().sum(), weight.square().sum()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            earlier.backward(retain_graph=True)
        fresh.backward()
        torch.testing.assert_close(weight.grad, 2 * weight.detach())
        weight.grad = None
        perturbation.flip()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            stale.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stale.backward()
    earlier.backward()
    assert weight.grad.tolist() == [2, 4]


@impls
def test_inference_tensors_and_directions_with_a_graph(impl):
    with torch.inference_mode():
        theta = torch.ones(3)
        with perturbed([theta], [torch.ones(3)], 0.3, impl=impl):
            assert (theta > 1).all()
        assert theta.tolist() == [1, 1, 1]
    weight = torch.ones(3, requires_grad=True)
    (v,) = torch.autograd.grad((weight**3).sum(), weight, create_graph=True)
    with perturbed([weight], [v], 0.3, impl=impl) as perturbation:
        assert not perturbation.epsilon.requires_grad


@pytest.mark.parametrize("impl", [None, "reference"])
def test_tensors_that_are_a_part_of_a_longer_direction(impl):
    theta, v = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
    with perturbed([theta], [v], 0.5, norm=torch.tensor(10.0, dtype=torch.float64), impl=impl) as perturbation:
        torch.testing.assert_close(theta, torch.tensor([1.15, 2.2]))
        perturbation.flip()
        torch.testing.assert_close(theta, torch.tensor([0.85, 1.8]))
    assert theta.tolist() == [1.0, 2.0]
    torch.testing.assert_close(perturbation.epsilon, torch.tensor(0.05))
