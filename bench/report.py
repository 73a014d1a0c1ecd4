"""The operators of a run as markdown and CSV, on either device. Cells and columns with nothing measured are empty."""

import csv
from collections.abc import Iterator
from pathlib import Path

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
    reason_without_time,
    title,
)
from bench.text import cell, one_line, table_of

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
COLUMNS = (  # as kernel benchmarks are exchanged
    *("kernel_name", "kernel_provider", "mode", "shape", "dtype", "p20", "p50", "p80", "unit", "device"),
    *("fastmeta_version", "git_commit", "date"),
)


def write_csv(results: Row, path: Path) -> None:
    """One line for each figure."""
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([COLUMNS, *_csv_lines(results)])


def _csv_lines(results: Row) -> Iterator[tuple[object, ...]]:
    """Times in microseconds (``stream``: as called; ``graph``: the device's; ``host``), peak memory in bytes."""
    environment = results["environment"]
    device = environment.get("gpu", {}).get("name") or environment.get("cpu")
    made = environment.get("fastmeta"), (environment.get("git_commit") or "")[:10], environment.get("date")
    for record in results["operators"]:
        for v in measured(record):
            low, high = v.get("p20_p80_us", ("", ""))
            graph_low, graph_high = v.get("graph_p20_p80_us", ("", ""))
            host, memory = v.get("host_us"), v.get("peak_bytes")
            for mode, p20, p50, p80, unit in (
                ("stream", low, v["stream_us"], high, "us"),
                ("graph", graph_low, v.get("graph_us"), graph_high, "us"),
                ("host", host, host, host, "us"),
                ("memory", memory, memory, memory, "B"),
            ):
                if p50 is not None:
                    what = record["operator"], v["name"], mode, record["shape"], record["dtype"]
                    yield *what, p20, p50, p80, unit, device, *made


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


def _operator_row(record: Row, tests: Row, float32: dict[str, Row]) -> dict[str, str]:
    verdict = tests.get(record["operator"], {})
    failing = f" ({verdict['failed']} tests fail)" if verdict.get("failed") else ""
    row = {"operator": record["operator"] + failing, "N, D, C": record["shape"], "dtype": record["dtype"]}
    ours = main_variant(record)
    if ours is None:
        return row | {"time": one_line(reason_without_time(record))}
    cost, peers = record["cost"], measured(record, "peer")
    eager, compiles = measured(record, "eager"), measured(record, "compile")
    compiled = [v for v in compiles if v["name"] != MAX_AUTOTUNE], [v for v in compiles if v["name"] == MAX_AUTOTUNE]

    def in_graphs(others: list[Row]) -> str:
        return cell(over(record, others, device=True) if cost["launch_us"] else None)

    row |= {
        "time": text.time(ours["stream_us"]) + " !" * is_noisy(ours),
        "first quartile": cell(ours["quartiles_us"][0] if "host_us" in ours else None, text.time),
        "graph": cell(ours.get("graph_us"), text.time),
        "x floor": cell(ours.get("times_floor")),
        "bound": cost.get("bound", ""),
        "flop/B, achieved": _roofline(cost, ours),
        "products alone": cell(cost.get("gemm_us") or None, text.time),
        "launches": cell(ours.get("launches"), str),
        "host us": cell(ours.get("host_us"), "{:.1f}"),
        "over eager": cell(over(record, eager)),
        "over eager, graphs": in_graphs(eager),
        "over compile / max-autotune": " / ".join(filter(None, (cell(over(record, one)) for one in compiled))),
        "over compile, graphs": " / ".join(filter(None, map(in_graphs, compiled))),
        "over best other": f"{cell(over(record, peers))} {peers[0]['name']}" if peers else "",
        "peak memory": cell(ours.get("peak_bytes"), text.memory),
    }
    beside = measured(float32.get(record["operator"] + record["shape"], {}), "eager")
    if beside and record["dtype"] != "float32":
        row["over float32 eager"] = text.factor(beside[0]["stream_us"] / ours["stream_us"])
    return row


def _roofline(cost: Row, ours: Row) -> str:
    """Arithmetic intensity, and the rate achieved of what bounds the call: FLOP/s or B/s."""
    seconds = 1e-6 * best_known_us(ours)
    what, unit = (cost["flops"], "FLOP/s") if cost["bound"] == "flops" else (cost["bytes"], "B/s")
    return f"{cost['flops'] / cost['bytes']:.3g}, {what / seconds / 1e9:.3g} G{unit}"


