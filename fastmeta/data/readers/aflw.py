"""AFLW as the Multi-Task Facial Landmark data set has it: lists of pictures with five landmarks each."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fastmeta.data.images import DataError
from fastmeta.data.landmarks import COORDINATES, Landmarks
from fastmeta.data.readers.pictures import as_mode

LISTS = {"train": "training.txt", "test": "testing.txt"}
_URL = "http://mmlab.ie.cuhk.edu.hk/projects/TCDCN/data/MTFL.zip"
_SIDE = 60  # pixels, as TCDCN takes them


def is_aflw(path: Path) -> bool:
    """Whether a folder has the lists."""
    return all((path / name).is_file() for name in LISTS.values())


def open_aflw(path: Path, image_size: int | None = None) -> Landmarks:
    r"""The faces of a folder, gray, each resized to a square.

    A line of a list is ``folder\picture.jpg x1 ... x5 y1 ... y5 gender smile glasses pose``: pixels of the left and
    right eye, the nose and the left and right corner of the mouth. Attributes are left alone.

    Args:
        path: the folder with both lists and the folders of pictures.
        image_size: side of the square; None: 60.

    Raises:
        DataError: a list or a picture is missing, or a line is none of these.
    """
    size = image_size or _SIDE
    pictures: list[str] = []
    coordinates: list[np.ndarray] = []
    counts = []
    for name in LISTS.values():
        if not (path / name).is_file():
            raise DataError(f"{path}: aflw without {name}; get MTFL.zip with it and its pictures from {_URL}")
        before = len(pictures)
        try:
            lines = (path / name).read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise DataError(f"{path / name}: must be UTF-8 text: {error}") from error
        for number, line in enumerate(lines, start=1):
            if line.strip():
                picture, points = _parsed(line, f"{path / name}: line {number}")
                pictures.append(picture)
                coordinates.append(points)
        counts.append(len(pictures) - before)
        if not counts[-1]:
            raise DataError(f"{path / name}: must have a line for each picture, got none")
    first, _ = counts
    places = torch.arange(len(pictures))
    parts = {"train": places[:first], "test": places[first:]}
    return _faces("aflw", [path / name for name in pictures], np.stack(coordinates), size, parts, pictures)


def open_faces(paths: Sequence[str], image_size: int | None = None) -> Landmarks:
    """Pictures of faces whose landmarks are not known: NaN; each gray, resized to a square as :func:`open_aflw` does.

    Raises:
        DataError: a picture cannot be read.
    """
    unknown = np.full((len(paths), len(COORDINATES)), np.nan)
    size = image_size or _SIDE
    return _faces("faces", [Path(path) for path in paths], unknown, size, {"test": torch.arange(len(paths))}, paths)


def _faces(
    name: str,
    paths: Sequence[Path],
    coordinates: np.ndarray,
    size: int,
    parts: dict[str, torch.Tensor],
    names: Sequence[str],
) -> Landmarks:
    """Of pictures ``[M]`` and landmarks in their pixels ``[M, 10]``."""
    decoded = [_decoded(path, size) for path in paths]
    scales = np.stack([scale for _, scale in decoded])
    try:
        return Landmarks(
            name,
            torch.from_numpy(np.stack([pixels for pixels, _ in decoded])).unsqueeze(1),
            torch.from_numpy(coordinates * scales.repeat(5, axis=1)),
            parts,
            names,
            scales=torch.from_numpy(scales),
        )
    except ValueError as error:
        raise DataError(f"{name}: {error}") from error


def _parsed(line: str, where: str) -> tuple[str, np.ndarray]:
    picture, *words = line.split()
    try:
        numbers = np.array([float(word) for word in words[: len(COORDINATES)]])
    except ValueError as error:
        raise DataError(f"{where}: must be a path and numbers: {error}") from error
    if len(numbers) < len(COORDINATES) or not np.isfinite(numbers).all():
        raise DataError(f"{where}: must have {len(COORDINATES)} finite coordinates, got {len(numbers)} numbers")
    return picture.replace("\\", "/"), numbers


def _decoded(path: Path, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Gray pixels ``[size, size]`` as stored, and what coordinates (x, y) are multiplied by.

    EXIF's orientation is left alone: the lists have coordinates of the pixels in the file.
    """
    try:
        with Image.open(path) as picture:
            scale = np.array([size / picture.width, size / picture.height])
            return np.asarray(as_mode(picture, "L").resize((size, size), Image.Resampling.BILINEAR)), scale
    except Exception as error:  # whatever Pillow raises for what it cannot read
        raise DataError(f"{path}: cannot be read: {error}") from error
