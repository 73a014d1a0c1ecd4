"""What the passes over the unlabeled inputs have found."""

from torch import Tensor


class UnlabeledPass:
    """Results of the first pass over the unlabeled inputs at theta, kept so that no second pass is made for them.

    All problems at one theta share one object.
    """

    def __init__(self) -> None:
        self.logits: Tensor | None = None  # [N, C], detached, in full precision
        self.on_graph: Tensor | None = None  # [N, C], on the graph of the model's own parameters
        self.labels: Tensor | None = None  # imputed labels [N, C]
