"""What the gradients and the influence of example weights cost (Not All Unlabeled Data Are Equal, Section 4.4).

WRN-28-2 with random weights and images; batch normalization takes its running statistics, so that an example's gradient
is its own. A cell times every form once, in turn; the table has medians and ratios. The time is the process's own,
which other processes on the machine change little. The paper's batch is 64 labeled, 256 unlabeled and 320 validation
images on a GPU; here it is a sixteenth of that, on the CPU.
"""

import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.nn import functional

import fastmeta
from fastmeta.models import WideResNet
from fastmeta.reproduce.experiment import Experiment, Row, markdown
from fastmeta.training.reports.drawing import pyplot, style

PARTS = (64, 256, 320)  # labeled, unlabeled and validation examples of the paper
TERMS = 10  # of the Neumann series
SERIAL, EXACT, WHOLE, NEUMANN = "one by one", "last layer, exact H", "whole model, H = I", "last block, Neumann series"
PAPER = {
    SERIAL: "18.17 s",
    "vectorized": "does not fit 16 GB; the authors' form, from activations: 0.94 s",
    EXACT: "0.455 s",
    "last layer, H = I": "",
    WHOLE: "0.399 s (Luketina et al., on which parameters is not said)",
    NEUMANN: "4.6 times the exact last layer (Lorraine et al.)",
}


def cells(quick: bool) -> list[Row]:
    """A round of all forms each."""
    depth, fraction, rounds = (10, 64, 1) if quick else (28, 16, 3)
    return [{"round": number, "depth": depth, "fraction": fraction} for number in range(rounds)]


