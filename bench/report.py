"""The operators of a run as markdown: tables for either device. Cells and columns with nothing measured are empty."""

from collections.abc import Callable, Iterable
from typing import Any

from bench import text
from bench.rows import (
    MAX_AUTOTUNE,
    Row,
    best_form,
    best_known_us,
    contended_share,
    is_noisy,
    main_variant,
    measured,
    over,
    title,
)

SCHEMA_VERSION = 2
METHOD = {
    "cpu": (
        "Medians of interleaved samples in one process, with data in cache where it fits. *x floor*: the time over "
        "max(flops / GEMM rate, bytes / copy bandwidth). *over*: a peer's time over fastmeta's in the same dtype: "
        "above 1 fastmeta is faster. Every variant's result was checked against float64 before it was timed."
    ),
    "cuda": (
        "Medians of interleaved samples in one process. *time*: between two events around many calls on the stream, "
        "so where the host is slower than the device it is the host's; *first quartile*: of the same samples; *graph*: "
        "the calls replayed from a CUDA graph, the device's time (calls beyond 2 ms are not captured: the stream's "
        "time is the device's). *!*: the third quartile is more than 1.3 times the first. Arguments rotate over sets "
        "that exceed three times the L2 cache, up to 24 sets; what is smaller is measured within L2, as is its copy. "
        "*x floor*: the device's time over max(flops / GEMM rate, bytes / copy bandwidth, one empty launch in a "
        "graph). *products alone*: the library's time for the products at these shapes, a peer's and no floor. "
        "*over*: a peer's time over fastmeta's, above 1 fastmeta is faster. *host us*: until a call returns, median "
        "of 7. Every variant's result was checked against float64 before it was timed."
    ),
}


def cell(value: Any, form: Callable[[Any], str] = text.factor) -> str:
    return "" if value is None else form(value)


def one_line(message: str) -> str:
    return " ".join(message.split())[:160]


def _against(record: Row, role: str, *, tuned: bool | None = None) -> tuple[str, str]:
    """The best of a role over fastmeta, on the stream and in graphs."""
    others = [v for v in measured(record, role) if tuned is None or (v["name"] == MAX_AUTOTUNE) == tuned]
    device = over(record, others, device=True) if record["cost"]["launch_us"] else None
    return cell(over(record, others)), cell(device)


def _operator_row(record: Row, tests: Row, float32: dict[str, Row]) -> dict[str, str]:
    verdict = tests.get(record["operator"], {})
    failing = f" ({verdict['failed']} tests fail)" if verdict.get("failed") else ""
    row = {"operator": record["operator"] + failing, "N, D, C": record["shape"], "dtype": record["dtype"]}
    ours = main_variant(record)
    if ours is None:
        reasons = [v["reason"] for v in record.get("variants", []) if v["name"] == record["main"] and "reason" in v]
        return row | {"time": one_line(record.get("failed") or (reasons or ["no time"])[0])}
    cost, peers = record["cost"], measured(record, "peer")
    eager, compiled = _against(record, "eager"), _against(record, "compile", tuned=False)
    tuned = _against(record, "compile", tuned=True)
    row |= {
        "time": text.time(ours["stream_us"]) + " !" * is_noisy(ours),
        "first quartile": cell(ours["quartiles_us"][0] if "host_us" in ours else None, text.time),
        "graph": cell(ours.get("graph_us"), text.time),
        "x floor": cell(ours.get("times_floor")),
        "bound": cost.get("bound", ""),
        "flop/B, achieved": _roofline(cost, ours),
        "products alone": cell(cost.get("gemm_us") or None, text.time),
        "launches": cell(ours.get("launches"), str),
        "host us": cell(ours.get("host_us"), lambda us: f"{us:.1f}"),
        "over eager": eager[0],
        "over eager, graphs": eager[1],
        "over compile / max-autotune": " / ".join(filter(None, (compiled[0], tuned[0]))),
        "over compile, graphs": " / ".join(filter(None, (compiled[1], tuned[1]))),
        "over best other": f"{cell(over(record, peers))} {peers[0]['name']}" if peers else "",
        "peak memory": cell(ours.get("peak_bytes"), text.memory),
    }
    beside = float32.get(record["operator"] + record["shape"])
    if beside is not None and record["dtype"] != "float32" and measured(beside, "eager"):
        row["over float32 eager"] = text.factor(measured(beside, "eager")[0]["stream_us"] / ours["stream_us"])
    return row


