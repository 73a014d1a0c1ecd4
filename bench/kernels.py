"""fastmeta's kernels as the benchmarks see them: the forms of an operator, and what a call would launch."""

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from typing import Any

import torch

from bench.case import Form
from fastmeta.dispatch import NARROW_OUTPUTS, OPERATORS

MAIN = "fastmeta"  # what a user gets
# The operators whose Triton forms can be forced; the others have one.
_FORCED = frozenset(name for name, each in OPERATORS.items() if each.triton) - {"finite_difference_labels"}


def _triton(name: str | None) -> Any:
    return import_module(f"fastmeta.triton_kernels.{name}")


def offered(operator: str, num_classes: int, device: str, dtype: torch.dtype = torch.bfloat16) -> list[Form]:
    """What a user gets, and every implementation and form of the shape that can be named beside it.

    What is ``cpp`` is what a user gets on the CPU.
    """
    forms = [Form(MAIN)]
    names = OPERATORS[operator].implementations(device)
    if "cuda" in names and num_classes <= NARROW_OUTPUTS:
        forms.append(Form("cuda", "cuda"))
    if "triton" in names and operator in _FORCED:
        force = _triton("_rule").force
        names_of_forms = forms_of(operator, num_classes, dtype)
        forms += [Form(f"triton {name}", "triton", partial(force, name)) for name in names_of_forms]
    elif "triton" in names:
        forms.append(Form("triton", "triton"))
    return forms


def forms_of(operator: str, num_classes: int, dtype: torch.dtype) -> list[str]:
    """Triton forms that an operator has with so many classes; of one that cannot be forced, its only one."""
    rule = _triton("_rule")
    if operator not in _FORCED or (operator == "feature_similarity" and dtype.itemsize > 2):
        return ["rows"]
    return [form for form in rule.FORMS if form != "fused" or num_classes <= rule.MOST_FUSED_CLASSES]


def plans_of(operator: str, num_classes: int, given: tuple[Any, ...]) -> Iterator[Any]:
    """The programs that may serve a call: in every form, and where the library sums no columns."""
    plan: Callable[..., Any] = _triton(OPERATORS[operator].triton).plan
    for form in forms_of(operator, num_classes, given[0].dtype):
        with _triton("_rule").force(form):
            yield plan(*given)
            if "sums_apart" in inspect.signature(plan).parameters:
                yield plan(*given, sums_apart=True)


def launches_of(operator: str, num_classes: int, given: tuple[Any, ...]) -> list[Any]:
    """The launches of those programs, recorded in place of being made."""
    count = OPERATORS[operator].numbers
    with _triton("_program").recording() as launches:
        for program in plans_of(operator, num_classes, given):
            program.run(given[:-count], given[-count:])
    return launches


def launches_of_solver(size: int, dtype: torch.dtype) -> list[Any]:
    """Those of an iteration of the conjugate gradient on so many unknowns."""
    solver = _triton("conjugate_gradient")
    v = torch.empty(size, dtype=dtype, device="meta")
    sums = torch.empty(solver.num_partials(v), dtype=torch.float64, device="meta")
    now = torch.empty(8, dtype=torch.float64, device="meta")
    with _triton("_program").recording() as launches:
        solver.dot(v, v, sums, now)
        solver.advance(v, v, v, v, sums, sums, now)
        solver.turn(v, v, sums, sums, sums, now, now)
    return launches
