"""``fastmeta.verify``: which derivatives of a user's model are right."""

import copy
import time
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from fastmeta.methods import Method
from fastmeta.problem.model_function import _unwrapped
from fastmeta.problem.targets import check_targets
from fastmeta.verification.causes import notes_on, problems_of
from fastmeta.verification.passes import Passes, method_of
from fastmeta.verification.report import Report, Row
from fastmeta.verification.witness import Witness

# Of two passes of the copy in float64; a hundred follow.
_MOST_SECONDS = 2.0


def verify(
    model: nn.Module,
    inputs: Any,
    targets: Tensor | None = None,
    *,
    methods: Iterable[Method | str] | None = None,
    quiet: bool = False,
) -> Report:
    r"""Find out which derivatives of a model are right, on a small batch of its own inputs; prints a table.

    Every ``how`` of :func:`fastmeta.label_gradient` is run along a random direction and along the gradient of a loss,
    and held against two witnesses that share no code with it: the user's own backward pass, ``<u, D_v f> = <J^T u, v>``
    for several u, and central differences of the forward pass,

    .. math:: D_v f = \lim_{\epsilon \to 0}
        \frac{f(x; \theta + \epsilon v) - f(x; \theta - \epsilon v)}{2 \epsilon}

    at the radius where they depend on it least. The same for the features and logits of the last linear layer, the
    gradient of a loss and products with its Hessian. A model of which a copy in float64 runs, within a second, is
    verified there, too, where an error stands out from rounding. After each of them parameters, buffers, ``.grad``,
    modes, attributes, random states, inputs, closures and the globals that the model's code reads are compared with
    what they were, and put back.

    It is meant for a batch of a few examples, once, when a loop is set up: it takes about a hundred passes.

    Args:
        model: gives logits ``[N, C]``, as for :func:`fastmeta.label_gradient`; in the mode in which it will be used.
        inputs: of N examples: a tensor, a tuple of arguments or a mapping of keyword arguments.
        targets: int64 classes ``[N]`` or probabilities ``[N, C]``; of tokens also ``[B, T]`` or ``[B, T, C]``. None,
            and a class of -100: the classes that the model predicts.
        methods: methods, or names of their classes with default settings: one step of a copy of each, with the batch as
            unlabeled and as hold-out examples, is compared with the same step by ``how="double_backward"``.
        quiet: print nothing.

    Returns:
        A row for each ``how``: exact, approximate (its error), refused (why), or it disagrees with a witness; what is
        wrong, with the likely cause and the way out. ``report.ok`` says whether nothing is, ``report.best`` which
        ``how`` to use. Where the model's own backward pass and the differences of its forward disagree, as behind a
        stop-gradient, neither is believed: the report says which of the ways equals which.

    Raises:
        TypeError: ``model`` is not a module, or gives no logits.
        ValueError: no parameter requires grad, the logits are not ``[N, C]``, or the targets do not fit.

    Whatever the model's own forward raises is raised, too, with everything put back.

    >>> model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    >>> report = verify(model, torch.ones(5, 3, dtype=torch.float64), quiet=True)
    >>> report.ok, report.best, report["jvp"].verdict, report["finite_difference"].verdict
    (True, 'jvp', 'exact', 'approximate')
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    module = _unwrapped(model)
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise ValueError(f"model must have parameters that require grad, got none in {type(model).__name__}")
    with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of passes that nobody trains with
        witness = Witness(module, inputs, targets, backward=not _has_gradient_hooks(model))
        if targets is not None:
            check_targets(targets, witness.logits, "targets")
        twin = None if witness.logits.dtype == torch.float64 else _double(module, inputs, targets)
        witness.testify(differences=twin is None)
        chosen = [method_of(method, witness) for method in methods or ()]
        passes = Passes(model, witness)
        rows = passes.rows()
        if twin is not None:
            twin.testify(differences=True)
            rows = [_joined(*pair) for pair in zip(rows, Passes(twin.module, twin).rows(), strict=True)]
        rows += [passes.method_row(method) for method in chosen]
        problems, notes = tuple(problems_of(witness, rows, twin)), tuple(notes_on(witness, twin))
    report = Report(_described(witness, twin), tuple(rows), problems, notes)
    if not quiet:
        print(report)
    return report


def _has_gradient_hooks(model: nn.Module) -> bool:
    """Whether a backward pass would do more than to fill ``.grad``: synchronize processes, step an optimizer."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return True
    return any(p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None) for p in model.parameters())


def _joined(own: Row, exact: Row) -> Row:
    """The verdict on the model itself and on its copy in float64: the worse, with the error that says more."""
    if own.verdict == "refused" or exact.verdict in ("refused", "unknown"):
        return own
    if own.verdict == "disagrees" and exact.verdict == "exact":
        return replace(own, note=f"{own.note}; in a copy in float64 it is right ({exact.error:.1e})")
    error = own.error if "difference" in own.name else exact.error  # rounding is a part of a difference's error
    return replace(own, verdict=exact.verdict, error=error, note=exact.note)


def _described(witness: Witness, twin: Witness | None) -> str:
    """What was looked at, in a line."""
    count = sum(value.numel() for value in witness.parameters.values())
    mode = "training" if witness.module.training else "evaluation"
    dtype = str(witness.logits.dtype).removeprefix("torch.")
    return (
        f"{type(witness.module).__name__} in {mode} mode, {count:,} parameters that train, logits "
        f"{list(witness.logits.shape)} in {dtype}{'' if twin is None else ' and on a copy in float64'}; errors are "
        "relative"
    )


def _double(module: nn.Module, inputs: Any, targets: Tensor | None) -> Witness | None:
    """The witness of a copy in float64, in which an error stands out from rounding; None if it has none, or a slow one.

    Convolutions in float64 take many times as long as in float32.
    """

    def doubled(value: Any) -> Any:
        if isinstance(value, Tensor):
            value = value.detach().clone()
            return value.double() if value.is_floating_point() else value
        return copy.deepcopy(value)

    try:
        twin = copy.deepcopy(module).double()
        arguments = dict(inputs) if isinstance(inputs, Mapping) else inputs
        begin = time.perf_counter()
        witness = Witness(twin, _pytree.tree_map(doubled, arguments), targets, backward=True)
        if time.perf_counter() - begin > _MOST_SECONDS:
            return None
        trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
        leaves = set(map(id, witness.graph().leaves))
        is_own = leaves.isdisjoint(map(id, module.parameters())) and not leaves.isdisjoint(map(id, twin.parameters()))
        is_whole = witness.logits.dtype == torch.float64 and is_own and witness.parameters.keys() == trained
    except Exception:  # code that names a dtype or a device, an object without a copy
        return None
    return witness if is_whole else None
