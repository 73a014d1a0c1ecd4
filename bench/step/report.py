"""A run's results as JSON, as markdown and on the terminal. Cells that were not measured stay empty."""

import json
from pathlib import Path
from typing import Any

from bench import text
from bench.goal import Goal
from bench.step import gate, goals

SCHEMA_VERSION = 1
Row = dict[str, Any]


NOTES = (
    "The plain steps: Mean Teacher is a labeled and an unlabeled student pass and its teacher's; FixMatch one forward "
    "and backward of three batches, with separate passes its cheapest form; pseudo-labels an evaluation pass and a "
    "step on both batches; table labels a step on both batches.",
    "The hold-out examples are the labeled batch. FixMatch has as many unlabeled as labeled images.",
    "L2I, two views: labels are imputed from a view of their own and the hold-out gradient is looked ahead for, as in "
    "the published code. Otherwise from the images that learn from them, where C^U alone makes looking ahead change "
    "nothing.",
    "Fused L2I takes the hold-out gradient before the base's update, not after it; fused Meta-Gradient in training "
    "mode, not in evaluation mode; fused example weights are those of the labeled batch in every step.",
    "ExampleWeights, between updates: a step that only reads the weights; identity: no inverse Hessian, whole model.",
    "LabelGradientAlignment has no published code: its published form is Algorithm 1 in plain PyTorch.",
)


def write(results: Row, folder: Path) -> list[str]:
    """Write step.json and step.md; returns their names."""
    folder.mkdir(parents=True, exist_ok=True)
    with_goals = results | {
        "goals": {n["network"]: [goal.as_json() for goal in goals.goals(n)] for n in results["networks"]}
    }
    (folder / "step.json").write_text(json.dumps(with_goals, indent=1) + "\n")
    (folder / "step.md").write_text(markdown(results))
    return ["step.json", "step.md"]


def contended_share(results: Row) -> float:
    """Share of the samples that were taken although other processes ran."""
    rows = [row for n in results["networks"] for row in (*n["steps"], *n["derivatives"]) if "samples" in row]
    return sum(row["contended_samples"] for row in rows) / max(1, sum(row["samples"] for row in rows))


def goals_table(results: Row) -> list[str]:
    """Each goal, and the worst that was measured for it on each network."""
    networks = results["networks"]
    columns = [goals.goals(network) for network in networks]
    rows = [
        [column[0].name, f"<= {column[0].text(column[0].required)}", *(_verdict(goal) for goal in column)]
        for column in zip(*columns, strict=True)
    ]
    return text.table(["goal", "", *(network["network"] for network in networks)], rows)


def _verdict(goal: Goal) -> str:
    if goal.worst is None:
        return ""
    name, value = goal.worst
    return f"{goal.text(value)}, {'reached' if goal.met else 'not reached'} ({name})"


def _plain(rows: list[Row]) -> list[str]:
    table = [
        [row["name"], f"{row['passes']:.1f}", text.time(row["median_us"]), text.memory(row["peak_bytes"])]
        for row in rows
        if row["schedule"] == "plain"
    ]
    return text.table(["plain step", "F", "time", "peak memory"], table)


def _methods(rows: list[Row]) -> list[str]:
    header = ["method", "how", "schedule", "over the plain step", "F", "predicted", "measured", "memory", "error"]
    return text.table(header, [_method(row) for row in rows if row["schedule"] != "plain"])


def _method(row: Row) -> list[str]:
    measured = text.factor(row.get("ratio"))
    return [
        row["method"],
        row["how"],
        row["schedule"],
        row["plain"],
        f"{row['passes']:.1f}" if "passes" in row else "",
        text.factor(row.get("predicted")),
        f"{measured} (computed)" if row["status"] == "computed" else measured or row["status"],
        text.factor(row.get("memory_ratio")),
        f"{row['error']:.0e}" if "error" in row else "",
    ]


def _derivatives(rows: list[Row]) -> list[str]:
    table = [
        [
            row["mode"],
            row["name"],
            text.time(row["median_us"]),
            text.factor(row["ratio"]),
            text.memory(row["peak_bytes"]),
            f"{row['difference']:.0e}" if "difference" in row else "",
        ]
        for row in rows
    ]
    return text.table(["mode", "", "time", "over one forward", "peak memory", "difference"], table)


def markdown(results: Row) -> str:
    """The whole report."""
    environment, settings = results["environment"], results["settings"]
    lines = [
        "# Step cost on the CPU",
        "",
        f"{environment['cpu']}, {environment['threads']} threads, {environment['torch_cpu_capability']}, "
        f"torch {environment['torch']}, fastmeta {environment['fastmeta']} at "
        f"{(environment['git_commit'] or '?')[:10]}, {environment['date']}.",
        "",
        f"float32, random images of 32 x 32 pixels, {settings['batch']} labeled and {settings['batch']} unlabeled a "
        f"step. Medians of {settings['rounds']} rounds, all steps of a network in turn, in one process. Other "
        f"processes ran during {contended_share(results):.0%} of the samples.",
        "",
        *goals_table(results),
        "The worst case of each goal is named. For context, the published code on another machine (2 cores), over its "
        f"own plain step: {goals.ELSEWHERE}.",
        "",
        "F is the arithmetic of the convolutions and linear layers, counted in a run, in forwards of "
        f"{settings['batch']} images (a backward is 2); the prediction is the ratio of F, the measured ratio that of "
        "the times. Memory is the peak of torch's allocations within a step, gradients included, over the plain "
        "step's. The error is that of the parameter gradients against the published form with its double backward or "
        f"probes, after {gate.STEPS} steps in float64; above {gate.TOLERANCE:.0e} a step is not timed. `published`: "
        "plain PyTorch after the papers' equations; `alternating`: fastmeta in the papers' order, the method's passes "
        "its own; `fused`: fastmeta sharing the base's passes, an approximation of it.",
        "",
    ]
    lines += [*(f"- {note}" for note in NOTES), ""]
    for network in results["networks"]:
        lines += [
            f"## {network['network']}",
            "",
            f"{network['parameters'] / 1e6:.1f} million parameters; F is {network['forward_flops'] / 1e9:.1f} GFLOP.",
            "",
            *_plain(network["steps"]),
            *_methods(network["steps"]),
        ]
        failed = [row for row in network["steps"] if "reason" in row]
        lines += [f"- {row['name']}: {row['status']}, {row['reason']}." for row in failed] + [""] * bool(failed)
        lines += [
            "The derivative alone, `fastmeta.label_gradient`, of the same images. The difference is that from the "
            "double backward, in float32 (a finite difference at radius 0.01 is a probe, not a derivative):",
            "",
            *_derivatives(network["derivatives"]),
        ]
    return "\n".join(lines).rstrip() + "\n"
