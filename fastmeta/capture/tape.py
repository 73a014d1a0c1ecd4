"""The calls of the last linear layer in a block, and the features that gave some logits."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fastmeta.capture import recording
from fastmeta.capture.graph_rows import by_graph
from fastmeta.capture.outputs import Outputs
from fastmeta.capture.recording import Call
from fastmeta.capture.rows import NotRowsError, Rows, as_rows, by_cuts, by_memory, by_values, joined

_BY_HAND = "fastmeta.Outputs(features, logits, weight, bias)"


class FeatureTape:
    """The calls of one linear layer in a :func:`capture_features` block, in order.

    The tape keeps their features and outputs alive as long as it lives.
    """

    def __init__(self, layer: nn.Linear, description: str) -> None:
        self._layer = layer
        self._description = description
        self._before = recording.position(layer)
        self._closed: list[Call] | None = None

    @property
    def calls(self) -> list[tuple[Tensor, Tensor]]:
        """Features ``[..., D]`` and output ``[..., C]`` of each call so far, in order."""
        return [(call.features, call.output) for call in self._recorded()]

    def outputs(self, logits: Tensor, *, rows: Tensor | slice | None = None) -> Outputs:
        """The features that gave ``logits``, with the layer's weight and bias.

        The logits are what the layer returned, or rows of it in any order: sliced, split, indexed, put back in order
        after an interleaved forward, the last token of each text, of several calls concatenated, gathered by
        DataParallel; before or after a cast. Constants may be added to them (logit adjustment, the frozen layer under a
        LoRA adapter), and one factor may multiply them where no bias moves: the features are then multiplied by it.

        Views, slices and casts are recognized for free. Else autograd's graph tells which rows they are, so call this
        before the backward pass; without a graph rows are found by their values. Both read the logits, and on a GPU
        wait for the device.

        Args:
            logits: ``[N, C]``. Outputs with more dimensions are matched row by row by ``logits.flatten(0, -2)``.
            rows: int64 ``[N]``, a slice, or a bool mask: which rows of the outputs of all calls, flattened to
                ``[M, C]`` and one below the other, the logits are. Nothing is searched then; that the values are
                the same is checked, for which a GPU is waited for.

        Raises:
            RuntimeError: the layer has not run, did not give these logits, or their values cannot tell the rows.
            ValueError: ``logits`` is not 2-D, or it or its features were changed in place; ``rows`` do not fit; the
                layer's weight does not require grad, so that it never moves; its output is not
                ``features weight^T + bias``.

        >>> import torch
        >>> layer = torch.nn.Linear(3, 2)
        >>> with capture_features(layer) as tape:
        ...     first, second = layer(torch.arange(15.0).view(5, 3))[[4, 0, 1, 2, 3]].split([3, 2])
        >>> tape.outputs(second).features
        tensor([[ 6.,  7.,  8.],
                [ 9., 10., 11.]])
        """
        if not isinstance(logits, Tensor):
            raise TypeError(f"logits must be a tensor, got {type(logits).__name__}")
        if logits.dim() != 2:
            hint = "; flatten them first: logits.flatten(0, -2)" if logits.dim() > 2 else ""
            raise ValueError(f"logits must be 2-D [N, C], got {logits.dim()}-D {list(logits.shape)}{hint}")
        calls = self._recorded()
        if not calls:
            raise RuntimeError(f"{self._description} has not run in the capture_features block{self._patched()}")
        if not _moves(self._layer, "weight"):
            raise ValueError(
                f"the weight of {self._description} must require grad, but it is frozen: the last layer never moves. "
                "Use how='jvp' with model=..., where the other parameters move; tape.calls has the features as such"
            )
        found = self._found(logits, calls) if rows is None else self._given(logits, calls, rows)
        used = calls if found.call is None else [calls[found.call]]
        for call in used:
            self._check(call)
        if found.call is None:
            features = joined([call.features for call in used], logits, dtype=used[0].features.dtype)[found.rows]
        else:
            features = as_rows(used[0].features)[found.rows]
        return self._outputs(features, logits, found, used)

    def _outputs(self, features: Tensor, logits: Tensor, found: Rows, used: list[Call]) -> Outputs:
        first = used[0]
        bias = first.bias if _moves(self._layer, "bias") else None
        if found.scale != 1:
            if bias is not None:
                raise self._not_rows(
                    logits, used, f"they are {found.scale:.6g} times its rows, and its bias, which moves too, would be"
                )
            features = features * found.scale
        weight = first.weight
        if found.offset or bias is not first.bias or any(call.weight is not weight for call in used[1:]):
            weight = None
        return Outputs(
            features, logits, None if weight is None else weight.detach(), None if bias is None else bias.detach()
        )

    def _found(self, logits: Tensor, calls: list[Call]) -> Rows:
        outputs = [call.output for call in calls]
        found = by_memory(logits, outputs) or by_cuts(logits, outputs)
        if found is not None:
            return found
        if all(output.shape[-1] != logits.shape[1] for output in outputs):
            raise self._not_rows(logits, calls)
        try:
            parameters = list(self._layer.parameters())
            found = by_graph(logits, outputs, parameters) or by_values(
                logits, outputs, [call.features for call in calls]
            )
        except NotRowsError as error:
            raise self._not_rows(logits, calls, str(error)) from None
        if found is None:
            no_graph = "they have no graph, as in torch.no_grad, and none of its rows has the same values"
            raise self._not_rows(logits, calls, "" if logits.requires_grad else no_graph)
        return found

    def _given(self, logits: Tensor, calls: list[Call], rows: Tensor | slice) -> Rows:
        whole = joined([call.output for call in calls], logits)
        if isinstance(rows, slice):
            place: Tensor | slice = rows
        elif isinstance(rows, Tensor) and rows.dtype in (torch.int64, torch.bool) and rows.dim() == 1:
            place = rows.to(whole.device)
        else:
            got = f"{rows.dtype} {list(rows.shape)}" if isinstance(rows, Tensor) else type(rows).__name__
            raise TypeError(f"rows must be an int64 tensor [N], a bool mask [M] or a slice, got {got}")
        if isinstance(place, Tensor) and place.dtype == torch.bool:
            if len(place) != len(whole):
                raise ValueError(f"rows must be a mask of the {len(whole)} rows of the outputs, got {len(place)}")
        elif isinstance(place, Tensor) and bool(((place < 0) | (place >= len(whole))).any()):
            raise ValueError(f"rows must be in [0, {len(whole)}), the rows of the outputs")
        chosen = whole[place]
        if chosen.shape != logits.shape:
            raise ValueError(f"rows must choose {list(logits.shape)} like logits, got {list(chosen.shape)}")
        eps = max(torch.finfo(tensor.dtype).eps for tensor in (logits, calls[0].output))
        if not torch.allclose(chosen, logits.detach(), rtol=2 * eps, atol=0, equal_nan=True):
            raise ValueError(
                f"rows must give logits: these rows of the output of {self._description} have other numbers. Where "
                f"logits are computed from the output, pass them before that, or build {_BY_HAND} by hand"
            )
        return Rows(None, place)

    def _check(self, call: Call) -> None:
        """Raise unless the output is still ``features weight^T + bias``."""
        if call.is_changed():
            raise ValueError(
                f"the output of {self._description} was changed in place after the call, so logits are not what "
                "its features give; use an operation that returns a new tensor"
            )
        if call.has_other_features():
            raise ValueError(
                f"the features that went into {self._description} were changed in place after the call; use an "
                "operation that returns a new tensor, or give the layer a copy of a buffer that is used again"
            )
        if not call.is_linear and not _is_linear(call):
            there = call.weight is not None and not call.weight.is_meta
            what = "it is not" if there else "its weight is not there after the call to check it"
            raise ValueError(
                f"the output of {self._description} must be features weight^T + bias, but with "
                f"{recording.forward_name(self._layer)} {what}. "
                f"Use how='jvp' with model=..., or build {_BY_HAND} by hand"
            )

    def _not_rows(self, logits: Tensor, calls: list[Call], reason: str = "") -> RuntimeError:
        shapes = ", ".join(str(list(call.output.shape)) for call in calls)
        return RuntimeError(
            f"logits {list(logits.shape)} are not rows of any output of {self._description} (its calls in the block "
            f"gave {shapes}){reason and ': '}{reason}. Pass what the layer returned, or rows of it, before anything is "
            f"computed from it; say which rows by tape.outputs(logits, rows=index); build {_BY_HAND} of tape.calls by "
            "hand; or use how='jvp' with model=.... If another layer gives the logits, capture that one: "
            "capture_features(model.fc)"
        )

    def _patched(self) -> str:
        name = recording.forward_name(self._layer)
        return "" if name is None else f"; it has {name}, which gave no tensor or ran without the layer"

    def _recorded(self) -> list[Call]:
        if self._closed is not None:
            return self._closed
        return recording.calls_since(self._layer, self._before)

    def _close(self) -> None:
        self._closed = self._recorded()
        self._before = recording.Position(None, 0)


@contextlib.contextmanager
def capture_features(module: nn.Module) -> Iterator[FeatureTape]:
    """Record what goes into and out of the last linear layer while the block runs.

    Works for a layer anywhere inside a nested, compiled, DataParallel- or DistributedDataParallel-wrapped model, with
    hooks, parametrizations or a forward set by other libraries. A compiled model is compiled once more, without a graph
    break, when it first runs in such a block. Blocks may be nested; copies made in a block are of the plain model. Of a
    layer under ``torch.nn.utils.parametrize`` it is the weight that the forward used which moves.

    Args:
        module: the last ``nn.Linear`` itself, or a model; then the ``nn.Linear`` defined last in it.

    Raises:
        TypeError: ``module`` is not a module.
        ValueError: it contains no ``nn.Linear``.
        RuntimeError: the layer did not run in the block.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
    >>> with capture_features(model) as tape:
    ...     logits_l, logits_u = model(torch.ones(5, 4)), model(torch.zeros(6, 4))
    >>> tape.outputs(logits_u).features.shape
    torch.Size([6, 3])
    """
    layer, description = last_linear(module)
    outermost = not recording.is_recording(layer)
    if outermost:
        recording.start(layer)
    tape = FeatureTape(layer, description)
    try:
        yield tape
    finally:
        tape._close()
        if outermost:
            recording.stop(layer)
    if not tape._closed:
        raise RuntimeError(
            f"{description} did not run in the capture_features block{tape._patched()}; run the model inside it, or "
            "name the layer that gives the logits: capture_features(model.fc)"
        )


def last_linear(module: object) -> tuple[nn.Linear, str]:
    """The layer, and how to name it in an error."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    if isinstance(module, nn.Linear):
        layer, description = module, f"the layer Linear({module.in_features}, {module.out_features})"
    else:
        found = [(name, child) for name, child in module.named_modules() if isinstance(child, nn.Linear)]
        if not found:
            raise ValueError(f"module must be or contain an nn.Linear, got {type(module).__name__} without one")
        name, layer = found[-1]
        description = f"the layer '{name}' Linear({layer.in_features}, {layer.out_features})"
        if len(found) > 1:
            description += f", the last of {len(found)} nn.Linear in {type(module).__name__}"
    if any(is_lazy(parameter) for parameter in layer.parameters()):
        raise ValueError(f"{description} is lazy; run the model once before capturing it")
    return layer, description


