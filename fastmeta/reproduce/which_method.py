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


def _chosen(alone: Sequence[Row]) -> dict[int, float]:
    """Test errors, by seed, of the settings of the base that have the least validation error on that seed."""
    errors, validation = runs.by_seed(alone), runs.by_seed(alone, "validation_error")
    common = set.intersection(*(set(one) for one in errors.values())) if errors else set()
    return {seed: errors[min(validation, key=lambda arm: validation[arm][seed])][seed] for seed in sorted(common)}


def _best(rows: Sequence[Row], places: Sequence[tuple[str, int]]) -> str:
    """Where a method helps, the largest difference on FixMatch; else that none does."""
    lines: list[list[object]] = []
    for place in places:
        here = _of_the_base(rows, place)
        plain, chosen = runs.by_seed(here["alone"]).get(BASE, {}), _chosen(here["alone"])
        against = chosen if len(chosen) >= FEWEST else plain
        candidates = {
            name: errors
            for name, errors in runs.by_seed(
                [row for row in here["with"] if not METHODS[row["method"]].uses_holdout]
            ).items()
            if len(set(errors) & set(against)) >= FEWEST
        }
        if not candidates:
            continue
        level = 1 - 0.05 / len(candidates)
        found = {name: runs.paired(errors, against, level) for name, errors in candidates.items()}
        helping = {name: one for name, one in found.items() if one is not None and runs.verdict(one) == "helps"}
        if helping:
            name = min(helping, key=lambda name: helping[name].mean)
            advice = [name, runs.interval_text(helping[name])]
        else:
            advice = [f"the base alone: none of {len(found)} tried is shown to help", ""]
        tuned = len(runs.by_seed(here["alone"])) > 1 and against is chosen
        shown = runs.mean_text(list(chosen.values())) if tuned else ""
        lines.append([_name(place), runs.mean_text(list(plain.values())), shown, *advice])
    if not lines:
        return "Nothing is measured yet."
    columns = ["", f"{BASE} errs on, %", "with its settings chosen, %", "take", "which changes, points"]
    return (
        f"{markdown(columns, lines)}\n\nWith its settings chosen: those of several with the least validation error on "
        "each seed, where others were tried; what to take is then compared with that. It is the one with the largest "
        "difference among those that help, its rivals may be as good. The largest of several looks larger than it is: "
        "here the interval is widened for as many as were tried (Bonferroni). Methods with labels that no other sees "
        "are left out."
    )


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
    """L2I as it is against FixMatch with the settings that have the least validation error, seed by seed."""
    parts = []
    for place in places:
        here = _of_the_base(rows, place)
        errors, with_it = runs.by_seed(here["alone"]), runs.by_seed(runs.of(here["with"], method="l2i"))
        chosen = _chosen(here["alone"])
        seeds = sorted(set(chosen) & set(with_it.get(f"{BASE} + l2i", {})))
        if len(errors) < 2 or len(seeds) < FEWEST:
            continue
        chosen = {seed: chosen[seed] for seed in seeds}
        lines: list[list[object]] = []
        for name, found in [*errors.items(), ("the best of these on each seed's validation images", chosen)]:
            lines.append([name, runs.mean_text([found[seed] for seed in seeds]), ""])
        for name, found in with_it.items():
            common = [found[seed] for seed in seeds if seed in found]
            if common:
                lines.append([name, runs.mean_text(common), runs.interval_text(runs.paired(found, chosen))])
        untouched = runs.paired(with_it[f"{BASE} + l2i"], chosen)
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
