"""What the settings of a machine ask of the base and the method."""

from fastmeta import graph
from fastmeta.ssl import Algorithm, MixUpConsistency, Refiner
from fastmeta.training.config import MachineConfig
from fastmeta.training.processes import Processes


def refuse_compile(base: Algorithm, method: Refiner | None) -> None:
    """Nothing where the model's forward may be compiled.

    Raises:
        ValueError: passes in both modes are on one graph.
    """
    if isinstance(base, MixUpConsistency) and method is not None and method.method.update.needs_graph:
        raise ValueError(
            "machine.compile must be False for mix-up-consistency with a method whose loss has a gradient: its pass in "
            "evaluation mode needs the running statistics that a compiled pass in training mode writes, got True"
        )


def refuse_sharding(method: Refiner | None, machine: MachineConfig, processes: Processes) -> None:
    """Nothing where the model's parameters may be spread over the processes.

    Raises:
        ValueError: there is one process, or something needs whole parameters.
    """
    if processes.group is None:
        reason = "on one process"
    elif method is not None and method.passes == "own":
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
