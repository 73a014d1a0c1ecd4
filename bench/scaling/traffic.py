"""What processes exchange in a training step, as a list of collectives; a test counts them on gloo."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

FLOAT, DOUBLE, INDEX = 4, 8, 8  # bytes
BUCKETS = 2**20, 25 * 2**20  # of DistributedDataParallel's gradients, in bytes: the first, and every other


@dataclass(frozen=True)
class Collective:
    """One call of all processes."""

    kind: Literal["all_reduce", "all_gather", "broadcast"]
    size: int  # bytes that a process puts in

    def sent(self, processes: int) -> float:
        """Bytes that a process sends in a ring: to all-reduce is to scatter sums and to gather them."""
        if self.kind == "broadcast":
            return self.size
        if self.kind == "all_gather":
            return (processes - 1) * self.size
        return 2 * (processes - 1) / processes * self.size


@dataclass(frozen=True)
class Setting:
    """What the sizes depend on."""

    classes: int  # C
    features: int  # D
    parameters: int  # of the model
    unlabeled: int  # B, unlabeled images of a process
    processes: int  # P
    norms: int = 0  # BatchNorm layers
    channels: int = 0  # of all of them
    iterations: int = 50  # of conjugate gradients

    @property
    def last_layer(self) -> int:
        """Bytes of a direction of the last layer, weight and bias."""
        return FLOAT * self.classes * (self.features + 1)

    @property
    def model(self) -> int:
        """Bytes of a direction of the whole model."""
        return FLOAT * self.parameters


Calls = list[Collective]
Exchange = Callable[[Setting, int], Calls]  # of a setting and the bytes of a direction


def summed(size: int) -> Calls:
    return [Collective("all_reduce", size)]


def gathered(size: int) -> Calls:
    return [Collective("all_gather", size)]


# A mean is over the examples of all processes, so they add up how many there are.
COUNT = summed(8)


def base_step(setting: Setting) -> Calls:
    """The gradients of DistributedDataParallel in their buckets."""
    first, other = BUCKETS
    sizes, left = [min(first, setting.model)], setting.model - min(first, setting.model)
    while left > 0:
        sizes.append(min(other, left))
        left -= sizes[-1]
    return [call for size in sizes for call in summed(size)]


def trainer_step(setting: Setting) -> Calls:
    """The trainer's own: the first process's running statistics, in float64, and whether all losses were finite."""
    return [Collective("broadcast", 2 * DOUBLE * setting.channels), *summed(FLOAT)]


def synchronized_norms(setting: Setting) -> Calls:
    """SyncBatchNorm: mean, deviation and count of every layer forwards, two sums of its gradient backwards."""
    width = setting.channels // setting.norms
    return setting.norms * (gathered(FLOAT * (2 * width + 1)) + summed(FLOAT * 2 * width))


def gradient(direction: int) -> Calls:
    """The gradient of a mean."""
    return COUNT + summed(direction)


def read(setting: Setting, columns: int) -> Calls:
    """Rows of a sharded table; those of a complete one are there."""
    rows = setting.unlabeled
    return gathered(8) + gathered(INDEX * rows) + summed(FLOAT * setting.processes * rows * columns)


def table_step(setting: Setting, columns: int) -> Calls:
    """A step of Masked Adam: every process gets the places and gradients of all."""
    rows = setting.unlabeled
    return gathered(8) + gathered(INDEX * rows) + gathered(FLOAT * rows * columns)


def solve(setting: Setting, direction: int) -> Calls:
    """Conjugate gradients for the inverse Hessian, in one pass."""
    if direction == setting.model:
        # All stop together: each product has a number beside it.
        return summed(FLOAT) + 2 * COUNT + setting.iterations * (summed(direction) + summed(FLOAT))
    agreed = 15 * 8 * setting.processes  # a line of 15 numbers of each
    products = (setting.iterations + 1) * summed(direction + FLOAT)
    return 2 * COUNT + summed(agreed) + summed(16) + products + summed(direction) + summed(24)


METHODS: dict[str, Exchange] = {
    "MetaGradient": lambda s, v: gradient(v),
    "L2I": lambda s, v: gradient(v) + COUNT,
    "L2I, look-ahead": lambda s, v: 2 * gradient(v) + COUNT,
    "L2I, look-ahead of 3 steps": lambda s, v: 6 * gradient(v) + 3 * COUNT,
    "AlignedImputation": lambda s, v: 2 * gradient(v) + COUNT,
    "ImplicitImputation": lambda s, v: gradient(v) + solve(s, v) + COUNT,
    "ImputeAndWeight": lambda s, v: gradient(v) + COUNT + table_step(s, 1),
    "ImputeAndWeight, sharded": lambda s, v: 2 * read(s, 1) + gradient(v) + COUNT + table_step(s, 1),
    "ExampleWeights, identity": lambda s, v: gradient(v) + table_step(s, 1),
    "ExampleWeights": lambda s, v: gradient(v) + solve(s, v) + table_step(s, 1),
    "ExampleWeights, sharded": lambda s, v: 2 * read(s, 1) + gradient(v) + solve(s, v) + table_step(s, 1),
    "LabelGradientAlignment": lambda s, v: 2 * gradient(v) + COUNT + table_step(s, s.classes),
    "LabelGradientAlignment, sharded": lambda s, v: (
        read(s, s.classes) + 2 * gradient(v) + COUNT + table_step(s, s.classes)
    ),
}
"""What each method adds to :func:`base_step`, in the step where it learns."""
