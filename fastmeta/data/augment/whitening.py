"""Whitening: pixels that are uncorrelated over the training images."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastmeta.data.augment.augmentation import Augmentation
from fastmeta.data.augment.pixels import centre, to_unit
from fastmeta.data.images import fingerprint_of
from fastmeta.data.random_numbers import KeyedRandom

LARGEST = 8192  # numbers of an image: the matrix has the square of that
_CONTRAST = 55.0  # length of an image, as Oliver et al. (2018) have it
_EPSILON = 0.1  # theirs, too: added to the eigenvalues, of pixels whose variance is about 1


class Whitening:
    """Global contrast normalization, then ZCA (Krizhevsky, 2009): ``z = (x - mean) V (D + 0.1)^(-1/2) V^T``.

    Each image is first brought to mean 0 and length 55; the mean and the covariance ``V D V^T`` are those of the
    training images. The values are those of Oliver et al. (2018).

    Args:
        mean: ``[channels * size * size]`` of the normalized images.
        matrix: symmetric ``[channels * size * size, channels * size * size]``.
        shape: ``(channels, size, size)`` of an image.

    >>> generator = torch.Generator().manual_seed(0)
    >>> images = torch.rand(500, 1, 4, 4, generator=generator)
    >>> white = Whitening.of_few(contrast_normalized(images, 4), (1, 4, 4))(images).flatten(1)
    >>> (torch.corrcoef(white.T) - torch.eye(16)).abs().max() < 0.1  # 1 of the 16 is spent on the images' mean
    tensor(True)
    """

    def __init__(self, mean: Tensor, matrix: Tensor, shape: tuple[int, ...]) -> None:
        self.mean, self.matrix, self.shape = mean, matrix, tuple(shape)

    @classmethod
    def of(cls, moments: Tensor, shape: tuple[int, ...]) -> "Whitening":
        """Of the sum of :func:`second_moments` over all training images.

        Raises:
            ValueError: they are of fewer than two images.
        """
        count = float(moments[-1, -1])
        _check_count(count)
        mean = moments[-1, :-1] / count
        covariance = (moments[:-1, :-1] - count * mean.outer(mean)) / (count - 1)
        values, vectors = torch.linalg.eigh(covariance)
        return cls._of(mean, values, vectors, shape)

    @classmethod
    def of_few(cls, rows: Tensor, shape: tuple[int, ...]) -> "Whitening":
        """The same of :func:`contrast_normalized` training images, which is faster for fewer of them than numbers each.

        Raises:
            ValueError: they are fewer than two.
        """
        _check_count(len(rows))
        mean = rows.mean(dim=0)
        _, lengths, vectors = torch.linalg.svd(rows - mean, full_matrices=False)
        return cls._of(mean, lengths**2 / (len(rows) - 1), vectors.T, shape)

    @classmethod
    def _of(cls, mean: Tensor, values: Tensor, vectors: Tensor, shape: tuple[int, ...]) -> "Whitening":
        """Of the covariance's eigenvalues ``[k]`` and eigenvectors ``[D, k]``; those left out are 0."""
        of_zero = _EPSILON**-0.5
        matrix = vectors * ((values.clamp_min(0) + _EPSILON).rsqrt() - of_zero) @ vectors.T
        matrix.diagonal().add_(of_zero)
        return cls(mean.float(), matrix.float(), shape)

    def __call__(self, images: Tensor) -> Tensor:
        """Of ``[n, channels, height, width]`` in [0, 1] or uint8: ``[n, channels, size, size]`` float32, of any size.

        It is a matrix product, so an image's last bit may depend on those beside it.
        """
        rows = contrast_normalized(images, self.shape[-1])
        if self.mean.device != rows.device:
            self.mean, self.matrix = self.mean.to(rows.device), self.matrix.to(rows.device)
        return ((rows.float() - self.mean) @ self.matrix).view(-1, *self.shape)

    def __repr__(self) -> str:
        return f"Whitening({self.shape}, {fingerprint_of(self.mean.cpu(), self.matrix.cpu())})"


@dataclass(frozen=True)
class Whitened:
    """A view of whitened images.

    Args:
        whitening: comes first.
        view: then shifts or flips.
    """

    whitening: Whitening
    view: Augmentation

    def __call__(self, images: Tensor, random: KeyedRandom) -> Tensor:
        """Of ``[n, channels, height, width]``: ``[n, channels, size, size]`` float32."""
        return self.view(self.whitening(images), random)


def contrast_normalized(images: Tensor, size: int) -> Tensor:
    """Mean 0 and length 55 ``[n, channels * size * size]`` float64; an image of one color is 0."""
    rows = to_unit(centre(images, size)).flatten(1).double()
    rows = rows - rows.mean(dim=1, keepdim=True)
    length = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return rows * torch.where(length < 1e-8, 0, _CONTRAST / length)


def second_moments(rows: Tensor) -> Tensor:
    """``[D + 1, D + 1]`` float64: the sum over images of ``(x, 1) (x, 1)^T``, x of :func:`contrast_normalized`.

    What it gives for several parts of the images is added up.
    """
    rows = torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)
    return rows.T @ rows


def _check_count(count: float) -> None:
    if count < 2:
        raise ValueError(f"images must be at least 2 for augmentation.whitening zca, got {int(count)}")
