"""Tiny data sets in exactly the files of published ones, to try a run before the real data are there.

Pictures are a colour of their class and noise: a net learns them in a few steps. There are few of a class, and as many
classes as the format has. Faces are drawn, reviews made of words.
"""

import gzip
import io
import struct
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from fastmeta.data.readers.optional import optional

_SEED = 0


def _pixels(part: str, classes: int, count: int, side: int, channels: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Images ``[n, side, side, channels]`` uint8 and their classes ``[n]``, ``count`` of each class in turn."""
    colors = np.random.default_rng(_SEED).integers(40, 216, (classes, channels))
    labels = np.tile(np.arange(classes), count)
    draw = np.random.default_rng([_SEED, *part.encode()])
    noise = draw.integers(-40, 40, (len(labels), side, side, channels))
    return (colors[labels][:, None, None] + noise).astype(np.uint8), labels


def pickled_by_python_2(value: object) -> bytes:
    """As Python 2 pickled it, with protocol 2: dicts, lists, whole numbers, texts given as bytes, arrays of bytes."""
    return b"\x80\x02" + _opcodes(value) + b"."


def _opcodes(value: object) -> bytes:
    if isinstance(value, dict):
        return b"}(" + b"".join(_opcodes(one) for item in value.items() for one in item) + b"u"
    if isinstance(value, list):
        return b"](" + b"".join(map(_opcodes, value)) + b"e"
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value)
    if isinstance(value, bytes):
        short = len(value) < 256
        return (b"U" + bytes([len(value)]) if short else b"T" + struct.pack("<i", len(value))) + value
    assert isinstance(value, np.ndarray)
    assert value.dtype == np.uint8
    # numpy.core.multiarray._reconstruct(ndarray, (0,), "b"), then the state: version, shape, dtype, order, bytes
    dtype = (
        b"cnumpy\ndtype\n"
        + _opcodes(b"u1")
        + b"K\x00K\x01\x87R"
        + b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    )
    new = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    shape = b"(" + b"".join(map(_opcodes, value.shape)) + b"t"
    return new + b"(K\x01" + shape + dtype + b"\x89" + _opcodes(value.tobytes()) + b"tb"


def _cifar_10(folder: Path) -> None:
    files: dict[str, object] = {
        "batches.meta": {
            b"num_cases_per_batch": 2 * 10,
            b"label_names": list(b"airplane automobile bird cat deer dog frog horse ship truck".split()),
            b"num_vis": 3072,
        }
    }
    for file in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
        data, labels = _rows(file, 10, 2)
        names = [b"%s_%02d.png" % (file.encode(), row) for row in range(len(labels))]
        files[file] = {b"batch_label": file.encode(), b"labels": labels, b"data": data, b"filenames": names}
    _tar(folder / "cifar-10-python.tar.gz", "cifar-10-batches-py", files)


def _cifar_100(folder: Path) -> None:
    fine = [b"fine_%02d" % label for label in range(100)]  # stand-ins
    coarse = [b"coarse_%02d" % label for label in range(20)]
    files: dict[str, object] = {"meta": {b"fine_label_names": fine, b"coarse_label_names": coarse}}
    for file, count in (("train", 5), ("test", 1)):
        data, labels = _rows(file, 100, count)
        names = [b"%s_%03d.png" % (file.encode(), row) for row in range(len(labels))]
        files[file] = {
            b"batch_label": file.encode(),
            b"coarse_labels": [label // 5 for label in labels],
            b"fine_labels": labels,
            b"data": data,
            b"filenames": names,
        }
    _tar(folder / "cifar-100-python.tar.gz", "cifar-100-python", files)


def _rows(part: str, classes: int, count: int) -> tuple[np.ndarray, list[int]]:
    images, labels = _pixels(part, classes, count, 32)
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2).reshape(len(images), -1)), labels.tolist()


def _tar(archive: Path, inside: str, files: Mapping[str, object]) -> None:
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, "w:gz") as tar:
        for name, value in files.items():
            content = pickled_by_python_2(value)
            member = tarfile.TarInfo(f"{inside}/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def _svhn(folder: Path, *, extra: bool = False) -> None:
    scipy = optional("scipy.io", "scipy", "files of Matlab")
    folder.mkdir(parents=True, exist_ok=True)
    for part, count in (("train", 6), ("test", 2), *([("extra", 4)] if extra else [])):
        images, labels = _pixels(part, 10, count, 32)
        values = {"X": images.transpose(1, 2, 3, 0), "y": np.where(labels == 0, 10, labels)[:, None].astype(np.uint8)}
        scipy.savemat(folder / f"{part}_32x32.mat", values, do_compression=True)


def _svhn_extra(folder: Path) -> None:
    _svhn(folder, extra=True)


def _fashion_mnist(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for part, count in (("train", 6), ("t10k", 2)):
        images, labels = _pixels(part, 10, count, 28, channels=1)
        for kind, values in (("images-idx3", images[..., 0]), ("labels-idx1", labels.astype(np.uint8))):
            sizes = struct.pack(f">{values.ndim}I", *values.shape)
            content = bytes([0, 0, 8, values.ndim]) + sizes + values.tobytes()
            (folder / f"{part}-{kind}-ubyte.gz").write_bytes(gzip.compress(content, mtime=0))


def _tiny_imagenet(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    ids = [f"n{label:08}" for label in range(200)]
    root = "tiny-imagenet-200"
    with zipfile.ZipFile(folder / f"{root}.zip", "w") as archive:
        archive.writestr(f"{root}/wnids.txt", "".join(f"{name}\n" for name in ids))
        archive.writestr(f"{root}/words.txt", "".join(f"{name}\tthing {name}, of its kind\n" for name in ids))
        lines = []
        for part, count in (("train", 4), ("val", 1)):
            for row, (image, label) in enumerate(zip(*_pixels(part, 200, count, 64), strict=True)):
                name = ids[label]
                below = f"train/{name}/images/{name}_{row}.JPEG" if part == "train" else f"val/images/val_{row}.JPEG"
                archive.writestr(f"{root}/{below}", _jpeg(image))
                if part == "val":
                    lines.append(f"val_{row}.JPEG\t{name}\t0\t0\t63\t63\n")
        archive.writestr(f"{root}/val/val_annotations.txt", "".join(lines))
        for row in range(2):  # without labels, and read by nobody
            archive.writestr(f"{root}/test/images/test_{row}.JPEG", _jpeg(np.zeros((64, 64, 3), np.uint8)))


def _imagenet(folder: Path, side: int = 96) -> None:
    """``train/<class>/*.JPEG`` and ``val/<class>/*.JPEG``, of unequal sides."""
    draw = np.random.default_rng(_SEED)
    for part, count in (("train", 6), ("val", 2)):
        for row, (image, label) in enumerate(zip(*_pixels(part, 20, count, 2 * side), strict=True)):
            height, width = (round(side * factor) for factor in draw.uniform(0.9, 1.5, 2))
            place = folder / part / f"n{label:08}"
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{row}.JPEG").write_bytes(_jpeg(image[:height, :width]))


def _imagenet_72(folder: Path) -> None:
    _imagenet(folder, 72)


def _aflw(folder: Path) -> None:
    """The lists of MTFL and drawn faces, somewhere in the picture, turned and of several sizes."""
    draw = np.random.default_rng(_SEED)
    for part, count, below in (("training", 160, "lfw_5590"), ("testing", 80, "AFLW")):
        (folder / below).mkdir(parents=True, exist_ok=True)
        lines = []
        for row in range(count):
            pixels, places = _face(draw, 150)
            name = f"{row:04}-image{row:05}.jpg"
            (folder / below / name).write_bytes(_jpeg(pixels))
            numbers = [f"{value:.2f}" for value in places.T.flatten()]
            lines.append(" ".join([f"{below}\\{name}", *numbers, "1", "2", "2", "3"]) + "\n")
        (folder / f"{part}.txt").write_text("".join(lines))


def _face(draw: np.random.Generator, side: int) -> tuple[np.ndarray, np.ndarray]:
    """A drawn face, uint8 ``[side, side, 3]``, and its landmarks (x, y) ``[5, 2]``."""
    size, angle = side * draw.uniform(0.2, 0.3), draw.uniform(-0.35, 0.35)
    middle = side / 2 + side * draw.uniform(-0.12, 0.12, 2)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    shape = np.array([(-0.5, -0.4), (0.5, -0.4), (0.0, 0.1), (-0.4, 0.6), (0.4, 0.6)]) + draw.normal(0, 0.03, (5, 2))
    places = middle + size * shape @ turn
    background, skin = (tuple(draw.integers(low, low + 80, 3).tolist()) for low in (20, 150))
    picture = Image.new("RGB", (side, side), background)
    pen = ImageDraw.Draw(picture)
    pen.ellipse([*(middle - 1.3 * size), *(middle + 1.3 * size)], fill=skin)
    for (x, y), radius in zip(places[:3], (0.16, 0.16, 0.1), strict=True):
        pen.ellipse([x - radius * size, y - radius * size, x + radius * size, y + radius * size], fill=(30, 30, 30))
    pen.line([tuple(places[3]), tuple(places[4])], fill=(130, 20, 20), width=max(2, round(0.12 * size)))
    return np.clip(np.asarray(picture) + draw.normal(0, 8, (side, side, 3)), 0, 255).astype(np.uint8), places


def _imdb(folder: Path) -> None:
    """``aclImdb``: reviews of made-up opinions, of which each has some of many words, among words that say nothing."""
    draw = np.random.default_rng(_SEED)
    opinions = {"pos": _PRAISE.split(), "neg": _BLAME.split()}
    counts = {"train/pos": 30, "train/neg": 30, "train/unsup": 240, "test/pos": 60, "test/neg": 60}
    for below, count in counts.items():
        place = folder / "aclImdb" / below
        place.mkdir(parents=True, exist_ok=True)
        for row in range(count):
            kind = below[-3:] if below[-3:] in opinions else ("pos", "neg")[row % 2]
            words = draw.choice(_FILLING.split(), 24)
            told = draw.random(24) < 0.2
            words[told] = draw.choice(opinions[kind], told.sum())
            rating = (
                0 if below.endswith("unsup") else int(draw.integers(7, 11) if kind == "pos" else draw.integers(1, 5))
            )
            text = " ".join(words[:12]).capitalize() + ".<br /><br />" + " ".join(words[12:]).capitalize() + "."
            (place / f"{row}_{rating}.txt").write_text(text, encoding="utf-8")


_PRAISE = "great wonderful brilliant moving superb charming delightful perfect gripping lovely masterful funny"
_BLAME = "awful boring terrible dull wooden pointless annoying predictable lame tedious clumsy worst"
_FILLING = (
    "the a this film movie story actor scene plot of and it was is with in on that they director camera music end "
    "first then about from there who when people time year house city man woman child"
)


def _jpeg(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


WRITERS: dict[str, Callable[[Path], None]] = {
    "cifar-10": _cifar_10,
    "cifar-100": _cifar_100,
    "svhn": _svhn,
    "svhn-extra": _svhn_extra,
    "fashion-mnist": _fashion_mnist,
    "tiny-imagenet": _tiny_imagenet,
    "imagenet": _imagenet,
    "imagenet-72": _imagenet_72,
    "aflw": _aflw,
    "imdb": _imdb,
}
"""By the data set's name: writes a tiny one into a folder, which is made where it is not there."""
