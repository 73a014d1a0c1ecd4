"""A split written down place by place, so that another run has the same whatever draws random numbers there."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from fastmeta.data.images import Images
from fastmeta.data.split import Split


def written(images: Images, split: Split) -> dict[str, Any]:
    """For JSON: what the images are, and the places of each part."""
    places = {field.name: getattr(split, field.name).tolist() for field in fields(Split)}
    return {"name": images.name, "fingerprint": images.fingerprint, **places}


def read_split(path: str | Path, images: Images) -> Split:
    """The split in a file that a run wrote, of the same images.

    Raises:
        ValueError: there is no such file, or it is of other images.
    """
    try:
        held = json.loads(Path(path).read_text(encoding="utf-8"))
        parts = {field.name: torch.tensor(held[field.name], dtype=torch.int64) for field in fields(Split)}
        name, fingerprint = held["name"], held["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"split.file must be the split.json of a run, got {path}: {error!r}") from error
    if fingerprint != images.fingerprint:
        raise ValueError(
            f"split.file must be of the same images, {images.name} ({images.fingerprint}), got {path} of {name} "
            f"({fingerprint})"
        )
    return Split(**parts)
