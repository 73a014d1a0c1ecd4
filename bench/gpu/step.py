"""The phase ``step``: a FixMatch step as a user writes it, alone and with each method at the last layer.

``python -m bench.gpu.step --out FILE --seconds S``. Steps of all variants are taken in turn; networks and images are
the same for all of them, made on the device.
"""

import argparse
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import fastmeta
from bench.gpu import files
from bench.gpu.clock import Clock, DeviceLost, clock_for, ensure_healthy
from bench.gpu.operators import DEVICE_LOST
from bench.step.task import Batch
from bench.timing import Timed, interleave
from fastmeta.methods import Method
from fastmeta.models import WideResNet

UNLABELED = 100_000  # images in the set, for the methods with a table
THRESHOLD = 0.95
WARM_UP = 3
PRECISION = "bfloat16 autocast over float32 weights, channels_last"


@dataclass(frozen=True)
class Task:
    """A network, and the images of a step."""

    name: str
    make: Callable[[int], nn.Module]
    labeled: int
    unlabeled: int
    pixels: int
    num_classes: int

    def __str__(self) -> str:
        return f"{self.name}, {self.pixels} px, B {self.labeled} + {self.unlabeled}"


def resnet50(num_classes: int) -> nn.Module:
    from torchvision.models import resnet50 as make  # where it is installed

    return make(num_classes=num_classes)


TASKS = (
    Task("WRN-28-2", WideResNet, 64, 448, 32, 10),
    Task("ResNet-50", resnet50, 64, 320, 224, 1000),
)
# Each method, and whether it looks at the view that learns; the settings cost the same as any others.
METHODS: dict[str, tuple[Callable[[int, int], Method], bool]] = {
    "L2I V1": (lambda m, c: fastmeta.L2I("V1"), False),
    "L2I V2": (lambda m, c: fastmeta.L2I("V2"), False),
    "MetaGradient": (lambda m, c: fastmeta.MetaGradient(), False),
    "ExampleWeights": (lambda m, c: fastmeta.ExampleWeights(m, inverse_hessian="cg"), True),
    "LabelGradientAlignment": (lambda m, c: fastmeta.LabelGradientAlignment(m, c), True),
}
PLAIN = "FixMatch"


def make_batch(task: Task, device: str) -> Batch:
    generator = torch.Generator(device).manual_seed(0)

    def images(count: int) -> Tensor:
        shape = (count, 3, task.pixels, task.pixels)
        return torch.randn(shape, generator=generator, device=device).contiguous(memory_format=torch.channels_last)

    def integers(high: int, count: int) -> Tensor:
        return torch.randint(high, (count,), generator=generator, device=device)

    return Batch(
        images(task.labeled),
        integers(task.num_classes, task.labeled),
        images(task.unlabeled),
        images(task.unlabeled),
        integers(UNLABELED, task.unlabeled),
    )


class Training:
    """A training loop; each call is one step."""

    def __init__(self, task: Task, batch: Batch, meta: Any, on_strong: bool, device: str) -> None:
        torch.manual_seed(0)
        model = task.make(task.num_classes).to(device)
        self.model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.fc: nn.Linear = self.model.fc  # type: ignore[assignment]
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9, nesterov=True)
        self.batch, self.meta, self.on_strong, self.device = batch, meta, on_strong, device

    def __call__(self) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.plain_loss() if self.meta is None else self.refined_loss()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def forward(self) -> tuple[Tensor, ...]:
        batch = self.batch
        with torch.autocast(self.device, torch.bfloat16):
            logits = self.model(torch.cat([batch.labeled, batch.weak, batch.strong]))
        return logits.split([len(batch.labeled), len(batch.weak), len(batch.strong)])

    def plain_loss(self) -> Tensor:
        labeled, weak, strong = self.forward()
        confidence, labels = weak.detach().float().softmax(-1).max(-1)
        per_example = functional.cross_entropy(strong.float(), labels, reduction="none")
        unlabeled = ((confidence >= THRESHOLD) * per_example).mean()
        return functional.cross_entropy(labeled.float(), self.batch.targets) + unlabeled

    def refined_loss(self) -> Tensor:
        with fastmeta.capture_features(self.fc) as tape:
            labeled, weak, strong = self.forward()
        refined = self.refine(tape, labeled, strong if self.on_strong else weak)
        confidence, labels = refined.labels.max(-1)
        per_example = functional.cross_entropy(strong.float(), labels, reduction="none")
        unlabeled = ((confidence >= THRESHOLD) * refined.weights * per_example).mean()
        return functional.cross_entropy(labeled.float(), self.batch.targets) + unlabeled + refined.loss

    def refine(self, tape: fastmeta.FeatureTape, labeled: Tensor, unlabeled: Tensor) -> fastmeta.Refined:
        return self.meta.refine(
            unlabeled=tape.outputs(unlabeled),
            holdout=tape.outputs(labeled),
            targets=self.batch.targets,
            index=self.batch.index,
        )

    def refine_alone(self) -> Callable[[], object]:
        """The method's part of a step, on the outputs of one forward."""
        with fastmeta.capture_features(self.fc) as tape:
            labeled, weak, strong = self.forward()
        unlabeled = strong if self.on_strong else weak
        return lambda: self.refine(tape, labeled, unlabeled)


