"""Tensors of more than 2^31 elements, on a GPU with room for them: every kernel's addresses are 64 bits wide."""

import pytest
import torch
from cases import DEVICE
from torch import Tensor

from fastmeta import Head, ops
from fastmeta.dispatch import NARROW_OUTPUTS, Operator

LIMIT = 2**31
BF16 = torch.bfloat16

pytestmark = [
    pytest.mark.skipif(DEVICE != "cuda" or not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.xdist_group("large"),  # one after the other
]

# N C, N D and C D beyond the limit, and N D C beyond it while no tensor is.
SHAPES = {
    "N C": (2**17 + 24, 16, 2**14),
    "N D": (2**21 + 24, 1024, 10),
    "C D": (40, 2**14, 2**17 + 24),
    "N D C": (1500, 1300, 1200),
}
ENDS = 20  # rows at each end that the truth is computed for

shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
impls = pytest.mark.parametrize("impl", ["triton", "cuda"])


@pytest.fixture(autouse=True)
def room():
    """Memory as it was, before and after; the tests hold up to some 25 GB."""
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GB of free memory")
    yield
    torch.cuda.empty_cache()


def normal(*size: int, scale: float = 1.0) -> Tensor:
    """Written in blocks: float32 numbers of this size would take twice the room."""
    out = torch.empty(size, dtype=BF16, device=DEVICE)
    for block in out.view(-1).split(2**28):
        block.copy_(torch.randn(block.shape, device=DEVICE) * scale)
    return out


def ends(tensor: Tensor) -> Tensor:
    return torch.cat([tensor[:ENDS], tensor[-ENDS:]])


def skip_unless_there(operator: str, impl: str, classes: int = 1) -> None:
    if impl not in Operator(operator).implementations(DEVICE):
        pytest.skip(f"{operator} has no {impl} kernel here")
    if impl == "cuda" and classes > NARROW_OUTPUTS:
        pytest.skip(f"the CUDA kernel takes up to {NARROW_OUTPUTS} classes")


def assert_close(got: Tensor, truth: Tensor) -> None:
    """As a whole; a wrong address is wrong by far more than bfloat16 rounds."""
    error = (got.double() - truth).norm() / truth.norm()
    assert error < 2e-2, f"relative error {error:.2g}"


@impls
@shapes
def test_rows(shape, impl):
    n, d, c = shape
    skip_unless_there("label_gradient", impl, c)
    h, f, v, b = normal(n, d), normal(n, c), normal(c, d, scale=d**-0.5), normal(c)
    got = ops.label_gradient(h, f, v, b, impl=impl)
    z = ends(h).double() @ v.double().T + b.double()
    p = ends(f).double().softmax(-1)
    mean = (p * z).sum(-1, keepdim=True)
    assert_close(ends(got), z - mean)
    del got
    targets = torch.randint(c, (n,), device=DEVICE)
    dot = ops.per_example_dot(h, f, targets, v, b, impl=impl)
    assert_close(ends(dot), (mean - z.gather(1, ends(targets).unsqueeze(1))).squeeze(1))


@impls
@shapes
def test_sums(shape, impl):
    """Only the rows at both ends have a weight: the sum is theirs, if their addresses are right."""
    n, d, c = shape
    skip_unless_there("last_layer_gradient", impl, c)
    h, f = normal(n, d), normal(n, c)
    targets = torch.randint(c, (n,), device=DEVICE)
    weights = torch.zeros(n, dtype=BF16, device=DEVICE)
    weights[:ENDS] = weights[-ENDS:] = 1.0
    weight, bias = ops.last_layer_gradient(h, f, targets, weights, impl=impl)
    r = ends(f).double().softmax(-1)
    r[torch.arange(2 * ENDS, device=DEVICE), ends(targets)] -= 1
    assert_close(bias, r.sum(0))
    rows = torch.cat([torch.arange(min(c, 64)), torch.arange(max(c - 64, 0), c)]).to(DEVICE)
    assert_close(weight[rows], r[:, rows].T @ ends(h).double())


@impls
def test_the_hessian_at_many_logits(impl):
    n, d, c = SHAPES["N C"] if impl == "triton" else SHAPES["N D"]
    skip_unless_there("hessian_vector_product", impl, c)
    h, f, v = normal(n, d), normal(n, c), normal(c, d, scale=d**-0.5)
    weights = torch.zeros(n, dtype=BF16, device=DEVICE)
    weights[:ENDS] = weights[-ENDS:] = 1.0
    got, _ = ops.hessian_vector_product(h, f, v, None, weights, impl=impl)
    p, z = ends(f).double().softmax(-1), ends(h).double() @ v.double().T
    curvature = p * (z - (p * z).sum(-1, keepdim=True))
    assert_close(got, curvature.T @ ends(h).double())


def test_logits_that_are_never_written():
    """A head whose logits would have more elements than any tensor here."""
    n, d, c = SHAPES["N C"]
    skip_unless_there("per_example_dot", "triton", c)
    h, head, v = normal(n, d), Head(normal(c, d, scale=0.5)), normal(c, d, scale=d**-0.5)
    targets = torch.randint(c, (n,), device=DEVICE)
    got = ops.per_example_dot(h, head, targets, v, impl="triton")
    f, z = ends(h).double() @ head.weight.double().T, ends(h).double() @ v.double().T
    truth = (f.softmax(-1) * z).sum(-1) - z.gather(1, ends(targets).unsqueeze(1)).squeeze(1)
    assert_close(ends(got), truth)


def test_the_label_step():
    n, c = 2**17 + 24, 2**14
    skip_unless_there("finite_difference_labels", "triton", c)
    plus, minus = normal(n, c), normal(n, c)
    labels = torch.full((n, c), 1 / c, dtype=BF16, device=DEVICE)
    got = ops.finite_difference_labels(plus, minus, labels, 0.5, step=0.1, impl="triton")
    moved = ends(labels).double() - 0.2 * (ends(plus).double().softmax(-1) - ends(minus).double().softmax(-1))
    moved = moved.clamp(min=0)
    assert_close(ends(got), moved / moved.sum(-1, keepdim=True))


def test_feature_similarity():
    n, d, c = SHAPES["N C"]
    skip_unless_there("feature_similarity", "triton", c)
    h_u, h_h, r = normal(n, d), normal(100, d), normal(100, c)
    got = ops.feature_similarity(h_u, h_h, r, impl="triton")
    assert_close(ends(got), (ends(h_u).double() @ h_h.double().T + 1) @ r.double())


def test_rows_apart():
    """Few rows, each 2^28 elements from the next: the offset of the last one is beyond the limit."""
    n, d, c = 12, 40, 50
    skip_unless_there("label_gradient", "triton", c)
    stride = 2**28
    wide = torch.empty(stride * (n - 1) + d, dtype=BF16, device=DEVICE)
    h = wide.as_strided((n, d), (stride, 1))
    h.copy_(normal(n, d))
    f, v = normal(n, c), normal(c, d, scale=d**-0.5)
    z = h.double() @ v.double().T
    truth = z - (f.double().softmax(-1) * z).sum(-1, keepdim=True)
    assert_close(ops.label_gradient(h, f, v, impl="triton"), truth)


def test_a_table_of_many_entries():
    skip_unless_there("masked_adam_", "cuda")
    rows, columns = 2**24 + 3, 2**7 + 1
    table = normal(rows, columns)
    exp_avg, exp_avg_sq = torch.zeros_like(table), torch.zeros_like(table)
    steps = torch.zeros(rows, dtype=torch.int32, device=DEVICE)
    index = torch.tensor([0, rows - 1, rows // 2, rows - 1], device=DEVICE)
    grad = normal(4, columns)
    before = table[index[:3]].double()
    ops.masked_adam_(table, index, grad, exp_avg, exp_avg_sq, steps, lr=0.5, eps=1e-8, impl="cuda")
    summed = torch.stack([grad[0], grad[1] + grad[3], grad[2]]).double()
    assert_close(table[index[:3]], before - 0.5 * summed.sign())  # the first step of Adam
    assert steps.sum() == 3


def test_lists_of_a_large_tensor():
    skip_unless_there("alignment_direction_", "cuda")
    size = LIMIT + 40
    g_l, g_u, m, q = (torch.zeros(size, dtype=BF16, device=DEVICE) for _ in range(4))
    for tensor in (g_l, g_u):
        tensor[:ENDS], tensor[-ENDS:] = normal(ENDS), normal(ENDS)
    (direction,) = ops.alignment_direction([g_l], [g_u], [m], [q], decay=0.5, decay_norm=0.5, epsilon=1.0, impl="cuda")
    v = ends(g_l).double() / 2 - ends(g_u).double()
    assert_close(ends(direction), 2 * v / (1 + (v**4 / 2).sqrt()))
    assert_close(ends(m), ends(g_l).double() / 2)
    assert not direction[ENDS:-ENDS].any()


def test_perturbing_a_large_tensor():
    skip_unless_there("perturb_", "cuda")
    size = LIMIT + 40
    parameter, v = (torch.zeros(size, dtype=BF16, device=DEVICE) for _ in range(2))
    parameter[:ENDS], parameter[-ENDS:] = normal(ENDS), normal(ENDS)
    v[:ENDS], v[-ENDS:] = normal(ENDS), normal(ENDS)
    before, step = ends(parameter), ends(v).double() * 3.0 / ends(v).double().norm()
    with ops.perturbed([parameter], [v], 3.0):
        assert_close(ends(parameter), before.double() + step)
        assert not parameter[ENDS:-ENDS].any()
    assert torch.equal(ends(parameter), before)
