"""Bad input: one error that names the argument, what was expected and what came. The same for every implementation."""

import re

import numpy
import pytest
import torch
from cases import CASES, READS_TARGETS, Arguments, Case, Draw, to
from torch import Tensor

from fastmeta import Head, checks, ops
from fastmeta.losses import LOSSES

SIZES = {"N": 5, "D": 4, "C": 3, "H": 6}
SHAPE = (5, 4, 3)
ERRORS = (TypeError, ValueError, RuntimeError)
cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def loss_of(case: Case) -> str | None:
    """The first that reads the targets, if there is one."""
    return next((loss for loss in case.losses if case.reads_targets(loss)), case.losses[0])


def good(case: Case, draw: Draw, variant: str | None = None) -> Arguments:
    """Every optional tensor given, and read where a loss reads it."""
    arguments = case.arguments(draw, SHAPE, loss_of(case), "bias weights" if variant is None else variant)
    if case.name == "feature_similarity":
        arguments |= {"features_h": draw.normal(6, 4), "residual_h": draw.normal(6, 3)}
    return arguments


def implementations(case: Case) -> list[str | None]:
    return [None, *case.operator.implementations("cpu")]


def taken(case: Case, arguments: Arguments, impl: str | None) -> Arguments:
    """In a dtype that the implementation takes."""
    exact = impl in (None, "reference") or case.takes(impl, torch.float64, SHAPE)
    return arguments if exact else to(arguments, torch.float32)


def refused(case: Case, arguments: Arguments, *words: str, kinds: tuple[type[Exception], ...] = ERRORS) -> None:
    """Every implementation refuses, in one error that says all these words."""
    texts = set()
    for impl in implementations(case):
        with pytest.raises(kinds) as caught:
            case.call(arguments, impl)
        error = caught.value
        for word in words:
            assert re.search(word, str(error)), f"{impl}: {word!r} not in {str(error)!r}"
        assert error.__suppress_context__ or error.__context__ is None, "one error, not a chain"
        texts.add((type(error), str(error)))
    assert len(texts) == 1, f"the implementations word it differently: {texts}"


def every_tensor(case: Case, draw: Draw):
    for name, symbols in case.shapes.items():
        arguments = good(case, draw)
        if arguments[name] is not None:
            yield name, symbols, arguments


@cases
def test_good_arguments_are_accepted(case, draw):
    for impl in implementations(case):
        case.call(taken(case, good(case, draw), impl), impl)


@cases
def test_wrong_rank(case, draw):
    for name, _, arguments in every_tensor(case, draw):
        value = arguments[name]
        for bad in (value.unsqueeze(0), value[0], torch.tensor(1.0).double()):
            if bad.shape == value.shape:
                continue
            refused(case, arguments | {name: bad}, name, "must be", re.escape(f"{list(bad.shape)}"))


@cases
def test_mismatched_sizes(case, draw):
    """One too many and one too few, in each dimension; the error names an argument that has this dimension."""
    for name, symbols, arguments in every_tensor(case, draw):
        for dim, symbol in enumerate(symbols):
            partners = [other for other, s in case.shapes.items() if symbol in s]
            if len(partners) < 2:
                continue
            for change in (-1, 1):
                shape = list(arguments[name].shape)
                shape[dim] += change
                bad = draw.uniform(*shape)
                refused(case, arguments | {name: bad}, "|".join(partners), r"must be .*got \[", kinds=(ValueError,))


@cases
@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str)
def test_dtypes_that_are_not_supported(case, draw, dtype):
    for name, _, arguments in every_tensor(case, draw):
        bad = arguments[name].to(dtype)
        refused(case, arguments | {name: bad}, name, str(dtype).removeprefix("torch."), kinds=(TypeError,))


@cases
def test_mixed_dtypes(case, draw):
    first = next(iter(case.shapes))
    for name, _, arguments in every_tensor(case, draw):
        if name != first:
            refused(case, arguments | {name: arguments[name].float()}, name, "float64", "float32", kinds=(TypeError,))


