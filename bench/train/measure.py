"""Times the steps of several methods in turn, in one process or in all of a group."""

import statistics
import time

import torch

from bench.clock import MAX_WAITING, Timing, waiting_ns
from bench.rows import Row
from bench.train.stopwatch import Stopwatch
from bench.train.task import Task
from fastmeta.training.config import MachineConfig
from fastmeta.training.processes import Processes
from fastmeta.training.trainer import Trainer

WARM_UP, WATCHED = 2, 3  # steps


def measure(task: Task, machine: MachineConfig, rounds: int, processes: Processes | None = None) -> list[Row]:
    """A row for each method: its step, what the step is made of, and both over the plain step's."""
    processes = processes or Processes()
    images = task.images()
    trainers = {method: task.trainer(method, machine, images, processes) for method in task.methods}
    for trainer in trainers.values():
        for _ in range(WARM_UP):
            trainer.train_step()
    timings = {method: Timing(1) for method in trainers}
    for number in range(rounds):
        order = list(trainers) if number % 2 == 0 else list(reversed(trainers))
        for method in order:
            seconds, contended = _step(trainers[method])
            timings[method].samples_us.append(1e6 * seconds)
            timings[method].contended += contended
    rows = []
    plain = timings[task.methods[0]]
    for method, trainer in trainers.items():
        timing = timings[method]
        watch = Stopwatch(trainer)
        with watch.running():
            for _ in range(WATCHED):
                trainer.train_step()
        trainer.batches.close()
        total = sum(watch.seconds.values())
        ratios = [mine / its for mine, its in zip(timing.samples_us, plain.samples_us, strict=True)]
        seconds = 1e-6 * timing.median_us
        rows.append(
            {
                "task": task.name,
                "method": method,
                "processes": processes.count,
                "median_us": timing.median_us,
                "quartiles_us": timing.quartiles_us,
                "ratio": statistics.median(ratios),
                "images_per_second": task.batch / seconds,
                "hours": (task.config.steps or 0) * seconds / 3600,
                "parts": {part: spent / total for part, spent in watch.seconds.items()},
            }
            | timing.counts()
        )
    return rows


def _step(trainer: Trainer) -> tuple[float, bool]:
    """Seconds of a step, and whether other processes had the cores meanwhile."""
    waited, begin = waiting_ns(), time.perf_counter()
    trainer.train_step()
    if trainer.device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    return seconds, waiting_ns() - waited > MAX_WAITING * seconds * 1e9
