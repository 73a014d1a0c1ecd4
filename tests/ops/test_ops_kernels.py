"""Every implementation that is not the reference, against float64 truth within the budget of kernel_checks.py."""

import itertools
import os
import threading
from collections.abc import Sequence

import pytest
import torch
from cases import CASE_LOSS_IDS, CASE_LOSSES, CASES, DEVICE, DTYPES, SIZES, Case, Draw, Shape, map_tensors, tensors, to
from guarded import guarded
from kernel_checks import check, strided
from poison import poisoned_memory
from torch import Tensor

from fastmeta.dispatch import NARROW_OUTPUTS
from fastmeta.losses import of
from fastmeta.ops.feature_similarity import gram_is_cheaper

CHILD = os.environ.get("FASTMETA_CHILD")  # "cpp" or "gpu": see test_instruction_sets.py and test_emulated_reads.py
TRITON_ALONE = ("feature_similarity", "finite_difference_labels")
EXPANDED: Shape = (9, 20, 17)
# Larger than one block of rows or columns, for several threads and for the products of larger heads.
LARGE = [(2049, 33, 10), (700, 129, 65), (300, 257, 300), (64, 515, 130)]

CPU_IMPLS = {None: ["cpp", "triton", "cuda"], "cpp": ["cpp"], "gpu": ["triton", "cuda"]}[CHILD]
IMPLS = CPU_IMPLS if DEVICE == "cpu" else ["triton", "cuda"]


def kernels(
    names: str,
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    shapes: Sequence[Shape] = ((1, 1, 1), (1, 1, 64)),
) -> pytest.MarkDecorator:
    """``names`` of case, loss, dtype and impl: every kernel there is, for these dtypes and one of these shapes."""
    found = {}
    named_cases = list(zip(CASE_LOSSES, CASE_LOSS_IDS, strict=True))
    for impl, dtype, ((case, loss), case_loss) in itertools.product(IMPLS, dtypes, named_cases):
        exists = impl != "cuda" or case.name not in TRITON_ALONE
        if exists and any(case.takes(impl, dtype, shape) for shape in shapes):
            values = {"case": case, "loss": loss, "dtype": dtype, "impl": impl}
            words = [case_loss if "loss" in names else case.name, impl]
            words += [str(dtype).removeprefix("torch.")] * ("dtype" in names)
            found["-".join(words)] = [values[name] for name in names.split()]
    return pytest.mark.parametrize(names.split(), list(found.values()), ids=list(found))


every_kernel = kernels("case loss dtype impl", DTYPES)


@pytest.fixture(autouse=True)
def one_thread():
    """Small tensors in one thread: on a shared machine the others are waited for. Tests of threads set their own."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def emulated(impl: str) -> bool:
    """Whether a kernel of the GPU runs on the CPU here: right, but slow."""
    return DEVICE == "cpu" and impl != "cpp"


def ready(case: Case, impl: str) -> None:
    """A missing implementation skips, or fails where a build was promised."""
    if impl not in case.operator.implementations(DEVICE):
        assert os.environ.get(f"FASTMETA_REQUIRE_{impl.upper()}") != "1", f"{case.name} has no {impl} kernel"
        pytest.skip(f"no {impl} kernel of it here")


def meant(case: Case, impl: str, dtype: torch.dtype, shapes: list[Shape]) -> list[Shape]:
    """The shapes that the implementation takes; where it is slow, the last of them."""
    taken = [shape for shape in shapes if case.takes(impl, dtype, shape)]
    return [few_rows(impl, shape) for shape in taken[-1:]] if emulated(impl) else taken


def few_rows(impl: str, shape: Shape) -> Shape:
    """Under Triton's interpreter rows for two or three tiles, one of them in part: more would repeat them."""
    n, d, c = shape
    return (min(n, 5 if c > 128 else 17), d, c) if impl == "triton" and emulated(impl) else shape


def variants(case: Case, impl: str, draw: Draw) -> tuple[str, ...]:
    """Those of the case; where the implementation is slow, one of them."""
    return (draw.choice(case.variants),) if emulated(impl) else case.variants


def large(case: Case, impl: str, dtype: torch.dtype) -> list[Shape]:
    shapes = [(300, 33, 10), (37, 70, 65), (9, 130, 300)] if emulated(impl) else LARGE
    return [shape for shape in shapes if case.takes(impl, dtype, shape)]


