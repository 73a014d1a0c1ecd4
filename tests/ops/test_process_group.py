"""Rows on two processes give every process what one process makes of all rows."""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import forked
import pytest
import torch
import torch.distributed
from cases import Draw
from hessian_problems import ITERATIVE, SOLVERS, flat, make, power_law, targets_of, true_residual
from torch import Tensor

import fastmeta
from fastmeta.losses import LOSSES
from fastmeta.ops import HessianSolution, NotConvergedWarning, SolverState, process_group, solve_hessian
from fastmeta.ops.solve import conjugate_gradient as device
from fastmeta.ops.solve.conjugate_gradient import TorchUpdates
from fastmeta.ops.solve.kronecker import trial_iterations

SIZES = {"n > D": (23, 5, 4), "n < D": (7, 9, 3), "n = D + 1": (6, 5, 3), "n = 1": (1, 4, 3)}
Case = dict[str, Any]
Results = list[dict[str, Any]]


def own(rank: int, rows: Tensor | None, first: int) -> Tensor | None:
    """The first rows are those of process 0."""
    return None if rows is None else (rows[:first], rows[first:])[rank]


def solve(case: Case, rank: int | None, state: SolverState | None = None) -> HessianSolution:
    """With the rows of one process, or (None) with all of them."""
    h, f, rhs_weight, rhs_bias, w = case["problem"]
    rows = (h, f, w if case["weighted"] else None, targets_of(f))
    if rank is not None:
        rows = tuple(own(rank, tensor, case["first"]) for tensor in rows)
    group = None if rank is None else torch.distributed.group.WORLD
    bias = rhs_bias if case["bias"] else None
    options = case["options"] | {"targets": rows[3], "state": state, "process_group": group}
    return solve_hessian(rows[0], rows[1], rhs_weight, bias, rows[2], **options)


def numbers(solution: HessianSolution) -> tuple[Tensor, int, float]:
    return flat(solution), solution.iterations, solution.residual


@contextlib.contextmanager
def as_on_gpu(active: bool) -> Iterator[None]:
    """The CPU is taken for a GPU without Triton."""
    with pytest.MonkeyPatch.context() as patch:
        if active:
            patch.setattr(device, "serves", lambda tensor: True)
            patch.setattr(device, "updates_for", lambda vector, impl: TorchUpdates())
        yield


def messages(*calls: Callable[[], Any]) -> list[str]:
    """What each call raises."""
    result = []
    for call in calls:
        try:
            call()
            result.append("nothing")
        except (ValueError, TypeError, RuntimeError) as error:
            result.append(f"{type(error).__name__}: {error}")
    return result


def counted(call: Callable[[], Any]) -> tuple[Any, int]:
    """The result, and the number of all-reduces."""
    with pytest.MonkeyPatch.context() as patch:
        calls, reduce = [], torch.distributed.all_reduce
        patch.setattr(
            torch.distributed, "all_reduce", lambda *args, **kwargs: (calls.append(0), reduce(*args, **kwargs))
        )
        return call(), len(calls)


def warm_starts(rank: int, case: Case) -> list[tuple]:
    """Four solves with a state each, alone and together, as the right-hand side moves."""
    results = []
    with as_on_gpu(case["on_gpu"]):
        states = [SolverState(refresh_every=3) for _ in range(2)]
        for scale in (1.0, 1.1, 1.1, 0.9):
            h, f, rhs_weight, rhs_bias, w = case["problem"]
            moved = case | {"problem": (h, f, scale * rhs_weight, rhs_bias + scale, w)}
            pair = [numbers(solve(moved, which, state)) for which, state in zip((rank, None), states, strict=True)]
            results.append((*pair, *((state.solver, state.age) for state in states)))
    return results


def one_stops_early(rank: int, case: Case, early: int) -> tuple[Tensor, int, float]:
    """One process thinks that it is done sooner, as by rounding it may; here the other has a target far below."""
    with as_on_gpu(case["on_gpu"]), pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "MARGIN", 0.95 if rank == early else 1e-6)
        return numbers(solve(case, rank))


