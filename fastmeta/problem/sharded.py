"""Parameters of which a process has a part alone."""

import sys

from torch import Tensor, nn


def is_spread(tensor: Tensor) -> bool:
    """Whether it is a tensor of which each process has a part (DTensor)."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a parameter, on the same memory; all of one that is not spread."""
    whole = tensor.detach()
    return whole.to_local() if is_spread(tensor) else whole  # type: ignore[attr-defined]  # of DTensor alone


def refuse_sharded(model: nn.Module) -> None:
    """Raise for a model of FullyShardedDataParallel, which puts its parameters together as it runs.

    Raises:
        ValueError: so it is.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if any(map(is_spread, model.parameters())) or (
        fsdp and any(isinstance(part, fsdp.FullyShardedDataParallel) for part in model.modules())
    ):
        raise ValueError(
            "model must have whole parameters, but those of this one are sharded over processes; use "
            "how='last_layer' with tape.outputs(logits) of capture_features(model.fc), or, after fully_shard, "
            "how='finite_difference' with process_group"
        )
