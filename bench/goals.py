"""The speeds that this project set itself, beside what was measured: of operators on an H100-class card, of steps."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from bench import text
from bench.rows import Row, device_us, main_variant, measured, over, title

GIANT = "8192, 2048, 128256"
SMALL = ("256, 128, 10", "448, 128, 100", "768, 512, 200")
LARGE = "4096, 2048, 1000"
SUMS = {"last_layer_gradient": 40.0, "hessian_vector_product": 66.0}  # us at LARGE in bfloat16
PRODUCTS = ("label_gradient", "per_example_dot", *SUMS)
LISTS = ("perturbed", "alignment_direction")
SHAPES = (*SMALL, LARGE, GIANT, "65536, 256", "32768, 1000", "8192, 4000", "ResNet-50")  # of all of them

# Step over plain step of the published code, each on its own network and framework, 2 cores of another machine.
ELSEWHERE = "L2I exact 2.97x, Meta-Gradient by finite differences 1.67x"
NOISE = 0.02


@dataclass(frozen=True)
class Goal:
    """One goal and the worst of what was measured for it."""

    name: str  # what it asks
    required: float
    found: dict[str, float]  # each measurement with its name; empty where nothing was measured
    at_least: bool = True  # whether a larger number is better
    unit: str = "%"  # how the number is written: `%`, `x` with `digits`, `us`, or nothing
    digits: int = 2

    @property
    def worst(self) -> tuple[str, float] | None:
        if not self.found:
            return None
        name = (min if self.at_least else max)(self.found, key=self.found.__getitem__)
        return name, self.found[name]

    @property
    def met(self) -> bool | None:
        if self.worst is None:
            return None
        return self.worst[1] >= self.required if self.at_least else self.worst[1] <= self.required

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


def of_operators(results: Row) -> Iterator[Goal]:
    """On a GPU."""
    records = [record for record in results["operators"] if "cost" in record]

    def of(operators: Iterable[str], *shapes: str, dtype: str | None = None) -> list[Row]:
        chosen = [r for r in records if r["operator"] in operators and r["shape"] in shapes]
        return [r for r in chosen if dtype in (None, r["dtype"])]

    def collect(chosen: list[Row], value: Callable[[Row], float | None]) -> dict[str, float]:
        return {title(record): found for record in chosen if (found := value(record)) is not None}

    def ours_us(record: Row) -> float | None:
        return device_us(main_variant(record) or {})

    def share(*parts: str) -> Callable[[Row], float | None]:
        """Parts of the least time over the device's time."""
        return lambda r: None if (us := ours_us(r)) is None else sum(r["cost"][part] for part in parts) / us

    copying = share("copy_us")
    long_rows = of(["finite_difference_labels"], "32768, 1000", "8192, 4000")
    yield Goal("row kernel, C >= 1,000: share of the copy bandwidth", 0.85, collect(long_rows, copying))
    short_rows = of(["finite_difference_labels"], "65536, 256")
    yield Goal("row kernel, C = 256: share of the copy bandwidth", 0.60, collect(short_rows, copying))
    lists = collect(of(LISTS, "ResNet-50"), copying)
    yield Goal("lists of tensors, 25.6M parameters: share of the copy bandwidth", 0.85, lists)

    large = of(PRODUCTS, LARGE, dtype="bfloat16")
    shares = collect(large, share("gemm_us", "row_us"))
    yield Goal(f"({LARGE}) bfloat16: products alone and row bytes at copy speed over the call", 0.85, shares)
    for operator, us in SUMS.items():
        found = collect(of([operator], LARGE, dtype="bfloat16"), ours_us)
        yield Goal(f"{operator} at ({LARGE})", us, found, at_least=False, unit="us")
    dot = of(["per_example_dot"], GIANT, dtype="bfloat16")
    yield Goal(f"per_example_dot at ({GIANT})", 8000.0, collect(dot, ours_us), at_least=False, unit="us")
    beside = collect([*large, *dot], lambda r: over(r, measured(r, "compile"), device=True))
    yield Goal("the same: torch.compile's time over ours on the device", 1.0, beside, unit="x")

    def scratch(record: Row) -> float | None:
        ours = main_variant(record)
        n, _, c = (int(size) for size in record["shape"].removesuffix(", head").split(", "))
        return None if ours is None else ours["peak_bytes"] / (n * c * (2 if record["dtype"] == "bfloat16" else 4))

    heads = collect(of(["per_example_dot"], f"{GIANT}, head"), scratch)
    yield Goal(f"a head in slabs at ({GIANT}): memory over its logits'", 0.15, heads, at_least=False)

    small, below = of(PRODUCTS, *SMALL), "(768, 512, 200) and below"
    eager = collect(small, lambda r: over(r, measured(r, "eager")))
    yield Goal(f"{below}: times faster than eager, no graphs", 3.0, eager, unit="x")
    compiled = collect(small, lambda r: over(r, measured(r, "compile")))
    yield Goal(f"{below}: times faster than torch.compile, no graphs", 1.5, compiled, unit="x")
    launches = collect(small, lambda r: (main_variant(r) or {}).get("launches"))
    yield Goal(f"{below}: launches", 2, launches, at_least=False, unit="")