def faults(rank: int, case: Case) -> list[str]:
    """What both processes must be told of, or none of them goes on."""
    h, f, rhs, bias, w = case["problem"]
    bad = h.clone()
    bad[-1] = torch.nan  # a row of process 1
    mine = case | {"problem": (h, f, rhs * (1 + rank), bias, w)}
    damped = case | {"options": case["options"] | {"damping": 0.1 + rank}}
    negative = case | {"problem": (h, f, rhs, bias, torch.cat([w[: case["first"]], -50 - w[case["first"] :]]))}
    with pytest.MonkeyPatch.context() as patch:
        result = messages(
            lambda: solve(case | {"problem": (bad, f, rhs, bias, w)}, rank),
            lambda: solve(mine, rank),
            lambda: solve(damped, rank),
            lambda: solve(negative, rank),
            lambda: solve(case | {"problem": (h.clone().requires_grad_(), f, rhs, bias, w)}, rank),
        )
        patch.setattr(device, "capturing", lambda tensor: True)
        return result + messages(lambda: solve(case, rank))


def behavior(rank: int, cases: list[Case]) -> dict[str, list]:
    results: dict[str, list] = {"warm": [warm_starts(rank, case) for case in cases]}
    results["early"] = [[one_stops_early(rank, case, early) for early in range(2)] for case in cases]
    results["faults"] = faults(rank, cases[0])
    short = cases[0] | {"options": cases[0]["options"] | {"solver": "cg"}}
    solution, reductions = counted(lambda: solve(short, rank))
    results["reductions"] = [reductions - solution.iterations, counted(lambda: solve(short, None))[1]]
    return results


def shared_cases(draw: Draw) -> list[Case]:
    options = {"damping": 1.0, "solver": "pcg", "tol": 1e-3, "max_iter": 50}
    given = {"problem": make(draw, 40, 8, 3), "options": options, "first": 28, "bias": True, "weighted": True}
    return [given | {"on_gpu": on_gpu} for on_gpu in (False, True)]


def test_the_processes_decide_together(results: tuple[dict, Results]) -> None:
    every = [result["behavior"] for result in results[1]]
    for result in every:
        for together, alone, state, state_alone in (solves for warm in result["warm"] for solves in warm):
            assert (together[1], state) == (alone[1], state_alone)
            assert float((together[0] - alone[0]).norm()) <= 1e-10 * float(alone[0].norm())
        assert "nothing" not in result["faults"]
        # The meeting, where to start, the end of the iterations, the true residual, and whether to go on.
        assert result["reductions"] == [5, 0], "one all-reduce a product"
    for first, second in zip(*(result["early"] for result in every), strict=True):
        for one, other in zip(first, second, strict=True):
            assert one[1] == other[1] > 0
            torch.testing.assert_close(one[0], other[0], rtol=1e-12, atol=1e-12)
    on_host, on_device = every[0]["early"]
    assert on_host[0][1] == on_host[1][1], "whoever stops first ends the solve"
    assert on_device[0][1] == on_device[1][1], "on a GPU as well"
    nan, rhs, damping, negative, derivative, graph = zip(*(result["faults"] for result in every), strict=True)
    tensors = "features, logits, rhs, weights and targets"
    assert nan[0] == f"NotFiniteError: {tensors} must be finite on every process, not on 1"
    assert nan[1].startswith("NotFiniteError: features must be finite, got nan at [11, 0]")
    for said, words in (
        (rhs, "ValueError: rhs_weight and rhs_bias must be the same on every process of process_group, their norm is"),
        (damping, "ValueError: damping must be the same on every process of process_group"),
        (negative, "_LinAlgError: the damped Hessian is not positive definite"),
        (derivative, "RuntimeError: solve_hessian has no derivative with a process_group; detach"),
        (graph, "RuntimeError: process_group cannot be captured in a CUDA graph"),
    ):
        assert all(message.startswith(words) for message in said), said


