"""What is particular to the CUDA kernels of lists: any alignment, many launches, the mark on the device, any order."""

import os

import pytest
import torch
from cases import DEVICE
from perturbed_lists import assert_bits, bits, copy, draw, dtypes

from fastmeta import _extension, dispatch
from fastmeta.ops import alignment_direction, perturbed
from fastmeta.ops.perturbed import MOVE

NUMBERS = {"decay": 0.9, "decay_norm": 0.7, "epsilon": 0.1}
LARGE_TABLE = 614  # entries of perturb_'s largest table


@pytest.fixture(autouse=True)
def ready():
    if "cuda" not in MOVE.implementations(DEVICE):
        assert os.environ.get("FASTMETA_REQUIRE_CUDA") != "1", "no CUDA kernels"
        pytest.skip("no CUDA kernels")


@pytest.fixture
def raw():
    """The kernels themselves."""
    namespace = "fastmeta_emulated" if DEVICE == "cpu" else "fastmeta"
    names = "perturb_epsilon", "perturb_", "perturb_restore_"
    return [dispatch.direct(name, DEVICE.upper(), namespace) for name in names]


def shifted(tensor, elements):
    """The same values, beginning some elements after a multiple of 64 bytes."""
    memory = torch.empty(tensor.numel() + 64, dtype=tensor.dtype, device=tensor.device)
    start = -memory.data_ptr() // tensor.element_size() % (64 // tensor.element_size()) + elements
    return memory[start : start + tensor.numel()].view(tensor.shape).copy_(tensor)


@dtypes
@pytest.mark.parametrize("offsets", [(0, 0), (1, 0), (0, 1), (3, 3)])
def test_any_alignment(dtype, offsets, generator):
    """Vectors where all lists allow them, elements where not: the same bits."""
    shapes = [(5,), (4096,), (4097,), (9000,)]
    params, direction = draw(generator, dtype, shapes), draw(generator, dtype, shapes)
    moved = [shifted(p, offsets[0]) for p in params]
    along = [shifted(v, offsets[1]) for v in direction]
    start = bits(params)
    with perturbed(params, direction, 0.5, impl="cuda"), perturbed(moved, along, 0.5, impl="cuda"):
        if dtype == torch.float64:  # the sums in epsilon run in another order: no more than rounding for the others
            torch.testing.assert_close(moved, params)
        else:
            assert_bits(moved, bits(params))
    assert_bits(moved, start)
    lists = [draw(generator, dtype, shapes) for _ in range(4)]
    lists[3] = [q.abs() for q in lists[3]]
    other = [[shifted(t, (offsets * 2)[k]) for t in tensors] for k, tensors in enumerate(lists)]
    for got, want in zip(
        alignment_direction(*other, **NUMBERS, impl="cuda"),
        alignment_direction(*lists, **NUMBERS, impl="cuda"),
        strict=True,
    ):
        assert torch.equal(got, want)
    for mine, plain in zip(other[2:], lists[2:], strict=True):
        assert_bits(mine, bits(plain))


def many(generator, count):
    sizes = torch.randint(0, 70, (count,), generator=generator).tolist()
    return [(size,) for size in sizes]


def test_more_tensors_than_one_launch_takes(generator):
    shapes = many(generator, 2 * LARGE_TABLE + 10)
    params, direction = draw(generator, torch.float32, shapes), draw(generator, torch.float32, shapes)
    expected, start = copy(params), bits(params)
    with (
        perturbed(params, direction, 3.0, impl="cuda") as perturbation,
        perturbed(expected, direction, 3.0, impl="reference") as reference,
    ):
        torch.testing.assert_close(perturbation.epsilon, reference.epsilon)
        torch.testing.assert_close(params, expected)
        perturbation.flip()
        reference.flip()
        torch.testing.assert_close(params, expected)
    assert_bits(params, start)
    lists = [draw(generator, torch.bfloat16, shapes) for _ in range(4)]
    lists[3] = [q.abs() for q in lists[3]]
    other = [copy(tensors) for tensors in lists]
    got = alignment_direction(*lists, **NUMBERS, impl="cuda")
    torch.testing.assert_close(got, alignment_direction(*other, **NUMBERS, impl="reference"))
    torch.testing.assert_close(lists, other)