def _roofline(cost: Row, ours: Row) -> str:
    """Arithmetic intensity, and the rate of what binds: of arithmetic or of memory."""
    seconds = 1e-6 * best_known_us(ours)
    what, unit = (cost["flops"], "FLOP/s") if cost["bound"] == "flops" else (cost["bytes"], "B/s")
    return f"{cost['flops'] / cost['bytes']:.3g}, {what / seconds / 1e9:.3g} G{unit}"


def table_of(rows: Iterable[dict[str, str]]) -> list[str]:
    """Columns in the order in which they first have something in them."""
    rows = list(rows)
    names = list(dict.fromkeys(name for row in rows for name in row))
    header = [name for name in names if any(row.get(name) for row in rows)]
    return text.table(header, [[row.get(name, "") for name in header] for row in rows])


def operators(results: Row) -> list[str]:
    """The table of all records; an operator whose tests fail is marked, or where it was refused has a line."""
    records, tests = results["operators"], results["tests"].get("operators", {})
    float32 = {r["operator"] + r["shape"]: r for r in records if r["dtype"] == "float32" and "variants" in r}
    lines = table_of(_operator_row(record, tests, float32) for record in records) if records else []
    there = {record["operator"] for record in records}
    for operator, verdict in tests.items():
        if operator not in there and not verdict["green"] and results.get("refused"):
            lines += [f"**{operator}: not measured, {verdict['reason']}.**", ""]
    return lines


def forms(results: Row) -> list[str]:
    """What is chosen, on the stream and in graphs, against the best form that was measured."""
    rows = []
    for record in results["operators"]:
        stream, graph = (best_form(record, device=device) for device in (False, True))
        if stream is None:
            continue
        named = [v for v in measured(record, "fastmeta") if v["name"] != record["main"]]
        rows.append(
            {
                "operator": record["operator"],
                "N, D, C": record["shape"],
                "dtype": record["dtype"],
                "best": stream[0],
                "chosen over best": text.factor(stream[1]),
                "best in graphs": graph[0] if graph else "",
                "chosen over best, graphs": text.factor(graph[1]) if graph else "",
                "every form: stream (graph)": "; ".join(
                    f"{v['name']} {text.time(v['stream_us'])}{in_graph(v)}" for v in named
                ),
            }
        )
    return table_of(rows) if rows else []


def in_graph(variant: Row) -> str:
    return f" ({text.time(variant['graph_us'])})" if "graph_us" in variant else ""


def left_out(results: Row) -> list[str]:
    """What was not measured, is wrong, waits for the device, or is noise."""
    crashed = results.get("crashed", {})
    lines = [f"- {key}, {step}: {why}" for key, steps in crashed.items() for step, why in steps.items()]
    if results.get("unfinished"):
        lines.append(f"- no time was left for {len(results['unfinished'])} cases: {'; '.join(results['unfinished'])}")
    noisy = []
    for record in results["operators"]:
        for variant in record.get("variants", []):
            where = f"- {title(record)}, {variant['name']}: "
            if variant["status"] in ("failed", "wrong"):
                lines.append(where + one_line(variant["reason"]))
            elif variant.get("host_syncs"):
                lines.append(f"{where}waits for the device {variant['host_syncs']} times")
            noisy += [f"{title(record)}, {variant['name']}"] * is_noisy(variant)
    if noisy:
        lines.append(f"- noise, third quartile over 1.3 times the first, in {len(noisy)}: {'; '.join(noisy[:12])}")
    return [*lines, ""] if lines else []


