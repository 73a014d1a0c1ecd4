"""CTAugment (Berthelot et al., 2020, Section 3.2): how strong an operation may be is learned while a net is trained."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastmeta.data.augment.apply import view
from fastmeta.data.augment.augmentation import Augmentation
from fastmeta.data.augment.operations import CODES
from fastmeta.data.augment.pixels import constant
from fastmeta.data.augment.weak import started
from fastmeta.data.random_numbers import KeyedRandom
from fastmeta.state import Stateful

_BINS = 17


class _Operation(NamedTuple):
    """Of which code (see ``operations.py``), and its level, of magnitudes u in [0, 1) and the image's side."""

    code: str
    level: Callable[[Tensor, int], Tensor]
    bins: int = _BINS


def _cutout(u: Tensor, side: int) -> Tensor:
    return (1 + (u * side * 0.499).floor()).div(2, rounding_mode="floor") * 2


# Magnitudes as in Google's code; but the shifts, which are fractions of the side in the paper and fractions of a pixel
# there, so that nothing moves, are the paper's. "rescale" has another magnitude, which chooses one of six filters.
OPERATIONS: dict[str, _Operation] = {
    "autocontrast": _Operation("autocontrast", lambda u, side: u),
    "blur": _Operation("blur", lambda u, side: u),
    "brightness": _Operation("brightness", lambda u, side: 0.1 + 1.9 * u),
    "color": _Operation("color", lambda u, side: 0.1 + 1.9 * u),
    "contrast": _Operation("contrast", lambda u, side: 0.1 + 1.9 * u),
    "cutout": _Operation("cutout", _cutout),
    "equalize": _Operation("equalize", lambda u, side: u),
    "identity": _Operation("identity", lambda u, side: 0 * u, 1),
    "invert": _Operation("invert", lambda u, side: u),
    "posterize": _Operation("posterize", lambda u, side: 1 + (7.999 * u).floor(), 8),
    "rescale": _Operation("rescale-lanczos", lambda u, side: 0.25 * u),
    "rotate": _Operation("rotate", lambda u, side: (90 * u - 45).round()),
    "sharpness": _Operation("sharpness", lambda u, side: 0.1 + 1.9 * u),
    "shear_x": _Operation("shear-x", lambda u, side: 0.6 * u - 0.3),
    "shear_y": _Operation("shear-y", lambda u, side: 0.6 * u - 0.3),
    "smooth": _Operation("smooth", lambda u, side: u),
    "solarize": _Operation("solarize", lambda u, side: (255.999 * u).floor()),
    "translate_x": _Operation("translate-x", lambda u, side: (0.6 * u - 0.3) * side),
    "translate_y": _Operation("translate-y", lambda u, side: (0.6 * u - 0.3) * side),
}
_NAMES = tuple(OPERATIONS)
_RESCALE = _NAMES.index("rescale")
_FILTERS = 6  # of "rescale", whose codes follow each other
BINS = (*(operation.bins for operation in OPERATIONS.values()), _FILTERS)
"""Bins of each operation's magnitude, then those of the filter of "rescale"."""


class _Drawn(NamedTuple):
    """What images draw, D operations each."""

    operations: Tensor  # [n, D] places in OPERATIONS
    bins: Tensor  # [n, D, 2] of the magnitude and of the filter
    magnitudes: Tensor  # [n, D, 2] in [0, 1)
    places: Tensor  # [n, D + 1, 2] in [0, 1): of a cutout, and of the one that comes last


