"""Real pictures as folders: scikit-learn's digits, and patches of photographs."""

from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from fastmeta.data import load_photographs


def write_digits(root: Path, *, train: int = 20, test: int = 5, unlabeled: int = 0) -> Path:
    """``train/<digit>/<number>.png``, so many a digit, and ``test/``; ``unlabeled/<number>.png``, so many in all."""
    bunch = load_digits()
    left = []
    for digit in range(10):
        members = np.flatnonzero(bunch.target == digit)
        for part, numbers in (("train", members[:train]), ("test", members[train : train + test])):
            for number in numbers:
                _save(_ink(bunch.images[number]), root / part / str(digit) / f"{number:04}.png")
        left += list(members[train + test :])
    for number in sorted(left)[:unlabeled]:
        _save(_ink(bunch.images[number]), root / "unlabeled" / f"{number:04}.png")
    return root


def write_photographs(root: Path) -> Path:
    """Some patches of photographs, labelled by photograph, as ``train`` and ``test``."""
    photographs = load_photographs()
    for part, places in photographs.parts.items():
        for place in places[::9].tolist():
            pixels = photographs.images[place].permute(1, 2, 0).numpy()
            name = photographs.classes[photographs.targets[place]]
            _save(pixels, root / part / name / f"{place:04}.png")
    return root


def _ink(image: np.ndarray) -> np.ndarray:
    return np.round(image / 16 * 255).astype(np.uint8)


def _save(pixels: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