def ceilings(shared: Row) -> str:
    copies = ", ".join(
        f"{text.memory(float(size))} {rate / 1e9:.0f} GB/s" for size, rate in shared["copy_bytes_per_s"].items()
    )
    rates = ", ".join(f"{dtype} {rate / 1e9:,.0f} GFLOP/s" for dtype, rate in shared["peak_flops"].items())
    launch = shared["launch_us"]
    empty = f"; an empty launch {launch['stream']:.2f} us on the stream, {launch['graph']:.2f} us in a graph"
    empty *= any(launch.values())
    return f"Ceilings of the same run: GEMM {rates}; copy, read and write together: {copies}{empty}."


def where(environment: Row) -> str:
    gpu = environment.get("gpu")
    machine = (
        f"{environment.get('cpu')}, {environment.get('threads')} threads, {environment.get('torch_cpu_capability')}"
    )
    if gpu:
        machine = (
            f"{gpu['name']} (compute capability {gpu['capability']}, {gpu['multiprocessors']} multiprocessors, "
            f"{text.memory(gpu['memory_bytes'])}, L2 {text.memory(gpu['l2_bytes'])}), Triton "
            f"{environment['packages']['triton']}"
        )
    return (
        f"{machine}, torch {environment['torch']}, fastmeta {environment['fastmeta']} at "
        f"{(environment['git_commit'] or '?')[:10]}, {environment['date']}."
    )


def details(results: Row) -> list[str]:
    """Every variant of every operator at every shape."""
    lines: list[str] = []
    for operator in dict.fromkeys(record["operator"] for record in results["operators"]):
        records = [r for r in results["operators"] if r["operator"] == operator and "variants" in r]
        if not records:
            continue
        names = list(dict.fromkeys(v["name"] for record in records for v in record["variants"]))
        rows = []
        for record in records:
            by_name = {v["name"]: v for v in record["variants"]}
            shape = f"{record['shape']} {record['dtype']}{' (in L2)' * record['cost']['in_l2']}"
            rows.append([shape, *(_detail(record, by_name.get(name)) for name in names)])
        notes = {v["name"]: v["note"] for record in records for v in record["variants"] if v.get("note")}
        if any("extrapolated" in v for record in records for v in record["variants"]):
            notes["\\*"] = "measured on a few examples and scaled to all of them: the whole would not fit"
        note = records[0].get("note")
        lines += [f"## {operator}", "", *([note, ""] if note else [])]
        lines += ["Time (in a graph), over fastmeta's, peak memory beyond the arguments:", ""]
        lines += text.table(["", *names], rows)
        lines += [f"- {name}: {note}." for name, note in notes.items()] + [""] * bool(notes)
    return lines


def _detail(record: Row, variant: Row | None) -> str:
    if variant is None:
        return ""
    if "stream_us" not in variant:
        return variant["status"]
    ours = main_variant(record)
    parts = [f"{text.time(variant['stream_us'])}{'*' * ('extrapolated' in variant)}{in_graph(variant)}"]
    parts += [text.factor(variant["stream_us"] / ours["stream_us"])] if ours and ours is not variant else []
    parts += [f"{variant['iterations']} iterations"] if "iterations" in variant else []
    parts += [text.memory(variant["peak_bytes"])] if variant.get("peak_bytes") is not None else []
    return ", ".join(parts)


def timed(results: Row) -> list[Row]:
    """All rows with samples."""
    return [v for record in results["operators"] for v in record.get("variants", []) if "samples" in v]


def markdown(results: Row, name: str, sections: list[tuple[str, list[str]]]) -> str:
    """The whole report.

    Args:
        results: of a run.
        name: its first heading.
        sections: heading and lines of each part that comes before the operators' details.
    """
    environment, shared = results["environment"], results["shared"]
    lines = [f"# {name}", "", *([where(environment), ""] if environment else [])]
    if shared:
        lines += [ceilings(shared), "", METHOD["cuda" if any(shared["launch_us"].values()) else "cpu"], ""]
    if (share := contended_share(timed(results))) > 0:
        lines += [f"Other processes ran during {share:.0%} of the samples.", ""]
    for heading, part in sections:
        lines += [*([f"## {heading}", ""] if heading else []), *part] if part else []
    return "\n".join([*lines, *details(results)]).rstrip() + "\n"
