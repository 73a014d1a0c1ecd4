"""The page "Which method, when?", of the rows of ``field`` and nothing else."""

from collections.abc import Iterator, Sequence

from fastmeta.reproduce import runs
from fastmeta.reproduce.experiment import Row, markdown
from fastmeta.training.recipes import METHODS
from fastmeta.training.reports.intervals import Interval

PLAIN = "none"
FEWEST = 3  # seeds; of fewer nothing is said
BASE = "fixmatch"  # whose settings were varied, and whose labels were counted

ABOUT = (
    "Drawn by `fastmeta reproduce field` from its own measurements and from nothing else; each figure is in its table, "
    "[reproduced/field/table.md](reproduced/field/table.md), with date and commit. Images of 8 to 16 pixels, a small "
    "net, 1,000 steps, settings chosen on the digits' validation images (the views of photographs by nobody): what "
    "holds for ImageNet is not said here. A difference is in points of test error on the same seeds, with its 95% "
    f"interval; a method *helps* or *harms* where that does not reach 0. Fewer than {FEWEST} seeds say nothing, and of "
    "twenty intervals without an effect one is wrong."
)


def page(rows: Sequence[Row]) -> str:
    """Markdown."""
    places = order_of(rows)
    parts = [
        "# Which method, when?",
        ABOUT,
        "## With these labels, this",
        _best(rows, places),
        "## On another base",
        _bases(rows, places),
        "## What each method did",
        *_methods(rows, places),
        "## How many labels until nothing is left",
        _edges(rows, places),
        "## What remains when the base is tuned",
        _tuned(rows, places),
    ]
    return "\n\n".join(parts) + "\n"


def order_of(rows: Sequence[Row]) -> list[tuple[str, int]]:
    """Data sets with numbers of labels."""
    data = list(dict.fromkeys(row["data"] for row in rows))
    return sorted({(row["data"], row["labels"]) for row in rows}, key=lambda place: (data.index(place[0]), place[1]))


def differences(rows: Sequence[Row], place: tuple[str, int]) -> Iterator[tuple[str, str, int, Interval]]:
    """Base, method, seeds and difference to the base alone, of runs without other settings."""
    plain = [row for row in runs.of(rows, data=place[0], labels=place[1]) if not row["changes"] and not _longer(row)]
    errors = runs.by_seed(plain)
    for base, method in dict.fromkeys((row["base"], row["method"]) for row in plain):
        if method == PLAIN or base not in errors:
            continue
        with_method = errors[f"{base} + {method}"]
        seeds = len(set(with_method) & set(errors[base]))
        difference = runs.paired(with_method, errors[base])
        if difference is not None and seeds >= FEWEST:
            yield base, method, seeds, difference


def _longer(row: Row) -> bool:
    return bool(row["steps"] > runs.STEPS)


def _name(place: tuple[str, int]) -> str:
    return f"{place[0]}, {place[1]} label{'s' * (place[1] > 1)} a class"


def _of_the_base(rows: Sequence[Row], place: tuple[str, int]) -> dict[str, list[Row]]:
    """The rows of FixMatch at a place, alone and with a method."""
    here = runs.of(rows, data=place[0], labels=place[1], base=BASE)
    alone = runs.of(here, method=PLAIN)
    return {"alone": alone, "with": [row for row in here if row["method"] != PLAIN]}


def _chosen(alone: Sequence[Row]) -> str:
    """The settings of the base with the least validation error, over the seeds that all settings have."""
    validation = runs.by_seed(alone, "validation_error")
    common = set.intersection(*(set(one) for one in validation.values()))
    if len(common) < FEWEST:
        return BASE
    return min(validation, key=lambda arm: sum(validation[arm][seed] for seed in common))


