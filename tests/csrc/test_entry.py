"""The fast entry: which calls it takes, and which it leaves to the slow, right way.

The native functions of these tests write 42, so a result says which way it came.
"""

import native_of_tests
import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastmeta
from fastmeta import _extension, ops
from fastmeta.losses import LOSSES

pytestmark = pytest.mark.skipif(
    not hasattr(_extension._C, "Entry") or not _extension._C.has_exchange_api(), reason="this torch has no fast entry"
)


def new(name: str, programs_on: str = "cuda"):
    return _extension._C.Entry(name, programs_on, native_of_tests.address())


@pytest.fixture
def entry():
    return new("feature_similarity")


@pytest.fixture
def fast(monkeypatch):
    """The public operator in front of such an entry."""
    monkeypatch.setattr(ops.feature_similarity.__globals__["OPERATOR"], "entry", new("feature_similarity"))


def tensors():
    return torch.rand(4, 3), torch.rand(5, 3), torch.rand(5, 2)


def test_results_are_tensors_of_the_operator_s_shapes():
    n, d, c = 6, 5, 3
    h, f, y, v, b, w = (torch.rand(*shape) for shape in ((n, d), (n, c), (n, c), (c, d), (c,), (n,)))
    for head in ((f, None, None), (None, v, b), (None, v, None)):
        assert new("per_example_dot")(h, *head, y, v, b, 0).tolist() == [42.0] * n
        assert new("label_gradient")(h, *head, None, v, None, 0, 0.5).shape == (n, c)
        weight, bias = new("last_layer_gradient")(h, *head, y, w, 2)
        assert (weight.shape, bias.tolist()) == ((c, d), [2.0] * c)
    weight, bias = new("hessian_vector_product")(h, f, None, v, b, None, 1, 0.5)
    assert (weight.shape, bias.tolist()) == ((c, d), [1.0] * c)
    assert new("hessian_vector_product")(h, f, None, v, None, w, 1, 0)[1] is None
    assert new("feature_similarity")(h, h, f, 1.0, True).shape == (n, c)
    assert new("finite_difference_labels")(f, f, y, torch.ones(()), 0.5, False).shape == (n, c)


def test_a_result_owns_memory_of_torch(entry):
    result = entry(*tensors(), 1.0, True)
    assert (result.shape, result.dtype, result.is_contiguous()) == ((4, 2), torch.float32, True)
    assert result.is_leaf
    assert not result.requires_grad
    result.resize_(100)  # memory that only DLPack knows could not grow
    assert result.untyped_storage().resizable()
    with torch.inference_mode():
        assert entry(*tensors(), 1.0, True).is_inference()


def test_parameters_and_detached_tensors_are_taken(entry):
    u, h, r = tensors()
    parameter = torch.nn.Parameter(u)
    assert entry(parameter, h, r, 1.0, True) is NotImplemented
    assert entry(parameter.detach(), h, r, 1.0, True)[0, 0] == 42
    assert entry(torch.nn.Parameter(u, requires_grad=False), h, r, 1.0, True)[0, 0] == 42
    with torch.no_grad():
        assert entry(parameter, h, r, 1.0, True)[0, 0] == 42
    assert entry(u[1:, ::2], h[:, :2], r, 1.0, True).shape == (3, 2)


def test_none_examples(entry):
    u, h, r = tensors()
    assert entry(u[:0], h, r, 1.0, True).shape == (0, 2)


class Subclass(torch.Tensor):
    pass


