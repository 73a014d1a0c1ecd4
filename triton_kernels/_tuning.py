"""Tiles: a heuristic's, or one that was measured on this chip and recorded.

A kernel's tiles are named tuples in a table in its module, few and stated. Nothing is measured on a first call, so no
training step ever waits for it: :func:`tune` does that when asked, and writes a file. At import the files
``tuned/<chip>.json`` beside this module and ``$FASTMETA_TUNED`` are read, the latter last. Shapes are rounded up to
powers of two, so that another batch size needs no new measurement.
"""

import contextlib
import json
import os
import re
from collections.abc import Callable, Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from fastmeta.triton_kernels import _launch

Tile = TypeVar("Tile", bound=tuple[Any, ...])
Choices = dict[str, dict[str, dict[str, Any]]]  # kernel -> dtype and bucket -> the tile's fields


class Request(NamedTuple):
    """A tile that was asked for: of which kernel and shape, and out of which."""

    kernel: str
    bucket: str
    table: tuple[Any, ...]


_choices: Choices = {}
_override: dict[str, Any] = {}
_requests: list[Request] | None = None


def bucket(dtype: torch.dtype, shape: Sequence[int]) -> str:
    """``float32 256x128x16``: sizes rounded up to powers of two."""
    sizes = "x".join(str(1 << max(size - 1, 0).bit_length()) for size in shape)
    return f"{str(dtype).removeprefix('torch.')} {sizes}"


def tile(kernel: str, dtype: torch.dtype, shape: Sequence[int], table: Sequence[Tile], heuristic: Tile) -> Tile:
    """The tile of a kernel at a shape. Part of planning, not of every call.

    Args:
        kernel: a name of its own.
        dtype: of the operands.
        shape: the sizes that matter.
        table: the tiles that are valid at this shape; one that was recorded and is not among them is passed over.
        heuristic: the one to take when none was recorded.
    """
    assert heuristic in table, f"{heuristic} is not in the table of {kernel}"
    key = bucket(dtype, shape)
    if _requests is not None:
        _requests.append(Request(kernel, key, tuple(table)))
    forced = _override.get(kernel)
    if forced in table:
        return forced
    recorded = _choices.get(kernel, {}).get(key)
    return next((one for one in table if recorded is not None and one._asdict() == recorded), heuristic)  # type: ignore[attr-defined]


@contextlib.contextmanager
def requested() -> Iterator[list[Request]]:
    """Collect what is asked for in the block; plans are made anew."""
    global _requests
    before, _requests = _requests, []
    _launch.forget_plans()
    try:
        yield _requests
    finally:
        _requests = before


@contextlib.contextmanager
def using(kernel: str, chosen: Any) -> Iterator[None]:
    """Have a kernel take this tile in the block, wherever its table has it."""
    before = dict(_override)
    _override[kernel] = chosen
    _launch.forget_plans()
    try:
        yield
    finally:
        _override.clear()
        _override.update(before)
        _launch.forget_plans()


def tune(
    call: Callable[[], object],
    path: str | os.PathLike[str],
    *,
    timer: Callable[[Callable[[], object]], float] | None = None,
) -> Choices:
    """Time every tile of every kernel that ``call`` launches, and record the fastest in a file.

    Kernel by kernel, the others at the tiles they have. What the file held for other kernels and shapes stays.

    Args:
        call: the operator's call at the shape to tune.
        path: the JSON file, ``triton_kernels/tuned/<chip>.json`` to ship it; :func:`load` reads it.
        timer: time of a call; by default ``triton.testing.do_bench``, on the GPU and with a cold L2.

    Returns:
        All that the file holds.
    """
    if timer is None:
        from triton.testing import do_bench as timer
    with requested() as requests:
        call()
    for kernel, key, table in dict.fromkeys(requests):
        times: dict[Hashable, float] = {}
        for candidate in table:
            with using(kernel, candidate):
                times[candidate] = timer(call)
        fastest = min(table, key=times.__getitem__)
        _choices.setdefault(kernel, {})[key] = fastest._asdict()
    _launch.forget_plans()
    file = Path(path)
    held: Choices = json.loads(file.read_text())["tiles"] if file.exists() else {}
    for kernel, key, _ in requests:
        held.setdefault(kernel, {})[key] = _choices[kernel][key]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"chip": chip_name(), "tiles": held}, indent=1, sort_keys=True) + "\n")
    return held


def load(path: str | os.PathLike[str]) -> None:
    """Take over the choices in a file; those it does not name stay.

    Raises:
        ValueError: the file was written on another chip.
    """
    found = json.loads(Path(path).read_text())
    if found["chip"] != chip_name():
        raise ValueError(f"{path} holds tiles for {found['chip']}, this is {chip_name()}")
    for kernel, tiles in found["tiles"].items():
        _choices.setdefault(kernel, {}).update(tiles)
    _launch.forget_plans()


def chip_name() -> str:
    """``nvidia-h200``; ``none`` without a GPU."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _load_at_import() -> None:
    shipped = Path(__file__).parent / "tuned" / f"{chip_name()}.json"
    if shipped.exists():
        load(shipped)
    if own := os.environ.get("FASTMETA_TUNED"):
        load(own)


_load_at_import()