def _best(rows: Sequence[Row], places: Sequence[tuple[str, int]]) -> str:
    """Where a method helps, the largest difference on FixMatch; else that none does."""
    lines: list[list[object]] = []
    for place in places:
        here = _of_the_base(rows, place)
        alone = runs.by_seed(here["alone"])
        if BASE not in alone:
            continue
        chosen = _chosen(here["alone"])
        fair = [row for row in here["with"] if not METHODS[row["method"]].uses_holdout]
        candidates = {
            name: errors
            for name, errors in runs.by_seed(fair).items()
            if len(set(errors) & set(alone[chosen])) >= FEWEST
        }
        if not candidates:
            continue
        level = 1 - 0.05 / len(candidates)
        found = {name: runs.paired(errors, alone[chosen], level) for name, errors in candidates.items()}
        helping = {name: one for name, one in found.items() if one is not None and runs.verdict(one) == "helps"}
        shown = [runs.mean_text(list(alone[BASE].values())), ""]
        if chosen != BASE:
            shown[1] = f"{chosen.removeprefix(f'{BASE}, ')}: {runs.mean_text(list(alone[chosen].values()))}"
        if helping:
            name = min(helping, key=lambda name: helping[name].mean)
            seeds = len(set(candidates[name]) & set(alone[chosen]))
            advice = [name, f"{runs.interval_text(helping[name])}, {seeds} seeds"]
        else:
            advice = [f"the base alone: none of {len(found)} tried is shown to help", ""]
        lines.append([_name(place), *shown, *advice])
    if not lines:
        return "Nothing is measured yet."
    columns = ["", f"{BASE} errs on, %", "with other settings, %", "take", "which changes, points"]
    return (
        f"{markdown(columns, lines)}\n\nOther settings: of those that were tried, the one with the least validation "
        "error, if it is not the base as it is; what to take is then compared with that. It is the one with the "
        "largest difference among those that help, its rivals may be as good. The largest of several looks larger than "
        "it is: here the interval is widened for as many as were tried (Bonferroni). Methods with labels that no other "
        "sees are left out."
    )


def _bases(rows: Sequence[Row], places: Sequence[tuple[str, int]]) -> str:
    """All bases as they are, alone and with L2I, and alone against FixMatch with it."""
    parts = []
    for place in places:
        here = [row for row in runs.of(rows, data=place[0], labels=place[1]) if not row["changes"] and not _longer(row)]
        errors = {name: one for name, one in runs.by_seed(here).items() if len(one) >= FEWEST}
        alone = [base for base in dict.fromkeys(row["base"] for row in here) if base in errors]
        rival = errors.get(f"{BASE} + l2i", {})
        lines: list[list[object]] = []
        for base in sorted(alone, key=lambda base: sum(errors[base].values()) / len(errors[base])):
            with_it = errors.get(f"{base} + l2i", {})
            changes, against = (
                f"{runs.interval_text(runs.paired(one, other))}, {common} seeds"
                if (common := len(set(one) & set(other))) >= FEWEST
                else ""
                for one, other in ((with_it, errors[base]), (errors[base], rival))
            )
            told = [runs.mean_text(list(one.values())) if one else "" for one in (errors[base], with_it)]
            lines.append([base, *told, changes, against])
        if len(lines) > 1:
            columns = [_name(place), "errs on, %", "with l2i, %", "l2i changes, points"]
            parts.append(markdown([*columns, f"alone against {BASE} + l2i, points"], lines))
    if not parts:
        return "Nothing is measured yet."
    return "\n\n".join([*parts, "Means are those of each one's own seeds, differences of common ones."])


