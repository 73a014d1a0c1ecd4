"""What the settings of a machine ask of the model, the base and the method."""

import torch
from torch import Tensor, nn

from fastmeta import graph
from fastmeta.ops.process_group import ProcessGroup
from fastmeta.problem.sharded_function import DIFFERENCES
from fastmeta.ssl import Algorithm, MixUpConsistency, Refiner, ReMixMatch
from fastmeta.training.config import MachineConfig
from fastmeta.training.processes import Processes


def refuse_compile(base: Algorithm, method: Refiner | None) -> None:
    """Nothing where the model's forward may be compiled.

    Raises:
        ValueError: passes in both modes are on one graph, or features are read in the midst of one.
    """
    if isinstance(base, ReMixMatch) and base.rotation_weight:
        raise ValueError(
            "machine.compile must be False for remixmatch, unless its rotation_weight is 0: a compiled pass does not "
            "give its features, got True"
        )
    if isinstance(base, MixUpConsistency) and method is not None and method.method.update.needs_graph:
        raise ValueError(
            "machine.compile must be False for mix-up-consistency with a method whose loss has a gradient: its pass in "
            "evaluation mode needs the running statistics that a compiled pass in training mode writes, got True"
        )


def refuse_accumulation(method: Refiner | None, machine: MachineConfig) -> None:
    """Nothing where a step may be computed in parts.

    Raises:
        ValueError: the method's own update, or its fresh batches, belong to a whole step.
    """
    if machine.accumulation > 1 and method is not None and (method.own_update or method.fresh):
        part = "an update" if method.own_update else "batches"
        raise ValueError(
            f"machine.accumulation must be 1 for a method with {part} of its own, got {machine.accumulation}"
        )


def refuse_sharding(method: Refiner | None, machine: MachineConfig, processes: Processes) -> None:
    """Nothing where the model's parameters may be spread over the processes.

    Raises:
        ValueError: there is one process, or something needs whole parameters.
    """
    if processes.group is None:
        reason = "on one process"
    elif method is not None and method.own_update:
        reason = "with a method that has an update of its own"
    elif method is not None and method.passes == "own" and method.method.derivative.how not in DIFFERENCES:
        reason = f"with a method that makes passes of its own (how={method.method.derivative.how!r})"
    elif machine.compile or machine.channels_last:
        reason = f"with machine.{'compile' if machine.compile else 'channels_last'}"
    else:
        return
    raise ValueError(f"machine.sharding must be none {reason}, got 'fsdp2'")


def refuse_synchronized(method: Refiner | None) -> None:
    """Nothing where batch normalization may take the statistics of all processes.

    Raises:
        ValueError: the method needs a derivative that SyncBatchNorm has not.
    """
    how = "last_layer" if method is None else method.method.derivative.how
    if how not in ("last_layer", "last_layer_difference", "finite_difference", "forward_difference"):
        raise ValueError(
            f"machine.batch_norm must be per-process for a method with how={how!r}, which SyncBatchNorm has no "
            "derivative for, got 'synchronized'"
        )


def capture_steps(method: Refiner | None, processes: Processes) -> None:
    """Have the method's steps captured in CUDA graphs.

    Raises:
        ValueError: they cannot be, or would be captured anew each time.
    """
    if method is None or method.passes == "own":
        reason = "without a method that works on the last layer's features"
    elif method.scheduled is not None:
        reason = f"with a method whose {method.scheduled} changes at every step"
    elif processes.group is not None:
        reason = f"on {processes.count} processes"
    else:
        graph(method.method, copy=False)  # a step's results are used within it
        return
    raise ValueError(f"machine.graph must be False {reason}, got True")


def distributed(model: nn.Module, images: Tensor, group: ProcessGroup) -> nn.parallel.DistributedDataParallel:
    """The model, whose gradients are averaged over the processes; ``images`` are any that it takes."""
    model.eval()
    model(images).sum().backward()
    unused = any(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    model.zero_grad()
    network = nn.parallel.DistributedDataParallel(
        model, process_group=group, gradient_as_bucket_view=True, find_unused_parameters=unused
    )
    network.broadcast_buffers = False  # the trainer does, once a step: a base forwards several times
    # After its first backward pass DDP puts its buckets in another order, in which sums round differently. One
    # without effect comes before all steps, so that those of a resumed run round as those of one that was not.
    network(images).sum().backward()
    network.zero_grad()
    return network.train()


@torch.no_grad()
def put_back_(buffers: list[Tensor], before: list[Tensor], *, where: Tensor) -> None:
    """``buffers`` become what they were, where that is true; the host waits for nothing."""
    if buffers:
        flat = [torch.cat([tensor.flatten() for tensor in tensors]) for tensors in (before, buffers)]
        parts = torch.where(where, flat[0], flat[1]).split([buffer.numel() for buffer in buffers])
        torch._foreach_copy_(buffers, [part.view_as(buffer) for part, buffer in zip(parts, buffers, strict=True)])
