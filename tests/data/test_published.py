"""Published data sets in their original files, small ones written in exactly those formats."""

import gzip
import io
import os
import pickle
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from fastmeta.data import DataError, make_split, open_images
from fastmeta.data.generated import WRITERS, pickled_by_python_2
from fastmeta.data.readers.plain_pickle import read_pickle

PARTS = {
    "cifar-10": ({"train": 100, "test": 20}, 10, (3, 32, 32)),
    "cifar-100": ({"train": 500, "test": 100}, 100, (3, 32, 32)),
    "svhn": ({"train": 60, "test": 20}, 10, (3, 32, 32)),
    "svhn-extra": ({"train": 60, "unlabeled": 40, "test": 20}, 10, (3, 32, 32)),
    "fashion-mnist": ({"train": 60, "test": 20}, 10, (1, 28, 28)),
    "tiny-imagenet": ({"train": 800, "test": 200}, 200, (3, 64, 64)),
    "imagenet": ({"train": 120, "validation": 40}, 20, (3, 256, 256)),
    "imagenet-72": ({"train": 120, "validation": 40}, 20, (3, 72, 72)),
}
ORIGINALS = ("cifar-10", "cifar-100", "svhn", "svhn-extra", "fashion-mnist", "tiny-imagenet")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Folders by name; nobody changes them."""
    root = tmp_path_factory.mktemp("published")
    for name, write in WRITERS.items():
        if name in PARTS:
            write(root / name)
    return root


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTMETA_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("name", PARTS)
def test_each_data_set_by_its_name(name, written):
    if name.startswith("svhn"):
        pytest.importorskip("scipy")
    parts, classes, shape = PARTS[name]
    images = open_images(f"{name}:{written / name}")
    assert {part: len(places) for part, places in images.parts.items()} == parts
    assert (images.name, len(images.classes), images.image_shape) == (name, classes, shape)
    for places in images.parts.values():
        assert len(images.targets[places].unique()) == classes
    split = make_split(images, labels_per_class=2, seed=0)
    assert len(split.labeled) == 2 * classes
    drawn = {"test_fraction": 0.5} if "test" in parts else {"validation": 5}
    with pytest.raises(ValueError, match=f"must be 0, because {name} has an official"):
        make_split(images, labels_per_class=1, seed=0, **drawn)


@pytest.mark.parametrize("name", [name for name in ORIGINALS if name != "fashion-mnist"])
def test_original_files_are_known_without_a_name_and_kept_in_the_cache(name, written, monkeypatch):
    if name.startswith("svhn"):
        pytest.importorskip("scipy")
    named, plain = open_images(f"{name}:{written / name}"), open_images(written / name, cache=False)
    places = torch.arange(len(plain))
    assert (plain.name, plain.fingerprint, plain.classes) == (name, named.fingerprint, named.classes)
    assert plain.targets.equal(named.targets)
    assert plain.get(places).equal(named.get(places))
    assert plain.describe(7) == named.describe(7)
    if name != "tiny-imagenet":
        monkeypatch.setattr("fastmeta.data.readers.original._Contents", lambda *_: pytest.fail("read again"))
    assert open_images(f"{name}:{written / name}").get(places).equal(named.get(places))


def test_generated_pickles_are_those_of_python_2(written):
    value = {b"data": np.arange(6, dtype=np.uint8).reshape(2, 3), b"labels": [1, -2], b"text": b"a" * 300}
    for loaded in (pickle.loads(pickled_by_python_2(value), encoding="bytes"), read_pickle(pickled_by_python_2(value))):
        assert loaded.pop(b"data").tolist() == [[0, 1, 2], [3, 4, 5]]
        assert loaded == {b"labels": [1, -2], b"text": b"a" * 300}


def unpack(archive, folder):
    if archive.suffix == ".zip":
        zipfile.ZipFile(archive).extractall(folder)
    else:
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
    return next(folder.iterdir())


@pytest.mark.parametrize(
    ("name", "archive"),
    [
        ("cifar-10", "cifar-10-python.tar.gz"),
        ("cifar-100", "cifar-100-python.tar.gz"),
        ("tiny-imagenet", "tiny-imagenet-200.zip"),
    ],
)
def test_an_archive_and_what_it_unpacks_to_are_the_same(name, archive, written, tmp_path):
    packed = open_images(f"{name}:{written / name / archive}", cache=False)
    inside = unpack(written / name / archive, tmp_path / "unpacked")
    some = torch.arange(0, len(packed), 17)
    for path in (tmp_path / "unpacked", inside, f"{name}:{inside}"):
        unpacked = open_images(path, cache=False)
        assert unpacked.fingerprint == packed.fingerprint
        assert unpacked.get(some).equal(packed.get(some))
    assert os.path.basename(unpacked.describe(3)) == os.path.basename(packed.describe(3))


def test_pixels_of_cifar_are_three_planes_of_rows(tmp_path):
    """Written as Krizhevsky's page describes it, by NumPy's own pickles."""
    data = np.zeros((2, 3072), np.uint8)
    data[1, 2 * 1024 + 5 * 32 + 7] = 200  # blue, row 5, column 7
    for file in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
        batch = {b"data": data, b"labels": [3, 9]}
        (tmp_path / file).write_bytes(pickle.dumps(batch, protocol=4))
    names = [b"airplane", *(b"class %d" % number for number in range(1, 10))]
    (tmp_path / "batches.meta").write_bytes(pickle.dumps({b"label_names": names}, protocol=4))
    images = open_images(tmp_path, cache=False)
    assert images.targets.tolist() == [3, 9] * 6
    assert images.classes[0] == "airplane"
    assert images.parts["test"].tolist() == [10, 11]
    pixels = images.get(torch.tensor([1]))[0]
    assert torch.nonzero(pixels).tolist() == [[2, 5, 7]]


def test_the_binary_version_of_cifar(tmp_path):
    rows = np.zeros((4, 2 + 3072), np.uint8)
    rows[:, 0], rows[:, 1] = [1, 2, 3, 4], [5, 99, 0, 42]  # coarse, fine
    rows[2, 2 + 1024] = 7  # green
    for part in ("train", "test"):
        (tmp_path / f"{part}.bin").write_bytes(rows.tobytes())
    (tmp_path / "fine_label_names.txt").write_text("\n".join(f"c{number}" for number in range(100)))
    images = open_images(tmp_path, cache=False)
    assert (images.name, images.classes[42]) == ("cifar-100", "c42")
    assert images.targets.tolist() == [5, 99, 0, 42] * 2
    assert torch.nonzero(images.get(torch.tensor([2]))[0]).tolist() == [[1, 0, 0]]


def test_a_digit_0_of_svhn_is_10_in_its_file(tmp_path):
    scipy = pytest.importorskip("scipy.io")
    pixels = np.zeros((32, 32, 3, 2), np.uint8)
    pixels[4, 6, 2, 1] = 9
    for part in ("train", "test"):
        scipy.savemat(tmp_path / f"{part}_32x32.mat", {"X": pixels, "y": np.array([[10], [1]], np.uint8)})
    images = open_images(tmp_path, cache=False)
    assert images.targets.tolist() == [0, 1] * 2
    assert torch.nonzero(images.get(torch.tensor([1]))[0]).tolist() == [[2, 4, 6]]
    scipy.savemat(tmp_path / "train_32x32.mat", {"X": pixels, "y": np.array([[0], [1]], np.uint8)})
    with pytest.raises(DataError, match=r"train_32x32.mat: y must lie in \[1, 10\], got 0; .* has MD5 \w{32} and"):
        open_images(tmp_path, cache=False)


def test_extra_images_of_svhn_are_unlabeled_where_they_are_asked_for(written):
    pytest.importorskip("scipy")
    folder = written / "svhn-extra"
    assert set(open_images(f"svhn:{folder}").parts) == {"train", "test"}
    assert set(open_images(folder).parts) == {"train", "unlabeled", "test"}
    with pytest.raises(DataError, match=r"no svhn-extra found; expected extra_32x32.mat, train_32x32.mat, test_32x32"):
        open_images(f"svhn-extra:{written / 'svhn'}")


def test_files_of_mnist_need_a_name(written, tmp_path):
    with pytest.raises(DataError, match=r"may be fashion-mnist or mnist, give fashion-mnist:.* or mnist:"):
        open_images(written / "fashion-mnist")
    digits = open_images(f"mnist:{written / 'fashion-mnist'}")
    assert digits.classes == tuple("0123456789")
    raw = tmp_path / "FashionMNIST" / "raw"  # as torchvision unpacks it
    raw.mkdir(parents=True)
    for path in (written / "fashion-mnist").iterdir():
        (raw / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
    unpacked = open_images(tmp_path, cache=False)
    assert (unpacked.name, unpacked.classes[9]) == ("fashion-mnist", "Ankle boot")
    places = torch.arange(len(unpacked))
    assert unpacked.get(places).equal(digits.get(places))


def test_a_forked_process_opens_the_zip_by_itself(written, monkeypatch):
    images = open_images(written / "tiny-imagenet", cache=False)
    images.get(torch.tensor([0]))
    before = images.collection.opener._file
    monkeypatch.setattr(os, "getpid", lambda: -1)
    images.get(torch.tensor([1]))
    assert images.collection.opener._file is not before


def test_several_data_sets_in_one_folder_need_a_name(written, tmp_path):
    for name in ("cifar-10", "cifar-100"):
        os.link(written / name / f"{name}-python.tar.gz", tmp_path / f"{name}-python.tar.gz")
    with pytest.raises(DataError, match=r"may be cifar-10 or cifar-100, give cifar-10:.* or cifar-100:"):
        open_images(tmp_path)
    assert len(open_images(f"cifar-100:{tmp_path}").classes) == 100


def test_tiny_imagenet_is_tested_on_val(written):
    images = open_images(written / "tiny-imagenet", cache=False)
    assert all("/val/images/" in images.describe(place) for place in images.parts["test"].tolist())
    place = int(images.parts["train"][5])
    assert images.classes[images.targets[place]] == f"thing {images.describe(place).split('/')[2]}"


@pytest.mark.parametrize("name", ORIGINALS)
def test_what_is_missing_is_named(name, tmp_path):
    (tmp_path / "readme.txt").touch()
    with pytest.raises(DataError, match=rf"no {name} found; expected .*; or parquet files .* \(.*: no images"):
        open_images(f"{name}:{tmp_path}")
    with pytest.raises(DataError, match="nowhere: no such file or folder"):
        open_images(f"{name}:{tmp_path / 'nowhere'}")


@pytest.mark.parametrize("name", ["imagenet", "imagenet-72"])
def test_imagenet_needs_its_validation_images(name, written, tmp_path):
    with pytest.raises(DataError, match="no images found, expected train/<class>/ or <class>/"):
        open_images(f"{name}:{tmp_path}")
    with pytest.raises(DataError, match=f"{name} needs val/<class>/ or a validation part beside train, got train"):
        open_images(f"{name}:{written / name / 'train'}")


def test_how_to_get_it_is_said(written, tmp_path):
    inside = unpack(written / "cifar-10" / "cifar-10-python.tar.gz", tmp_path)
    (inside / "data_batch_4").unlink()
    (inside / "batches.meta").unlink()
    with pytest.raises(DataError) as caught:
        open_images(tmp_path)
    said = str(caught.value)
    assert "cifar-10 without data_batch_4, batches.meta; expected data_batch_1," in said
    assert "there or in cifar-10-batches-py, or cifar-10-python.tar.gz as downloaded; get it from https://" in said
    assert "c58f30108f718f92721af3b95e74349a" in said


@pytest.mark.parametrize(
    ("name", "file", "message"),
    [
        ("cifar-10", "cifar-10-python.tar.gz", "must be a whole archive|: not in it"),
        ("cifar-100", "cifar-100-python.tar.gz", "must be a whole archive|: not in it"),
        ("svhn", "train_32x32.mat", "must be a file of Matlab with X and y"),
        ("fashion-mnist", "train-images-idx3-ubyte.gz", "cannot be read|must be an idx file"),
        ("tiny-imagenet", "tiny-imagenet-200.zip", "must be Tiny ImageNet, whole"),
    ],
)
@pytest.mark.parametrize("damage", ["cut off", "empty", "overwritten"])
def test_a_damaged_download_is_named_with_its_sum(name, file, message, damage, written, tmp_path):
    if name == "svhn":
        pytest.importorskip("scipy")
    for path in (written / name).iterdir():
        content = bytearray(path.read_bytes())
        if path.name == file:
            if damage == "overwritten":
                content[len(content) // 2 : len(content) // 2 + 400] = bytes(400)
                content[-3000:] = bytes(3000)
            else:
                del content[0 if damage == "empty" else len(content) * 2 // 3 :]
        (tmp_path / path.name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        open_images(f"{name}:{tmp_path}")
    assert f"{file} has MD5 " in str(caught.value)
    assert not any(path.is_dir() for path in (tmp_path / "cache").glob("*"))


class Trap:
    def __reduce__(self):
        return (os.mkdir, ("trapped",))


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_runs_nothing(protocol, written, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    inside = unpack(written / "cifar-100" / "cifar-100-python.tar.gz", tmp_path)
    (inside / "train").write_bytes(pickle.dumps({b"data": Trap()}, protocol=protocol))
    with pytest.raises(DataError, match=r"train: must be a pickle of arrays: it names .*mkdir, which is not loaded"):
        open_images(inside, cache=False)
    assert not (tmp_path / "trapped").exists()
    (inside / "train").write_bytes(pickle.dumps({b"data": [1]}))
    with pytest.raises(DataError, match=r"train: must be a pickled dict with data, fine_labels, got {b'data': "):
        open_images(inside, cache=False)
    (inside / "train").write_bytes(pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"fine_labels": [100]}))
    with pytest.raises(DataError, match=r"train: labels must lie in \[0, 100\), got 100 to 100"):
        open_images(inside, cache=False)


def test_parquet_files_of_the_hub_by_name(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

    def write(name, image, **columns):
        buffer = io.BytesIO()
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(buffer, "PNG")
        rows = len(next(iter(columns.values())))
        pictures = [{"bytes": buffer.getvalue(), "path": None}] * rows
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        parquet.write_table(pyarrow.table({image: pictures, **columns}), path)

    for part in ("train", "test"):
        write(f"cifar100/{part}-00000-of-00001.parquet", "img", fine_label=[*range(100)], coarse_label=[0] * 100)
        write(f"svhn/{part}-00000-of-00001.parquet", "image", label=[*range(10)])
    write("svhn/extra-00000-of-00001.parquet", "image", label=[*range(10)])
    images = open_images(f"cifar-100:{tmp_path / 'cifar100'}")
    assert (images.name, len(images.classes), set(images.parts)) == ("cifar-100", 100, {"train", "test"})
    assert images.targets.tolist() == [*range(100)] * 2
    assert set(open_images(f"svhn-extra:{tmp_path / 'svhn'}").parts) == {"train", "test", "unlabeled"}
    assert set(open_images(f"svhn:{tmp_path / 'svhn'}").parts) == {"train", "test"}
    with pytest.raises(DataError, match="cifar-10 has 10 classes, got 100"):
        open_images(f"cifar-10:{tmp_path / 'cifar100'}")
    for part in ("train", "valid"):
        write(f"tiny/{part}-00000-of-00001.parquet", "image", label=[*range(200)])
    assert set(open_images(f"tiny-imagenet:{tmp_path / 'tiny'}").parts) == {"train", "test"}
