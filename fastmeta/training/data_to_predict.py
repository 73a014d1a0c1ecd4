"""What ``fastmeta predict`` is given: pictures or texts in any folders, or a data set."""

import os
from collections.abc import Collection as Container
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from fastmeta.data import DataError, Images, open_images
from fastmeta.data.readers.aflw import is_aflw, open_aflw, open_faces
from fastmeta.data.readers.collection import Collection, DecodedImages
from fastmeta.data.readers.folder import collect_files
from fastmeta.data.readers.imdb import imdb_below
from fastmeta.data.readers.labels import class_name, part_of
from fastmeta.data.readers.pictures import SUFFIXES
from fastmeta.data.readers.shards import shards_below
from fastmeta.data.readers.texts import open_texts_to_predict
from fastmeta.data.text import Texts
from fastmeta.training.reports.run_folder import RunFolder

_TEXTS = (".txt",)


def open_for_prediction(paths: Sequence[str], run: RunFolder) -> Images:
    """What is at ``paths``: images as large as those of the run, or texts as long, in the run's tokens.

    Pictures and texts (``.txt``, one each) may lie in any folders. One in a folder that is named as a class of the run
    has that label, and the part is that of the outermost folder (``test/cat/1.jpg``), else "all".

    Args:
        paths: files and folders of files; or one data set of any other kind that training takes.
        run: whose data these are to be like.

    Raises:
        DataError: there is nothing, a text is not UTF-8, or pictures have colours and the run's have none.
    """
    if run.task == "texts":
        return _texts(paths, run)
    size = run.config["image_size"]
    if run.task == "landmarks":
        only = Path(paths[0].removeprefix("aflw:"))
        if len(paths) == 1 and (is_aflw(only) or paths[0].startswith("aflw:")):
            return open_aflw(only, size)
        return open_faces(list(dict.fromkeys(_pictures(paths).names)), size)
    if len(paths) == 1 and not _has_files(Path(paths[0]), SUFFIXES):
        return open_images(paths[0], image_size=size, mode=run.mode)
    found = _pictures(paths)
    if run.mode == "L" and _have_colours(found):
        raise DataError(f"{', '.join(paths)}: pictures have colours, expected gray ones as the run's")
    targets, parts = _labels_of_folders(found.names, paths, run.classes)
    return DecodedImages(replace(found, classes=run.classes, targets=targets, parts=parts), size, run.mode)


def _pictures(paths: Sequence[str]) -> Collection:
    return collect_files([Path(os.path.abspath(path)) for path in paths])


def _texts(paths: Sequence[str], run: RunFolder) -> Texts:
    length, tokenizer = run.image_shape[0], str(run.folder)
    if len(paths) == 1 and not _is_of_text_files(Path(paths[0])):
        found: Images | None = None
        if Path(paths[0]).exists() and imdb_below(Path(paths[0])) is None:
            found = open_texts_to_predict(Path(paths[0]), run.classes, length, tokenizer)
        if found is None:
            found = open_images(paths[0], image_size=length, tokenizer=tokenizer)
        if not isinstance(found, Texts):
            raise DataError(f"{paths[0]}: must be texts, as those of {run.folder}, got images")
        return found
    names = []
    for path in paths:
        if not os.path.exists(path):
            raise DataError(f"{path}: no such file or folder")
        below = sorted(_files_below(os.path.abspath(path), _TEXTS))
        if not below:
            raise DataError(f"{path}: no texts found, expected .txt files, or a folder of them")
        names += below
    names = list(dict.fromkeys(names))
    texts = []
    for name in names:
        try:
            texts.append(Path(name).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{name}: must be UTF-8 text: {error}") from error
    targets, parts = _labels_of_folders(names, paths, run.classes)
    made = Texts("texts", texts, targets, run.classes, {}, names, tokenizer=tokenizer, length=length)
    made.parts = parts
    return made


def _is_of_text_files(path: Path) -> bool:
    """Whether a path is a text, or a folder of texts and no data set."""
    if not path.is_dir():
        return _has_files(path, _TEXTS)
    return imdb_below(path) is None and not shards_below(path, ".parquet")


def _labels_of_folders(
    names: Sequence[str], paths: Sequence[str], classes: Sequence[str]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Targets ``[M]`` and parts of files below ``paths``."""
    inner_first = sorted({os.path.abspath(path) for path in paths}, key=len, reverse=True)
    number: Mapping[str, int] = {name: place for place, name in enumerate(classes)}
    targets: list[int] = []
    parts: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        root = next((root for root in inner_first if name.startswith(root + os.sep)), os.path.dirname(name))
        folders = os.path.relpath(name, root).split(os.sep)[:-1]
        targets.append(next((number[c] for c in map(class_name, reversed(folders)) if c in number), -1))
        part = part_of(folders[0]) if folders else None
        parts.setdefault(part or "all", []).append(place)
    return torch.tensor(targets), {part: torch.tensor(places) for part, places in parts.items()}


def _have_colours(found: Collection) -> bool:
    try:
        return DecodedImages(found).mode == "RGB"
    except DataError:  # none can be read: what predicts them names them
        return False


def _has_files(path: Path, suffixes: Container[str]) -> bool:
    return next(_files_below(str(path), suffixes), None) is not None


def _files_below(path: str, suffixes: Container[str]) -> Iterator[str]:
    """The file at a path, or those of a folder, whose names end so."""
    if not os.path.isdir(path):
        yield from [path] if os.path.splitext(path)[1].lower() in suffixes else []
        return
    for folder, _, inside in os.walk(path, followlinks=True):
        for name in inside:
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in suffixes:
                yield os.path.join(folder, name)
