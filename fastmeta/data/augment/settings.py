"""The settings of a run's views."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

StrongName = Literal["auto", "randaugment-google", "randaugment-paper", "randaugment-usb", "ctaugment", "weak"]


@dataclass(frozen=True)
class AugmentationConfig:
    """Changes to the views that ``views`` names."""

    strong: StrongName = "auto"
    """The strong view; weak, and with whitening auto, too: another weak one."""
    flip: bool | None = None
    """Exchange left and right of every second image (default: for pictures)."""
    shift: int | None = None
    """Largest shift of the weak view, in pixels (default: 1 for digits, an eighth for pictures)."""
    padding: Literal["zeros", "reflected"] | None = None
    """What a shift moves in (default: reflected for pictures, else zeros)."""
    noise: float = 0.0
    """Standard deviation of Gaussian noise on both views, in units of the pixels that the net is given."""
    whitening: Literal["none", "zca"] = "none"
    """zca: contrast normalization and ZCA, fitted on the images that training reads, before all else."""
    cutout: bool = True
    """Of ctaugment: cut a square out at last (ReMixMatch: no)."""
    threshold: float = 0.85
    """Of ctaugment: share of an operation's best rate below which a magnitude is left out."""
    adapt: bool = True
    """Of ctaugment: whether its rates move."""

    def check(self) -> None:
        """Raise ValueError for a value out of range; the command line makes these before it checks them."""
        for name, value, choices in (
            ("strong", self.strong, get_args(StrongName)),
            ("padding", self.padding, (None, "zeros", "reflected")),
            ("whitening", self.whitening, ("none", "zca")),
        ):
            if value not in choices:
                names = ", ".join(choice for choice in choices if choice is not None)
                raise ValueError(f"augmentation.{name} must be one of {names}, got {value!r}")
        if self.shift is not None and self.shift < 0:
            raise ValueError(f"augmentation.shift must be at least 0, got {self.shift}")
        if not 0 <= self.noise < math.inf:
            raise ValueError(f"augmentation.noise must be at least 0 and finite, got {self.noise}")
        if self.whitening != "none" and self.strong not in ("auto", "weak"):
            raise ValueError(
                f"augmentation.strong must be auto or weak with whitening: others need pixels, got {self.strong!r}"
            )
        for name in ("cutout", "threshold", "adapt"):
            default = getattr(AugmentationConfig, name)
            if self.strong != "ctaugment" and getattr(self, name) != default:
                raise ValueError(
                    f"augmentation.{name} must be {default} unless augmentation.strong is ctaugment, got "
                    f"{getattr(self, name)}"
                )
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"augmentation.threshold must lie in [0, 1], got {self.threshold}")
