"""Seconds per training step of several runs, measured against each other."""

import statistics
import time
from collections.abc import Sequence

import torch

from fastmeta.data import Images
from fastmeta.training.build import build
from fastmeta.training.files import read_checkpoint
from fastmeta.training.train import threads
from fastmeta.training.trainer import Trainer
from fastmeta.training.workers import Job

_WARM_UP = 5


def interleaved_seconds(jobs: Sequence[Job], images: Images, *, rounds: int) -> list[float]:
    """Median wall seconds of a step of each job: one step of each in turn.

    While runs train side by side their steps disturb each other; taken in turn, a busy machine slows all of them alike.
    A run with a saved model is timed at its weights, because the iterations of a solver depend on them. Batches are
    drawn and augmented in the step; logging, evaluation and checkpoints are not.

    Args:
        jobs: the runs.
        images: the images.
        rounds: steps of each that count.
    """
    with torch.random.fork_rng(devices=[]), threads() as set_threads:
        trainers = [_prepared(job, images) for job in jobs]
        set_threads(trainers[0].machine.threads or 1)
        seconds: list[list[float]] = [[] for _ in trainers]
        for _ in range(_WARM_UP + rounds):
            for trainer, times in zip(trainers, seconds, strict=True):
                begin = time.perf_counter()
                trainer.train_step()
                if trainer.device.type == "cuda":
                    torch.cuda.synchronize()
                times.append(time.perf_counter() - begin)
    return [statistics.median(times[_WARM_UP:]) for times in seconds]


def _prepared(job: Job, images: Images) -> Trainer:
    trainer = build(job.config, images).trainer
    weights = read_checkpoint(job.folder / "model.pt")
    if weights is not None:
        trainer.model.load_state_dict(weights)
    return trainer
