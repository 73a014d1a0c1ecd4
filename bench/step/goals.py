"""The step costs this project set itself, beside what was measured on each network."""

from collections.abc import Callable, Iterator
from typing import Any

from bench.goal import Goal

Row = dict[str, Any]
NOISE = 0.02
EVERY_STEP = "ExampleWeights"  # the method with an update in every step

# Step over plain step of the published code, each on its own network and framework, 2 cores of another machine.
ELSEWHERE = "L2I exact 2.97x, Meta-Gradient by finite differences 1.67x"


def goals(network: Row) -> list[Goal]:
    if network.get("device") == "cuda":
        return [*_on_gpu(network)]
    return [*_steps(network["steps"]), *_derivatives(network["derivatives"])]


def _on_gpu(network: Row) -> Iterator[Goal]:
    """A ratio whose rounds scatter by more than :data:`NOISE` says little: there the bound is judged."""

    def goal(name: str, required: float, chosen: Callable[[Row], bool]) -> Goal:
        rows = [row for row in network["steps"] if row["status"] == "measured" and "ratio" in row and chosen(row)]
        found = {row["name"]: _judged(row) for row in rows}
        return Goal(name, required, found, at_least=False, unit="x", digits=3)

    def last_layer(row: Row) -> bool:
        return row.get("how") == "last_layer" and row["schedule"] == "fused"

    yield goal("last layer, fused", 1.03, lambda row: last_layer(row) and not _of(row, "ExampleWeights"))
    weights = 1.01 if network["network"] == "ResNet-50" else 1.03
    yield goal("ExampleWeights at interval 1", weights, lambda row: last_layer(row) and row["method"] == EVERY_STEP)
    yield goal("exact by jvp, fused", 2.0, lambda row: row.get("how") == "jvp" and row["schedule"] == "fused")


def _steps(rows: list[Row]) -> Iterator[Goal]:
    def goal(name: str, required: float, chosen: Callable[[Row], bool], key: str = "ratio") -> Goal:
        found = {row["name"]: row[key] for row in rows if row["status"] == "measured" and key in row and chosen(row)}
        return Goal(name, required, found, at_least=False, unit="x")

    def last_layer(schedules: tuple[str, ...], *methods: str) -> Callable[[Row], bool]:
        return lambda row: row["how"] == "last_layer" and row["schedule"] in schedules and _of(row, *methods)

    def exact(schedule: str, *methods: str) -> Callable[[Row], bool]:
        return lambda row: row["how"] == "jvp" and row["schedule"] == schedule and _of(row, *methods)

    fused = last_layer(("fused",), "L2I", "ExampleWeights", "LabelGradientAlignment")
    yield goal("last layer, fused: L2I, weights, alignment", 1.10, fused)
    yield goal("last layer: Meta-Gradient", 1.20, last_layer(("fused", "alternating"), "MetaGradient"))
    yield goal("last layer, alternating: L2I", 1.7, last_layer(("alternating",), "L2I"))
    for schedule in ("fused", "alternating"):
        yield goal(f"exact by jvp, {schedule}: L2I", 2.0, exact(schedule, "L2I"))
        yield goal(f"exact by jvp, {schedule}: Meta-Gradient", 1.6, exact(schedule, "MetaGradient"))
    yield goal("exact by jvp: peak memory", 1.5, lambda row: row["how"] == "jvp", "memory_ratio")


def _of(row: Row, *methods: str) -> bool:
    return row["method"].startswith(methods)


def _derivatives(rows: list[Row]) -> Iterator[Goal]:
    found = {f"{row['mode']} mode": row["ratio"] for row in rows if row["name"] == "jvp"}
    yield Goal("label_gradient by jvp over one forward", 1.9, found, at_least=False, unit="x")


def _judged(row: Row) -> float:
    first, third = row["ratio_quartiles"]
    return min(row["ratio"], row["bound"]) if "bound" in row and third - first > NOISE else row["ratio"]
