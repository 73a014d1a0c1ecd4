"""The page "Which method, when?", of the rows of ``field`` and nothing else."""

from collections.abc import Iterator, Sequence

from fastmeta.reproduce import runs
from fastmeta.reproduce.experiment import Row, markdown
from fastmeta.training.reports.intervals import Interval

PLAIN = "none"
FEWEST = 3  # seeds; of fewer nothing is said
BASE = "fixmatch"  # whose settings were varied, and whose labels were counted

ABOUT = (
    "Drawn by `fastmeta reproduce field` from its own measurements and from nothing else; each figure is in its table, "
    "[reproduced/field/table.md](reproduced/field/table.md), with date and commit. Images of 8 to 16 pixels, a small "
    "net, 1,000 steps, settings chosen on the digits' validation images: what holds for ImageNet is not said here. A "
    "difference is in points of test error against the base alone on the same seeds, with its 95% interval; a method "
    f"*helps* or *harms* where that does not reach 0. Fewer than {FEWEST} seeds say nothing, and of twenty intervals "
    "without an effect one is wrong."
)


def page(rows: Sequence[Row]) -> str:
    """Markdown."""
    places = order_of(rows)
    parts = [
        "# Which method, when?",
        ABOUT,
        "## With these labels, this",
        _best(rows, places),
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


def _best(rows: Sequence[Row], places: Sequence[tuple[str, int]]) -> str:
    """Where a method helps, the largest difference on FixMatch; else that none does."""
    lines: list[list[object]] = []
    for place in places:
        errors = runs.by_seed(runs.of(rows, data=place[0], labels=place[1])).get(BASE, {})
        found = [(method, difference) for base, method, _, difference in differences(rows, place) if base == BASE]
        if not found or len(errors) < FEWEST:
            continue
        helping = [one for one in found if runs.verdict(one[1]) == "helps"]
        if helping:
            method, difference = min(helping, key=lambda one: one[1].mean)
            advice = [f"`{method}`", runs.interval_text(difference)]
        else:
            advice = [f"{BASE} alone: none of {len(found)} tried is shown to help", ""]
        lines.append([_name(place), runs.mean_text(list(errors.values())), *advice])
    if not lines:
        return "Nothing is measured yet."
    note = "The method with the largest difference among those that help; its rivals may be as good, see the table."
    return f"{markdown(['', f'{BASE} errs on, %', 'take', 'which changes, points'], lines)}\n\n{note}"


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
        most = min(all_of_it, key=lambda one: one[2].mean)
        lines.append(
            [
                f"`{method}`",
                len(all_of_it),
                len(counts["helps"]),
                len(counts["harms"]),
                f"{most[0]}: {runs.interval_text(most[2])}",
                "; ".join(counts["harms"][:2]) + (f"; {more} more" if (more := len(counts["harms"]) - 2) > 0 else ""),
            ]
        )
    columns = ["method", "tried on", "helped", "harmed", "at its best", "where it harmed"]
    never = [f"`{method}`" for method, one in found.items() if not any(said == "helps" for _, said, _ in one)]
    always = [f"`{method}`" for method, one in found.items() if all(said == "helps" for _, said, _ in one)]
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
        helped = [labels for labels, difference in found if runs.verdict(difference) == "helps"]
        last = f"helps up to {max(helped)} labels a class" if helped else "is not shown to help with any number"
        beyond = [labels for labels, _ in found if helped and labels > max(helped)]
        gone = f"; from {beyond[0]} on no gain is shown" if beyond else ""
        if helped and not beyond:
            gone = ", the most that was tried"
        sentences.append(f"- {data}: `l2i` on {BASE} {last}{gone}. By labels a class: {shown}.")
    return "\n".join(sentences) or "Nothing is measured yet."


def _tuned(rows: Sequence[Row], places: Sequence[tuple[str, int]]) -> str:
    """L2I as it is against FixMatch with the settings that have the least validation error, seed by seed."""
    parts = []
    for place in places:
        here = [row for row in runs.of(rows, data=place[0], labels=place[1], base=BASE)]
        alone, with_it = runs.of(here, method=PLAIN), runs.of(here, method="l2i")
        if not any(row["changes"] or _longer(row) for row in alone):
            continue
        errors, validation = runs.by_seed(alone), runs.by_seed(alone, "validation_error")
        seeds = sorted(set.intersection(*(set(one) for one in errors.values())))
        if len(seeds) < FEWEST:
            continue
        chosen = {seed: errors[min(validation, key=lambda arm: validation[arm][seed])][seed] for seed in seeds}
        lines: list[list[object]] = []
        for name, found in [*errors.items(), ("the best of these on each seed's validation images", chosen)]:
            lines.append([name, runs.mean_text([found[seed] for seed in seeds]), ""])
        for name, found in runs.by_seed(with_it).items():
            common = [found[seed] for seed in seeds if seed in found]
            if common:
                lines.append([name, runs.mean_text(common), runs.interval_text(runs.paired(found, chosen))])
        untouched = runs.paired(runs.by_seed(with_it).get(f"{BASE} + l2i", {}), chosen)
        said = {
            "helps": "The gap is not the base's settings: L2I as it is beats the best of them.",
            "harms": "The gap was the base's settings: the best of them beats L2I as it is.",
        }.get(runs.verdict(untouched), "Between the best of them and L2I as it is no difference is shown.")
        columns = [_name(place), "test error, %", "against the best of the base, points"]
        parts.append(
            f"{markdown(columns, lines)}\n\n{said} {len(seeds)} seeds; the base had {len(errors)} runs on each to "
            "choose from, L2I one, with the settings of the digits."
        )
    return "\n\n".join(parts) or "Nothing is measured yet."
