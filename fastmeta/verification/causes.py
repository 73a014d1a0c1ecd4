"""What is wrong with a model, with the likely cause and the way out, from what the witnesses and the rows say."""

from collections.abc import Iterator, Sequence

from fastmeta.verification.report import Row
from fastmeta.verification.snapshot import is_promised
from fastmeta.verification.witness import Graph, Witness

# What disagrees with the user's own backward pass wherever differences of the forward do.
_DISPUTED = ("finite_difference", "forward_difference", "Hessian product")


def problems_of(witness: Witness, rows: Sequence[Row], twin: Witness | None = None) -> Iterator[str]:
    """What is wrong, one sentence or two each.

    Args:
        witness: of the user's own model.
        rows: the verdicts.
        twin: of its copy in float64, if there is one.
    """
    if not witness.repeats:
        yield (
            f"two passes from the same state give logits {witness.gap:.1e} apart: the model draws from randomness, or "
            "depends on state, that cannot be seen from outside, so nothing can be verified. Draw from torch's own "
            "random state, from a torch.Generator in an attribute of the module, or keep the state in buffers"
        )
    if witness.no_backward:
        yield f"your own backward pass raises {witness.no_backward}"
    graph = Graph([], [], False) if witness.no_backward else witness.graph()
    for text in _foreign(witness, graph):
        yield (
            f"the logits depend on {text}, which requires grad and is not among the model's named_parameters(), so no "
            "direction moves it: make it an nn.Parameter of the module, or set requires_grad=False"
        )
    sharpest = twin or witness
    if sharpest.dispute is not None:
        yield _dispute(sharpest, graph, rows)
    for row in rows:
        if row.verdict == "disagrees" and not (sharpest.dispute is not None and row.name in _DISPUTED):
            causes = [] if row.name == "capture_features" else list(_causes(row, witness, graph))
            yield f"{row.name}: {row.note}" + (f". Likely: {'; or '.join(causes)}" if causes else "")
    left: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        if row.touched and not row.harmless:
            left.setdefault(row.touched, []).append(row.name)
    for touched, names in left.items():
        yield f"{', '.join(names)}: left changed {_listed(touched)}"


def notes_on(witness: Witness, twin: Witness | None) -> Iterator[str]:
    """What is worth knowing."""
    changes = [name for name in witness.changes_by_forward if not is_promised(name) or name.startswith("inputs")]
    if changes:
        yield f"one forward of the model changes {_listed(changes)}"
    if witness.tolerance > 1e-6 and twin is None:
        yield f"no copy in float64, or a slow one: an error below {witness.tolerance:.0e} may be rounding"


def _foreign(witness: Witness, graph: Graph) -> list[str]:
    """Tensors that are trained and are no parameters."""
    named = {key: name for key, (name, _) in witness.snapshot.tensors.items()}
    inputs = {key for key, name in named.items() if name.startswith("inputs")}
    known = inputs.union(map(id, witness.module.parameters()))
    leaves = [leaf for leaf in graph.leaves if id(leaf) not in known]
    found = [f"{named.get(id(leaf), 'a tensor')} {list(leaf.shape)}" for leaf in leaves]
    hidden = [name for name in witness.others_with_gradient if not name.startswith("inputs")]
    return found + [name for name in hidden if not any(name in text for text in found)]


def _dispute(witness: Witness, graph: Graph, rows: Sequence[Row]) -> str:
    """The user's own backward pass is not the derivative of the forward pass."""
    missing, wrong = witness.disputed_parameters()
    text = f"your own backward pass is {witness.dispute:.1e} off the differences of the forward pass. "
    if missing:
        text += (
            f"It does not reach {_listed(missing)}, with which the logits move: torch.no_grad, detach, .data, .item() "
            "or reentrant checkpointing of an input without a gradient is on the way. "
        )
    if wrong or not missing:
        custom = f", or the backward of {_listed(graph.functions)} is wrong" if graph.functions else ""
        text += f"It is otherwise for {_listed(wrong) or 'several together'}: a part of the way is detached{custom}. "
    same = [row.name for row in rows if row.verdict == "exact" and row.name in ("jvp", "double_backward")]
    if same:
        advice = f"use {' or '.join(same)}, which is your own backward pass, and no differences"
    else:
        advice = "nothing here is what you train"
    return f"{text}If this is meant (a stop-gradient, a straight-through estimator), {advice}"


def _causes(row: Row, witness: Witness, graph: Graph) -> Iterator[str]:
    """Why a derivative is neither right nor refused."""
    if "CheckpointFunction" in graph.functions:
        yield "reentrant activation checkpointing is hidden from it: pass use_reentrant=False to checkpoint"
    custom = [name for name in graph.functions if name != "CheckpointFunction"]
    if custom and "difference" not in row.name:
        yield (
            f"torch.autograd.Function {_listed(custom)} may have a backward that cannot be differentiated (mark it "
            "once_differentiable), a wrong jvp, or read parameters that are not among its arguments"
        )
    if graph.scripted:
        yield "TorchScript loses tangents: use the plain Python function"
    if any(name.startswith("inputs") for name in witness.changes_by_forward):
        yield "the forward changes its input in place: let it work on a new tensor"
    hidden = [name for name in witness.changes_by_forward if not is_promised(name)]
    if hidden:
        yield (
            f"the forward changes {_listed(hidden)}, which is not put back between passes: keep it in a buffer, or "
            "draw from torch's own random state"
        )
    if row.name == "last_layer":
        yield "the last nn.Linear is not features W^T + b, or its logits are not the model's: use how='jvp'"


def _listed(names: Sequence[str], most: int = 4) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
