"""Features of a frozen backbone in place of images: what training a last layer alone runs on."""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastmeta.capture import last_linear
from fastmeta.data.augment import Views
from fastmeta.data.feature_cache import KINDS, FeatureCache, cache_features
from fastmeta.data.images import Images, UnreadableImage, fingerprint_of
from fastmeta.data.random_numbers import KeyedRandom


class FeatureImages:
    """The images of a run by their numbers alone: :meth:`get` gives these, and the views look features up.

    Everything else is that of the images behind it: classes, labels, parts, descriptions.

    Args:
        images: these.
        cache: their features.
    """

    def __init__(self, images: Images, cache: FeatureCache) -> None:
        self.images = images
        self.name: str = images.name
        self.classes: tuple[str, ...] = images.classes
        self.targets: Tensor = images.targets
        self.parts: Mapping[str, Tensor] = images.parts
        self.image_shape: tuple[int, ...] = (cache.features.shape[1],)  # of what the views give
        self.fingerprint = fingerprint_of(images.fingerprint, cache.key)
        self._unreadable = cache.unreadable
        self._broken = torch.zeros(len(images), dtype=torch.bool)
        self._broken[list(cache.unreadable)] = True

    def __len__(self) -> int:
        return len(self.images)

    def get(self, places: Tensor) -> Tensor:
        """``places`` themselves, ``[n]`` int64: what the views take.

        Raises:
            UnreadableImage: the first image that could not be read when the features were computed.
        """
        broken = places[self._broken[places]]
        if len(broken):
            place = int(broken[0])
            raise UnreadableImage(place, self.describe(place), self._unreadable[place])
        return places

    def describe(self, place: int) -> str:
        """As the images do."""
        return self.images.describe(place)


class CachedView:
    """One view of each image, ``[n]`` places to features ``[n, D]`` float32; of several by the example's number.

    Args:
        features: ``[R, D]``; a memory map, or on the device of training.
        first: ``[M]`` int64, the row of an image's first view of this kind.
        count: V, its views of this kind, one below the other.
    """

    def __init__(self, features: Tensor, first: Tensor, count: int) -> None:
        self.features, self.first, self.count = features, first, count

    def __call__(self, images: Tensor, random: KeyedRandom | None = None) -> Tensor:
        """The features of ``images``, as :meth:`FeatureImages.get` gives them; ``random`` chooses among several."""
        rows = self.first.to(images.device).index_select(0, images)
        if self.count > 1:
            if random is None:
                raise ValueError(f"random must be given to choose one of {self.count} views")
            rows = rows + random.integers(0, self.count, 1)[:, 0]
        return self.features.index_select(0, rows.to(self.features.device)).to(images.device, torch.float32)


class FrozenFeatures(NamedTuple):
    """What a trainer of the last layer takes in place of images, views and model."""

    images: FeatureImages
    views: Views
    head: nn.Linear


def frozen_features(
    model: nn.Module,
    images: Images,
    views: Views,
    *,
    folder: Path | str,
    augmented: Tensor | None = None,
    views_per_image: int = 4,
    seed: int = 0,
    batch_size: int | None = None,
    workers: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> FrozenFeatures:
    """The features that the last linear layer of ``model`` sees, of every image, computed once.

    The plain view of every image, and V weak and V strong ones of ``augmented``, go through the model in evaluation
    mode (no dropout, running statistics). Training then draws one of an image's V views by the example's number: two
    views of one kind are the same one time in V. Features lie in ``folder``, in a file that is named after what they
    depend on: weights, images, augmentation, V, seed and dtype; where it is there, nothing is computed. Other processes
    that ask for the same wait; a run that was killed goes on from where it was.

    On a GPU the features are kept there if they take at most half of its free memory.

    Args:
        model: the classifier.
        images: all images of a run.
        views: weak, strong and plain; their text (``repr``) says what they do, as that of a dataclass.
        folder: where files of features lie; it may be shared by runs.
        augmented: ``[A]`` int64, places that training reads; None: the parts "train" and "unlabeled".
        views_per_image: V.
        seed: of the augmentation.
        batch_size: images that go through the model at once, view by view; None: by their size.
        workers: processes that read images.
        device: where the model runs.
        dtype: of the file, float32 or float16 (half the size, 11 bits).
        on_progress: called with the number of images that are done, and of all.

    Raises:
        ValueError: an argument is out of its range; the logits are not what the last ``nn.Linear`` gives; a feature is
            not finite, or too large for float16.

    >>> import tempfile
    >>> from fastmeta.data import KeyedRandom, load_digits, views_for
    >>> from fastmeta.models import build_model
    >>> digits, views = load_digits(), views_for("digits", (1, 8, 8), 8)
    >>> model = build_model("conv-net", num_classes=10, channels=1, image_size=8)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     made = frozen_features(model, digits, views, folder=folder, augmented=torch.arange(20), views_per_image=2)
    >>> places = torch.tensor([3, 4])
    >>> features = made.views.weak(made.images.get(places), KeyedRandom(0, "labeled", "weak", torch.tensor([0, 1])))
    >>> made.head(features).shape, len(made.images)
    (torch.Size([2, 10]), 1797)
    """
    if augmented is None:
        parts = [images.parts[part] for part in ("train", "unlabeled") if part in images.parts]
        augmented = torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)
    augmented = augmented.unique()
    layer, _ = last_linear(model)
    cache = cache_features(
        model,
        images,
        views,
        folder=Path(folder),
        augmented=augmented,
        views_per_image=views_per_image,
        seed=seed,
        batch_size=batch_size,
        workers=workers,
        device=torch.device(device),
        dtype=dtype,
        on_progress=on_progress,
    )
    features = _placed(cache.features, torch.device(device))
    count = len(images)

    def view(number: int) -> CachedView:
        first = torch.full((count,), -(2**62))  # no row at all, so that no image without views gets another's
        first[augmented] = count + (len(KINDS) * torch.arange(len(augmented)) + number) * views_per_image
        return CachedView(features, first.to(device), views_per_image)

    plain = CachedView(features, torch.arange(count, device=device), 1)
    head = copy.deepcopy(layer).requires_grad_(True)
    return FrozenFeatures(FeatureImages(images, cache), Views(view(0), view(1), plain), head)


def restore_head(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Put the state dict of a trained head back into the model whose backbone was frozen.

    Raises:
        RuntimeError: it is that of another layer.
    """
    layer, _ = last_linear(model)
    layer.load_state_dict(weights)


def _placed(features: Tensor, device: torch.device) -> Tensor:
    if device.type != "cuda":
        return features
    free, _ = torch.cuda.mem_get_info(device)
    return features.to(device) if 2 * features.nbytes <= free else features