def _methods(rows: Sequence[Row], places: Sequence[tuple[str, int]]) -> list[str]:
    """How often each helped, and what never did."""
    found: dict[str, list[tuple[str, str, Interval]]] = {}
    for place in places:
        for base, method, _, difference in differences(rows, place):
            found.setdefault(method, []).append((f"{base} on {_name(place)}", runs.verdict(difference), difference))
    if not found:
        return ["Nothing is measured yet."]
    lines: list[list[object]] = []
    for method, all_of_it in found.items():
        counts = {word: [where for where, said, _ in all_of_it if said == word] for word in ("helps", "harms")}
        most = min((one for one in all_of_it if one[1] == "helps"), key=lambda one: one[2].mean, default=None)
        lines.append(
            [
                f"`{method}`",
                len(all_of_it),
                len(counts["helps"]),
                len(counts["harms"]),
                "" if most is None else f"{most[0]}: {runs.interval_text(most[2])}",
                "; ".join(counts["harms"][:2]) + (f"; {more} more" if (more := len(counts["harms"]) - 2) > 0 else ""),
            ]
        )
    columns = ["method", "tried on", "helped", "harmed", "most where", "where it harmed"]
    never = [f"`{method}`" for method, one in found.items() if not any(said == "helps" for _, said, _ in one)]
    always = [
        f"`{method}`" for method, one in found.items() if len(one) > 1 and all(said == "helps" for _, said, _ in one)
    ]
    told = [f"Never shown to help here: {', '.join(never) or 'none of them'}."]
    if always:
        told.append(f"Helped wherever it was tried: {', '.join(always)}.")
    told.append("`example-weights` has three hold-out labels a class that no other sees.")
    return [markdown(columns, lines), " ".join(told)]


def _edges(rows: Sequence[Row], places: Sequence[tuple[str, int]]) -> str:
    """FixMatch and L2I by number of labels, for each data set."""
    sentences = []
    for data in dict.fromkeys(place[0] for place in places):
        found = [
            (place[1], difference)
            for place in places
            if place[0] == data
            for base, method, _, difference in differences(rows, place)
            if (base, method) == (BASE, "l2i")
        ]
        if not found:
            continue
        shown = ", ".join(f"{labels}: {runs.interval_text(difference)}" for labels, difference in found)
        counts = {
            word: [str(labels) for labels, difference in found if runs.verdict(difference) == word]
            for word in ("helps", "harms", "no difference shown")
        }
        told = [f"{word} with {', '.join(labels)}" for word, labels in counts.items() if labels]
        sentences.append(f"- {data}: `l2i` on {BASE}, by labels a class, {'; '.join(told)}. In points: {shown}.")
    return "\n".join(sentences) or "Nothing is measured yet."


def _tuned(rows: Sequence[Row], places: Sequence[tuple[str, int]]) -> str:
    """Settings of FixMatch, the one of them with the least validation error, and methods against it."""
    parts = []
    for place in places:
        here = _of_the_base(rows, place)
        alone, with_it = runs.by_seed(here["alone"]), runs.by_seed(here["with"])
        if len(alone) < 2 or len(set.intersection(*(set(one) for one in alone.values()))) < FEWEST:
            continue
        chosen = _chosen(here["alone"])
        methods = {runs.arm(row): row["method"] for row in here["with"]}
        lines: list[list[object]] = [
            [f"**{name}**" if name == chosen else name, len(errors), runs.mean_text(list(errors.values())), "", ""]
            for name, errors in alone.items()
        ]
        for name, errors in with_it.items():
            same = alone.get(name.replace(f" + {methods[name]}", ""), {})  # the same settings without the method
            against = [
                f"{runs.interval_text(runs.paired(errors, other))}, {common} seeds"
                if (common := len(set(errors) & set(other))) >= FEWEST
                else ""
                for other in (alone[chosen], same)
            ]
            lines.append([name, len(errors), runs.mean_text(list(errors.values())), *against])
        untouched = with_it.get(f"{BASE} + l2i", {})
        gap = runs.paired(untouched, alone[chosen]) if len(set(untouched) & set(alone[chosen])) >= FEWEST else None
        said = {
            "helps": "The gap is not the base's settings: L2I as it is beats the best of them.",
            "harms": "The gap was the base's settings: the best of them beats L2I as it is.",
            "no difference shown": "Between the best of them and L2I as it is no difference is shown.",
        }.get(runs.verdict(gap), "")
        columns = [_name(place), "seeds", "test error, %", "against the best of the base, points"]
        parts.append(
            f"{markdown([*columns, 'against the same settings'], lines)}\n\nIn bold, the settings of the base with the "
            f"least validation error of the {len(alone)} that were tried. {said}".rstrip()
        )
    return "\n\n".join(parts) or "Nothing is measured yet."