def shapes(draw: Draw) -> list[tuple[int, int, int]]:
    """Each size as N, as D and as C, beside two others at random."""
    found = []
    for size, place in itertools.product(SIZES, range(3)):
        shape = [draw.choice(SIZES) for _ in range(3)]
        shape[place] = size
        found.append(tuple(shape))
    return found


@every_kernel
def test_matches_float64(case, loss, dtype, impl, generator):
    ready(case, impl)
    draw = Draw(generator, dtype)
    for shape in shapes(draw)[:: 12 if emulated(impl) else 8 if CHILD else 1]:
        shape = few_rows(impl, shape)
        if case.narrow and impl == "cuda":
            shape = (*shape[:2], 1 + shape[2] % NARROW_OUTPUTS)
        elif not case.takes(impl, dtype, shape):
            shape = (*shape[:2], NARROW_OUTPUTS + shape[2])
        variant = draw.choice(case.variants)
        arguments = case.arguments(draw, shape, loss, variant)
        check(case, arguments, impl, f"{case.name} {shape} {loss} {variant!r} {dtype} {impl}")


@every_kernel
def test_matches_float64_on_large_shapes(case, loss, dtype, impl, generator):
    ready(case, impl)
    draw = Draw(generator, dtype)
    torch.set_num_threads(2)
    numbered = list(enumerate(large(case, impl, dtype)))
    # Every other shape; the others with the next loss or type.
    first = (case.losses.index(loss) + DTYPES.index(dtype)) % 2
    for i, shape in numbered[first::2] or numbered:
        variant = case.variants[i % len(case.variants)]
        arguments = case.arguments(draw, shape, loss, variant)
        check(case, arguments, impl, f"{case.name} {shape} {loss} {variant!r} {dtype} {impl}")


@every_kernel
@pytest.mark.parametrize("kind", ["transposed", "row-stride", "column-step", "row-step", "offset"])
def test_strides(case, loss, dtype, kind, impl, generator):
    ready(case, impl)
    draw = Draw(generator, dtype)
    for variant in variants(case, impl, draw):
        for shape in meant(case, impl, dtype, [(5, 19, 6), (33, 16, 16), (9, 40, 35)]):
            plain = case.arguments(draw, shape, loss, variant)
            arguments = map_tensors(lambda t: strided(t, kind), plain)
            check(case, arguments, impl, f"{case.name} {shape} {loss} {variant!r} {dtype} {impl}", plain)


@kernels("case loss dtype impl", DTYPES, [EXPANDED])
@pytest.mark.parametrize("axis", [0, 1, "both"])
def test_expanded_with_stride_zero(case, loss, dtype, axis, impl, generator):
    ready(case, impl)
    draw = Draw(generator, dtype)

    def expand(tensor: Tensor) -> Tensor:
        for dim in range(tensor.dim()) if axis == "both" else [axis]:
            if dim < tensor.dim():
                tensor = tensor.narrow(dim, 0, 1).expand(tensor.shape)
        return tensor

    for variant in variants(case, impl, draw):
        arguments = map_tensors(expand, case.arguments(draw, EXPANDED, loss, variant))
        check(case, arguments, impl, f"{case.name} {loss} {variant!r} {dtype} {impl}")


@every_kernel
@pytest.mark.parametrize("shape", [(0, 5, 3), (4, 0, 3), (0, 0, 3), (3, 4, 0), (0, 4, 0)], ids=str)
def test_empty(case, loss, dtype, shape, impl, generator):
    ready(case, impl)
    if not case.takes(impl, dtype, shape):
        pytest.skip(f"{impl} is not meant for {shape} in {dtype}")
    for variant in case.variants:
        if "classes" in variant and shape[2] == 0:
            continue
        arguments = case.arguments(Draw(generator, dtype), shape, loss, variant)
        check(case, arguments, impl, f"{case.name} {shape} {loss} {variant!r} {dtype} {impl}")


@every_kernel
@pytest.mark.parametrize("extreme", ["huge", "one-hot", "equal", "spread"])
def test_extreme_logits(case, loss, dtype, extreme, impl, generator):
    ready(case, impl)
    draw = Draw(generator, dtype)

    def logits(n: int, c: int) -> Tensor:
        values = {
            "huge": lambda: 1e4 * torch.sign(draw.normal(n, c)),
            "one-hot": lambda: torch.where(torch.arange(c) == draw.classes(n, c).cpu()[:, None], 1e4, -1e4),
            "equal": lambda: torch.full((n, c), -1e4),
            "spread": lambda: draw.normal(n, c, scale=50.0),
        }
        return values[extreme]().to(dtype).to(DEVICE)

    shapes = meant(case, impl, dtype, [(7, 9, 5), (18, 20, 33), (40, 17, 200)])
    for variant, shape in itertools.product(variants(case, impl, draw), shapes):
        if "head" in variant:
            continue
        arguments = case.arguments(draw, shape, loss, variant)
        for name in ("logits", "logits_plus", "logits_minus"):
            if name in arguments:
                arguments[name] = logits(shape[0], shape[2])
        if dtype == torch.float16 and loss == "mse":  # sums of 2 (f - y) z must stay below 65,504
            arguments["logits"] = arguments["logits"] / 1024
        check(case, arguments, impl, f"{case.name} {shape} {loss} {variant!r} {dtype} {impl}")


