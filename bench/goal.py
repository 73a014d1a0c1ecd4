"""A speed that this project set itself, beside what was measured."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Goal:
    """One goal and the worst of what was measured for it.

    Args:
        name: what it asks.
        required: the number.
        found: each measurement with its name; empty where nothing was measured.
        at_least: whether a larger number is better.
        unit: how the number is written, ``%`` or ``x`` or nothing.
    """

    name: str
    required: float
    found: dict[str, float]
    at_least: bool = True
    unit: str = "%"

    @property
    def worst(self) -> tuple[str, float] | None:
        if not self.found:
            return None
        choose = min if self.at_least else max
        name = choose(self.found, key=self.found.__getitem__)
        return name, self.found[name]

    @property
    def met(self) -> bool | None:
        worst = self.worst
        if worst is None:
            return None
        return worst[1] >= self.required if self.at_least else worst[1] <= self.required

    def text(self, value: float) -> str:
        return f"{value:.0%}" if self.unit == "%" else f"{value:.2f}x" if self.unit == "x" else f"{value:.0f}"

    def as_json(self) -> dict[str, Any]:
        return {"name": self.name, "required": self.required, "found": self.found, "met": self.met}