def sums(rank: int, tensors: list[list[Tensor]]) -> tuple:
    group = torch.distributed.group.WORLD
    given = tensors[rank]
    before = [tensor.clone() for tensor in given]
    summed, reductions = counted(lambda: process_group.sum_over(given, group))
    assert all(map(torch.equal, given, before)), "not in place"
    assert not any(tensor.requires_grad for tensor in summed)
    counts = [process_group.joined_count(count, group, "cpu") for count in (3 + 4 * rank, 5 * rank)]
    alone = torch.distributed.new_group([0])
    inside = process_group.sum_over(given, alone) if rank == 0 else messages(lambda: process_group.check(alone))
    return summed, reductions, counts, process_group.world_size(group), inside


def tensors_to_sum(draw: Draw) -> list[list[Tensor]]:
    return [
        [
            draw.normal(3, 4).T,
            draw.normal(5).float(),
            torch.tensor(7 - rank),
            draw.normal(0, 3),
            draw.normal(2, 2).requires_grad_(),
            draw.normal(4).bfloat16(),
            draw.normal().reshape(()),
        ]
        for rank in range(2)
    ]


def test_sums_and_counts(results: tuple[dict, Results]) -> None:
    _, tensors = results[0]["sums"]
    for rank, result in enumerate(results[1]):
        summed, reductions, counts, size, inside = result["sums"]
        for got, first, second in zip(summed, *tensors, strict=True):
            assert got.dtype == first.dtype
            assert torch.equal(got, (first + second).detach())
        assert (reductions, counts, size) == (4, [10, 5], 2), "one all-reduce for each dtype"
        if rank == 0:
            assert all(map(torch.equal, inside, tensors[0]))
        else:
            assert inside == ["ValueError: process_group must be a group that this process is in, got NON_GROUP_MEMBER"]


def test_without_a_group_nothing_happens() -> None:
    tensors = [torch.ones(2), torch.ones(3)]
    summed = process_group.sum_over(tensors, None)
    assert [id(tensor) for tensor in summed] == [id(tensor) for tensor in tensors]
    count = process_group.joined_count(5, None, "cpu")
    assert type(count) is int
    assert (count, process_group.world_size(None)) == (5, 1)
    process_group.check(None)


def test_a_group_that_cannot_serve(draw: Draw) -> None:
    h, f, rhs, *_ = make(draw, 5, 4, 3)
    with pytest.raises(TypeError, match=r"process_group must be a torch.distributed.ProcessGroup or None, got str"):
        solve_hessian(h, f, rhs, damping=0.1, process_group="world")  # type: ignore[arg-type]
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        group = torch.distributed.group.WORLD
        alone, all_rows = (solve_hessian(h, f, rhs, damping=0.1, process_group=given) for given in (group, None))
        torch.testing.assert_close(alone.weight, all_rows.weight)
        method = fastmeta.graph(fastmeta.L2I(process_group=group))
        with pytest.raises(ValueError, match=r"process_group must be None for fastmeta\.graph"):
            method.refine(unlabeled=h, holdout=h, targets=f)
    finally:
        torch.distributed.destroy_process_group()
    for call in (
        lambda: solve_hessian(h, f, rhs, damping=0.1, process_group=group),
        lambda: process_group.sum_over([h], group),
        lambda: process_group.joined_count(1, group, "cpu"),
        lambda: fastmeta.MetaGradient(process_group=group),
    ):
        with pytest.raises(RuntimeError, match=r"process_group.*init_process_group"):
            call()


def both(rank: int, cases: list[Case]) -> list[tuple]:
    """Every case with this process's rows and with all rows."""
    results = []
    for case in cases:
        with as_on_gpu(case["on_gpu"]), warnings.catch_warnings():
            warnings.simplefilter("ignore", NotConvergedWarning)
            results.append((numbers(solve(case, rank)), numbers(solve(case, None))))
    return results


# Conjugate gradients amplify rounding from iteration to iteration: either a few, or all until nothing is left.
FEW = {"tol": 1e-3, "max_iter": 6}
ALL = {"tol": 1e-13, "max_iter": 300}


