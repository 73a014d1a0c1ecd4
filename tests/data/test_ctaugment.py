"""CTAugment by its definition: how bins are drawn, what operations do (Pillow's word), and how the rates move."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from scipy import stats
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastmeta.data import KeyedRandom, Shift
from fastmeta.data.augment import CTAugment, Plain
from fastmeta.data.augment.ctaugment import BINS, OPERATIONS

NAMES = tuple(OPERATIONS)
FILTERS = ("LANCZOS", "BICUBIC", "BILINEAR", "BOX", "HAMMING", "NEAREST")
SIDE = 16


def random(count: int, view: str = "strong", start: int = 0) -> KeyedRandom:
    return KeyedRandom(0, "labeled", view, torch.arange(start, start + count))


def pixels(count: int, channels: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, channels, SIDE, SIDE), dtype=torch.uint8, generator=generator)


def drawn(augment: CTAugment, count: int, *, even: bool = False) -> list[Tensor]:
    return list(augment._draw(random(count), even=even, device=torch.device("cpu")))


def test_nineteen_operations_and_their_bins() -> None:
    bins = dict(zip((*NAMES, "filters of rescale"), BINS, strict=True))
    assert len(OPERATIONS) == 19
    assert {name: count for name, count in bins.items() if count != 17} == {
        "posterize": 8,
        "identity": 1,
        "filters of rescale": 6,
    }


@pytest.mark.parametrize("even", [False, True])
def test_at_first_everything_is_drawn_evenly(even: bool) -> None:
    operations, bins, magnitudes, places = drawn(CTAugment(SIDE, Plain(SIDE), depth=3), 6000, even=even)
    assert stats.chisquare(torch.bincount(operations.flatten(), minlength=19)).pvalue > 1e-4
    for name, count in (("rotate", 17), ("posterize", 8), ("rescale", 17)):
        mine = operations == NAMES.index(name)
        assert stats.chisquare(torch.bincount(bins[..., 0][mine], minlength=count)).pvalue > 1e-4
        assert stats.kstest(magnitudes[..., 0][mine].numpy(), "uniform").pvalue > 1e-4
        assert (magnitudes[..., 0][mine] * count).floor().long().equal(bins[..., 0][mine])
    assert (
        stats.chisquare(torch.bincount(bins[..., 1][operations == NAMES.index("rescale")], minlength=6)).pvalue > 1e-4
    )
    assert stats.kstest(places.flatten().numpy(), "uniform").pvalue > 1e-4


def test_bins_are_drawn_by_their_rates() -> None:
    augment = CTAugment(SIDE, Plain(SIDE), threshold=0.85, decay=0.99)
    rates = torch.rand(20, 17, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rates[NAMES.index("color")] = 0.9 + 0.1 * rates[NAMES.index("color")]
    rates[NAMES.index("posterize"), 8:] = 7.0  # no bins
    augment.rates.copy_(rates)
    operations, bins, _, _ = drawn(augment, 20_000)
    for row, count in enumerate(BINS):
        share = rates[row, :count].numpy() + 0.01
        share = share / share.max()
        share[share < 0.85] = 0
        mine = bins[..., 1] if row == 19 else bins[..., 0][operations == row]
        found = torch.bincount(mine.flatten(), minlength=count).numpy()
        assert found.shape == (count,)
        assert not found[share == 0].any()
        expected = share[share > 0] / share.sum() * found.sum()
        assert len(expected) == 1 or stats.chisquare(found[share > 0], expected).pvalue > 1e-4, row
    _, even, _, _ = drawn(augment, 20_000, even=True)
    assert int((even[..., 1] == 5).sum()) > 6000


def enhanced(kind):
    return lambda image, u, v: kind(image).enhance(0.1 + 1.9 * u)


def blended(change):
    return lambda image, u, v: Image.blend(image, change(image), u)


def affine(matrix):
    return lambda image, u, v: image.transform(image.size, Image.Transform.AFFINE, matrix((2 * u - 1) * 0.3))


def rescaled(image, u, v):
    side, cut = image.size[0], 0.25 * u
    box = (cut * side, cut * side, side * (1 - cut), side * (1 - cut))
    return image.crop(box).resize(image.size, Image.Resampling[FILTERS[int(v * 5.99)]])


PILLOW = {
    "autocontrast": blended(ImageOps.autocontrast),
    "blur": blended(lambda image: image.filter(ImageFilter.BLUR)),
    "brightness": enhanced(ImageEnhance.Brightness),
    "color": enhanced(ImageEnhance.Color),
    "contrast": enhanced(ImageEnhance.Contrast),
    "equalize": blended(ImageOps.equalize),
    "identity": lambda image, u, v: image,
    "invert": blended(ImageOps.invert),
    "posterize": lambda image, u, v: ImageOps.posterize(image, 1 + int(u * 7.999)),
    "rescale": rescaled,
    "rotate": lambda image, u, v: image.rotate(int(np.round((2 * u - 1) * 45))),
    "sharpness": enhanced(ImageEnhance.Sharpness),
    "shear_x": affine(lambda slope: (1, slope, 0, 0, 1, 0)),
    "shear_y": affine(lambda slope: (1, 0, 0, slope, 1, 0)),
    "smooth": blended(lambda image: image.filter(ImageFilter.SMOOTH)),
    "solarize": lambda image, u, v: ImageOps.solarize(image, int(u * 255.999)),
    "translate_x": affine(lambda share: (1, 0, share * SIDE, 0, 1, 0)),
    "translate_y": affine(lambda share: (1, 0, 0, 0, 1, share * SIDE)),
}


def cut(image: Image.Image, u: float, place: Tensor) -> Image.Image:
    """A gray square of about half the side at most, around one of the pixels' corners, as far as it is inside."""
    half = (1 + int(u * SIDE * 0.499)) // 2
    x, y = (int(each * SIDE) for each in place.tolist())
    image = image.copy()
    left, upper = max(0, x - half), max(0, y - half)
    if min(SIDE, x + half) > left and min(SIDE, y + half) > upper:
        image.paste((127, 127, 127), (left, upper, min(SIDE, x + half), min(SIDE, y + half)))
    return image


