"""Numbers of a record that several reports need: which variant is the best of its kind, and by how much.

A record is one case in one dtype. ``stream_us`` is the median of a call as a user has it; on the CPU, the call's time.
"""

from typing import Any

Row = dict[str, Any]
# A call longer than this waits for no launch: the stream's time is the device's, and no graph is made.
GRAPH_BELOW_US = 2_000.0
MAX_AUTOTUNE = "torch.compile max-autotune"  # name of that variant
NOISY = 1.3  # third over first quartile


def device_us(variant: Row) -> float | None:
    """The device's time: in a graph, or on the stream where one call is long; None if neither was measured."""
    if "graph_us" in variant:
        return variant["graph_us"]
    stream = variant.get("stream_us")
    return stream if stream is not None and stream >= GRAPH_BELOW_US else None


def best_known_us(variant: Row) -> float:
    """The device's time, or on the CPU and where no graph holds the call, the call's."""
    device = device_us(variant)
    return variant["stream_us"] if device is None else device


def is_noisy(variant: Row) -> bool:
    first, third = variant.get("quartiles_us", (1.0, 1.0))
    return third > NOISY * first


def measured(record: Row, role: str | None = None) -> list[Row]:
    """Timed variants of one role or of all, fastest on the stream first."""
    found = [v for v in record.get("variants", []) if "stream_us" in v and role in (None, v["role"])]
    return sorted(found, key=lambda v: v["stream_us"])


def named(record: Row, name: str) -> Row | None:
    """The timed variant of that name."""
    return next((v for v in measured(record) if v["name"] == name), None)


def main_variant(record: Row) -> Row | None:
    """What a user gets; None if it has no time."""
    return named(record, record["main"])


def over(record: Row, others: list[Row], *, device: bool = False) -> float | None:
    """The best of the others' time over ours, on the stream or on the device alone; None where either has none."""
    ours = main_variant(record)
    key = device_us if device else (lambda v: v["stream_us"])
    times = [us for v in others if (us := key(v)) is not None]
    own = None if ours is None else key(ours)
    return min(times) / own if times and own else None


def best_form(record: Row, *, device: bool = False) -> tuple[str, float] | None:
    """The fastest of fastmeta's named forms, and the time of what it chooses over that one's."""
    ours = main_variant(record)
    key = device_us if device else (lambda v: v["stream_us"])
    times = {v["name"]: us for v in measured(record, "fastmeta") if (us := key(v)) and v is not ours}
    own = key(ours) if ours else None
    if not own or not times:
        return None
    best = min(times, key=times.__getitem__)
    return best, own / times[best]


def title(record: Row) -> str:
    """``operator (shape) dtype``."""
    return f"{record['operator']} ({record['shape']}) {record['dtype']}"


def contended_share(rows: list[Row]) -> float:
    """Share of the samples of these timed rows that were taken although other processes ran."""
    return sum(row.get("contended_samples", 0) for row in rows) / max(1, sum(row["samples"] for row in rows))
