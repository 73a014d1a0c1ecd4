"""What ``fastmeta predict`` is given, as images: pictures in any folders, or a data set."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from fastmeta.data import DataError, Images, open_images
from fastmeta.data.collection import Collection, DecodedImages
from fastmeta.data.folder import collect_files
from fastmeta.data.labels import class_name, part_of
from fastmeta.data.pictures import SUFFIXES
from fastmeta.training.run_folder import RunFolder


def open_for_prediction(paths: Sequence[str], run: RunFolder) -> Images:
    """The images at ``paths``, as large as those of the run.

    Pictures may lie in any folders. One in a folder that is named as a class of the run has that label, and the part is
    that of the outermost folder (``test/cat/1.jpg``), else "all".

    Args:
        paths: pictures and folders of pictures; or one data set of any other kind that training takes.
        run: whose images these are to be like.

    Raises:
        DataError: there are no images, or pictures have colours and the run's have none.
    """
    size = run.config["image_size"]
    if len(paths) == 1 and not _has_pictures(Path(paths[0])):
        return open_images(paths[0], image_size=size, mode=run.mode)
    roots = [os.path.abspath(path) for path in paths]
    found = collect_files([Path(root) for root in roots])
    if run.mode == "L" and _have_colours(found):
        raise DataError(f"{', '.join(paths)}: pictures have colours, expected gray ones as the run's")
    inner_first = sorted(set(roots), key=len, reverse=True)
    number = {name: place for place, name in enumerate(run.classes)}
    targets: list[int] = []
    parts: dict[str, list[int]] = {}
    for place, name in enumerate(found.names):
        root = next((root for root in inner_first if name.startswith(root + os.sep)), os.path.dirname(name))
        folders = os.path.relpath(name, root).split(os.sep)[:-1]
        targets.append(next((number[c] for c in map(class_name, reversed(folders)) if c in number), -1))
        part = part_of(folders[0]) if folders else None
        parts.setdefault(part or "all", []).append(place)
    return DecodedImages(
        replace(
            found,
            classes=run.classes,
            targets=torch.tensor(targets),
            parts={part: torch.tensor(places) for part, places in parts.items()},
        ),
        size,
        run.mode,
    )


def _have_colours(found: Collection) -> bool:
    try:
        return DecodedImages(found).mode == "RGB"
    except DataError:  # none can be read: what predicts them names them
        return False


def _has_pictures(path: Path) -> bool:
    if not path.is_dir():
        return path.suffix.lower() in SUFFIXES
    names = (name for _, _, inside in os.walk(path, followlinks=True) for name in inside if not name.startswith("."))
    return any(os.path.splitext(name)[1].lower() in SUFFIXES for name in names)