class CTAugment(Stateful):
    """A weak view, then some of 19 operations, as strong as the net still recognizes labeled images, and a cutout.

    The magnitudes of an operation are divided into bins, each with a rate ``r``, 1 at first. An image draws ``depth``
    operations, each evenly, and its bin with probability proportional to ``p = (r + 1 - decay) / max (r + 1 - decay)``,
    or 0 where ``p < threshold``. Labeled images with evenly drawn magnitudes are the probes; where the net gives a
    probe's class the probability ``w``, each of its bins becomes ``r <- decay r + (1 - decay) w``, one probe after
    another. The paper divides ``1 - w`` by the number of classes, which leaves all bins above the threshold; the code
    does not.

    Args:
        size: side of the result.
        weak: what comes first.
        depth: D, operations of an image.
        threshold: 0.85 by default in Google's code, 0.8 in the runs that it reports.
        decay: of the rates.
        cutout: whether a square of half the side is cut out at last (FixMatch: yes; ReMixMatch: no).
        adapt: whether the rates move; else magnitudes are drawn evenly.

    Attributes:
        rates: ``[20, 17]`` float64; a row an operation of :data:`OPERATIONS`, the last one the filters of "rescale". Of
            a row with fewer bins the first count.

    Raises:
        ValueError: an argument is out of its range.

    >>> from fastmeta.data.augment import Shift
    >>> augment = CTAugment(32, Shift(32, 4, "reflected", flip=True))
    >>> images = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    >>> augment(images, KeyedRandom(0, "unlabeled", "strong", torch.arange(4))).shape
    torch.Size([4, 3, 32, 32])
    """

    def __init__(
        self,
        size: int,
        weak: Augmentation,
        *,
        depth: int = 2,
        threshold: float = 0.85,
        decay: float = 0.99,
        cutout: bool = True,
        adapt: bool = True,
    ) -> None:
        super().__init__()
        if depth < 1:
            raise ValueError(f"depth must be at least 1, got {depth}")
        for name, value in (("threshold", threshold), ("decay", decay)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {value}")
        self.size, self.weak, self.depth = size, weak, depth
        self.threshold, self.decay, self.cutout, self.adapt = threshold, decay, cutout, adapt
        self.rates: Tensor
        self.register_buffer("rates", torch.ones(len(BINS), _BINS, dtype=torch.float64))

    def forward(self, images: Tensor, random: KeyedRandom) -> Tensor:
        """Of ``[n, channels, height, width]`` in [0, 1] or uint8: ``[n, channels, size, size]`` float32 in [0, 1]."""
        return self._applied(images, random, even=False)

    def probe(self, images: Tensor, random: KeyedRandom) -> Tensor:
        """Probes of labeled images: magnitudes are drawn evenly, and nothing is cut out at last."""
        return self._applied(images, random, even=True)

    @torch.no_grad()
    def update_(self, random: KeyedRandom, recognized: Tensor, where: Tensor) -> None:
        """Move the rates of the bins that probes drew.

        Args:
            random: of the probes, as :meth:`probe` had it.
            recognized: ``[n]``, the probability of each probe's class.
            where: a bool; False, or a probability that is not finite, leaves the rates as they were.
        """
        drawn = self._draw(random, even=True, device=recognized.device)
        rows = torch.stack([drawn.operations, torch.full_like(drawn.operations, len(_NAMES))], dim=2)
        hits = torch.zeros(rows.numel(), self.rates.numel(), dtype=torch.float64, device=recognized.device)
        taken = torch.stack([torch.ones_like(drawn.operations), drawn.operations == _RESCALE], dim=2)
        index = (rows * _BINS + drawn.bins).view(-1, 1)
        hits.scatter_(1, index, taken.view(-1, 1).double())  # [hits, bins], in the order of the probes
        later = (hits.sum(dim=0) - hits.cumsum(dim=0)).gather(1, index).squeeze(1)  # hits of the same bin
        gained = recognized.double().repeat_interleave(index.numel() // len(recognized)) * self.decay**later
        moved = self.rates.flatten() * self.decay ** hits.sum(dim=0) + (1 - self.decay) * (gained @ hits)
        self.rates.copy_(torch.where(where & recognized.isfinite().all(), moved.view_as(self.rates), self.rates))

    def rates_by_name(self) -> dict[str, list[float]]:
        """The rates of each operation's bins, from the least magnitude to the greatest, and of the filters."""
        names = (*_NAMES, "filter of rescale")
        rows = zip(names, BINS, self.rates.tolist(), strict=True)
        return {name: [round(rate, 4) for rate in rates[:bins]] for name, bins, rates in rows}

    def _applied(self, images: Tensor, random: KeyedRandom, *, even: bool) -> Tensor:
        drawn = self._draw(random, even=even, device=images.device)  # first, so that update_ can draw it again
        images, moves, reflected = started(self.weak, images, random)
        side = self.size
        levels = torch.stack([each.level(drawn.magnitudes[..., 0], side) for each in OPERATIONS.values()], dim=2)
        level = levels.gather(2, drawn.operations.unsqueeze(2)).squeeze(2)
        codes = constant(tuple(CODES[each.code] for each in OPERATIONS.values()), images.device)[drawn.operations]
        filters = (drawn.magnitudes[..., 1] * 5.99).long()
        codes = codes + torch.where(drawn.operations == _RESCALE, filters, 0)
        places = (drawn.places * side).floor()
        if self.cutout and not even:
            codes = torch.cat([codes, torch.full_like(codes[:, :1], CODES["cutout"])], dim=1)
            level = torch.cat([level, _cutout(torch.ones_like(level[:, :1]), side)], dim=1)
        else:
            places = places[:, :-1]
        return view(images, moves, codes, level, places, reflected=reflected)

    def _draw(self, random: KeyedRandom, *, even: bool, device: torch.device) -> _Drawn:
        """The same number of random numbers for every image, whatever its operations need."""
        operations = random.integers(0, len(_NAMES), self.depth).to(device)
        uniform = random.uniform(4 * self.depth + 2 * (self.depth + 1)).to(device)
        where, within, places = uniform.split([2 * self.depth, 2 * self.depth, 2 * (self.depth + 1)], dim=1)
        where, within = where.view(-1, self.depth, 2), within.view(-1, self.depth, 2)
        rows = torch.stack([operations, torch.full_like(operations, len(_NAMES))], dim=2)  # of the rates
        count = constant(BINS, device)[rows]
        if even or not self.adapt:
            bins = (where * count).long()
        else:
            bins = (self._cumulative()[rows] <= where.unsqueeze(3)).sum(dim=3)
        return _Drawn(operations, bins, (bins + within) / count, places.view(-1, self.depth + 1, 2))

    def _cumulative(self) -> Tensor:
        """Of each row of the rates, the probabilities of bins up to each ``[20, 17]``."""
        inside = torch.arange(_BINS, device=self.rates.device) < constant(BINS, self.rates.device).unsqueeze(1)
        shares = torch.where(inside, self.rates + (1 - self.decay), 0)
        shares = shares / shares.amax(dim=1, keepdim=True)
        sums = torch.where(shares < self.threshold, 0, shares).cumsum(dim=1)
        return sums / sums[:, -1:]