def of_steps(network: Row) -> Iterator[Goal]:
    """Of a network's steps over their plain steps."""
    on_gpu = network.get("device") == "cuda"

    def goal(
        name: str,
        required: float,
        methods: tuple[str, ...] = (),
        how: str = "last_layer",
        schedules: tuple[str, ...] = ("fused",),
        value: Callable[[Row], float | None] = lambda row: row.get("ratio"),
    ) -> Goal:
        chosen = [row for row in network["steps"] if row["status"] == "measured" and row.get("how") == how]
        chosen = [row for row in chosen if row["schedule"] in schedules and row["method"].startswith(methods or "")]
        found = {row["name"]: number for row in chosen if (number := value(row)) is not None}
        return Goal(name, required, found, at_least=False, unit="x", digits=3 if on_gpu else 2)

    if on_gpu:
        weights = 1.01 if network["network"] == "ResNet-50" else 1.03
        yield goal("last layer, fused", 1.03, value=_but_for_example_weights)
        yield goal("ExampleWeights at interval 1", weights, value=_example_weights_at_every_step)
        yield goal("exact by jvp, fused", 2.0, how="jvp", value=judged)
        return
    last_layer = ("L2I", "ExampleWeights", "LabelGradientAlignment")
    yield goal("last layer, fused: L2I, weights, alignment", 1.10, last_layer)
    both = ("fused", "alternating")
    yield goal("last layer: Meta-Gradient", 1.20, ("MetaGradient",), schedules=both)
    yield goal("last layer, alternating: L2I", 1.7, ("L2I",), schedules=("alternating",))
    for schedule in both:
        yield goal(f"exact by jvp, {schedule}: L2I", 2.0, ("L2I",), "jvp", (schedule,))
        yield goal(f"exact by jvp, {schedule}: Meta-Gradient", 1.6, ("MetaGradient",), "jvp", (schedule,))
    yield goal("exact by jvp: peak memory", 1.5, (), "jvp", both, _memory)
    found = {f"{row['mode']} mode": row["ratio"] for row in network["derivatives"] if row["name"] == "jvp"}
    yield Goal("label_gradient by jvp over one forward", 1.9, found, at_least=False, unit="x")


def _but_for_example_weights(row: Row) -> float | None:
    return None if row["method"].startswith("ExampleWeights") else judged(row)


def _example_weights_at_every_step(row: Row) -> float | None:
    return judged(row) if row["method"] == "ExampleWeights" else None


def _memory(row: Row) -> float | None:
    return row.get("memory_ratio")


def judged(row: Row) -> float | None:
    """A step's ratio; where its rounds scatter by more than :data:`NOISE`, the bound if that is smaller."""
    if "ratio" not in row:
        return None
    first, third = row["ratio_quartiles"]
    return min(row["ratio"], row["bound"]) if "bound" in row and third - first > NOISE else row["ratio"]
