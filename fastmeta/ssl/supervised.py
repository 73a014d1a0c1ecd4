"""The labeled loss alone: what the unlabeled images have to beat."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn
from torch.nn import functional

from fastmeta.ssl.base import Algorithm, Refiner, StepLoss, TrainingBatch


@dataclass(frozen=True)
class Supervised(Algorithm):
    """Cross-entropy on the labeled images. It imputes no labels, so there is nothing for a method to refine."""

    imputes: ClassVar[bool] = False
    second_view: ClassVar[Literal["weak", "strong"] | None] = None

    def loss(
        self,
        model: nn.Module,
        batch: TrainingBatch,
        *,
        teacher: nn.Module,
        progress: float,
        refiner: Refiner | None = None,
        memory: nn.Module | None = None,
    ) -> StepLoss:
        """Mean cross-entropy of the labeled batch; see :class:`fastmeta.ssl.Algorithm`.

        Raises:
            ValueError: a refiner is given.
        """
        if refiner is not None:
            raise ValueError("the supervised base imputes no labels, so refiner must be None")
        labeled = batch.labeled_share * functional.cross_entropy(model(batch.labeled), batch.targets)
        return StepLoss(total=labeled, labeled=labeled.detach(), unlabeled=labeled.new_zeros(()))