@every_kernel
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_numbers_end_where_the_reference_has_them(case, loss, dtype, bad, impl, generator):
    """In results per row they stay in their row; sums over rows do not lose them, even at a weight of zero."""
    ready(case, impl)
    draw = Draw(generator, dtype)
    for shape in meant(case, impl, dtype, [(6, 5, 4), (21, 18, 17), (70, 33, 40)]):
        for variant in variants(case, impl, draw):
            for name, symbols in case.shapes.items():
                arguments = case.arguments(draw, shape, loss, variant)
                target = arguments.get(name)
                if not isinstance(target, Tensor) or not target.is_floating_point() or symbols[0] != "N":
                    continue
                note = f"{bad} in {name}: {case.name} {shape} {loss} {variant!r} {dtype} {impl}"
                clean = case.call(arguments, impl)
                row = draw.integer(0, shape[0])
                dirty = arguments | {name: target.clone()}
                dirty[name][(row, *(draw.integer(0, size) for size in target.shape[1:]))] = bad
                if dirty.get("weights") is not None and name != "weights":
                    dirty["weights"] = dirty["weights"].clone()
                    dirty["weights"][row] = 0
                with poisoned_memory():
                    got = case.call(dirty, impl)
                for g, c, r in zip(got, clean, case.call(dirty, "reference"), strict=True):
                    if case.per_row:
                        others = torch.arange(shape[0], device=DEVICE) != row
                        assert torch.equal(g[others], c[others]), f"left its row, {note}"
                        g, r = g[row], r[row]
                    assert torch.equal(g.isfinite(), r.isfinite()), note
                    # inf times what a half type rounds to 0 is NaN there and inf in float32: only NaN is compared.
                    assert bad == bad or torch.equal(g.isnan(), r.isnan()), note


@kernels("case loss impl")
def test_logits_of_minus_infinity_have_probability_zero(case, loss, impl, generator):
    """A mask over classes is finite work, not NaN."""
    ready(case, impl)
    draw = Draw(generator, torch.float32)
    for shape in meant(case, impl, torch.float32, [(9, 8, 3), (9, 8, 17), (9, 8, 40)]):
        for variant in variants(case, impl, draw):
            arguments = case.arguments(draw, shape, loss, variant)
            if "head" in variant or (loss is not None and not of(loss).has_softmax):
                continue
            for name in ("logits", "logits_plus", "logits_minus"):
                if name in arguments:
                    arguments[name][::2, 1] = float("-inf")
            check(case, arguments, impl, f"{case.name} {loss} {variant!r} {impl}")


@kernels("case dtype impl", [torch.float32, torch.bfloat16])
def test_deterministic_and_independent_of_the_number_of_threads(case, dtype, impl, generator):
    ready(case, impl)
    draw = Draw(generator, dtype)
    for shape in meant(case, impl, dtype, [(33, 20, 10), *large(case, impl, dtype)[:3]]):
        arguments = case.arguments(draw, shape, case.losses[0], case.variants[0])
        for threads in (1, 2, 3) if impl == "cpp" else (1,):
            torch.set_num_threads(threads)
            note = f"{case.name} {shape} {dtype} {impl} with {threads} threads"
            first, again = case.call(arguments, impl), case.call(arguments, impl)
            assert all(map(torch.equal, first, again)), note
            check(case, arguments, impl, note)


