"""Published settings, typed: where paper and published code differ, there are two of them."""

from typing import Literal, TypeVar

Name = Literal["paper", "official_code"]
Preset = TypeVar("Preset")


def choose(presets: dict[str, Preset], name: str, method: str) -> Preset:
    """The preset of this name.

    Raises:
        ValueError: there is none.
    """
    if name not in presets:
        raise ValueError(f"{method} has the presets {', '.join(presets)}, got {name!r}")
    return presets[name]
