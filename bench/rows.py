"""Numbers of a record that several reports need: which variant is the best of its kind, and by how much.

A record is one case in one dtype. ``stream_us`` is the median of a call as a user has it; on the CPU, the call's time.
"""

import sys
from typing import Any

Row = dict[str, Any]
# For a longer call launch overhead is nothing: the stream's time is the device's, and no graph is captured.
GRAPH_BELOW_US = 2_000.0
MAX_AUTOTUNE = "torch.compile max-autotune"  # name of that variant
NOISY = 1.3  # third over first quartile


def stream_us(variant: Row) -> float | None:
    return variant.get("stream_us")


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
    key = device_us if device else stream_us
    times = [us for v in others if (us := key(v)) is not None]
    own = key(main_variant(record) or {})
    return min(times) / own if times and own else None


def best_form(record: Row, *, device: bool = False) -> tuple[str, float] | None:
    """The fastest of fastmeta's named forms, and the time of what it chooses over that one's."""
    ours, key = main_variant(record) or {}, device_us if device else stream_us
    times = {v["name"]: us for v in measured(record, "fastmeta") if (us := key(v)) and v is not ours}
    own = key(ours)
    if not own or not times:
        return None
    best = min(times, key=times.__getitem__)
    return best, own / times[best]


def title(record: Row) -> str:
    """``operator (shape) dtype``."""
    return f"{record['operator']} ({record['shape']}) {record['dtype']}"


def reason_without_time(record: Row) -> str:
    """Why what a user gets has no time."""
    reasons = [v["reason"] for v in record.get("variants", []) if v["name"] == record["main"] and "reason" in v]
    return record.get("failed") or (reasons or ["no time"])[0]


def contended_share(rows: list[Row]) -> float:
    """Share of the samples of these timed rows that were taken although other processes ran."""
    return sum(row.get("contended_samples", 0) for row in rows) / max(1, sum(row["samples"] for row in rows))


def warn_if_contended(rows: list[Row]) -> None:
    if (share := contended_share(rows)) > 0.1:
        print(
            f"Other processes ran during {share:.0%} of the samples: measure again on a quiet machine.", file=sys.stderr
        )


def machine(environment: Row) -> str:
    """The device that a run was on, in a few words."""
    name = environment.get("gpu", {}).get("name")
    return name or f"{environment.get('cpu')}, {environment.get('threads')} threads"