@cases
def test_mixed_devices(case, draw):
    for name, _, arguments in every_tensor(case, draw):
        bad = arguments | {name: arguments[name].to("meta")}
        for impl in (None, "reference"):
            with pytest.raises(ValueError, match=r"must be on (cpu|meta) like .*, got (meta|cpu)"):
                case.call(bad, impl)
        if "cpp" in case.operator.implementations():
            with pytest.raises(RuntimeError, match="impl='cpp' needs CPU tensors, got one on meta"):
                case.call(bad, "cpp")


@cases
@pytest.mark.parametrize("bad", [numpy.zeros((5, 4)), [[1.0]], 3, "text"], ids=["ndarray", "list", "int", "str"])
def test_not_a_tensor(case, draw, bad):
    for name, _, arguments in every_tensor(case, draw):
        refused(case, arguments | {name: bad}, f"{name} must be a tensor, got {type(bad).__name__}", kinds=(TypeError,))


@cases
def test_missing_tensors(case, draw):
    for name, _, arguments in every_tensor(case, draw):
        if name == "targets" and case.name in READS_TARGETS:
            refused(case, arguments | {name: None}, "targets are needed by .*, got None", kinds=(ValueError,))
        elif name not in ("weights", "direction_bias"):
            refused(case, arguments | {name: None}, f"{name} must be a tensor, got NoneType", kinds=(TypeError,))


@cases
def test_layouts_without_strides(case, draw):
    """A sparse tensor has no memory for a kernel to read: an error, not a crash."""
    if "cpp" not in case.operator.implementations():
        pytest.skip("the C++ extension has no kernel for it")
    for name, _, arguments in every_tensor(case, draw):
        for convert in (Tensor.to_sparse, Tensor.to_mkldnn):
            value = arguments[name]
            with pytest.raises(ERRORS):
                case.call(arguments | {name: convert(value.float() if convert is Tensor.to_mkldnn else value)}, "cpp")


@pytest.mark.parametrize("case", [case for case in CASES if case.losses[0]], ids=lambda case: case.name)
@pytest.mark.parametrize("loss", ["hinge", "", None, 0], ids=str)
def test_unknown_loss(case, draw, loss):
    words = f"loss must be one of {', '.join(LOSSES)}, got " + re.escape(repr(loss))
    refused(case, good(case, draw) | {"loss": loss}, words, kinds=(ValueError,))


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("label_gradient", "scale"),
        ("feature_similarity", "scale"),
        ("hessian_vector_product", "damping"),
        ("finite_difference_labels", "step"),
    ],
)
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), "must be finite, got nan"),
        (float("inf"), "must be finite, got inf"),
        ("1", "must be a number, got str"),
        (None, "must be a number, got NoneType"),
        (1j, "must be a number, got complex"),
    ],
    ids=str,
)
def test_numbers(name, argument, value, message, draw):
    case = next(case for case in CASES if case.name == name)
    refused(case, good(case, draw) | {argument: value}, f"{argument} {message}", kinds=(TypeError, ValueError))


def test_numbers_of_numpy_are_numbers(draw):
    case = next(case for case in CASES if case.name == "label_gradient")
    for impl in implementations(case):
        for value in (numpy.float32(0.5), numpy.float64(0.5), numpy.int64(2), 2):
            arguments = good(case, draw)
            given = taken(case, arguments, impl)
            got, want = case.call(given | {"scale": value}, impl), case.call(given | {"scale": float(value)}, impl)
            torch.testing.assert_close(got, want)


def test_negative_damping(draw):
    case = next(case for case in CASES if case.name == "hessian_vector_product")
    refused(case, good(case, draw) | {"damping": -1e-9}, "damping must be >= 0.0, got -1e-09", kinds=(ValueError,))
    for impl in implementations(case):
        case.call(taken(case, good(case, draw), impl) | {"damping": 0}, impl)


WITH_TARGETS = [case for case in CASES if "targets" in case.shapes and case.reads_targets(loss_of(case))]


