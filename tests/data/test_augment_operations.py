"""The operations against Pillow, one by one, to the bit; the rest of what they promise."""

import math

import pytest
import torch

import fastmeta
from bench.pillow_operations import PILLOW, by_pillow
from fastmeta.data import KeyedRandom, Shift
from fastmeta.data.augment import CODES, OPERATIONS, apply_operations
from fastmeta.data.augment.apply import OPERATOR, view

# Where a bound is far beyond what anybody uses.
USED = {"color": (0, 3), "contrast": (0, 3), "brightness": (0, 3), "sharpness": (0, 3), "rotate": (-180, 180)}
USED |= {"translate-x": (-20, 20), "translate-y": (-20, 20), "cutout": (0, 20)}
implementations = pytest.mark.parametrize("impl", OPERATOR.implementations())


def drawn_images(generator, *shape):
    """Random ones, of few values, of one value, and a ramp."""
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    images[1::4] = images[1::4] // 5 + 90
    images[2::4] = images[2::4, :, :1, :1]
    images[3::4] = (torch.arange(shape[3]) * 3 % 256).to(torch.uint8)
    return images


def drawn_levels(generator, name, count):
    low, high = USED.get(name, OPERATIONS[name][:2])
    levels = low + (high - low) * torch.rand(count, generator=generator)
    levels[:3] = torch.tensor([low, high, round(float(levels[2]))])
    if name == "rotate":
        levels[3:9] = torch.tensor([90.0, 270, 45, -45, 30, -60])
    return levels


def mixed(generator, count, steps, height, width):
    """Any operations with any levels, and places."""
    names = list(OPERATIONS)
    operations = torch.randint(0, len(names), (count, steps), generator=generator)
    levels = torch.stack([drawn_levels(generator, name, count * steps) for name in names])
    levels = levels.gather(0, operations.view(1, -1)).view(count, steps)
    places = torch.rand(count, steps, 2, generator=generator) * torch.tensor([width, height])
    return operations, levels, places


@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (5, 9), (32, 32), (31, 54)], ids=str)
@pytest.mark.parametrize("name", PILLOW)
def test_an_operation_is_pillow_s(name, shape, generator):
    for channels in (1, 3):
        images = drawn_images(generator, 12, channels, *shape)
        levels = drawn_levels(generator, name, 12)
        expected = torch.stack([by_pillow(*row) for row in zip(images, [name] * 12, levels.tolist(), strict=True)])
        for impl in OPERATOR.implementations():
            result = apply_operations(images, torch.full((12, 1), CODES[name]), levels.unsqueeze(1), impl=impl)
            assert result.equal(expected), impl


@pytest.mark.parametrize("impl", [name for name in OPERATOR.implementations() if name != "reference"])
def test_one_after_another_and_at_a_larger_side(impl, generator):
    for count, channels, height, width in [(60, 3, 12, 15), (40, 1, 9, 7), (5, 3, 96, 300)]:
        images = drawn_images(generator, count, channels, height, width)
        drawn = mixed(generator, count, 4, height, width)
        colors = {"fill": 77, "square": (1, 2, 3)}
        expected = apply_operations(images, *drawn, **colors, impl="reference")
        assert apply_operations(images, *drawn, **colors, impl=impl).equal(expected)
        for step in range(4):  # by themselves, what one leaves is what the next one finds
            images = apply_operations(images, *(each[:, step : step + 1] for each in drawn), **colors, impl=impl)
        assert images.equal(expected)


@implementations
def test_a_cutout_covers_what_has_its_centre_inside(impl, generator):
    images = drawn_images(generator, 200, 3, 9, 13)
    places = torch.rand(200, 1, 2, generator=generator) * 16 - 2
    sides = torch.rand(200, 1, generator=generator) * 12
    places[:50], sides[:50] = places[:50].floor(), sides[:50].floor() // 2 * 2  # as Google's: corners, even sides
    cutout = torch.full((200, 1), CODES["cutout"])
    result = apply_operations(images, cutout, sides, places, square=(9, 8, 7), impl=impl)
    expected = images.clone()
    for image, side, (x, y) in zip(expected, sides.flatten().tolist(), places[:, 0].tolist(), strict=True):
        for row in range(9):
            for column in range(13):
                if abs(row + 0.5 - y) < side / 2 and abs(column + 0.5 - x) < side / 2:
                    image[:, row, column] = torch.tensor([9, 8, 7])
    assert result.equal(expected)
    published = images[:50].clone()
    for image, side, (x, y) in zip(published, sides[:50, 0].tolist(), places[:50, 0].tolist(), strict=True):
        left, top, half = int(x), int(y), int(side) // 2
        image[:, max(0, top - half) : max(0, top + half), max(0, left - half) : max(0, left + half)] = torch.tensor(
            [[[9]], [[8]], [[7]]]
        )
    assert result[:50].equal(published)
    middle = apply_operations(images, cutout, sides, impl=impl)
    assert middle.equal(apply_operations(images, cutout, sides, torch.tensor([6.5, 4.5]).expand(200, 1, 2), impl=impl))


@implementations
def test_fill_is_what_moves_in(impl):
    image = torch.full((1, 1, 4, 6), 200, dtype=torch.uint8)
    for name, level in [("translate-x", 2.0), ("translate-y", -2), ("rotate", 45), ("shear-x", 1), ("shear-y", 1)]:
        for fill in (0, 3):
            arguments = torch.tensor([[CODES[name]]]), torch.tensor([[float(level)]])
            assert apply_operations(image, *arguments, fill=fill, impl=impl).unique().tolist() == [fill, 200]


