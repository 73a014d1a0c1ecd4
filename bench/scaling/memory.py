"""What a method keeps on each process, in bytes, beside the model and its activations."""

from bench.scaling.traffic import FLOAT, INDEX, Setting

# Values and both moments of Masked Adam in float32; beside them an int32 count of steps for each row.
PER_NUMBER, PER_ROW = 3 * FLOAT, 4


def table(examples: int, columns: int, processes: int = 1) -> int:
    """A table of ``examples`` rows, or the part of one of these processes."""
    return -(-examples // processes) * (PER_ROW + PER_NUMBER * columns)


def gathered_rows(setting: Setting, columns: int) -> int:
    """For the time of a step: places and gradients of all processes, as they arrive and joined."""
    return 2 * setting.processes * setting.unlabeled * (INDEX + FLOAT * columns)


def averages(direction: int) -> int:
    """Both averages of a normalized gap, for a direction of so many bytes."""
    return 2 * direction
