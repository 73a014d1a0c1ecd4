"""What is wrong with a model, with the likely cause and the way out, from what the witnesses and the rows say."""

from collections.abc import Sequence

from torch import Tensor

from fastmeta.verification.judge import Judge
from fastmeta.verification.report import Row
from fastmeta.verification.state import is_promised
from fastmeta.verification.witness import Graph, relative

# What disagrees with the user's own backward pass wherever differences of the forward do.
_DISPUTED = ("finite_difference", "forward_difference", "Hessian product")


def problems_of(judge: Judge, rows: Sequence[Row], other: Judge | None = None) -> list[str]:
    """What is wrong, one sentence or two each.

    Args:
        judge: of the user's own model.
        rows: the verdicts.
        other: of its copy in float64, if there is one.
    """
    witness = judge.witness
    problems = []
    if not judge.repeats:
        gap = relative(witness.again, witness.logits)
        problems.append(
            f"two passes from the same state give logits {gap:.1e} apart: the model draws from randomness, or depends "
            "on state, that cannot be seen from outside, so nothing can be verified. Draw from torch's own random "
            "state, from a torch.Generator in an attribute of the module, or keep the state in buffers"
        )
    if judge.no_backward:
        problems.append(f"your own backward pass raises {judge.no_backward}")
    graph = None if judge.no_backward else witness.graph()
    problems += _foreign(judge, graph)
    disputed = (other or judge).dispute is not None
    if disputed:
        problems.append(_dispute(other or judge, graph, rows))
    for row in rows:
        if row.verdict == "disagrees" and not (disputed and row.name in _DISPUTED):
            problems.append(_of_row(row, judge, graph))
    left: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        if row.touched and not row.harmless:
            left.setdefault(row.touched, []).append(row.name)
    problems += [f"{', '.join(names)}: left changed {_listed(touched)}" for touched, names in left.items()]
    return problems


def notes_on(judge: Judge, other: Judge | None) -> list[str]:
    """What is worth knowing."""
    notes = []
    changes = [name for name in judge.witness.changes_by_forward if not is_promised(name) or name == "inputs"]
    if changes:
        notes.append(f"one forward of the model changes {_listed(changes)}")
    if judge.tolerance.backward > 1e-6 and other is None:
        notes.append(
            f"the model has no copy in float64, so an error below {judge.tolerance.backward:.0e} may be rounding"
        )
    return notes


def _foreign(judge: Judge, graph: Graph | None) -> list[str]:
    """Tensors that are trained and are no parameters."""
    witness = judge.witness
    named = {id(tensor): name for name, tensor in witness.state.tensors()}
    known = set(map(id, witness.module.parameters())) | {key for key, name in named.items() if name == "inputs"}
    leaves = [] if graph is None else graph.leaves
    found = [_described(leaf, named) for leaf in leaves if id(leaf) not in known]
    found += [name for name in witness.others_with_gradient if not any(name in text for text in found)]
    return [
        f"the logits depend on {text}, which requires grad and is not among the model's named_parameters(), so no "
        "direction moves it: make it an nn.Parameter of the module, or set requires_grad=False"
        for text in found
    ]


def _described(leaf: Tensor, named: dict[int, str]) -> str:
    return f"{named.get(id(leaf), 'a tensor')} {list(leaf.shape)}"


def _dispute(judge: Judge, graph: Graph | None, rows: Sequence[Row]) -> str:
    """The user's own backward pass is not the derivative of the forward pass."""
    missing, wrong = judge.disputed_parameters()
    functions = graph.functions if graph is not None else []
    text = f"your own backward pass is {judge.dispute:.1e} off the differences of the forward pass. "
    if missing:
        text += (
            f"It does not reach {_listed(missing)}, with which the logits move: torch.no_grad, detach, .data, .item() "
            "or reentrant checkpointing of an input without a gradient is on the way. "
        )
    if wrong or not missing:
        custom = f", or the backward of {_listed(functions)} is wrong" if functions else ""
        text += f"It is otherwise for {_listed(wrong) or 'several together'}: a part of the way is detached{custom}. "
    same = [row.name for row in rows if row.verdict == "exact" and row.name in ("jvp", "double_backward")]
    as_backward = f"{' and '.join(same)} equal your own backward pass and are right for" if same else "trust none for"
    return (
        f"{text}If this is meant (a stop-gradient, a straight-through estimator), {as_backward} what you train, and "
        "differences are not"
    )


def _of_row(row: Row, judge: Judge, graph: Graph | None) -> str:
    """Why a derivative is neither right nor refused."""
    text = f"{row.name}: {row.note or 'it is neither your own backward pass nor a difference'}"
    if row.name == "capture_features":
        return text
    causes = []
    forward = judge.witness.changes_by_forward
    if graph is not None and "CheckpointFunction" in graph.functions:
        causes.append("reentrant activation checkpointing is hidden from it: pass use_reentrant=False to checkpoint")
    custom = [] if graph is None else [name for name in graph.functions if name != "CheckpointFunction"]
    if custom and "difference" not in row.name:
        causes.append(
            f"torch.autograd.Function {_listed(custom)} may have a backward that cannot be differentiated (mark it "
            "once_differentiable), a wrong jvp, or read parameters that are not among its arguments"
        )
    if graph is not None and graph.scripted:
        causes.append("TorchScript loses tangents: use the plain Python function")
    if "inputs" in forward:
        causes.append("the forward changes its input in place: let it work on a new tensor")
    hidden = [name for name in forward if not is_promised(name)]
    if hidden:
        causes.append(
            f"the forward changes {_listed(hidden)}, which is not put back between passes: keep it in a buffer, or "
            "draw from torch's own random state"
        )
    if row.name == "last_layer":
        causes.append("the last nn.Linear is not features W^T + b, or its logits are not the model's: use how='jvp'")
    return text + (f". Likely: {'; or '.join(causes)}" if causes else "")


def _listed(names: Sequence[str], most: int = 4) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
