"""A speed that this project set itself, beside what was measured."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from bench import text


@dataclass(frozen=True)
class Goal:
    """One goal and the worst of what was measured for it.

    Args:
        name: what it asks.
        required: the number.
        found: each measurement with its name; empty where nothing was measured.
        at_least: whether a larger number is better.
        unit: how the number is written: ``%``, ``x`` with ``digits``, ``us``, or nothing.
    """

    name: str
    required: float
    found: dict[str, float]
    at_least: bool = True
    unit: str = "%"
    digits: int = 2

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
        if self.unit == "us":
            return text.time(value)
        if self.unit == "%":
            return f"{value:.0%}"
        return f"{value:.{self.digits}f}x" if self.unit == "x" else f"{value:.0f}"

    def as_json(self) -> dict[str, Any]:
        return {"name": self.name, "required": self.required, "found": self.found, "met": self.met}


def goal_rows(goals: Iterable[Goal], first: dict[str, str] | None = None) -> Iterator[dict[str, str]]:
    """Rows of a table: each goal, what it asks, and the worst that was measured."""
    for goal in goals:
        worst = goal.worst
        yield (first or {}) | {
            "goal": goal.name,
            "required": f"{'>=' if goal.at_least else '<='} {goal.text(goal.required)}",
            "worst measured": "" if worst is None else f"{goal.text(worst[1])}: {worst[0]}",
            "met": {True: "yes", False: "no", None: ""}[goal.met],
        }
