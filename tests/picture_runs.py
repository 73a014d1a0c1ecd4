"""Digits as files, and short runs on them: what predictions and reports are tested with."""

from pathlib import Path

from PIL import Image
from sklearn.datasets import load_digits

from fastmeta.training import RunConfig, train
from fastmeta.training.config import EvaluationConfig, OptimizerConfig

# Names that a page and a CSV must not take for their own marks.
CLASSES = ("zero, nought", 'one "1"', "<i>two", "three & a half")


def write_pictures(folder: Path, *, unlabeled: int = 40) -> Path:
    """The digits 0 to 3: 5 of each class for training, unlabeled ones, one of which is broken, and 24 for the test."""
    digits = load_digits(n_class=len(CLASSES))
    for number, (pixels, digit) in enumerate(zip(digits.images[: 44 + unlabeled], digits.target, strict=False)):
        part = "train" if number < 20 else "test" if number < 44 else "unlabeled"
        path = folder / part / CLASSES[digit] / f"{number:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 255 / 16).astype("uint8")).save(path)
    (folder / "unlabeled" / CLASSES[0] / "broken.png").write_bytes(b"no picture")
    return folder


def train_on(pictures: Path, folder: Path, **settings) -> Path:
    """A short run in ``folder``."""
    chosen = {
        "method": "impute-and-weight",
        "model": "linear",
        "steps": 20,
        "labeled_batch": 8,
        "unlabeled_batch": 16,
        "base_settings": {"threshold": 0.3},
        "optimizer": OptimizerConfig(learning_rate=0.2),
        "image_size": 8,
        "evaluation": EvaluationConfig(every=5),
        **settings,
    }
    train(RunConfig(data=str(pictures), **chosen), folder)
    return folder