@pytest.mark.parametrize("name", [case.name for case in WITH_TARGETS])
class TestTargets:
    @pytest.mark.parametrize("wrong", [-1, 3, 2**40, -(2**63)])
    @pytest.mark.parametrize("place", [0, 4])
    @pytest.mark.parametrize("head", ["", "head"])
    def test_class_out_of_range(self, name, wrong, place, head, draw):
        case = next(case for case in CASES if case.name == name)
        if head and name == "hessian_vector_product":
            pytest.skip("it takes no head")
        arguments = good(case, draw, f"classes bias weights {head}")
        arguments["targets"][place] = wrong
        words = re.escape(f"targets must be classes in [0, 3), got {wrong}")
        refused(case, arguments, words, kinds=(ValueError,))

    def test_shape_of_classes(self, name, draw):
        case = next(case for case in CASES if case.name == name)
        arguments = good(case, draw, "classes bias")
        for bad in (torch.zeros(4), torch.zeros(6), torch.zeros(5, 3), torch.zeros(5, 1), torch.zeros(())):
            words = re.escape(f"targets of int64 classes must be [N] = [5], got {list(bad.shape)}")
            refused(case, arguments | {"targets": bad.long()}, words, kinds=(ValueError,))

    def test_dtype_of_classes(self, name, draw):
        case = next(case for case in CASES if case.name == name)
        for dtype in (torch.int32, torch.uint8, torch.bool):
            bad = torch.zeros(5, dtype=dtype)
            words = r"targets must be \[N, C\] probabilities or \[N\] int64 classes, got " + str(dtype)[6:]
            refused(case, good(case, draw) | {"targets": bad}, words, kinds=(TypeError,))

    def test_no_class_is_right_for_no_outputs(self, name, draw):
        case = next(case for case in CASES if case.name == name)
        arguments = case.make(draw, (5, 4, 0), frozenset({"bias"}))
        arguments |= {"loss": loss_of(case), "targets": torch.zeros(5).long()}
        refused(case, arguments, r"targets must be classes in \[0, 0\), got 0", kinds=(ValueError,))


@pytest.mark.parametrize("name", ["last_layer_gradient", "per_example_dot", "label_gradient"])
class TestHead:
    @pytest.mark.parametrize(
        ("weight", "bias", "words"),
        [
            ((3, 5), (3,), r"head weight must be \[C, D\] with D = 4, got \[3, 5\]"),
            ((3,), (3,), r"head weight must be 2-D \[C, D\], got 1-D \[3\]"),
            ((3, 4), (4,), r"head bias must be \[C\] = \[3\], got \[4\]"),
            ((3, 4), (3, 1), r"head bias must be \[C\] = \[3\], got \[3, 1\]"),
            ((2, 4), (2,), r"(targets|direction_weight) must be .*got \[(5, 3|3, 4)\]"),
        ],
    )
    def test_shapes(self, name, weight, bias, words, draw):
        case = next(case for case in CASES if case.name == name)
        bad = Head(draw.normal(*weight), draw.normal(*bias))
        refused(case, good(case, draw) | {"logits": bad}, words, kinds=(ValueError,))

    def test_dtypes(self, name, draw):
        case = next(case for case in CASES if case.name == name)
        weight, bias = draw.normal(3, 4), draw.normal(3)
        for bad, words in (
            (Head(weight.float(), bias), "head weight must be float64 like features, got float32"),
            (Head(weight, bias.float()), "head bias must be float64 like features, got float32"),
            (Head(weight.long(), bias), "head weight must be float32, .*got int64"),
            (Head("weight", bias), "head weight must be a tensor, got str"),
            (Head(weight, 3), "head bias must be a tensor, got int"),
            ((weight, bias), "logits must be a tensor, got tuple"),
        ):
            refused(case, good(case, draw) | {"logits": bad}, words, kinds=(TypeError,))


def test_hessian_takes_no_head(draw):
    case = next(case for case in CASES if case.name == "hessian_vector_product")
    bad = good(case, draw) | {"logits": Head(draw.normal(3, 4))}
    refused(case, bad, "logits must be a tensor, got Head", kinds=(TypeError,))


