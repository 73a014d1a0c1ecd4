"""What ``fastmeta presets`` prints: the papers' tables as runs."""

import json
from collections.abc import Mapping
from dataclasses import asdict

from fastmeta.data.readers.open import SHIPPED
from fastmeta.data.readers.published import named
from fastmeta.presets.preset import Preset
from fastmeta.training.config import RunConfig


def matching(presets: Mapping[str, Preset], words: tuple[str, ...]) -> dict[str, Preset]:
    """Those whose name, paper, table or data set has every one of the words, whatever their case.

    Raises:
        ValueError: there are none.
    """

    def text(name: str, preset: Preset) -> str:
        return f"{name} {preset.paper} {preset.table} {preset.dataset} {preset.config.arm}".lower()

    found = {
        name: preset for name, preset in presets.items() if all(word.lower() in text(name, preset) for word in words)
    }
    if not found:
        raise ValueError(f"no preset has {' and '.join(words)} in its name, paper, table, data set, base or method")
    return found


def as_text(presets: Mapping[str, Preset]) -> str:
    """A table for each paper: name, where it is printed, its error, base and method, data set; then the notes."""
    heads = ("preset", "printed in", "error", "base + method", "data")
    marks = {note: f"[{mark}]" for mark, note in enumerate(_notes(presets), start=1)}
    parts = []
    for paper in dict.fromkeys(preset.paper for preset in presets.values()):
        lines = [heads, *(_line(name, preset, marks) for name, preset in presets.items() if preset.paper == paper)]
        widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
        shown = ["  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) for line in lines]
        parts.append("\n".join([paper, *(f"  {line.rstrip()}" for line in shown)]))
    return "\n\n".join([*parts, *(["\n".join(f"{mark} {note}" for note, mark in marks.items())] if marks else [])])


def as_json(presets: Mapping[str, Preset]) -> str:
    """Everything of each, the whole configuration too."""
    listed = [{"name": name, **asdict(preset), "config": preset.config.as_dict()} for name, preset in presets.items()]
    return json.dumps(listed, indent=1)


def otherwise(run: RunConfig, own: RunConfig) -> str:
    """In what a run is not the preset's own, for the line with its figure; seed and machine may be any.

    >>> otherwise(RunConfig(data="cifar-10:images", steps=10), RunConfig(data="cifar-10"))
    'Otherwise here: steps.'
    """
    changed = [item for item in RunConfig.__dataclass_fields__ if getattr(run, item) != getattr(own, item)]
    changed = [item for item in changed if item not in ("data", "seed", "machine")]
    if run.data in SHIPPED or named(run.data)[0] not in (None, own.data):
        changed.insert(0, "data")
    return f"Otherwise here: {', '.join(changed)}." if changed else ""


def _notes(presets: Mapping[str, Preset]) -> dict[str, None]:
    return dict.fromkeys(preset.note for preset in presets.values() if preset.note)


def _line(name: str, preset: Preset, marks: Mapping[str, str]) -> tuple[str, ...]:
    error = "" if preset.error is None else f"{preset.error:.2f}%"
    mark = marks.get(preset.note, "")
    return (name, preset.table, f"{error} {mark}".strip(), preset.config.arm, preset.dataset)