class Forms:
    """Every form by name, as a function without arguments whose result is ``[N]`` or gradients."""

    def __init__(self, depth: int, fraction: int) -> None:
        torch.manual_seed(0)
        self.model = WideResNet(num_classes=10, depth=depth).eval()
        x = torch.randn(sum(PARTS) // fraction, 3, 32, 32)
        y = torch.randint(10, (len(x),))
        sizes = [part // fraction for part in PARTS]
        self.x_l, self.x_u, self.x_v = x.split(sizes)
        self.y_l, _, self.y_v = y.split(sizes)
        with torch.no_grad():
            self.labels = self.model(self.x_u + 0.1).argmax(1)  # of another view
        last_block = f"blocks.{len(self.model.blocks) - 1}"
        self.by_name: dict[str, Callable[[], Any]] = {
            SERIAL: self.one_by_one,
            "vectorized": self.vectorized,
            EXACT: lambda: self.influence(inverse_hessian="cholesky"),
            "last layer, H = I": lambda: self.influence(inverse_hessian="identity"),
            WHOLE: lambda: self.influence(how="jvp", inverse_hessian="identity"),
            NEUMANN: lambda: self.influence(
                how="jvp", inverse_hessian="neumann", max_iter=TERMS, layers=(last_block, "norm", "fc")
            ),
        }

    def one_by_one(self) -> dict[str, Tensor]:
        """A backward pass for each unlabeled example."""
        names, parameters = zip(*self.model.named_parameters(), strict=True)
        rows = []
        for image, label in zip(self.x_u, self.labels, strict=True):
            loss = functional.cross_entropy(self.model(image[None]), label[None])
            rows.append(torch.autograd.grad(loss, parameters))
        return dict(zip(names, map(torch.stack, zip(*rows, strict=True)), strict=True))

    def vectorized(self) -> dict[str, Tensor]:
        """All of them at once."""

        def loss(parameters: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
            logits = functional_call(self.model, parameters, (image[None],))
            return functional.cross_entropy(logits, label[None])

        parameters = {name: value.detach() for name, value in self.model.named_parameters()}
        found: dict[str, Tensor] = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, self.x_u, self.labels)
        return found

    def influence(self, **settings: Any) -> Tensor:
        """Weights ``[N]`` after one update, the passes that it needs among the time."""
        method = fastmeta.ExampleWeights(len(self.x_u), damping=0.1, mode="eval", **settings)
        return method.refine(
            model=self.model,
            unlabeled=self.x_u,
            pseudo_labels=self.labels,
            index=torch.arange(len(self.x_u)),
            holdout=self.x_v,
            targets=self.y_v,
            labeled=self.x_l,
            labeled_targets=self.y_l,
        ).weights


def measure(round: int, depth: int, fraction: int) -> Row:
    """Seconds of the process for each form."""
    for warm_up in Forms(10, 64).by_name.values():
        warm_up()
    forms = Forms(depth, fraction)
    order = list(forms.by_name)
    seconds = {}
    for name in order if round % 2 == 0 else reversed(order):
        start = time.process_time()
        forms.by_name[name]()
        seconds[name] = time.process_time() - start
    return {"seconds_of": seconds, "load": os.getloadavg()[0], "cores": os.cpu_count()}


def table(rows: Sequence[Row]) -> str:
    """Medians of the rounds, and the ratios that the paper has."""
    seconds = medians(rows)
    lines = []
    for name, paper in PAPER.items():
        of = SERIAL if name in (SERIAL, "vectorized") else EXACT
        lines.append([name, f"{seconds[name]:.3g} s", f"{seconds[name] / seconds[of]:.2f} of {of}", paper])
    sizes = "/".join(str(part // rows[0]["fraction"]) for part in PARTS)
    load = max(row["load"] for row in rows)
    return (
        f"WRN-{rows[0]['depth']}-2 on the CPU, {sizes} images (the paper: 64/256/320 on a GPU); medians of {len(rows)} "
        f"rounds. The first two rows form the gradient of every unlabeled example in the whole model; the others take "
        f"their influence without forming any.\n\n"
        + markdown(["", "seconds", "ratio", "the paper"], lines)
        + "\n\n"
        + markdown(
            ["the paper says", "here"],
            [
                [
                    "its per-example gradients are 19.3 times as fast as one by one (Section 4.4)",
                    f"vectorized: {seconds[SERIAL] / seconds['vectorized']:.2f} times; influence in the whole model "
                    f"without them: {seconds[SERIAL] / seconds[WHOLE]:.2f} times, other passes included",
                ],
                [
                    "the exact last layer costs 1.14 times the identity",
                    f"{seconds[EXACT] / seconds['last layer, H = I']:.2f} times that at the last layer, "
                    f"{seconds[EXACT] / seconds[WHOLE]:.2f} times that in the whole model",
                ],
                [
                    "the exact last layer is 4.6 times as fast as the Neumann series",
                    f"{seconds[NEUMANN] / seconds[EXACT]:.2f} times, with {TERMS} terms and the steps that find the "
                    "largest eigenvalue (the paper does not say how many)",
                ],
            ],
        )
        + f"\n\nThe machine's load was up to {load:.0f} on {rows[0]['cores']} cores; time is the process's own, but "
        "shared caches make it longer than on an idle machine. On a CPU one example at a time keeps a core about as "
        "busy as a batch does, so the first claim is one about GPUs."
    )


def medians(rows: Sequence[Row]) -> dict[str, float]:
    """Seconds of each form."""
    return {name: statistics.median(row["seconds_of"][name] for row in rows) for name in PAPER}


def draw(rows: Sequence[Row]) -> dict[str, Any]:
    """A bar for each form."""
    seconds = medians(rows)
    figure, axes = pyplot().subplots(figsize=(6.8, 3), layout="constrained")
    style(axes)
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color="0.9", linewidth=0.8)
    axes.barh(list(seconds), list(seconds.values()), color=["#7F7F7F"] * 2 + ["#009E73"] * 4)
    axes.invert_yaxis()
    axes.set_xlabel("seconds a batch (gray: per-example gradients; green: influence)")
    return {"figure": figure}


WEIGHTS_RUNTIME = Experiment(
    name="weights-runtime",
    paper="Not All Unlabeled Data Are Equal, Section 4.4: time of per-example gradients and of the influence",
    cells=cells,
    measure=measure,
    table=table,
    draw=draw,
)
