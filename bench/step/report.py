"""A run's results as JSON, as markdown and on the terminal."""

from pathlib import Path

from bench import files, goals, text
from bench.report import where
from bench.rows import Row, contended_share
from bench.step import gate
from bench.text import cell, table_of

SCHEMA_VERSION = 1
METHOD = (
    "F is the arithmetic of the convolutions and linear layers, counted in a run, in forwards of the unlabeled images "
    "(a backward is 2); the prediction is the ratio of F, the measured ratio that of the times. Memory is the peak of "
    "torch's allocations within a step, gradients included, over the plain step's. The error is that of the parameter "
    f"gradients against the published form with its double backward or probes, after {gate.STEPS} steps in float64; "
    f"above {gate.TOLERANCE:.0e} a step is not timed. `published`: plain PyTorch after the papers' equations; "
    "`alternating`: fastmeta in the papers' order, the method's passes its own; `fused`: fastmeta sharing the base's "
    "passes, an approximation of it. *refine alone*: the method's part on what one step gave it, again and again; "
    "*bound*: with that on top of the plain step."
)
NOTES = (
    "The plain steps: Mean Teacher is a labeled and an unlabeled student pass and its teacher's; FixMatch one forward "
    "and backward of three batches, with separate passes its cheapest form; pseudo-labels an evaluation pass and a "
    "step on both batches; table labels a step on both batches.",
    "The hold-out examples are the labeled batch.",
    "L2I, two views: labels are imputed from a view of their own and the hold-out gradient is looked ahead for, as in "
    "the published code. Otherwise from the images that learn from them, where C^U alone makes looking ahead change "
    "nothing.",
    "Fused L2I takes the hold-out gradient before the base's update, not after it; fused Meta-Gradient in training "
    "mode, not in evaluation mode; fused example weights are those of the labeled batch in every step.",
    "ExampleWeights, between updates: a step that only reads the weights; identity: no inverse Hessian, whole model.",
    "LabelGradientAlignment has no published code: its published form is Algorithm 1 in plain PyTorch.",
)
DERIVATIVES = (
    "The derivative alone, `fastmeta.label_gradient`, of the same images. The difference is that from the double "
    "backward, in float32 (a finite difference at radius 0.01 is a probe, not a derivative):"
)


def write(results: Row, folder: Path) -> list[str]:
    """Write step.json and step.md; returns their names."""
    judged = {n["network"]: [goal.as_json() for goal in goals.of_steps(n)] for n in results["networks"]}
    files.write(folder / "step.json", results | {"goals": judged})
    (folder / "step.md").write_text(markdown(results))
    return ["step.json", "step.md"]


def timed(results: Row) -> list[Row]:
    """All rows with samples."""
    return [row for n in results["networks"] for row in (*n["steps"], *n["derivatives"]) if "samples" in row]


def goals_table(results: Row) -> list[str]:
    """Each goal, and the worst that was measured for it on each network."""
    networks = results["networks"]
    return table_of(row for n in networks for row in goals.goal_rows(goals.of_steps(n), {"network": n["network"]}))


def _plain(row: Row) -> dict[str, str]:
    return {
        "plain step": row["name"],
        "F": cell(row.get("passes"), "{:.1f}"),
        "time": text.time(row["median_us"]),
        "peak memory": cell(row["peak_bytes"], text.memory),
    }


def _method(row: Row) -> dict[str, str]:
    measured = cell(row.get("ratio"), "{:.3f}x" if "bound" in row else text.factor)
    spread = row.get("ratio_quartiles")
    return {
        "method": row["method"] + ", graph" * row["name"].endswith(", graph"),
        "how": row["how"],
        "schedule": row["schedule"],
        "over the plain step": row["plain"],
        "F": cell(row.get("passes"), "{:.1f}"),
        "predicted": cell(row.get("predicted")),
        "measured": f"{measured} (computed)" if row["status"] == "computed" else measured or row["status"],
        "quartiles": f"{spread[0]:.3f} to {spread[1]:.3f}" if spread else "",
        "refine alone": cell(row.get("refine_us"), text.time),
        "bound": cell(row.get("bound"), "{:.3f}x"),
        "host syncs": cell(row.get("refine_host_syncs"), str),
        "memory": cell(row.get("memory_ratio")),
        "error": cell(row.get("error"), "{:.0e}"),
    }


def _derivatives(rows: list[Row]) -> list[str]:
    header = ["mode", "", "time", "over one forward", "peak memory", "difference"]
    return text.table(
        header,
        [
            [
                *(row["mode"], row["name"], text.time(row["median_us"]), text.factor(row["ratio"])),
                *(cell(row["peak_bytes"], text.memory), cell(row.get("difference"), "{:.0e}")),
            ]
            for row in rows
        ],
    )


def markdown(results: Row) -> str:
    """The whole report."""
    on_gpu = any(network["device"] == "cuda" for network in results["networks"])
    precision = "bfloat16 autocast over float32 weights, channels last" if on_gpu else "float32"
    lines = [
        f"# Step cost on {'a GPU' if on_gpu else 'the CPU'}",
        "",
        where(results["environment"]),
        "",
        f"{precision}, random images. Medians of {results['settings']['rounds']} rounds, all steps of a network in "
        "turn, in one process; a ratio is the median of the rounds' own, between the quartiles given. Other processes "
        f"ran during {contended_share(timed(results)):.0%} of the samples.",
        "",
        *goals_table(results),
        "The worst case of each goal is named. For context, the published code on another machine (2 cores), over its "
        f"own plain step: {goals.ELSEWHERE}.",
        "",
        METHOD,
        "",
        *(f"- {note}" for note in NOTES),
        "",
    ]
    lines += [f"{name}: not measured, {reason}." for name, reason in results.get("failed", {}).items()]
    for network in results["networks"]:
        images, steps = network["images"], network["steps"]
        lines += [
            f"## {network['network']}",
            "",
            f"{network['parameters'] / 1e6:.1f} million parameters; {images['labeled']} labeled and "
            f"{images['unlabeled']} unlabeled images of {images['pixels']} x {images['pixels']} pixels; F is "
            f"{network['forward_flops'] / 1e9:.1f} GFLOP.",
            "",
            *table_of(_plain(row) for row in steps if row["schedule"] == "plain"),
            *table_of(_method(row) for row in steps if row["schedule"] != "plain"),
        ]
        failed = [row for row in steps if "reason" in row]
        lines += [f"- {row['name']}: {row['status']}, {row['reason']}." for row in failed] + [""] * bool(failed)
        lines += [DERIVATIVES, "", *_derivatives(network["derivatives"])]
    return "\n".join(lines).rstrip() + "\n"
