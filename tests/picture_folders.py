"""Real pictures as folders: scikit-learn's digits, and patches of photographs."""

from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images

PATCH = 32  # pixels


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
    """Patches of photographs, labelled by photograph: the left 60% of each to train, the right 30% to test.

    scikit-learn has two photographs; scikit-image, where it is installed, has more.
    """
    for name, pixels in _photographs().items():
        height, width = (side // PATCH for side in pixels.shape[:2])
        for row in range(height):
            for column in range(width):
                part = "train" if column < 0.6 * width else "test" if column >= 0.7 * width else None
                if part is not None:
                    patch = pixels[row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH]
                    _save(patch, root / part / name / f"{row:02} {column:02}.png")
    return root


def _photographs() -> dict[str, np.ndarray]:
    bunch = load_sample_images()
    found = {Path(name).stem: pixels for name, pixels in zip(bunch.filenames, bunch.images, strict=True)}
    try:
        import skimage.data
    except ImportError:
        return found
    return found | {name: getattr(skimage.data, name)() for name in ("astronaut", "chelsea", "coffee", "rocket")}


def _ink(image: np.ndarray) -> np.ndarray:
    return np.round(image / 16 * 255).astype(np.uint8)


def _save(pixels: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
