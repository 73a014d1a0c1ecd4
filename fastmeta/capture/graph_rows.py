"""Which rows of which outputs some logits are, by autograd's graph between them.

The operations in between must be ones that move, add to or scale numbers, by name: only then is the map affine whatever
the numbers are. What the map is, its transpose tells: row and column numbers are pulled back as cotangents. The nodes
are called here and not by the engine, which would run the hooks that others have on these tensors.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastmeta.capture.rows import Edge, NotRowsError, Rows, as_rows, edge_of

_MOVES = {
    *("Alias", "AsStrided", "Cat", "Clone", "ConstantPadNd", "Copy", "CopySlices", "Expand", "Flip", "Gather", "Index"),
    *("IndexCopy", "IndexPut", "IndexSelect", "MaskedScatter", "MaskedSelect", "PackPaddedSequence", "Permute"),
    *("Repeat", "ReshapeAlias", "Roll", "Scatter", "Select", "SelectScatter", "Slice", "SliceScatter", "Split"),
    *("SplitWithSizes", "Squeeze", "Stack", "T", "ToCopy", "Transpose", "Unbind", "Unfold", "UnsafeSplit"),
    *("UnsafeView", "Unsqueeze", "View", "Where"),
}
_ADDS = {"Add", "Sub", "Rsub"}
_SCALES = {"Div", "Mul", "Neg"}
# Functions in Python that give back what they get: DistributedDataParallel's, and that of full backward hooks.
_PASSES_ON = {"_DDPSinkBackward", "BackwardHookFunctionBackward"}
_DATA_PARALLEL = "GatherBackward"  # of nn.DataParallel; torch.gather is GatherBackward0

_BASE = 32  # of row and column numbers: bfloat16 carries such digits through a rounding or two


def by_graph(logits: Tensor, outputs: Sequence[Tensor], parameters: Sequence[Tensor]) -> Rows | None:
    """Rows that were moved, cast, joined, scaled by one factor or added to: ``[N, C]`` of outputs ``[..., C]``.

    Reads the device three times. None: the graph cannot tell, as in a compiled model or after a backward pass has
    freed it.

    Raises:
        NotRowsError: they are something else, or depend on the layer's parameters beside its outputs.
    """
    if logits.grad_fn is None:
        return None
    targets = {edge_of(output): call for call, output in enumerate(outputs) if output.grad_fn is not None}
    order, names = _between(edge_of(logits), targets, parameters)
    if not order:
        return None
    try:
        with torch.no_grad():
            rows, scale = _pulled_back(logits, outputs, targets, order)
    except RuntimeError as error:
        if "second time" in str(error):
            return None
        raise
    return Rows(None, rows, scale, offset=not _ADDS.isdisjoint(names))


def _kind(node: Any) -> str:
    """The name of the operation: ``Slice`` of ``SliceBackward0``; as it is for a function in Python."""
    name = node.name().rpartition("::")[2]
    if isinstance(node, torch.autograd.function.BackwardCFunction):
        return name
    return name.rstrip("0123456789").removesuffix("Backwards").removesuffix("Backward")


def _between(root: Edge, targets: dict[Edge, int], parameters: Sequence[Tensor]) -> tuple[list[Any], set[str]]:
    """The nodes on the way from the logits to the outputs, each before those it leads to; their names.

    Empty: the graph cannot tell.
    """
    leads: dict[Any, bool] = {}
    order: list[Any] = []
    stack: list[tuple[Any, bool]] = [(root[0], False)]

    def leading(edge: Edge) -> bool:
        return edge in targets or leads.get(edge[0], False)

    while stack:
        node, visited = stack.pop()
        if visited:
            leads[node] = any(map(leading, node.next_functions))
            if leads[node]:
                order.append(node)
        elif node not in leads:
            leads[node] = False
            stack.append((node, True))
            stack += [(edge[0], False) for edge in node.next_functions if edge[0] is not None and edge not in targets]
    if not leading(root):
        if _ends_in_the_dark(root[0]):
            return [], set()
        raise NotRowsError("they do not depend on it")
    for node in order:
        kind = _kind(node)
        count = sum(map(leading, node.next_functions))
        if kind == "CompiledFunctionBackward":
            return [], set()
        if kind not in _MOVES | _ADDS | _SCALES | _PASSES_ON | {_DATA_PARALLEL}:
            raise NotRowsError(f"{node.name()} lies between")
        if kind in _SCALES and (count > 1 or (kind == "Div" and not leading(node.next_functions[0]))):
            raise NotRowsError(f"{node.name()} of several outputs lies between")
    leaves = [node.variable for node in leads if _kind(node) == "AccumulateGrad"]
    if any(leaf is parameter for leaf in leaves for parameter in parameters):
        raise NotRowsError("they depend on its parameters in another way, too")
    return order[::-1], {_kind(node) for node in order}


def _ends_in_the_dark(node: Any) -> bool:
    """Whether the logits were moved or cast from something that hides its graph: compiled, checkpointed, a leaf."""
    while _kind(node) in _MOVES | _PASSES_ON and node.next_functions and node.next_functions[0][0] is not None:
        node = node.next_functions[0][0]
    hidden = isinstance(node, torch.autograd.function.BackwardCFunction)
    return hidden or _kind(node) == "AccumulateGrad"


def _pulled_back(
    logits: Tensor, outputs: Sequence[Tensor], targets: dict[Edge, int], order: Sequence[Any]
) -> tuple[Tensor, float]:
    """Rows of all outputs ``[N]`` and the factor, found and proved by the transposed map.

    The columns of a cotangent carry ones, which give the factor, and the digits of the rows' numbers, which give the
    rows. These, digits of the columns' numbers and irregular numbers must come out in these rows, times the factor,
    and nowhere else.
    """
    num_rows, num_columns = logits.shape
    if num_columns == 0:
        raise NotRowsError("they have no columns")
    row = torch.arange(num_rows, device=logits.device, dtype=torch.int32)[:, None]
    column = torch.arange(num_columns, device=logits.device, dtype=torch.int32)

    def pulled(cotangent: Tensor) -> Tensor:
        return _transposed(cotangent, outputs, targets, order, edge_of(logits))

    values = torch.cat([torch.ones_like(row), *_digits(row, num_rows)], 1).to(logits.dtype)
    count = values.shape[1]
    cotangents = [values[:, (column + start) % count] for start in range(0, count, num_columns)]
    got = [pulled(cotangent) for cotangent in cotangents]
    carried = [got[place // num_columns][:, place % num_columns] for place in range(count)]

    where = carried[0].nonzero().flatten()
    if len(where) != num_rows:
        raise NotRowsError(f"{len(where)} of its rows, not {num_rows}, reach them, each once")
    if num_rows == 0:
        return where, 1.0
    scale = float(carried[0][where[0]])
    number = torch.zeros_like(where)
    for power, digit in enumerate(carried[1:]):
        number += ((digit[where] / scale).round().long() - 1) * _BASE**power
    rows = where[number.argsort()]

    # Exact without a factor; each multiplication rounds once, in a dtype that the nodes know.
    dtypes = {logits.dtype}.union(into.dtype for node in order for into in node._input_metadata)
    num_factors = sum(_kind(node) in _SCALES | _ADDS for node in order)
    tolerance = (num_factors + bool(num_factors)) * max(torch.finfo(dtype).eps for dtype in dtypes)
    of_columns = torch.stack([torch.ones_like(column), *_digits(column, num_columns)]).to(logits.dtype)
    cotangents.append(of_columns[row[:, 0] % len(of_columns)])
    irregular = (row * num_columns + column).square() % 127  # of 7 bits, which any dtype carries
    cotangents.append((irregular + 1).to(logits.dtype) / 128)
    differs = []
    for place, cotangent in enumerate(cotangents):
        there = got[place] if place < len(got) else pulled(cotangent)
        expected = scale * cotangent.to(there.dtype)
        differs.append(~((there[rows] - expected).abs() <= tolerance * expected.abs()).all())
        differs.append(there.index_fill_(0, rows, 0).any())
    if torch.stack(differs).any():
        raise NotRowsError("they are other sums or multiples of its outputs than rows times one factor")
    return rows, scale


def _digits(numbers: Tensor, count: int) -> list[Tensor]:
    """Of integers below ``count``, each plus 1, the lowest first."""
    digits = []
    while count > 1:
        digits.append(numbers % _BASE + 1)
        numbers, count = numbers // _BASE, -(-count // _BASE)
    return digits


def _transposed(
    cotangent: Tensor, outputs: Sequence[Tensor], targets: dict[Edge, int], order: Sequence[Any], root: Edge
) -> Tensor:
    """Cotangents of all outputs, one below the other ``[M, C]``, from that of the logits ``[N, C]``."""
    gathered: dict[Edge, Tensor] = {root: cotangent}
    wanted = set(order)
    for node in order:
        given = [gathered.pop((node, place), None) for place in range(len(node._input_metadata))]
        for edge, gradient in zip(node.next_functions, _backward_of(node)(*given), strict=True):
            if gradient is not None and (edge in targets or edge[0] in wanted):
                into = edge[0]._input_metadata[edge[1]]
                gradient = gradient.sum_to_size(into.shape).to(into.device, into.dtype)
                gathered[edge] = gathered[edge] + gradient if edge in gathered else gradient
    exact = torch.float64 if cotangent.dtype == torch.float64 else torch.float32
    parts = [gathered.get(edge_of(output)) for output in outputs]
    flat = [
        as_rows(output.new_zeros(output.shape) if part is None else part).to(cotangent.device, exact)
        for part, output in zip(parts, outputs, strict=True)
    ]
    return flat[0] if len(flat) == 1 else torch.cat(flat)


def _backward_of(node: Any) -> Callable[..., Sequence[Tensor | None]]:
    kind = _kind(node)
    if kind in _PASSES_ON:
        return lambda *gradients: gradients
    if kind == _DATA_PARALLEL:
        return lambda gradient: gradient.split(node.input_sizes, node.dim)

    def backward(*gradients: Tensor | None) -> Sequence[Tensor | None]:
        result = node(*gradients)
        return result if isinstance(result, tuple) else (result,)

    return backward
