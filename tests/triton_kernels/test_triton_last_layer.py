"""The last-layer operators' forms on a GPU or under Triton's interpreter, each forced, at many small shapes."""

import contextlib
import math
from collections.abc import Iterator

import pytest
import torch
from cases import CASES, DEVICE, Case, Draw, map_tensors
from kernel_checks import check, strided
from torch import Tensor

from fastmeta import Head, ops
from fastmeta.losses import LOSSES

pytest.importorskip("triton")
from fastmeta.triton_kernels import _last_layer, _rule, hvp
from fastmeta.triton_kernels._program import Product

NAMES = ("per_example_dot", "label_gradient", "last_layer_gradient", "hessian_vector_product")
LAST_LAYER = [case for case in CASES if case.name in NAMES]
SUMS = [case for case in LAST_LAYER if not case.per_row]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
operators = pytest.mark.parametrize("case", LAST_LAYER, ids=lambda case: case.name)
sums = pytest.mark.parametrize("case", SUMS, ids=lambda case: case.name)
forms = pytest.mark.parametrize("form", _rule.FORMS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
losses = pytest.mark.parametrize("loss", LOSSES)
softmax_losses = pytest.mark.parametrize("loss", ["cross_entropy", "mse_probs"])
kinds = pytest.mark.parametrize("kind", ["transposed", "row-stride", "column-step", "row-step", "offset"])
# Tile edges: one of everything, around 16, operands that are aligned and that are not.
SHAPES = [(1, 1, 1), (17, 5, 3), (16, 64, 16), (5, 130, 127), (20, 24, 128)]
LONG = 9000  # classes that no program holds

pytestmark = pytest.mark.skipif(
    "triton" not in LAST_LAYER[0].operator.implementations(DEVICE), reason="no Triton kernel here"
)


@contextlib.contextmanager
def settings(form: str | None = None, limit: int | None = None) -> Iterator[None]:
    """A form, with slabs of at most so many bytes."""
    with contextlib.ExitStack() as stack:
        if form is not None:
            stack.enter_context(_rule.force(form))
        if limit is not None:
            stack.enter_context(_rule.slab_limit(limit))
        yield


def plan(case: Case, arguments: dict) -> object:
    """What would run."""
    from importlib import import_module

    return import_module(f"fastmeta.triton_kernels.{case.operator.triton}").plan(*case.raw(arguments))


def products(case: Case, arguments: dict) -> list[Product]:
    return [step for step in plan(case, arguments).steps if isinstance(step, Product)]


@dtypes
@losses
@forms
@operators
def test_forms(case, form, loss, dtype, generator):
    draw = Draw(generator, dtype)
    rounded = form == "rows" and dtype != torch.float32
    with settings(form):
        for shape in SHAPES[draw.integer(0, 2) :: 2]:
            if rounded and shape[2] < 16:
                continue  # products are rounded as in eager PyTorch, whose error in a few entries may be 0 by chance
            variant = draw.choice(case.variants)
            note = f"{form} {case.name} {shape} {loss} {variant!r} {dtype}"
            check(case, case.arguments(draw, shape, loss, variant), "triton", note)


@kinds
@forms
@operators
def test_strides(case, form, kind, generator):
    """What the library cannot read is copied first; what a kernel reads is not."""
    draw = Draw(generator, torch.float32)
    variant = draw.choice(case.variants)
    plain = case.arguments(draw, (37, 24, 40), "mse_probs", variant)
    with settings(form, limit=1):
        given = map_tensors(lambda t: strided(t, kind), plain)
        check(case, given, "triton", f"{form} {kind} {variant!r}", plain)


@forms
@operators
def test_no_features(case, form, generator):
    """The products are their biases, strided ones too."""
    draw = Draw(generator, torch.float32)
    for variant in case.variants:
        plain = case.arguments(draw, (9, 0, 40), draw.choice(tuple(LOSSES)), variant)
        given = map_tensors(lambda t: strided(t, "column-step"), plain)
        with settings(form):
            check(case, given, "triton", f"{form} {variant!r}", plain)


def test_biases_begin_at_16_bytes():
    """The library reads them so; one that does not is copied first."""
    case = next(case for case in LAST_LAYER if case.name == "label_gradient")
    flat = torch.zeros(201, dtype=torch.bfloat16, device=DEVICE)
    h, f, v = (torch.zeros(size, dtype=torch.bfloat16, device=DEVICE) for size in ((9, 8), (9, 200), (200, 8)))
    for bias, scratch in ((flat[:200], False), (flat[1:], True)):
        given = {"features": h, "logits": f, "direction_weight": v, "direction_bias": bias, "loss": "cross_entropy"}
        (product,) = products(case, given)
        assert (product.bias.kind == "scratch") == scratch


@operators
def test_shapes_at_random(case, generator):
    draw = Draw(generator, torch.float32)
    for _ in range(6):
        shape = draw.integer(0, 40), draw.integer(0, 40), draw.integer(1, 140)
        given = case.arguments(draw, shape, draw.choice(tuple(LOSSES)), draw.choice(case.variants))
        with settings(limit=draw.choice((1, 2000, 1 << 30))):
            check(case, given, "triton", f"{case.name} {shape}")


@losses
@operators
def test_long_rows(case, loss, generator):
    """Logits that rise, fall and are masked along the row: a group's maximum changes often, or late, or never."""
    draw = Draw(generator, torch.float32)
    variant = draw.choice([v for v in case.variants if "head" not in v])
    given = case.arguments(draw, (6, 4, LONG), loss, variant)
    f = given["logits"]
    ramp = torch.linspace(-60, 60, LONG, device=DEVICE)
    f[0] += ramp
    f[1] -= ramp
    if loss in ("cross_entropy", "mse_probs"):
        f[2, : LONG - 7] = float("-inf")
        f[3, 5:] = float("-inf")
        f[4, ::2] = float("-inf")
    check(case, given, "triton", f"{loss} {variant!r}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@softmax_losses
@operators
def test_long_rows_of_half_types(case, loss, dtype, generator):
    draw = Draw(generator, dtype)
    variant = draw.choice(case.variants)
    check(case, case.arguments(draw, (3, 4, LONG), loss, variant), "triton", f"{loss} {variant!r} {dtype}")


@softmax_losses
def test_sums_of_one_sign_over_a_long_row(loss, generator):
    case = LAST_LAYER[[one.name for one in LAST_LAYER].index("per_example_dot")]
    given = case.arguments(Draw(generator, torch.float32), (4, 4, LONG), loss, "bias")
    given["direction_bias"] += 20
    check(case, given, "triton", loss)


@dtypes
def test_tiles(dtype):
    """Sixteen entries a thread, whole rows as long as a program holds them; longer ones in steps of 16 bytes twice."""
    group = 16 // dtype.itemsize
    for classes in (1, 16, 17, 200, 512, 513, 1000, 4096, 8192):
        tile = _last_layer.row_tile(classes, dtype)
        assert tile.classes >= classes
        assert tile.rows * tile.classes == max(512, tile.classes)
        assert 512 * tile.warps == tile.rows * tile.classes
        assert tile.group == group
    assert _last_layer.row_tile(8193, dtype) == (1, 2048, group, 32 // group)


@dtypes
@operators
def test_slabs_of_rows(case, dtype, generator):
    """A limit of one byte: the last slab is shorter; sums of 16-bit results add up in float32, damping once."""
    draw = Draw(generator, dtype)
    for variant in case.variants:
        given = case.arguments(draw, (38, 2, 30), draw.choice(tuple(LOSSES)), variant)
        with settings("rows", limit=1):
            check(case, given, "triton", f"{variant!r} {dtype}")


@losses
@pytest.mark.parametrize("variant", ["bias", "head bias", "head head-without-bias classes"])
def test_slabs_are_the_whole(variant, loss, generator):
    case = next(case for case in LAST_LAYER if case.name == "per_example_dot")
    given = case.arguments(Draw(generator, torch.float32), (70, 6, 30), loss, variant)
    with settings("rows"):
        whole, steps = case.call(given, "triton")[0], len(plan(case, given).steps)
    with settings("rows", limit=2000):
        assert len(plan(case, given).steps) > steps
        # Not to the last bit: the products of a slab may add up in another order.
        torch.testing.assert_close(case.call(given, "triton")[0], whole, rtol=1e-4, atol=1e-4)


def test_slabs_of_sums_are_not_smaller_than_they_are_worth():
    with _rule.slab_limit(1):
        assert _rule.slab_rows(10**6, 2000, least=4 * 64) == 256
        assert _rule.slab_rows(100, 2000, least=4 * 64) == 100
    with _rule.slab_limit(2 << 20):
        assert _rule.slab_rows(10**6, 4000, least=4) == (2 << 20) // 4000 // 16 * 16
        assert _rule.slab_rows(0, 10) == 1
        assert _rule.slab_rows(5, 0) == 5


@sums
def test_columns_are_summed_in_passing_or_apart(case, generator):
    """In the product where that is a launch less; by one with ones where there are slabs, damping or no features."""
    draw = Draw(generator, torch.bfloat16)
    variant = "bias weights" if case.name == "hessian_vector_product" else "weights unnormalized"
    given = case.arguments(draw, (20, 8, 40), "cross_entropy", variant)
    with settings("rows"):
        assert [step.column_sums is not None for step in products(case, given)][-1]
    with settings("rows", limit=1):
        large = case.arguments(draw, (80, 8, 40), "cross_entropy", variant)
        assert all(step.column_sums is None for step in products(case, large))
    if case.name == "hessian_vector_product":
        damped = given | {"damping": 0.5}
        assert all(step.column_sums is None for step in products(case, damped))


@losses
@operators
def test_sums_apart(case, loss, generator):
    """The program for a library without sums in passing."""
    if case.per_row:
        pytest.skip("no sums")
    draw = Draw(generator, torch.float32)
    given = case.arguments(draw, (20, 8, 40), loss, case.variants[1])
    module_plan = hvp.plan if case.name == "hessian_vector_product" else None
    if module_plan is None:
        from fastmeta.triton_kernels.last_layer_gradient import plan as module_plan
    raw = case.raw(given)
    count = sum(not isinstance(one, int | float) for one in raw)
    one, other = (module_plan(*raw, sums_apart=apart).run(raw[:count], raw[count:]) for apart in (False, True))
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@dtypes
@pytest.mark.parametrize("loss", ["binary_cross_entropy", "mse"])
def test_label_gradients_without_a_softmax_are_a_product(loss, dtype, generator):
    """Whatever the logits are, and whatever lies in the memory of the result."""
    case = next(case for case in LAST_LAYER if case.name == "label_gradient")
    for variant, form in [("bias", "rows"), ("scale", "rows"), ("head bias scale", "rows"), ("bias", "fused")]:
        given = case.arguments(Draw(generator, dtype), (9, 8, 30), loss, variant)
        with settings(form):
            check(case, given, "triton", f"{loss} {variant!r} {dtype}")
            before = case.call(given, "triton")[0]
            if "head" not in variant:
                given["logits"].fill_(float("nan"))
                assert torch.equal(case.call(given, "triton")[0], before)


@losses
@forms
def test_scales(form, loss, generator):
    """One plan for all of them: an int, zero and 1 as well."""
    case = next(case for case in LAST_LAYER if case.name == "label_gradient")
    given = case.arguments(Draw(generator, torch.float32), (9, 8, 30), loss, "bias")
    with settings(form):
        for scale in (1, 0.25, 0, -3, 1e-20):
            check(case, given | {"scale": scale}, "triton", f"{form} {loss} {scale}")
        for scale in (math.inf, math.nan):
            with pytest.raises(ValueError, match="scale must be finite"):
                ops.label_gradient(**given | {"scale": scale}, impl="triton")


@losses
@forms
@operators
def test_non_finite(case, form, loss, generator):
    """NaN and infinities come out in the rows where the reference has them, and nowhere else."""
    draw = Draw(generator, torch.float32)
    variant = next((v for v in case.variants if "weights" in v), "bias") if not case.per_row else "bias"
    for bad in (float("nan"), float("inf"), float("-inf")):
        given = case.arguments(draw, (6, 8, 40), loss, variant)
        for name in ("features", "logits", "targets", "weights", "direction_bias"):
            if not isinstance(given.get(name), Tensor) or not given[name].is_floating_point():
                continue
            dirty = given | {name: given[name].clone()}
            dirty[name][(2, 3)[2 - dirty[name].dim() :]] = bad
            with settings(form):
                clean, got = (case.call(one, "triton") for one in (given, dirty))
            expected = case.call(dirty, "reference")
            note = f"{bad} in {name}, {form} {case.name} {loss}"
            for g, e, c in zip(got, expected, clean, strict=True):
                assert torch.equal(g.isfinite(), e.isfinite()), note
                assert bad == bad or torch.equal(g.isnan(), e.isnan()), note
                if case.per_row and name != "direction_bias":
                    others = torch.arange(6, device=DEVICE) != 2
                    assert torch.equal(g[others], c[others]), note


@pytest.mark.parametrize("classes", [40, LONG])
@softmax_losses
@operators
def test_masked_classes(case, loss, classes, generator):
    """-inf in all classes but one, and in most: probability 0, not NaN; nothing but -inf: NaN, in that row."""
    variant = "bias" if case.name != "last_layer_gradient" else ""
    given = case.arguments(Draw(generator, torch.float32), (5, 8, classes), loss, variant)
    given["logits"][:2, : classes - 3] = float("-inf")
    given["logits"][2, 1:] = float("-inf")
    for form in _rule.FORMS if classes <= 128 else ("rows",):
        with settings(form):
            check(case, given, "triton", f"{form} {loss}")
            masked = given | {"logits": given["logits"].clone()}
            masked["logits"][3] = float("-inf")
            for got in case.call(masked, "triton"):
                assert got[3].isnan().all() if case.per_row else got.isnan().all()
                assert not case.per_row or got[[0, 1, 2, 4]].isfinite().all()


@losses
@forms
@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("bad", [-1, 7, 2**40])
def test_a_class_that_does_not_exist(bad, head, loss, form):
    """An error on the CPU; on a GPU, where the check would be a wait, NaN in its row or sum."""
    h, w = torch.ones(3, 8, device=DEVICE), torch.ones(7, 8, device=DEVICE)
    f = Head(w) if head else h @ w.T
    classes = torch.tensor([0, bad, 1], device=DEVICE)
    calls = (
        lambda y: ops.last_layer_gradient(h, f, y, loss=loss, impl="triton"),
        lambda y: (ops.per_example_dot(h, f, y, w, loss=loss, impl="triton"),),
    )
    with settings(form):
        for call in calls:
            good = call(classes.clamp(0, 6))
            assert all(part.isfinite().all() for part in good)
            if DEVICE == "cpu":
                with pytest.raises(ValueError, match=r"classes in \[0, 7\)"):
                    call(classes)
            else:
                got = call(classes)
                assert all(part.isnan().any() for part in got)


@forms
def test_weight_zero_leaves_a_row_out(form, generator):
    case = next(case for case in LAST_LAYER if case.name == "last_layer_gradient")
    given = case.arguments(Draw(generator, torch.float32), (12, 8, 7), "cross_entropy", "weights unnormalized")
    given["weights"][::2] = 0
    kept = {name: value[1::2] if isinstance(value, Tensor) else value for name, value in given.items()}
    with settings(form):
        for all_rows, odd_rows in zip(case.call(given, "triton"), case.call(kept, "triton"), strict=True):
            torch.testing.assert_close(all_rows, odd_rows)


@pytest.mark.parametrize(("form", "limit"), [("rows", None), ("rows", 1), ("fused", None)])
@operators
def test_the_same_bits_again(case, form, limit, generator):
    variant = next((v for v in case.variants if "weights" in v), case.variants[0])
    given = case.arguments(Draw(generator, torch.bfloat16), (70, 8, 30), "cross_entropy", variant)
    with settings(form, limit):
        first, again = case.call(given, "triton"), case.call(given, "triton")
        assert all(map(torch.equal, first, again))


@pytest.mark.parametrize("damping", [0.0, 0.5])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", [(0, 3, 2), (4, 0, 2), (4, 3, 0), (4, 3, 2)], ids=str)
def test_the_bias_of_the_raw_product(shape, with_bias, damping):
    """Empty where the direction has none; without examples, the damping alone."""
    n, d, c = shape
    weight, bias = torch.ones(c, d, device=DEVICE), torch.ones(c, device=DEVICE)
    features, logits = torch.ones(n, d, device=DEVICE), torch.zeros(n, c, device=DEVICE)
    got_weight, got_bias = ops.hessian_vector_product(
        features, logits, weight, bias if with_bias else None, loss="mse", damping=damping, impl="triton"
    )
    tangent = d + with_bias
    torch.testing.assert_close(got_weight, (2 * n * tangent + damping) * weight)
    if with_bias:
        torch.testing.assert_close(got_bias, (2 * n * tangent + damping) * bias)
    else:
        assert got_bias is None


@pytest.mark.parametrize("damping", [-1.0, float("nan"), float("inf")])
def test_damping_is_checked(damping):
    one = torch.ones(1, 1, device=DEVICE)
    with pytest.raises(ValueError, match="damping must be finite and >= 0"):
        hvp.plan(one, one, None, one, None, None, 0, damping)