@pytest.mark.parametrize(
    ("epsilon", "words"),
    [
        (0.0, "epsilon must be > 0, got 0"),
        (-1.0, "epsilon must be >= 0.0, got -1"),
        (float("nan"), "epsilon must be finite, got nan"),
        (None, "epsilon must be a number, got NoneType"),
        (torch.ones(2), r"epsilon must be a floating tensor of one element, got .*\[2\]"),
        (torch.ones(0), r"epsilon must be a floating tensor of one element, got .*\[0\]"),
        (torch.tensor(1), r"epsilon must be a floating tensor of one element, got int64 \[\]"),
    ],
    ids=str,
)
def test_epsilon(epsilon, words, draw):
    case = next(case for case in CASES if case.name == "finite_difference_labels")
    refused(case, good(case, draw) | {"epsilon": epsilon}, words, kinds=(TypeError, ValueError))


@pytest.mark.parametrize(
    "case", [case for case in CASES if "cpp" in case.operator.implementations()], ids=lambda case: case.name
)
def test_the_registered_operators_check_for_themselves(case, draw):
    """Called directly they refuse the same input, before memory is touched, and name the argument."""
    operator = getattr(torch.ops.fastmeta, case.name)
    for name, symbols, arguments in every_tensor(case, draw):
        value = arguments[name]
        partners = "|".join(other for other, s in case.shapes.items() if set(symbols) & set(s))
        bad = [value.unsqueeze(0)]
        for dim, symbol in enumerate(symbols):
            if sum(symbol in s for s in case.shapes.values()) > 1:
                bad.append(draw.uniform(*(n + (d == dim) for d, n in enumerate(value.shape))))
        for tensor in bad:
            with pytest.raises(RuntimeError, match=partners):
                operator(*case.raw(arguments | {name: tensor}))
        with pytest.raises(RuntimeError, match=f"{partners}|float"):
            operator(*case.raw(arguments | {name: value.int()}))
        if name != next(iter(case.shapes)):
            with pytest.raises(RuntimeError, match=name):
                operator(*case.raw(arguments | {name: value.float()}))
    if good(case, draw).get("targets") is not None:
        for wrong in (-1, 3, 2**40):
            arguments = good(case, draw, "classes bias")
            arguments["targets"][2] = wrong
            with pytest.raises(RuntimeError, match="targets"):
                operator(*case.raw(arguments))
    if case.losses[0]:
        for code in (-1, len(LOSSES), 2**40):
            given = list(case.raw(good(case, draw)))
            given[[a.name for a in operator.default._schema.arguments].index("loss")] = code
            with pytest.raises(RuntimeError, match="loss"):
                operator(*given)


def test_check_functions():
    x = torch.ones(2, 3)
    assert checks.matrix(x, "x", "[N, D]") is x
    assert checks.number(2, "x", low=0, high=2) == 2.0
    with pytest.raises(ValueError, match=r"x must be in \[0, 1\], got 2"):
        checks.number(2, "x", low=0, high=1)
    with pytest.raises(TypeError, match="x must be a number, got bool"):
        checks.number(True, "x")

    def broken_kernel():
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        checks.run(broken_kernel, (), lambda: None)


def test_order_of_arguments_and_names_are_fixed():
    """The signatures other people's tests and training loops rely on."""
    import inspect

    signatures = {
        "last_layer_gradient": "features logits targets weights=None * loss=cross_entropy impl=None",
        "per_example_dot": "features logits targets direction_weight direction_bias=None * "
        "loss=cross_entropy impl=None",
        "label_gradient": "features logits direction_weight direction_bias=None * "
        "loss=cross_entropy scale=1.0 targets=None impl=None",
        "hessian_vector_product": "features logits direction_weight direction_bias=None weights=None * "
        "loss=cross_entropy damping=0.0 targets=None impl=None",
        "feature_similarity": "features_u features_h residual_h * scale=1.0 bias=True impl=None",
        "finite_difference_labels": "logits_plus logits_minus labels epsilon * step project=True impl=None",
    }
    for name, expected in signatures.items():
        words, keyword_only = [], False
        for parameter in inspect.signature(getattr(ops, name)).parameters.values():
            if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
                words.append("*")
                keyword_only = True
            default = "" if parameter.default is parameter.empty else f"={parameter.default}"
            words.append(parameter.name + default)
        assert " ".join(words) == expected
