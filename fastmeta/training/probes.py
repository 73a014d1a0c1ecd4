"""How well the averaged net recognizes labeled images that CTAugment tries, and what its rates become of it."""

import torch
from torch import Tensor, nn

from fastmeta.data import KeyedRandom
from fastmeta.data.augment import CTAugment
from fastmeta.ssl import TrainingBatch
from fastmeta.training.processes import Processes

STREAM, VIEW = "labeled", "probe"  # what keys the probes' operations


class Probes:
    """The probes of a step, of all its parts and processes.

    Args:
        policy: whose rates move.
        batch_size: labeled images in a step, of all processes.
        seed: of the augmentation.
        processes: those of the run, whose rates stay the same.
        device: where the net is.
    """

    def __init__(
        self, policy: CTAugment, batch_size: int, seed: int, processes: Processes, device: torch.device
    ) -> None:
        self.policy, self.batch_size, self.seed, self.processes = policy.to(device), batch_size, seed, processes
        self._recognized = torch.zeros(batch_size, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, step: int, model: nn.Module, batch: TrainingBatch) -> None:
        """The probabilities that ``model``, in evaluation mode, gives the classes of the batch's probes."""
        assert batch.probe is not None
        assert batch.labeled_keys is not None
        training = model.training
        model.eval()
        probabilities = model(batch.probe).double().softmax(dim=1)
        model.train(training)
        found = probabilities.gather(1, batch.targets.unsqueeze(1)).squeeze(1)
        self._recognized[batch.labeled_keys - step * self.batch_size] = found

    def update(self, step: int, where: Tensor) -> None:
        """Move the rates by the step's probes, in the order of the stream; where ``where`` is false, leave them."""
        recognized = self.processes.sum_(self._recognized)
        keys = step * self.batch_size + torch.arange(self.batch_size, device=recognized.device)
        self.policy.update_(KeyedRandom(self.seed, STREAM, VIEW, keys), recognized, where)
        recognized.zero_()
