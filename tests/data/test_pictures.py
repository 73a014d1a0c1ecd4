import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from fastmeta.data.readers.pictures import canvas_of, suitable_mode, suitable_size, to_canvas

RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (8, 8, 3), dtype=np.uint8)


def _file(picture, kind="PNG", **options):
    """The picture as it comes out of a file of this kind."""
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return Image.open(io.BytesIO(buffer.getvalue()))


def test_a_picture_of_the_canvas_is_its_pixels():
    assert (to_canvas(_file(Image.fromarray(NOISE)), "RGB", 8) == NOISE.transpose(2, 0, 1)).all()
    assert (to_canvas(_file(Image.fromarray(NOISE[..., 0])), "L", 8) == NOISE[None, ..., 0]).all()


def test_sixteen_bits_are_scaled():
    values = np.array([[0, 128, 129, 257], [32896, 65406, 65407, 65535]] * 2, np.uint16)
    pixels = to_canvas(_file(Image.fromarray(values)), "L", 4)
    assert pixels[0, 0].tolist() == [0, 0, 1, 1]
    assert pixels[0, 1].tolist() == [128, 254, 255, 255]


def test_transparent_parts_are_white():
    clear = np.dstack([NOISE, np.zeros((8, 8), np.uint8)])
    clear[0, 0, 3] = 255
    pixels = to_canvas(_file(Image.fromarray(clear)), "RGB", 8)
    assert pixels[:, 0, 0].tolist() == NOISE[0, 0].tolist()
    assert (pixels.reshape(3, -1)[:, 1:] == 255).all()
    gray = np.dstack([NOISE[..., 0], np.full((8, 8), 128, np.uint8)])
    half = to_canvas(_file(Image.fromarray(gray)), "L", 8)
    assert np.abs(half[0] - (NOISE[..., 0] / 255 * 128 + 127)).max() <= 1


def test_palettes_one_bit_and_cmyk_are_converted():
    flat = Image.new("RGB", (8, 8), (200, 30, 40))
    for picture in (_file(flat.convert("P", palette=Image.Palette.ADAPTIVE)), _file(flat.convert("CMYK"), "TIFF")):
        assert picture.mode in ("P", "CMYK")
        assert np.abs(to_canvas(picture, "RGB", 4)[:, 0, 0].astype(int) - (200, 30, 40)).max() <= 2
    clear = Image.new("P", (8, 8), 0)
    clear.putpalette([9, 9, 9])
    assert (to_canvas(_file(clear, transparency=0), "RGB", 4) == 255).all()
    assert (to_canvas(_file(Image.new("1", (8, 8), 1)), "L", 4) == 255).all()


def test_pixels_without_a_range_are_refused():
    with pytest.raises(ValueError, match="32 bits a pixel have no known range"):
        to_canvas(_file(Image.fromarray(np.ones((8, 8), np.float32)), "TIFF"), "L", 8)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(orientation):
    picture = Image.fromarray(RNG.integers(0, 256, (24, 40, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = _file(picture, exif=exif)
    upright = ImageOps.exif_transpose(file)
    assert upright.size == ((40, 24) if orientation < 5 else (24, 40))
    centre = upright.crop((8, 0, 32, 24) if orientation < 5 else (0, 8, 24, 32))
    assert (to_canvas(file, "RGB", 24) == np.asarray(centre).transpose(2, 0, 1)).all()


def test_the_shorter_side_is_resized_and_the_centre_kept():
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = 200
    for size in (10, 50):
        whole = (
            Image.fromarray(wide).resize((3 * size, size), Image.Resampling.BILINEAR).crop((size, 0, 2 * size, size))
        )
        assert (to_canvas(_file(Image.fromarray(wide)), "RGB", size) == np.asarray(whole).transpose(2, 0, 1)).all()
        tall = to_canvas(_file(Image.fromarray(wide.transpose(1, 0, 2))), "RGB", size)
        assert (tall == np.asarray(whole).transpose(2, 1, 0)).all()


def test_a_large_jpeg_is_decoded_small_and_looks_the_same():
    coarse = Image.fromarray(RNG.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    coarse.resize((1600, 1200), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=95)
    picture = Image.open(io.BytesIO(buffer.getvalue()))
    small = to_canvas(picture, "RGB", 32)
    assert picture.size == (200, 150)
    whole = Image.open(io.BytesIO(buffer.getvalue())).convert("RGB")
    assert np.abs(small.astype(int) - to_canvas(whole, "RGB", 32)).mean() < 1.5


def test_sizes_and_modes_that_suit():
    assert [suitable_size([(side, side)]) for side in (8, 28, 96, 150, 256, 4000)] == [8, 28, 96, 128, 224, 224]
    assert suitable_size([(100, 90), (70, 120), (64, 64)]) == 72
    assert suitable_size([(500, 3)]) == 8
    assert all(canvas_of(suitable_size([(side, side + 1)])) <= side for side in range(97, 300))
    assert [suitable_mode(modes) for modes in (["L", "LA", "1"], ["L", "RGB"], ["P"])] == ["L", "RGB", "RGB"]