@pytest.mark.parametrize("probe", [False, True])
def test_what_is_drawn_is_done_as_pillow_does_it(probe: bool) -> None:
    augment = CTAugment(SIDE, Plain(SIDE))
    images, count = pixels(400), 400
    result = (augment.probe if probe else augment)(images, random(count))
    operations, _, magnitudes, places = drawn(augment, count, even=probe)
    different = 0
    for row in range(count):
        image = Image.fromarray(images[row].permute(1, 2, 0).numpy())
        for step in range(2):
            name, (u, v) = NAMES[operations[row, step]], magnitudes[row, step].tolist()
            image = cut(image, u, places[row, step]) if name == "cutout" else PILLOW[name](image, u, v)
        if not probe:
            image = cut(image, 1.0, places[row, 2])
        expected = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        different += int(((result[row] * 255).round().to(torch.uint8) != expected).any(dim=0).sum())
    assert set(operations.flatten().tolist()) == set(range(19))
    assert different <= 3  # places halfway between two pixels: magnitudes are float32 there


def test_the_weak_view_comes_first() -> None:
    weak = Shift(SIDE, 4, "reflected", flip=True)
    augment = CTAugment(SIDE, weak, depth=1, cutout=False)
    images = pixels(300)
    keys = random(300)
    operations = augment._draw(keys, even=False, device=images.device).operations
    expected = weak(images, keys)
    untouched = (operations == NAMES.index("identity")).all(dim=1)
    assert 5 < int(untouched.sum()) < 40
    assert augment(images, random(300))[untouched].equal(expected[untouched])


class Drawing(Plain):
    """The image as it is, and random numbers that are used for nothing."""

    def __call__(self, images: Tensor, random: KeyedRandom | None = None) -> Tensor:
        if random is not None:
            random.uniform(5)
        return super().__call__(images)


def test_what_the_weak_view_draws_leaves_the_operations() -> None:
    """Else the rates would be moved for operations that no probe has had."""
    images = pixels(40)
    for weak in (Drawing(SIDE), Shift(SIDE, 0)):
        probes = CTAugment(SIDE, weak).probe(images, random(40, "probe"))
        assert probes.equal(CTAugment(SIDE, Plain(SIDE)).probe(images, random(40, "probe")))