def _moves(layer: nn.Linear, name: str) -> bool:
    """Whether training moves the weight or bias, or what it is computed from; not whether gradients are enabled."""
    parameter = layer._parameters.get(name)
    if parameter is not None:
        return parameter.requires_grad
    made_of = f"{name}_", f"parametrizations.{name}."  # of spectral and weight normalization, pruning
    found = [parameter for own, parameter in layer.named_parameters() if own.startswith(made_of)]
    return not found or any(parameter.requires_grad for parameter in found)


def _is_linear(call: Call) -> bool:
    """Whether ``features weight^T + bias`` is the output, to the rounding of any way to compute it."""
    h, f, weight, bias = call.features, call.output.detach(), call.weight, call.bias
    if weight is None or not weight.is_floating_point() or weight.is_meta or not f.is_floating_point():
        return False
    if h.shape[:-1] != f.shape[:-1] or (*f.shape[-1:], *h.shape[-1:]) != weight.shape:
        return False
    exact = torch.float64 if f.dtype == torch.float64 else torch.float32
    eps = max(torch.finfo(part.dtype).eps for part in (h, f))
    if f.is_cuda and f.dtype == torch.float32:
        eps = max(eps, 2.0**-10)  # TF32
    h, f = h.to(weight.device, exact), f.to(weight.device, exact)
    weight = weight.detach().to(exact)
    bias = weight.new_zeros(()) if bias is None else bias.detach().to(exact)
    with torch.autocast(f.device.type, enabled=False):
        expected, size = h @ weight.T + bias, h.abs() @ weight.abs().T + bias.abs()
    return bool(((f - expected).abs() <= 8 * eps * size).all())