@implementations
def test_levels_beyond_the_bounds_are_the_bounds(impl, generator):
    images = drawn_images(generator, 4, 3, 10, 11)
    for name, (low, high, _) in OPERATIONS.items():
        operations = torch.full((4, 1), CODES[name])
        for level, same in [(low - 1.5, low), (high + 1.5, high), (-math.inf, low), (math.inf, high)]:
            got, want = (
                apply_operations(images, operations, torch.full((4, 1), float(each)), impl=impl)
                for each in (level, same)
            )
            assert got.equal(want), name
        apply_operations(images, operations, torch.full((4, 1), math.nan), impl=impl)


@implementations
@pytest.mark.parametrize("padding", ["zeros", "reflected"])
def test_a_view_is_the_shift_then_the_operations_then_floats(impl, padding, generator):
    images = drawn_images(generator, 40, 3, 13, 13)
    shift = Shift(13, 12, padding, flip=True)
    random = KeyedRandom(0, "unlabeled", "weak", torch.arange(40))
    _, moves = shift.moves(images, random)
    drawn = mixed(generator, 40, 3, 13, 13)
    with fastmeta.use_impl("reference"):
        shifted = view(images, moves, reflected=shift.reflected)
        expected = apply_operations((shifted * 255).round().to(torch.uint8), *drawn).float() / 255
    with fastmeta.use_impl(impl):
        assert view(images, moves, reflected=shift.reflected).equal(shifted)
        assert view(images, moves, *drawn, reflected=shift.reflected).equal(expected)
        assert view(images.double() / 255, moves, *drawn, reflected=shift.reflected).equal(expected)


@implementations
def test_neither_rows_nor_threads_nor_strides_change_a_bit(impl, generator):
    images = drawn_images(generator, 67, 3, 24, 20)
    drawn = mixed(generator, 67, 2, 24, 20)
    before = images.clone()
    whole = apply_operations(images, *drawn, impl=impl)
    assert images.equal(before)
    for start, stop in [(0, 1), (66, 67), (3, 20)]:
        rows = [each[start:stop] for each in (images, *drawn)]
        assert apply_operations(*rows, impl=impl).equal(whole[start:stop])
    strided = images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert apply_operations(strided, drawn[0].T.contiguous().T, *drawn[1:], impl=impl).equal(whole)
    assert apply_operations(images[:0], *(each[:0] for each in drawn), impl=impl).shape == (0, 3, 24, 20)
    assert apply_operations(images, *(each[:, :0] for each in drawn), impl=impl).equal(images)
    if impl == "cpp":
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(3)
            assert apply_operations(images, *drawn, impl=impl).equal(whole)
        finally:
            torch.set_num_threads(threads)


def test_on_a_gpu_nobody_waits_and_shapes_are_known():
    """The reference on the meta device, where nothing can be read."""
    operations = torch.zeros(2, 3, dtype=torch.int64, device="meta")
    levels = torch.zeros(2, 3, device="meta")
    images = torch.zeros(2, 3, 8, 9, dtype=torch.uint8, device="meta")
    result = apply_operations(images, operations, levels)
    assert (result.shape, result.dtype) == (images.shape, torch.uint8)


X = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
ONE = torch.zeros(2, 1, dtype=torch.int64)
LEVEL = torch.zeros(2, 1)
REFUSED = {
    "images must be uint8, got float32": (X.float(), ONE, LEVEL),
    r"images must be \[N, 1 or 3, H, W\], got \[2, 4, 4, 4\]": (torch.cat([X, X[:, :1]], dim=1), ONE, LEVEL),
    r"images must have 1 to 8192 pixels a side, got \[2, 3, 4, 0\]": (X[..., :0], ONE, LEVEL),
    "operations must be int64, got int32": (X, ONE.int(), LEVEL),
    r"operations must be \[N, D\] with N = 2, got \[1, 1\]": (X, ONE[:1], LEVEL[:1]),
    r"levels must be \[2, 1\] like operations, got \[2, 2\]": (X, ONE, LEVEL.expand(2, 2)),
    "levels must be float32, got float64": (X, ONE, LEVEL.double()),
    r"places must be \[2, 1, 2\] like operations, got \[2, 1\]": (X, ONE, LEVEL, LEVEL),
    "operations must lie in 0 .. 23, got 24": (X, ONE + 24, LEVEL),
    "operations must lie in 0 .. 23, got -1": (X, ONE - 1, LEVEL),
}


@implementations
@pytest.mark.parametrize("message", REFUSED)
def test_what_does_not_fit_is_refused(message, impl):
    if impl == "cuda" and "0 .. 23" in message:
        return  # a GPU is not read
    with pytest.raises((ValueError, TypeError), match=message):
        apply_operations(*REFUSED[message], impl=impl)
    for colors in ({"fill": 256}, {"square": (0, -1, 0)}):
        with pytest.raises(ValueError, match=r"must lie in 0 .. 255"):
            apply_operations(X, ONE, LEVEL, **colors, impl=impl)


@pytest.mark.skipif("cpp" not in OPERATOR.implementations(), reason="the C++ extension is not built")
def test_opcheck():
    operator = torch.ops.fastmeta.augment.default
    for unit in (False, True):
        torch.library.opcheck(operator, (X, None, ONE, LEVEL, None, 0, 1, 2, 3, False, unit))
