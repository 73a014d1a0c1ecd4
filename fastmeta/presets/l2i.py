"""Learning to Impute: settings of its inner and outer step, and of the loop around it."""

from dataclasses import dataclass, replace
from typing import Literal

from fastmeta import checks
from fastmeta.derivatives import How
from fastmeta.presets import choose
from fastmeta.problem import Reduction

Task = Literal["classification", "landmarks"]
SecondReduction = Literal["sum", "mean", "mean_entries"]


@dataclass(frozen=True)
class L2IPreset:
    """Arguments of :class:`fastmeta.L2I`."""

    variant: Literal["V1", "V2"]
    rate: float
    labeled_weight: float
    label_space: Literal["probabilities", "logits"]
    project: bool
    imputer: Literal["base", "student"]
    outer_reduction: Reduction
    second_reduction: SecondReduction
    second_weight: float = 1.0
    label_step: float = 1.0
    weight: float = 1.0
    how: How = "jvp"
    inner_loss: str = "mse_probs"
    outer_loss: str = "cross_entropy"
    reduction: Reduction = "sum"
    look_ahead: bool = True
    unit_length: bool = False


@dataclass(frozen=True)
class TrainingPreset:
    """Settings of the loop around the method.

    Args:
        lr: learning rate of the model's optimizer, at the start.
        inner_rate: eta of the inner step for an ``lr`` of 1, in the published units (L2I's ``rate`` are those of
            :meth:`rate_at`).
        unlabeled_weight: lambda of the base's update, after its ramp.
        ramp: fraction of training over which lambda rises from 0, linearly.
        teacher_decay: of the averaged model.
        outputs: over which the published means run too, 1 where they do not; it divides the inner rate.
    """

    lr: float
    inner_rate: float
    unlabeled_weight: float
    ramp: float = 0.4
    teacher_decay: float = 0.999
    outputs: int = 1

    def rate_at(self, lr: float | None = None) -> float:
        """L2I's ``rate`` at a learning rate; None: the first one.

        >>> training("official_code", "V2", "landmarks").rate_at(0.003)  # after the learning rate's drop
        0.003
        """
        return self.inner_rate * (self.lr if lr is None else lr) / self.outputs

    def unlabeled_weight_at(self, progress: float) -> float:
        """Lambda when a fraction ``progress`` of the training steps is done.

        >>> training("official_code").unlabeled_weight_at(0.2)
        25.0
        """
        return self.unlabeled_weight * min(1.0, checks.number(progress, "progress", low=0.0, high=1.0) / self.ramp)


_PAPER = L2IPreset(
    variant="V2",
    rate=0.1,
    labeled_weight=1.0,
    label_space="probabilities",
    project=False,
    imputer="base",
    outer_reduction="sum",
    second_reduction="sum",
)
# train-L2I-O.py and train-L2I-L.py.
_CODE = L2IPreset(
    variant="V2",
    rate=0.1,
    labeled_weight=0.0,
    label_space="logits",
    project=True,
    imputer="student",
    outer_reduction="mean",
    second_reduction="mean_entries",
)


def preset(name: str, variant: str, task: str = "classification", outputs: int | None = None) -> L2IPreset:
    """Settings of the ``paper`` or of the ``official_code`` for ``V1`` (there "L") or ``V2`` ("O").

    Algorithm 1 has an inner step on C^T + C^U and sums everywhere (Eq. (1), (2)), imputes with the base's imputer, and
    V1 steps on z itself with no projection. The published code has C^U alone, a mean hold-out loss, imputes with the
    student again whatever imputes in the base's update, and V1 steps on the logits of the labels. Neither paper prints
    the inner rate or the label step ("tuned"): they are the code's. ``landmarks`` are the settings of the regression
    of AFLW; there the code's means run over examples and coordinates, and the paper's sums, with no rate printed, are
    taken as such means too.

    Args:
        name: ``paper`` or ``official_code``.
        variant: ``V1`` or ``V2``.
        task: ``classification`` or ``landmarks``.
        outputs: of the model, for the landmarks: 10 coordinates of 5 points if None.

    >>> preset("paper", "V2").labeled_weight, preset("official_code", "V2").labeled_weight
    (1.0, 0.0)
    >>> preset("official_code", "V2", "landmarks").inner_loss, preset("official_code", "V1", "landmarks").inner_loss
    ('mse_tanh', 'mse')
    """
    chosen = choose({"paper": _PAPER, "official_code": _CODE}, name, "L2I")
    loop = training(name, variant, task, outputs)
    chosen = replace(chosen, variant="V1" if variant == "V1" else "V2", rate=loop.rate_at())
    if task == "classification":
        return chosen
    return replace(
        chosen,
        inner_loss="mse_tanh" if name == "official_code" and variant == "V2" else "mse",
        outer_loss="mse",
        reduction="mean",
        outer_reduction="mean",
        second_reduction="mean_entries",
        label_space="probabilities",
        project=False,
        # The hold-out loss is a mean over the coordinates too.
        label_step=1.0 / loop.outputs,
        weight=1.0 / loop.outputs,
    )


def training(
    name: str, variant: str = "V2", task: str = "classification", outputs: int | None = None
) -> TrainingPreset:
    """The loop around the method; see :func:`preset`.

    The inner rate is 50 times the outer one in V2 and 100 times in V1; for the landmarks 10 times and once.

    >>> [training(name, "V2", "landmarks").unlabeled_weight for name in ("paper", "official_code")]
    [3.0, 75.0]
    """
    published = choose({"paper": True, "official_code": False}, name, "L2I")
    if variant not in ("V1", "V2"):
        raise ValueError(f"variant must be one of V1, V2, got {variant!r}")
    if task == "classification":
        if outputs is not None:
            raise ValueError(f"outputs must be None for classification, got {outputs}")
        return TrainingPreset(lr=0.002, inner_rate=50.0 if variant == "V2" else 100.0, unlabeled_weight=50.0)
    if task != "landmarks":
        raise ValueError(f"task must be one of classification, landmarks, got {task!r}")
    return TrainingPreset(
        lr=0.03,
        inner_rate=10.0 if variant == "V2" else 1.0,
        # 1 in the workshop version, 3 in the journal's; the code's default, which its commands leave as it is.
        unlabeled_weight=3.0 if published else 75.0,
        outputs=_outputs(outputs),
    )


def _outputs(outputs: int | None) -> int:
    if outputs is not None and (isinstance(outputs, bool) or not isinstance(outputs, int) or outputs < 1):
        raise ValueError(f"outputs must be an int >= 1, got {outputs!r}")
    return 10 if outputs is None else outputs
