"""Data sets of Hugging Face's hub, or of a folder, through their library."""

import io
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from fastmeta.data.images import DataError, fingerprint_of
from fastmeta.data.readers.collection import Collection
from fastmeta.data.readers.labels import PART_NAMES, checked_parts, class_name, number_labels
from fastmeta.data.readers.optional import optional
from fastmeta.data.readers.shards import RowNames, places_of_parts


class OpenExample:
    """Opens pictures of a data set whose images are not decoded."""

    def __init__(self, parts: list[Any], column: str) -> None:
        self._parts, self._column = parts, column

    def __call__(self, place: int) -> Image.Image:
        """The picture of an example."""
        for part in self._parts:
            if place < len(part):
                break
            place -= len(part)
        value = part[place][self._column]
        if value["bytes"] is None:
            return Image.open(value["path"])
        return Image.open(io.BytesIO(value["bytes"]))


def collect_huggingface(name: str) -> Collection:
    """The data set ``name``, ``name:configuration``, or a folder that ``save_to_disk`` or ``load_dataset`` knows.

    The first feature of type Image and the first ClassLabel (or the column ``label``) count; splits are parts by their
    names: train, validation, test, unsupervised.

    Raises:
        DataError: there is no such data set here, or it has no such features.
        MissingPackage: datasets is not installed.
    """
    datasets = optional("datasets", "datasets", "data sets of the hub")
    try:
        if any((Path(name) / file).exists() for file in ("dataset_dict.json", "state.json")):
            loaded = datasets.load_from_disk(name)
        else:
            repository, _, configuration = (name, "", "") if Path(name).exists() else name.partition(":")
            loaded = datasets.load_dataset(repository, configuration or None)
    except Exception as error:  # of many kinds, the network's too
        raise DataError(f"huggingface:{name}: cannot be loaded: {(str(error).splitlines() or [''])[0]}") from error
    splits = loaded if isinstance(loaded, dict) else {"train": loaded}
    splits = {PART_NAMES[split]: rows for split, rows in splits.items() if split in PART_NAMES}
    if "train" not in splits:
        raise DataError(f"huggingface:{name}: expected a split train, got {', '.join(loaded)}")
    features = splits["train"].features
    image = next((column for column, kind in features.items() if isinstance(kind, datasets.Image)), None)
    labels = [column for column, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    label = next(iter([*labels, *(column for column in features if column == "label")]), None)
    if image is None or label is None:
        raise DataError(f"huggingface:{name}: expected an image and a class label, got {', '.join(features)}")
    counts = [len(rows) for rows in splits.values()]
    names = RowNames([f"{name}:{part}" for part in splits], counts)
    places = places_of_parts(list(splits), counts)
    values = [value for rows in splits.values() for value in rows.with_format(None)[label]]
    if labels:
        classes = tuple(class_name(one) for one in features[label].names)
        targets = torch.tensor([-1 if value is None else value for value in values], dtype=torch.int64)
    else:
        texts = ["" if value in (None, -1) else class_name(str(value)) for value in values]
        classes, targets = number_labels(texts, places, names.__getitem__)
    parts = checked_parts(name, classes, targets, places, names.__getitem__)
    opener = OpenExample([rows.cast_column(image, datasets.Image(decode=False)) for rows in splits.values()], image)
    prints = [getattr(rows, "_fingerprint", "") for rows in splits.values()]
    fingerprint = fingerprint_of(classes, counts, targets)
    return Collection(
        name.rsplit("/", 1)[-1], classes, targets, parts, names, opener, fingerprint, fingerprint_of(name, prints)
    )