def test_more_strided_tensors_than_one_launch_takes(generator):
    base = [draw(generator, torch.float32, [(4, 6, 10)])[0] for _ in range(240)]
    params = [x[:, ::2, 1::3] for x in base]
    plain = draw(generator, torch.float32, [(4, 3, 3)] * 240)
    direction = [v.transpose(0, 2).contiguous().transpose(0, 2) for v in plain]
    start, whole = bits(params), bits(base)
    expected = [p.clone() for p in params]
    with perturbed(params, direction, 3.0, impl="cuda"), perturbed(expected, direction, 3.0, impl="reference"):
        torch.testing.assert_close(params, expected)
    assert_bits(params, start)
    assert_bits(base, whole)


def test_the_mark_is_read_on_the_device(raw, generator):
    """The host cannot look: filling a full backup keeps what it holds, restoring or moving from an empty one waits."""
    _, move, restore = raw
    params, direction = draw(generator, torch.float32, [(5000,), (3,)]), draw(generator, torch.float32, [(5000,), (3,)])
    epsilon = torch.tensor(0.25, device=DEVICE)
    backup = torch.full((64 + 5056 * 4,), 255, dtype=torch.uint8, device=DEVICE)
    backup[:64] = 0
    start = bits(params)
    restore(params, backup)
    move(params, direction, backup, epsilon, 1.0, False)
    assert_bits(params, start)
    move(params, direction, backup, epsilon, 1.0, True)
    plus = bits(params)
    assert not torch.equal(plus[0], start[0])
    move(params, direction, backup, epsilon, 1.0, True)
    assert_bits(params, plus)
    move(params, direction, backup, epsilon, -1.0, False)
    assert not torch.equal(bits(params)[0], plus[0])
    restore(params, backup)
    assert_bits(params, start)
    for theta in params:
        theta.add_(1)
    changed = bits(params)
    restore(params, backup)
    assert_bits(params, changed)


@pytest.mark.parametrize("count", [5, LARGE_TABLE + 5])
def test_the_mark_is_set_by_the_last_launch(raw, count, generator):
    _, move, restore = raw
    shapes = [(3,)] * count
    params, direction = draw(generator, torch.float32, shapes), draw(generator, torch.float32, shapes)
    backup = torch.zeros(64 + 64 * count, dtype=torch.uint8, device=DEVICE)
    start = bits(params)
    for _ in range(3):
        move(params, direction, backup, torch.tensor(0.5, device=DEVICE), 1.0, True)
        assert backup[:8].tolist() == [1, 0, 0, 0, 0, 0, 0, 0]
        restore(params, backup)
        assert backup[:8].tolist() == [0] * 8
        assert_bits(params, start)


@pytest.mark.skipif(DEVICE != "cpu", reason="the emulator's")
def test_results_do_not_depend_on_the_order_of_blocks_and_threads(generator, monkeypatch):
    params, direction = draw(generator, torch.float32), draw(generator, torch.float32)
    start, results = bits(params), []
    for order in ("forward", "reverse", "random", "random"):
        monkeypatch.setenv("FASTMETA_EMULATION_ORDER", order)
        with perturbed(params, direction, 0.5, impl="cuda") as perturbation:
            results.append(torch.cat([perturbation.epsilon.view(1), *(p.flatten() for p in params)]))
            perturbation.flip()
        assert_bits(params, start)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_outputs_begin_where_vectors_can_be_stored(generator):
    shapes = [(10,), (16, 3, 3, 3), (3,), (64,)]
    lists = [draw(generator, torch.float32, shapes) for _ in range(3)]
    out = alignment_direction(*lists, [q.abs() for q in lists[2]], **NUMBERS)
    assert [t.shape for t in out] == [torch.Size(s) for s in shapes]
    assert all(t.data_ptr() % 16 == 0 for t in out)


@pytest.mark.skipif(DEVICE != "cpu", reason="the emulator's")
def test_named_implementation_is_the_emulated_kernel():
    assert _extension.EMULATED
    kernel = MOVE.select("cuda", torch.ones(2))
    assert kernel is MOVE._kernels["cpu", "cuda"]
    assert MOVE.select(None, torch.ones(2)) is MOVE._kernels["cpu", "cpp"]