@kernels("case impl")
def test_calls_from_several_threads(case, impl, generator):
    ready(case, impl)
    if emulated(impl):
        pytest.skip("neither Triton's interpreter nor the emulator is for several threads")
    draw = Draw(generator, torch.float32)
    jobs = [case.arguments(draw, shape, case.losses[0], case.variants[0]) for shape in [(64, 20, 10), (40, 30, 70)]]
    expected = [case.call(job, impl) for job in jobs]
    wrong: list[str] = []

    def work(k: int, impl: str = impl, jobs: list = jobs, expected: list = expected, wrong: list = wrong) -> None:
        for _ in range(50):
            for got, want in zip(case.call(jobs[k % 2], impl), expected[k % 2], strict=True):
                if not torch.allclose(got, want, rtol=1e-4, atol=1e-4):
                    wrong.append(f"thread {k}")

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@kernels("case loss impl")
def test_lazy_negation_is_resolved(case, loss, impl, generator):
    """``x.conj().imag`` is a view that says "negate me": its memory holds the opposite sign."""
    ready(case, impl)
    draw = Draw(generator, torch.float32)

    def negative(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        view = torch.complex(torch.zeros_like(tensor), -tensor).conj().imag
        assert view.is_neg()
        return view

    for variant in variants(case, impl, draw):
        plain = to(case.arguments(draw, (7, 9, 5), loss, variant), torch.float32)
        for named in (impl, None):
            arguments = map_tensors(negative, plain)
            for got, want in zip(case.call(arguments, named), case.call(plain, named), strict=True):
                torch.testing.assert_close(got, want)


@kernels("case impl")
def test_a_result_is_memory_of_its_own(case, impl, generator):
    ready(case, impl)
    for variant in case.variants:
        arguments = case.arguments(Draw(generator, torch.float32), (6, 6, 6), case.losses[0], variant)
        addresses = {tensor.untyped_storage().data_ptr() for tensor in tensors(arguments)}
        first, second = case.call(arguments, impl), case.call(arguments, impl)
        for result in first:
            assert result.untyped_storage().data_ptr() not in addresses
        for a, b in zip(first, second, strict=True):
            assert a.data_ptr() != b.data_ptr()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_unnamed_implementation_is_the_kernel(case, generator):
    """With nothing to differentiate, impl=None gives the kernel's bits; so do ``nn.Parameter`` and inference mode."""
    there = case.operator.implementations(DEVICE)
    impl = "cpp" if DEVICE == "cpu" else "cuda" if "cuda" in there else "triton"
    ready(case, impl)
    draw = Draw(generator, torch.float32)
    arguments = case.arguments(draw, (19, 23, 11), case.losses[0], case.variants[0])
    expected = case.call(arguments, impl)
    with torch.no_grad():
        parameters = map_tensors(lambda t: torch.nn.Parameter(t) if t.is_floating_point() and t.dim() else t, arguments)
        results = [case.call(arguments), case.call(parameters)]
    with torch.inference_mode():
        results.append(case.call(arguments))
    for result in results:
        for got, want in zip(result, expected, strict=True):
            assert torch.equal(got, want)
            assert not got.requires_grad


@pytest.mark.parametrize("impl", [impl for impl in IMPLS if impl != "cuda"])
def test_feature_similarity_takes_the_cheaper_order(impl, generator):
    """Both orders are within budget on both sides of the turning point, whichever the kernel takes."""
    case = next(case for case in CASES if case.name == "feature_similarity")
    ready(case, impl)
    draw = Draw(generator, torch.float32)
    for count_u, count_h, d, c in [(30, 40, 300, 200), (300, 200, 20, 10), (1, 1, 64, 64), (64, 64, 1, 1)]:
        assert gram_is_cheaper(count_u, count_h, d, c) == (c > 10)
        arguments = {
            "features_u": draw.normal(count_u, d),
            "features_h": draw.normal(count_h, d),
            "residual_h": draw.normal(count_h, c),
        }
        for bias in (True, False):
            check(case, arguments | {"bias": bias}, impl, f"{count_u, count_h, d, c} bias={bias}")


if CHILD:  # a fault would end pytest: in a process of its own, see test_instruction_sets.py

    @every_kernel
    def test_reads_nothing_beyond_its_arguments(case, loss, dtype, impl, generator):
        ready(case, impl)
        draw = Draw(generator, dtype)
        for shape in [(3, 7, 5), (17, 33, 10), (5, 65, 31), (1, 1, 1), (40, 9, 129)]:
            if not case.takes(impl, dtype, shape):
                continue
            shape = few_rows(impl, shape)
            for variant, edge in itertools.product(variants(case, impl, draw), ("start", "end")):
                plain = case.arguments(draw, shape, loss, variant)
                arguments = map_tensors(lambda t, edge=edge: guarded(t, edge), plain)
                check(case, arguments, impl, f"{case.name} {shape} {loss} {variant!r} {dtype} {impl}", plain)