class Watch(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


UNUSUAL = {
    "requires grad": lambda x: x.requires_grad_(),
    "subclass": lambda x: x.as_subclass(Subclass),
    "parameter subclass": lambda x: type("P", (torch.nn.Parameter,), {})(x, requires_grad=False),
    "negative": lambda x: torch._neg_view(x),
    "negative view": lambda x: torch.complex(x, x).conj().imag,
    "zero tensor": lambda x: torch._efficientzerotensor(x.shape),
    "sparse": lambda x: x.to_sparse(),
    "sparse rows": lambda x: x.to_sparse_csr(),
    "meta": lambda x: x.to("meta"),
    "nested": lambda x: torch.nested.nested_tensor([x]),
    "functional": lambda x: torch._to_functional_tensor(x),
    "mkldnn": lambda x: x.to_mkldnn(),
    "quantized": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
    "list": lambda x: x.tolist(),
    "None": lambda x: None,
    "one dimension": lambda x: x[0],
    "complex": lambda x: torch.complex(x, x),
    "integers": lambda x: x.long(),
}


@pytest.mark.parametrize("kind", UNUSUAL)
def test_an_unusual_tensor_goes_the_slow_way(kind, entry):
    if kind == "mkldnn" and not torch.backends.mkldnn.is_available():
        pytest.skip("torch without mkldnn")
    u, h, r = tensors()
    assert entry(UNUSUAL[kind](u), h, r, 1.0, True) is NotImplemented
    assert not torch.is_grad_enabled() or entry(*tensors(), 1.0, True)[0, 0] == 42  # no error was left behind


@pytest.mark.parametrize("position", [1, 2])
@pytest.mark.parametrize("kind", ["requires grad", "negative", "zero tensor", "subclass", "meta", "sparse", "list"])
def test_each_tensor_is_looked_at(kind, position, entry):
    arguments = list(tensors())
    arguments[position] = UNUSUAL[kind](arguments[position])
    assert entry(*arguments, 1.0, True) is NotImplemented


def test_who_watches_sees_the_call(entry):
    seen = []
    plain = tensors()

    def call(x):
        seen.append(entry(*plain, 1.0, True) is NotImplemented)
        return x

    x = torch.ones(3)
    torch.func.vmap(call)(x)
    torch.func.grad(lambda y: call(y).sum())(x)
    torch.func.jvp(call, (x,), (x,))
    torch.func.functionalize(call)(x)
    torch.jit.trace(call, (x,), check_trace=False)
    with torch.autograd.forward_ad.dual_level():
        call(x)
    with Watch():
        call(x)
    with FakeTensorMode():
        call(x)
    assert seen == [True] * len(seen)
    assert len(seen) >= 8
    assert entry(*tensors(), 1.0, True) is not NotImplemented


@pytest.mark.parametrize(
    "scale", [float("nan"), float("inf"), -float("inf"), "1", None, True, 1j, torch.ones(()), 10**400]
)
def test_an_unusual_number_goes_the_slow_way(scale, entry):
    assert entry(*tensors(), scale, True) is NotImplemented


def test_numbers():
    u, h, r = tensors()
    entry = new("feature_similarity")
    assert entry(u, h, r, 2, True) is not NotImplemented  # an integer is a number
    assert entry(u, h, r, 3.0, True) is NotImplemented, "the native function's own refusal"
    assert entry(u, h, r, 1.0, 1) is NotImplemented, "a flag is a bool"
    f = torch.rand(4, 2)
    for loss in (None, -1, len(LOSSES), 0.5, "mse"):
        assert new("per_example_dot")(u, f, None, None, f, torch.rand(2, 3), None, loss) is NotImplemented
    assert new("hessian_vector_product")(u, f, None, torch.rand(2, 3), None, None, 0, -0.5) is NotImplemented
    for count in (0, 1, 4, 6):
        assert entry(*[u] * count) is NotImplemented


def test_in_place_the_versions_count():
    table, m, v, steps = torch.ones(5), torch.zeros(5), torch.zeros(5), torch.zeros(5, dtype=torch.int32)
    index, grad = torch.tensor([1]), torch.ones(1)
    entry = new("masked_adam_")
    assert entry(table, index, grad, m, v, steps, 0.1, 0.9, 0.99, 1e-8, None, 2.0) is None
    assert table.tolist() == [42.0] * 5, "None is not a number"
    assert [t._version for t in (table, m, v, steps)] == [1, 1, 1, 1]
    assert [t._version for t in (index, grad)] == [0, 0]
    entry(table, index, grad, m, v, steps, 0.1, 0.9, 0.99, 1e-8, -7, None)
    assert table.tolist() == [-7.0] * 5
    for beta in (1.0, -0.1):
        assert entry(table, index, grad, m, v, steps, 0.1, beta, 0.99, 1e-8, None, None) is NotImplemented
    assert entry(table.requires_grad_(), index, grad, m, v, steps, 0.1, 0.9, 0.99, 1e-8, None, None) is NotImplemented


@pytest.mark.usefixtures("fast")
class TestPublicOperator:
    def test_goes_through_the_entry(self):
        assert ops.feature_similarity(*tensors())[0, 0] == 42

    def test_named_implementations_do_not(self):
        u, h, r = tensors()
        wanted = ops.feature_similarity(u, h, r, impl="reference")
        assert wanted[0, 0] != 42
        assert torch.allclose(ops.feature_similarity(u, h, r, impl="cpp"), wanted)
        with fastmeta.use_impl("cpp"):
            assert torch.allclose(ops.feature_similarity(u, h, r), wanted)

    def test_a_compiled_region_does_not(self):
        u, h, r = tensors()
        compiled = torch.compile(ops.feature_similarity, backend="eager", fullgraph=True)
        assert torch.allclose(compiled(u, h, r), ops.feature_similarity(u, h, r, impl="reference"))

    def test_derivatives_are_the_reference_s(self):
        u, h, r = tensors()
        u.requires_grad_()
        (got,) = torch.autograd.grad(ops.feature_similarity(u, h, r).sum(), u)
        (wanted,) = torch.autograd.grad(ops.feature_similarity(u, h, r, impl="reference").sum(), u)
        assert torch.equal(got, wanted)
        tangent = torch.func.jvp(lambda x: ops.feature_similarity(x, h, r), (u.detach(),), (torch.ones_like(u),))[1]
        assert tangent.abs().sum() > 0

    def test_errors_are_worded_by_the_slow_way(self):
        u, h, r = tensors()
        with pytest.raises(ValueError, match="scale must be finite"):
            ops.feature_similarity(u, h, r, scale=float("nan"))
        with pytest.raises(TypeError, match="features_u must be a tensor"):
            ops.feature_similarity([1.0], h, r)


def test_a_slow_entry_keeps_plans_too():
    slow = _extension.SlowEntry()
    arguments = (*tensors(), 1.0, True)
    assert slow(*arguments) is NotImplemented
    assert slow.find(*arguments) is None
    slow.keep(*arguments, "plan")
    assert slow.find(*arguments) == slow.find(*tensors(), 0.5, True) == "plan"
    assert slow.find(*tensors(), 0.5, False) is slow.find(*tensors(), 0.0, True) is None
    slow.forget()
    assert len(slow) == 0


def test_kept_plans_are_bounded():
    entry = new("feature_similarity", "cpu")
    h, r = torch.rand(5, 3), torch.rand(5, 2)
    memory = torch.rand(3 * 5000)
    for n in range(1, 4200):
        assert entry.keep(memory[: 3 * n].view(n, 3), h, r, 1.0, True, "plan")
        assert len(entry) <= 4096
    assert len(entry) == 4199 - 4096