def trainings(task: Task, device: str, graphs: bool) -> Iterator[tuple[str, str, Callable[[], Training]]]:
    """Name, method's name, and the loop: the plain one, each method, each method in a CUDA graph."""
    batch = make_batch(task, device)

    def loop(name: str, graph: bool) -> Training:
        make, on_strong = METHODS[name]
        method: Any = make(UNLABELED, task.num_classes)
        return Training(task, batch, fastmeta.graph(method) if graph else method, on_strong, device)

    yield PLAIN, "", lambda: Training(task, batch, None, False, device)
    for name in METHODS:
        yield name, name, lambda name=name: loop(name, False)  # type: ignore[misc]
    if graphs:
        for name in METHODS:
            yield f"{name}, graph", name, lambda name=name: loop(name, True)  # type: ignore[misc]


def measure_task(task: Task, clock: Clock, rounds: int, budget_s: float) -> dict[str, Any]:
    """Step times of all variants, and their ratio to the plain step."""
    entries: list[dict[str, Any]] = []
    running: list[tuple[dict[str, Any], Training]] = []
    for name, method, make in trainings(task, clock.device, graphs=clock.device == "cuda"):
        entry: dict[str, Any] = {"name": name, "method": method, "graph": name.endswith(", graph")}
        entries.append(entry)
        try:
            training = make()
            for _ in range(WARM_UP):
                loss = training()
            if not bool(torch.isfinite(loss)):
                raise FloatingPointError(f"the loss is {float(loss)}")
        except Exception as error:  # memory, a missing library, a method that cannot be captured
            traceback.print_exc()
            entry["reason"] = f"{type(error).__name__}: {error}".splitlines()[0]
            ensure_healthy(clock.device)
            if name == PLAIN:
                return {"task": str(task), "failed": entry["reason"], "variants": []}
            continue
        running.append((entry, training))
    timings = interleave(
        [Timed(training, grad=True) for _, training in running],
        rounds=rounds,
        min_sample_s=0.05,
        budget_s=budget_s / len(running),
        sampler=clock.sampler,
    )
    for (entry, training), timing in zip(running, timings, strict=True):
        first, third = timing.quartiles_us
        entry |= {"step_ms": timing.median_us / 1e3, "quartiles_ms": [first / 1e3, third / 1e3]}
        entry["samples"] = len(timing.samples_us)
        entry["ratio"] = timing.median_us / timings[0].median_us
        if training.meta is not None:
            _refine_alone(entry, training, clock)
    return {"task": str(task), "precision": PRECISION, "variants": entries}


def _refine_alone(entry: dict[str, Any], training: Training, clock: Clock) -> None:
    call = training.refine_alone()
    timing = interleave([Timed(call, grad=True)], rounds=5, budget_s=0.2, sampler=clock.sampler)[0]
    entry["refine_us"] = timing.median_us
    entry["refine_host_syncs"] = clock.host_syncs(call)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(arguments)
    torch.backends.cudnn.benchmark = True
    begin = time.monotonic()
    results: list[dict[str, Any]] = []
    clock = clock_for("cuda")
    for task in TASKS:
        left = options.seconds - (time.monotonic() - begin)
        try:
            measured = measure_task(task, clock, 5 if options.quick else 15, 0.35 * left)
        except DeviceLost as error:
            print(f"The device is lost: {error}", file=sys.stderr)
            return DEVICE_LOST
        except Exception as error:
            traceback.print_exc()
            measured = {"task": str(task), "failed": f"{type(error).__name__}: {error}".splitlines()[0], "variants": []}
        results.append(measured)
        files.write(options.out, results)
        torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
