"""Which rows of which outputs some logits are: by their memory, by their last operations, or by their values."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Edge = tuple[Any, int]  # a node of autograd's graph, and which of its outputs


class Rows(NamedTuple):
    """The logits are ``scale * output[rows]``, plus ``offset`` where something constant is added."""

    call: int | None  # whose output; None: of all, flattened to [M, C] and one below the other
    rows: slice | Tensor  # int64 [N]
    scale: float = 1.0
    offset: bool = False


class NotRowsError(Exception):
    """With the reason why they are not, for the end of a sentence."""


def by_memory(logits: Tensor, outputs: Sequence[Tensor]) -> Rows | None:
    """Views ``[N, C]`` of an output ``[..., C]``. Compares storage, offset and stride; no data is read."""
    for call in reversed(range(len(outputs))):
        output = outputs[call]
        if logits is output:
            return Rows(call, slice(None))
        if output.shape[-1] == logits.shape[-1] and output.is_contiguous() and logits.dtype == output.dtype:
            rows = _rows_of_view(logits, output)
            if rows is not None:
                return Rows(call, rows)
    return None


def _rows_of_view(view: Tensor, whole: Tensor) -> slice | None:
    num_rows, num_columns = view.shape
    if view.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr() or view.device != whole.device:
        return None
    if num_rows == 0 or num_columns == 0:
        return slice(0, num_rows)
    start, column = divmod(int(view.storage_offset() - whole.storage_offset()), num_columns)
    step, rest = divmod(view.stride(0), num_columns) if num_rows > 1 else (1, 0)
    stop = start + step * (num_rows - 1) + 1
    rows = whole.numel() // num_columns
    if column or rest or step < 1 or start < 0 or stop > rows or (num_columns > 1 and view.stride(1) != 1):
        return None
    return slice(start, stop, step)


def by_cuts(logits: Tensor, outputs: Sequence[Tensor]) -> Rows | None:
    """Slices, parts of a split and casts of an output ``[M, C]``, in any order. Reads the graph, no data."""
    edges = {edge_of(output): call for call, output in enumerate(outputs) if output.dim() == 2 and output.grad_fn}
    edge, cuts = edge_of(logits), []
    while edge not in edges:
        node, part = edge
        name = "" if node is None else node.name()
        if name in ("SliceBackward0", "SplitBackward0", "SplitWithSizesBackward0"):
            if node._saved_dim != 0:
                return None
            if name == "SliceBackward0":
                cuts.append(slice(node._saved_start, node._saved_end, node._saved_step))
            elif name == "SplitBackward0":
                cuts.append(slice(part * node._saved_split_size, (part + 1) * node._saved_split_size))
            else:
                start = sum(node._saved_split_sizes[:part])
                cuts.append(slice(start, start + node._saved_split_sizes[part]))
        elif name != "ToCopyBackward0":
            return None
        edge = node.next_functions[0]
    call = edges[edge]
    rows = range(len(outputs[call]))
    for cut in reversed(cuts):
        rows = rows[cut]
    return Rows(call, slice(rows.start, rows.stop, rows.step))


def by_values(logits: Tensor, outputs: Sequence[Tensor], features: Sequence[Tensor]) -> Rows | None:
    """Rows with the same numbers, in the dtype of ``logits [N, C]``. On a GPU this waits for the device.

    Raises:
        NotRowsError: rows of equal numbers come of different features.
    """
    if not logits.is_floating_point():
        return None
    found, wanted = _bits(joined(outputs, logits)), _bits(logits.detach())
    # Rows are compared by a random integer made of each, and the rows found then in full.
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**62), 2**62, (logits.shape[1],), generator=generator).to(logits.device)
    keys = torch.cat([(bits * factors).sum(1) for bits in (found, wanted)])
    unique, group = torch.unique(keys, return_inverse=True)
    of_found, of_wanted = group[: len(found)], group[len(found) :]
    places = torch.arange(len(found), device=group.device)
    first = places.new_full((len(unique),), len(found)).scatter_reduce(0, of_found, places, "amin")
    rows = first[of_wanted]
    if bool((rows == len(found)).any()) or not torch.equal(found[rows], wanted):
        return None
    inputs = joined(features, logits, dtype=features[0].dtype)
    used = torch.isin(of_found, of_wanted)
    if not torch.equal(_bits(inputs[used]), _bits(inputs[first[of_found[used]]])):
        raise NotRowsError(
            "without a graph rows are found by their values, but rows with equal values have different features here"
        )
    return Rows(None, rows)


def _bits(values: Tensor) -> Tensor:
    """Integers ``[M, C]`` that are equal where the numbers are; NaN equals NaN."""
    values = torch.where(values.isnan(), torch.nan, values) + 0.0  # also: -0 becomes 0
    return values.contiguous().view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.itemsize])


def joined(parts: Sequence[Tensor], like: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """Parts ``[..., C]`` one below the other ``[M, C]``, where ``like`` is and in its dtype."""
    flat = [as_rows(part.detach()).to(like.device, dtype or like.dtype) for part in parts]
    return flat[0] if len(flat) == 1 else torch.cat(flat)


def as_rows(tensor: Tensor) -> Tensor:
    """``[..., C]`` as ``[M, C]``."""
    return tensor.flatten(0, -2) if tensor.dim() > 1 else tensor[None]


def edge_of(tensor: Tensor) -> Edge:
    """Where autograd's graph gives the tensor."""
    return tensor.grad_fn, tensor.output_nr
