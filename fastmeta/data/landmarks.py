"""Images in which places are to be found: a regression in place of classes."""

import copy
import csv
import io
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from fastmeta.data.images import ImageDataset, Images, fingerprint_of

LANDMARKS = ("left eye", "right eye", "nose", "left mouth corner", "right mouth corner")
COORDINATES = tuple(f"{axis} of {name}" for axis in "xy" for name in LANDMARKS)
"""What a net predicts of an image, K = 10 numbers."""


class Landmarks(ImageDataset):
    """Images with five landmarks of a face, in memory.

    Args:
        name: what reports call it.
        images: ``[M, channels, height, width]`` uint8.
        coordinates: of the landmarks in pixels, ``[M, 10]`` as :data:`COORDINATES` names them; NaN where not known.
        parts: official parts by name, places ``[.]`` int64.
        names: of the images.
        scales: of x and y ``[M, 2]``, pixels here for one of the picture that an image is made of; None: 1.

    Attributes:
        targets: the coordinates as a net learns them, ``(coordinates - mean) / deviation``, float32 ``[M, 10]``.
        classes: :data:`COORDINATES`.

    Raises:
        ValueError: the shapes are not these, or the eyes of an image are in one place.

    >>> faces = Landmarks("two", torch.zeros(2, 1, 60, 60, dtype=torch.uint8), torch.rand(2, 10), {}, ["1", "2"])
    >>> faces.errors(faces.targets, faces.targets)
    tensor([0., 0.], dtype=torch.float64)
    """

    def __init__(
        self,
        name: str,
        images: Tensor,
        coordinates: Tensor,
        parts: Mapping[str, Tensor],
        names: Sequence[str],
        *,
        scales: Tensor | None = None,
    ) -> None:
        if coordinates.shape != (len(images), len(COORDINATES)) or not coordinates.is_floating_point():
            raise ValueError(
                f"coordinates must be floating point [{len(images)}, {len(COORDINATES)}], got {coordinates.dtype} "
                f"{list(coordinates.shape)}"
            )
        eyes = _between_eyes(coordinates)
        if bool((eyes == 0).any()):
            place = int((eyes == 0).nonzero()[0])
            raise ValueError(f"coordinates must have two eyes in two places, got one of {names[place]}")
        super().__init__(name, images, torch.zeros(len(images), dtype=torch.int64), COORDINATES, parts, names)
        self.coordinates = coordinates.double()
        self.scales = self.coordinates.new_ones(len(images), 2) if scales is None else scales.double()
        self.mean, self.deviation = self.coordinates.new_zeros(10), self.coordinates.new_ones(10)
        self.targets = coordinates.float()
        self.fingerprint = fingerprint_of(name, tuple(images.shape), self.coordinates)

    def standardized(self, places: Tensor) -> "Landmarks":
        """The same with targets of mean 0 and deviation 1 over the images at ``places``, as the labeled ones are."""
        chosen = self.coordinates[places]
        # At least a pixel: one label has no deviation.
        return self.standardized_by(chosen.mean(dim=0), chosen.std(dim=0, correction=0).clamp_min(1.0))

    def standardized_by(self, mean: Tensor, deviation: Tensor) -> "Landmarks":
        """The same with targets ``(coordinates - mean) / deviation``, both ``[10]`` float64."""
        made = copy.copy(self)
        made.mean, made.deviation = mean, deviation
        made.targets = ((self.coordinates - made.mean) / made.deviation).float()
        return made

    def pixels(self, outputs: Tensor) -> Tensor:
        """Coordinates ``[N, 10]`` float64 of what a net says ``[N, 10]``."""
        return outputs.double() * self.deviation.to(outputs.device) + self.mean.to(outputs.device)

    def in_pictures(self, outputs: Tensor, places: Tensor) -> Tensor:
        """What a net says of the images at ``places`` ``[N, 10]``, in pixels of their pictures."""
        return self.pixels(outputs) / self.scales[places].to(outputs.device).repeat_interleave(5, dim=1)

    def errors(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """``mean_k |p_k - y_k| / |y_left eye - y_right eye|`` of each image, ``[N]`` float64 (Zhang et al., 2014).

        Args:
            outputs: of a net ``[N, 10]``.
            targets: as :attr:`targets` has them ``[N, 10]``.
        """
        found, true = self.pixels(outputs), self.pixels(targets)
        distances = (found - true).unflatten(1, (2, -1)).norm(dim=1)
        return distances.mean(dim=1) / _between_eyes(true)

    def moved(self, moves: Tensor) -> Tensor:
        """What a shift adds to targets, ``[N, 10]``, from that of :meth:`fastmeta.data.Shift.moves` ``[N, 3]``."""
        down, right = moves[:, 0:1], moves[:, 1:2]  # what is seen starts so much further down and to the right
        pixels = -torch.cat([right.expand(-1, 5), down.expand(-1, 5)], dim=1).double()
        return (pixels / self.deviation.to(moves.device)).float()


def errors_of(images: Images, outputs: Tensor, targets: Tensor) -> Tensor:
    """How wrong a net is about each image, ``[N]``: for classes, whether another is the likeliest.

    Args:
        images: whose targets these are.
        outputs: of the net ``[N, C]``.
        targets: ``[N]``, or ``[N, 10]`` of landmarks.
    """
    if isinstance(images, Landmarks):
        return images.errors(outputs, targets)
    return (outputs.argmax(dim=1) != targets).double()


def _between_eyes(coordinates: Tensor) -> Tensor:
    """The distance between the eyes ``[N]``."""
    x, y = coordinates.unflatten(1, (2, -1)).unbind(1)
    return torch.hypot(x[:, 0] - x[:, 1], y[:, 0] - y[:, 1])


def landmark_table(names: Iterable[str], found: Tensor) -> str:
    """A CSV: a line for each picture, with its landmarks in its pixels ``[N, 10]``."""
    text = io.StringIO(newline="")
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["path", *COORDINATES])
    for name, row in zip(names, found.tolist(), strict=True):
        table.writerow([name, *(f"{value:.2f}" for value in row)])
    return text.getvalue()
