"""Means of what the steps between two evaluations saw, gathered on the device."""

import torch
from torch import Tensor

from fastmeta.ssl import StepLoss
from fastmeta.training.processes import Processes

# The two errors compare labels with the truth that training never reads: they are shown, nothing is chosen by them.
AVERAGES = ("loss", "loss_labeled", "loss_unlabeled", "confident", "imputed_error", "used_error")


class StepAverages:
    """Means of :data:`AVERAGES` over steps with a finite loss and processes; the host waits when they are read.

    Args:
        processes: those of the run.
        device: where the steps are.
    """

    def __init__(self, processes: Processes, device: torch.device) -> None:
        self.processes = processes
        # Two more: images whose label is known, of which the last two are shares, and steps.
        self._sums = torch.zeros(len(AVERAGES) + 2, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, loss: StepLoss, truth: Tensor, share: float) -> None:
        """A step's loss.

        Args:
            loss: what the base returned.
            truth: classes of the unlabeled images ``[N]``, -1 where nobody knows.
            share: the factor of a mean over the unlabeled images, :attr:`fastmeta.ssl.TrainingBatch.unlabeled_share`.
        """
        zero = loss.total.new_zeros(())
        means = [loss.total.detach(), loss.labeled, loss.unlabeled, zero]
        counts = [zero, zero, zero]
        if loss.imputed is not None and loss.used is not None:
            known = truth >= 0
            means[3] = share * loss.used.mask.mean()
            wrong = [(labels.argmax(dim=1) != truth) & known for labels in (loss.imputed, loss.used.soft)]
            counts = [wrong[0].sum(), wrong[1].sum(), known.sum()]
        finite = loss.total.detach().isfinite()
        # Each process's share of means and steps, as all may be other processes after a resume; of counts the sum.
        shares = [value.double() / self.processes.count for value in (*means, finite)]
        values = torch.stack([*shares[:-1], *(count.double() for count in counts), shares[-1]])
        self._sums += torch.where(finite, values, 0.0)

    def read(self) -> dict[str, float]:
        """The means since the last call; those of nothing, no step or no label whose truth is known, are left out."""
        *sums, known, steps = self.processes.sum_(self._sums.clone()).tolist()
        self._sums.zero_()
        means: dict[str, float] = {}
        for name, total in zip(AVERAGES, sums, strict=True):
            count = known if name.endswith("_error") else steps
            if count:
                means[name] = total / count
        return means

    def state_dict(self) -> dict[str, Tensor]:
        """For a checkpoint; every process calls it."""
        sums = self._sums.new_zeros(self.processes.count, len(self._sums))
        sums[self.processes.rank] = self._sums
        return {"sums": self.processes.sum_(sums)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from :meth:`state_dict`, on any number of processes."""
        sums = state["sums"].to(self._sums.device)
        if len(sums) == self.processes.count:
            self._sums = sums[self.processes.rank].clone()
        else:
            self._sums = sums.sum(dim=0) * self.processes.is_first