def test_no_row_depends_on_another_and_any_shape_will_do() -> None:
    augment = CTAugment(SIDE, Shift(SIDE, 2, flip=True))
    augment.rates.copy_(torch.rand(20, 17, generator=torch.Generator().manual_seed(2)))
    for source in (
        pixels(40),
        pixels(40, 1),
        pixels(40).float() / 255,
        pixels(40)[..., :12],
        pixels(40).repeat(1, 1, 2, 3),
    ):
        whole = augment(source, random(40))
        assert whole.shape == (40, source.shape[1], SIDE, SIDE)
        assert whole.dtype == torch.float32
        assert bool(((whole >= 0) & (whole <= 1)).all())
        assert augment(source[7:21], random(14, start=7)).equal(whole[7:21])
    assert augment(pixels(0), random(0)).shape == (0, 3, SIDE, SIDE)


def test_rates_move_one_probe_after_another() -> None:
    augment = CTAugment(SIDE, Plain(SIDE), decay=0.9)
    count = 200
    recognized = torch.rand(count, generator=torch.Generator().manual_seed(0))
    rates = {row: [1.0] * bins for row, bins in enumerate(BINS)}
    for start in (0, 77):  # two steps
        keys = random(count, "probe", start)
        operations, bins, _, _ = augment._draw(random(count, "probe", start), even=True, device=recognized.device)
        augment.update_(keys, recognized, torch.tensor(True))
        for row in range(count):
            for step in range(2):
                taken = [(int(operations[row, step]), int(bins[row, step, 0]))]
                if NAMES[taken[0][0]] == "rescale":
                    taken.append((19, int(bins[row, step, 1])))
                for parameter, place in taken:
                    rates[parameter][place] = 0.9 * rates[parameter][place] + 0.1 * float(recognized[row])
    for row, bins in rates.items():
        torch.testing.assert_close(augment.rates[row, : len(bins)], torch.tensor(bins, dtype=torch.float64))
    padding = torch.arange(17) >= torch.tensor(BINS).unsqueeze(1)
    assert bool((augment.rates[padding] == 1).all())
    assert float(augment.rates[19, :6].min()) < 0.99


@pytest.mark.parametrize(("where", "value"), [(False, 0.5), (True, torch.nan), (True, torch.inf)])
def test_a_step_that_is_not_finite_moves_nothing(where: bool, value: float) -> None:
    augment = CTAugment(SIDE, Plain(SIDE))
    augment.rates.mul_(0.9)
    before = augment.rates.clone()
    recognized = torch.full((8,), 0.3, dtype=torch.float64)
    recognized[3] = value
    augment.update_(random(8, "probe"), recognized, torch.tensor(where))
    assert augment.rates.equal(before)
    augment.update_(random(8, "probe"), torch.full((8,), 0.3), torch.tensor(True))
    assert not augment.rates.equal(before)


class NothingRead(TorchDispatchMode):
    """Fails where a GPU's host would wait."""

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        assert function.name() not in {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select"}
        return function(*arguments, **keywords or {})


def test_the_host_waits_neither_to_draw_nor_to_update() -> None:
    augment = CTAugment(SIDE, Plain(SIDE))
    with NothingRead():
        drawn(augment, 8)
        augment.update_(random(8, "probe"), torch.full((8,), 0.3), torch.tensor(True))


def test_rates_are_its_state_and_stay_float64() -> None:
    augment, again = (CTAugment(SIDE, Plain(SIDE)) for _ in range(2))
    augment.update_(random(50, "probe"), torch.linspace(0, 0.5, 50), torch.tensor(True))
    saved = augment.state_dict()
    assert list(saved) == ["rates"]
    again.half().load_state_dict(saved)
    assert again.rates.dtype == torch.float64
    assert again(pixels(20), random(20)).equal(augment(pixels(20), random(20)))
    with pytest.raises(ValueError, match=r"rates must be \[20, 17\]"):
        again.load_state_dict({"rates": torch.ones(19, 17)})


def test_without_adapting_magnitudes_stay_even() -> None:
    augment = CTAugment(SIDE, Plain(SIDE), adapt=False)
    augment.rates[:, 3:] = 0
    assert int((drawn(augment, 500)[1] > 3).sum()) > 500


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"depth": 0}, "depth must be at least 1, got 0"),
        ({"threshold": 1.5}, r"threshold must lie in \[0, 1\], got 1.5"),
        ({"decay": -0.1}, r"decay must lie in \[0, 1\], got -0.1"),
    ],
)
def test_arguments_name_what_is_wrong(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CTAugment(SIDE, Plain(SIDE), **settings)
