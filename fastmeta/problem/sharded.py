"""Parameters of which a process has a part alone."""

import sys

from torch import nn


def refuse_sharded(model: nn.Module) -> None:
    """Raise for a model of FullyShardedDataParallel, which puts its parameters together as it runs.

    Raises:
        ValueError: so it is.
    """
    tensor, fsdp = (sys.modules.get(f"torch.distributed.{name}") for name in ("tensor", "fsdp"))
    sharded = tensor is not None and any(isinstance(parameter, tensor.DTensor) for parameter in model.parameters())
    if sharded or (fsdp and any(isinstance(part, fsdp.FullyShardedDataParallel) for part in model.modules())):
        raise ValueError(
            "model must have whole parameters, but those of this one are sharded over processes; use "
            "how='last_layer' with tape.outputs(logits) of capture_features(model.fc)"
        )