def problems(draw: Draw) -> Iterator[Case]:
    """Rows in uneven parts, one of them empty now and then."""
    for loss in LOSSES:
        for size in SIZES.values():
            problem = make(draw, *size)
            for on_gpu, solver in [*((False, s) for s in SOLVERS), *((True, s) for s in (*ITERATIVE, "auto"))]:
                for first, until in ((draw.choice((0, size[0])), FEW), (draw.integer(0, size[0] + 1), FEW), (2, ALL)):
                    options = {"loss": loss, "damping": 0.3, "solver": solver, **until}
                    flags = {"bias": draw.integer(0, 2), "weighted": draw.integer(0, 2), "on_gpu": on_gpu}
                    yield {"problem": problem, "options": options, "first": first, **flags}
    # No damping: what no solution meets stays in the residual. The Hessian is singular, so that rounding grows without
    # bound: only the first two iterates can be compared digit for digit, and pcg's, with the inverse of a singular
    # preconditioner, not even they.
    problem = make(draw, 4, 9, 3)
    for loss in [loss for loss in LOSSES if loss != "huber"]:  # whose curvature is 0 in some rows: refused
        for on_gpu in (False, True):
            options = {"loss": loss, "damping": 0.0, "solver": "cg", "tol": 1e-3, "max_iter": 2}
            flags = {"bias": True, "weighted": True, "on_gpu": on_gpu}
            yield {"problem": problem, "options": options, "first": 3, **flags}
    # No rows anywhere.
    options = {"damping": 0.3, "solver": "pcg"}
    yield {"problem": make(draw, 0, 4, 3), "options": options, "first": 0, "bias": 1, "weighted": 1, "on_gpu": False}


def large(solver: str, on_gpu: bool, damping: float = 1e-2) -> Case:
    """Large enough for auto to begin with cg on the host; with little damping it changes to pcg."""
    options = {"damping": damping, "solver": solver, "tol": 1e-3, "max_iter": 300}
    problem = power_law(256, 128, 10, dtype=torch.float64)
    return {"problem": problem, "options": options, "first": 100, "bias": True, "weighted": False, "on_gpu": on_gpu}


@pytest.fixture(scope="module")
def results(module_draw: Draw) -> tuple[dict, Results]:
    """Calls, and what they give in each process."""
    calls = {
        "both": (both, [*problems(module_draw), large("auto", False, 1.0), large("auto", False), large("pcg", True)]),
        "behavior": (behavior, shared_cases(module_draw)),
        "sums": (sums, tensors_to_sum(module_draw)),
    }
    return calls, forked.run_each(calls)


def residual_of(case: Case, solution: Tensor) -> float:
    """With the rows of all processes, from the definition."""
    weight = solution[: case["problem"][2].numel()].view_as(case["problem"][2])
    given = SimpleNamespace(weight=weight, bias=solution[weight.numel() :] if case["bias"] else None)
    options = case["options"]
    loss = options.get("loss", "cross_entropy")
    return true_residual(case["problem"], given, case["weighted"], loss, options["damping"])  # type: ignore[arg-type]


def test_every_solver_gives_what_one_process_gives(results: tuple[dict, Results]) -> None:
    _, cases = results[0]["both"]
    for case, *every in zip(cases, *(result["both"] for result in results[1]), strict=True):
        said = str({name: value for name, value in case.items() if name != "problem"} | {"N": len(case["problem"][0])})
        changes = case["options"] == large("auto", False)["options"]
        for (x, iterations, residual), (expected, expected_iterations, expected_residual) in every:
            if changes:  # after this many iterations rounding has grown to the tolerance
                assert iterations > trial_iterations(256, 10, 129, in_row_space=False)
                assert max(residual, expected_residual) <= 1e-3
                continue
            assert iterations == expected_iterations or case["options"].get("tol") == ALL["tol"], said
            assert float((x - expected).norm()) <= 1e-10 * float(expected.norm()), said
            for solution, told in ((x, residual), (expected, expected_residual)):
                assert told == pytest.approx(residual_of(case, solution), rel=1e-7, abs=1e-12), said
        assert torch.equal(every[0][0][0], every[1][0][0]), f"the processes have the same: {said}"
