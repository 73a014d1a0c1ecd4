"""The tables of docs/scaling.md."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

from bench.scaling.cost import HDR, NDR, SOURCES, Cluster
from bench.scaling.memory import averages, gathered_rows, table
from bench.scaling.traffic import METHODS, Calls, Setting, base_step, synchronized_norms, trainer_step
from bench.text import memory
from bench.text import table as markdown

PROCESSES = 8, 64, 256, 512
EVERY = 100  # steps from one update of ExampleWeights to the next, as published
SHARE = 0.1  # of a step that communication may take


@dataclass(frozen=True)
class Task:
    """A network, the images of a process, and the plain step that one H100 was measured with."""

    name: str
    setting: Setting
    seconds: float

    def at(self, processes: int) -> Setting:
        return replace(self.setting, processes=processes)


IMAGENET = Task("ResNet-50", Setting(1000, 2048, 25_557_032, 320, 1, norms=53, channels=26_560), 169.35e-3)
CIFAR = Task("WRN-28-2", Setting(10, 128, 1_467_610, 448, 1, norms=25, channels=1_808), 17.03e-3)
TASKS = IMAGENET, CIFAR


def exposed(task: Task, cluster: Cluster, processes: int) -> float:
    """Seconds of the gradients' all-reduce that no backward hides: the last bucket's, or more where it is late."""
    calls = base_step(task.at(processes))
    backward = 2 / 3 * task.seconds
    return max(cluster.seconds(calls[-1], processes), cluster.total(calls, processes) - backward)


def of_method(name: str, task: Task, processes: int, *, whole: bool = False) -> Calls:
    setting = task.at(processes)
    return METHODS[name](setting, setting.model if whole else setting.last_layer)


def traffic() -> list[str]:
    """Bytes and calls of each method."""
    setting = IMAGENET.at(64)
    rows = [
        ["FixMatch: DistributedDataParallel", *_traffic(base_step(setting)), "", ""],
        ["+ the trainer", *_traffic(trainer_step(setting)), "", ""],
        ["+ SyncBatchNorm", *_traffic(synchronized_norms(setting)), "", ""],
    ]
    for name in METHODS:
        layer, whole = (of_method(name, IMAGENET, 64, whole=whole) for whole in (False, True))
        rows.append([f"+ {name}", *_traffic(layer), *_traffic(whole)])
    return markdown(["a step", "calls", "sent", "whole model: calls", "sent"], rows)


def _traffic(calls: Calls) -> list[str]:
    return [str(len(calls)), memory(sum(call.sent(64) for call in calls))]


def added(task: Task) -> list[str]:
    """Milliseconds that the communication of each method adds to a step, and its share of the step."""
    places = [(NDR, p) for p in PROCESSES] + [(HDR, 64), (HDR, 512)]

    def row(name: str, calls: Callable[[int], Calls], every: int = 1) -> list[str]:
        seconds = [cluster.total(calls(p), p) / every for cluster, p in places]
        return [name, *(_part(each, task.seconds) for each in seconds)]

    hidden = [_part(exposed(task, cluster, p), task.seconds) for cluster, p in places]
    rows = [
        ["FixMatch, what backward does not hide", *hidden],
        row("+ the trainer", lambda p: trainer_step(task.at(p))),
        row("+ SyncBatchNorm", lambda p: synchronized_norms(task.at(p))),
        *(row(f"+ {name}", partial(of_method, name, task)) for name in METHODS),
        row(f"+ ExampleWeights, every {EVERY} steps", partial(of_method, "ExampleWeights", task), EVERY),
        row("+ L2I, whole model", partial(of_method, "L2I", task, whole=True)),
    ]
    return markdown([f"{task.name}, ms", *(f"{cluster.name}, {p}" for cluster, p in places)], rows)


def _part(seconds: float, step: float) -> str:
    return f"{1e3 * seconds:.2f} ({100 * seconds / step:.1f}%)"


def limits() -> list[str]:
    """Unlabeled images of a process below which communication takes more than its share of a step."""
    rows = []
    for task in TASKS:
        for name in ("FixMatch", "L2I", "ExampleWeights, identity", "LabelGradientAlignment"):
            cells = [str(least_images(task, NDR, name, p)) for p in PROCESSES]
            rows.append([task.name, "FixMatch" if name == "FixMatch" else f"+ {name}", *cells])
    return markdown(["network", "step", *map(str, PROCESSES)], rows)


def least_images(task: Task, cluster: Cluster, name: str, processes: int) -> int:
    """The smallest number of unlabeled images at which communication is at most that share of a step."""
    for images in range(1, 100_000):
        setting = replace(task.setting, unlabeled=images)
        scaled = replace(task, setting=setting, seconds=task.seconds * images / task.setting.unlabeled)
        spent = exposed(scaled, cluster, processes)
        if name != "FixMatch":
            spent += cluster.total(of_method(name, scaled, processes), processes)
        if spent <= SHARE * (spent + scaled.seconds):
            return images
    raise ValueError(f"{name} never gets there on {processes} processes of {cluster.name}")


def kept() -> list[str]:
    """Memory of tables and of what is gathered, for one process."""
    rows = []
    for name, columns in (("weights", 1), ("labels, C = 1000", 1000)):
        for examples in (1_281_167, 10**8, 10**9):
            cells = [memory(table(examples, columns, processes)) for processes in (1, *PROCESSES)]
            rows.append([f"{name}: {examples:,} rows", *cells])
        cells = [memory(gathered_rows(IMAGENET.at(processes), columns)) for processes in PROCESSES]
        rows.append([f"{name}: gathered in a step", "", *cells])
    return markdown(["table", "complete", *(f"sharded, {p}" for p in PROCESSES)], rows)


def directions() -> list[str]:
    """Memory of a direction and of the averages of a normalized gap."""
    rows = []
    for task in TASKS:
        for name, size in (("last layer", task.setting.last_layer), ("whole model", task.setting.model)):
            rows.append([f"{task.name}, {name}", memory(size), memory(averages(size))])
    return markdown(["direction", "itself", "both averages"], rows)


def blocks() -> Iterator[tuple[str, str]]:
    """The generated parts of the page, by the name that marks them."""
    yield "traffic", "\n".join(traffic())
    yield "imagenet", "\n".join(added(IMAGENET))
    yield "cifar", "\n".join(added(CIFAR))
    yield "limits", "\n".join(limits())
    yield "memory", "\n".join(kept())
    yield "directions", "\n".join(directions())
    yield "sources", "\n".join(f"- {line}" for line in SOURCES)


def filled(page: str) -> str:
    """The page with its generated parts made anew."""
    for name, text in blocks():
        found = re.search(f"(<!-- {name}: .*? -->\n).*?(<!-- end -->)", page, re.DOTALL)
        if found is None:
            raise ValueError(f"the page has no part named {name}")
        page = f"{page[: found.start()]}{found[1]}{text.strip()}\n{found[2]}{page[found.end() :]}"
    return page
