"""Numbers of a record that several reports need: which variant is the best of its kind, and by how much."""

from typing import Any

Row = dict[str, Any]
# A call longer than this waits for no launch: the stream's time is the device's, and no graph is made.
GRAPH_BELOW_US = 2_000.0
MAX_AUTOTUNE = "torch.compile max-autotune"  # name of that variant


def device_us(variant: Row) -> float | None:
    """The device's time: in a graph, or on the stream where one call is long; None if neither was measured."""
    if "graph_us" in variant:
        return variant["graph_us"]
    stream = variant.get("stream_us")
    return stream if stream is not None and stream >= GRAPH_BELOW_US else None


def main_variant(record: Row) -> Row | None:
    """What a user gets; None if it has no time."""
    return next((v for v in measured(record) if v["name"] == record["main"]), None)


def named(record: Row, name: str) -> Row | None:
    """The timed variant of that name."""
    return next((v for v in measured(record) if v["name"] == name), None)


def measured(record: Row, role: str | None = None) -> list[Row]:
    """Timed variants of one role or of all, fastest on the stream first."""
    found = [v for v in record.get("variants", []) if "stream_us" in v and role in (None, v["role"])]
    return sorted(found, key=lambda v: v["stream_us"])


def over(record: Row, others: list[Row], *, device: bool) -> float | None:
    """The best of the others' time over ours, on the stream or on the device alone; None where either has none."""
    ours = main_variant(record)
    key = device_us if device else (lambda v: v["stream_us"])
    times = [us for v in others if (us := key(v)) is not None]
    own = None if ours is None else key(ours)
    return min(times) / own if times and own else None


def title(record: Row) -> str:
    """``operator (shape) dtype``."""
    return f"{record['operator']} ({record['shape']}) {record['dtype']}"
