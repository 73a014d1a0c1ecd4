"""What :func:`fastmeta.verify` found, as data and as a table for a person."""

import textwrap
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["exact", "approximate", "disagrees", "refused", "unknown"]
# The cheapest first, of those that move the whole model.
_PREFERRED = ("jvp", "double_backward", "finite_difference", "forward_difference", "last_layer")
_WIDTH = 118


@dataclass(frozen=True)
class Row:
    """One way to a derivative, and what came of it.

    Args:
        name: a ``how``, another part of the package that reads the model, or a method.
        verdict: ``exact``: equal to the user's own backward pass and to differences of the forward pass;
            ``approximate``: a difference of finite radius; ``disagrees``: it is neither, and was not refused;
            ``refused``: an error says why; ``unknown``: there is nothing to hold it against.
        error: relative to the witness that it is further from; None where there is no value.
        note: why, and what to do.
        touched: what it left changed.
        harmless: whether the next pass gives the same logits all the same, and no promise is broken.
    """

    name: str
    verdict: Verdict
    error: float | None = None
    note: str = ""
    touched: tuple[str, ...] = ()
    harmless: bool = False


@dataclass(frozen=True, repr=False)
class Report:
    """What :func:`fastmeta.verify` found.

    Args:
        model: what was looked at, in words.
        rows: one for each way to a derivative.
        problems: what is wrong, with the way out; empty if nothing is.
        notes: what is worth knowing, and not wrong.
    """

    model: str
    rows: tuple[Row, ...]
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong, and a derivative is exact or approximate."""
        return not self.problems and self.best is not None

    @property
    def best(self) -> str | None:
        """The ``how`` to use: the cheapest that is exact, else the best difference; None if there is none."""
        for wanted in ("exact", "approximate"):
            for how in _PREFERRED:
                if any((row.name, row.verdict) == (how, wanted) for row in self.rows):
                    return how
        return None

    def __getitem__(self, name: str) -> Row:
        """The row of this name."""
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(name)

    def __repr__(self) -> str:
        # At a prompt verify has printed the table already.
        return f"Report(ok={self.ok}, best={self.best!r})"

    def __str__(self) -> str:
        names = max(len(row.name) for row in self.rows)
        lines = [self.model, "", f"{''.ljust(names)}  {'verdict':<11}  {'error':<7}  what is left changed; notes"]
        said: dict[str, str] = {}
        for row in self.rows:
            note = row.note
            if row.verdict == "refused":
                first = said.setdefault(note, row.name)
                note = note if first == row.name else f"as {first}"
            touched = ", ".join(row.touched) if row.touched else "" if row.verdict == "refused" else "nothing"
            text = "; ".join(part for part in (touched, note) if part)
            error = "" if row.error is None else f"{row.error:.1e}"
            lines += _wrapped(f"{row.name.ljust(names)}  {row.verdict:<11}  {error:<7}  ", text)
        lines.append("")
        for title, entries in (("wrong: ", self.problems), ("note: ", self.notes)):
            for entry in entries:
                lines += _wrapped(title, entry)
        if self.best is None:
            lines.append("no how can be used")
        else:
            lines.append(f"use how={self.best!r}" + ("" if self.ok else ", once the above is settled"))
        return "\n".join(line.rstrip() for line in lines)


def _wrapped(start: str, text: str) -> list[str]:
    lines = textwrap.wrap(text, _WIDTH - len(start), break_long_words=False) or [""]
    return [start + lines[0], *(" " * len(start) + line for line in lines[1:])]
