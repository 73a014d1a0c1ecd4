"""Seconds per training step of several runs, measured against each other."""

import statistics
from collections.abc import Sequence

import torch

from fastmeta.data import ImageDataset
from fastmeta.training.config import RunConfig
from fastmeta.training.files import read_checkpoint
from fastmeta.training.run import Run
from fastmeta.training.train import single_thread
from fastmeta.training.workers import Job

_WARM_UP = 5


def interleaved_seconds(jobs: Sequence[Job], dataset: ImageDataset, *, rounds: int = 40) -> list[float]:
    """Median wall seconds of a step of each job: one thread, one step of each in turn.

    While runs train side by side their steps disturb each other; taken in turn, a busy machine slows all of them alike.
    A run with a saved model is timed at its weights, because the iterations of a solver depend on them. Batches are
    drawn and augmented in the step; logging, evaluation and checkpoints are not.

    Args:
        jobs: the runs.
        dataset: the images.
        rounds: steps of each that count.
    """
    with torch.random.fork_rng(devices=[]), single_thread():
        runs = [_prepared(job.config, dataset, job) for job in jobs]
        for _ in range(_WARM_UP + rounds):
            for run in runs:
                run.train_step()
    return [statistics.median(run.seconds[_WARM_UP:]) for run in runs]


def _prepared(config: RunConfig, dataset: ImageDataset, job: Job) -> Run:
    run = Run(config, dataset)
    weights = read_checkpoint(job.folder / "model.pt")
    if weights is not None:
        run.model.load_state_dict(weights)
    return run