def forms(results: Row) -> list[str]:
    """What is chosen, on the stream and in graphs, against the best form that was measured."""
    rows = []
    for record in results["operators"]:
        stream, graph = (best_form(record, device=device) for device in (False, True))
        if stream is None:
            continue
        named = [v for v in measured(record, "fastmeta") if v["name"] != record["main"]]
        row = {"operator": record["operator"], "N, D, C": record["shape"], "dtype": record["dtype"]}
        row |= {"best": stream[0], "chosen over best": text.factor(stream[1])}
        if graph:
            row |= {"best in graphs": graph[0], "chosen over best, graphs": text.factor(graph[1])}
        every = (f"{v['name']} {text.time(v['stream_us'])}{_in_graph(v)}" for v in named)
        rows.append(row | {"every form: stream (graph)": "; ".join(every)})
    return table_of(rows) if rows else []


def _in_graph(variant: Row) -> str:
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
            where = f"{title(record)}, {variant['name']}"
            if variant["status"] in ("failed", "wrong"):
                lines.append(f"- {where}: {one_line(variant['reason'])}")
            elif variant.get("host_syncs"):
                lines.append(f"- {where}: waits for the device {variant['host_syncs']} times")
            noisy += [where] * is_noisy(variant)
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
    if gpu:
        machine = (
            f"{gpu['name']} (compute capability {gpu['capability']}, {gpu['multiprocessors']} multiprocessors, "
            f"{text.memory(gpu['memory_bytes'])}, L2 {text.memory(gpu['l2_bytes'])}), Triton "
            f"{environment['packages']['triton']}"
        )
    else:
        parts = environment.get("cpu"), f"{environment.get('threads')} threads", environment.get("torch_cpu_capability")
        machine = ", ".join(map(str, parts))
    versions = f"torch {environment['torch']}, fastmeta {environment['fastmeta']}"
    return f"{machine}, {versions} at {(environment['git_commit'] or '?')[:10]}, {environment['date']}."


def details(results: Row) -> list[str]:
    """Every variant of every operator at every shape."""
    lines: list[str] = []
    for operator in dict.fromkeys(record["operator"] for record in results["operators"]):
        records = [r for r in results["operators"] if r["operator"] == operator and "variants" in r]
        if not records:
            continue
        variants = [v for record in records for v in record["variants"]]
        names = list(dict.fromkeys(v["name"] for v in variants))
        rows = []
        for record in records:
            by_name = {v["name"]: v for v in record["variants"]}
            shape = f"{record['shape']} {record['dtype']}{' (in L2)' * record['cost']['in_l2']}"
            rows.append([shape, *(_detail(record, by_name.get(name)) for name in names)])
        notes = {v["name"]: v["note"] for v in variants if v.get("note")}
        if any("extrapolated" in v for v in variants):
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
    parts = [f"{text.time(variant['stream_us'])}{'*' * ('extrapolated' in variant)}{_in_graph(variant)}"]
    parts += [text.factor(variant["stream_us"] / ours["stream_us"])] if ours and ours is not variant else []
    parts += [f"{variant['iterations']} iterations"] if "iterations" in variant else []
    parts += [text.memory(variant["peak_bytes"])] if variant.get("peak_bytes") is not None else []
    return ", ".join(parts)


def timed(results: Row) -> list[Row]:
    """All rows with samples."""
    return [v for record in results["operators"] for v in record.get("variants", []) if "samples" in v]


def markdown(results: Row, name: str, sections: list[tuple[str, list[str]]]) -> str:
    """The whole report: its first heading, sections with headings of their own, and the operators' details."""
    environment, shared = results["environment"], results["shared"]
    lines = [f"# {name}", "", *([where(environment), ""] if environment else [])]
    if shared:
        lines += [ceilings(shared), "", METHOD["cuda" if any(shared["launch_us"].values()) else "cpu"], ""]
    if (share := contended_share(timed(results))) > 0:
        lines += [f"Other processes ran during {share:.0%} of the samples.", ""]
    for heading, part in sections:
        lines += [*([f"## {heading}", ""] if heading else []), *part] if part else []
    return "\n".join([*lines, *details(results)]).rstrip() + "\n"
