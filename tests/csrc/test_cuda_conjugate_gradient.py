"""Conjugate gradients in one launch, against the same iterations in float64 and against PyTorch's in float32."""

import math
import os
from functools import partial
from typing import Any

import pytest
import torch
from cases import DEVICE, Draw
from hessian_problems import make, power_law, solve, targets_of
from poison import poisoned_memory
from torch import Tensor

import fastmeta
from fastmeta.losses import LOSSES, READ_BY_CURVATURE
from fastmeta.ops import SolverState
from fastmeta.ops.hvp import hessian_vector_product_reference
from fastmeta.ops.solve import conjugate_gradient as cg

# Where a build was promised they run, and fail without it.
pytestmark = pytest.mark.skipif(
    "cuda" not in cg.OPERATOR.implementations(DEVICE) and os.environ.get("FASTMETA_REQUIRE_CUDA") != "1",
    reason="no CUDA kernel",
)
MULTIPROCESSORS = 8 if DEVICE == "cpu" else torch.cuda.get_device_properties(0).multi_processor_count
MANY = 64 * MULTIPROCESSORS  # rows from which on a warp takes 16 of them, not 2
SIZES = {
    "one row": (1, 4, 3),
    "one output": (9, 5, 1),
    "vectors": (40, 12, 5),
    "no vectors": (41, 13, 7),
    "32 outputs": (70, 9, 32),
    "17 outputs": (30, 140, 17),
    "many rows": (MANY + 18, 21, 10),
    "many rows, 32": (MANY + 18, 8, 29),
    "several chunks": (4 * MANY + 52, 6, 3),
    "wide": (20, 1100, 4),
}


def kernel(features: Tensor, logits: Tensor, rhs: Tensor, signs: Tensor | None = None, **options: Any) -> Any:
    """``x`` and the row of numbers, as a list."""
    options = {"loss": "cross_entropy", "damping": 0.3, "max_iter": 5, "target": 0.0, "targets": None, **options}
    target = torch.tensor(options["target"], dtype=torch.float64, device=features.device)
    call = cg.OPERATOR.select("cuda", features)
    assert call is not None
    numbers = LOSSES[options["loss"]], options["damping"], options["max_iter"]
    with poisoned_memory():
        x, row = call(features, logits, options["targets"], signs, rhs, target, *numbers)
    return x, row.tolist()


def plain(
    dtype: torch.dtype, features: Tensor, logits: Tensor, rhs: Tensor, signs: Tensor | None, **options: Any
) -> Any:
    """The iterations of the CPU in a dtype."""
    h, f, b, w, y = (None if t is None else t.to(dtype) for t in (features, logits, rhs, signs, options["targets"]))
    assert h is not None

    def product(v: Tensor) -> Tensor:
        return hessian_vector_product_reference(h, f, v, None, w, options["loss"], options["damping"], y)[0]  # type: ignore[arg-type]

    outcome = cg.conjugate_gradient(product, b, target=options["target"], max_iter=options["max_iter"])  # type: ignore[arg-type]
    return outcome.solution, outcome.row


def system(generator: torch.Generator, size: tuple[int, int, int], loss: str, *, signed: bool) -> tuple[Any, ...]:
    draw = Draw(generator, torch.float32)
    h, f, rhs, *_ = make(draw, *size)
    signs = (draw.classes(size[0], 4) - 1).clamp(-1, 1).to(h) if signed else None
    targets = targets_of(f).contiguous() if loss in READ_BY_CURVATURE else None
    return h, f, rhs, signs, targets


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("loss", LOSSES)
def test_iterates_are_as_exact_as_those_of_pytorch(
    generator: torch.Generator, loss: str, size: str, signed: bool
) -> None:
    """A few iterations, and damping of the size of the Hessian, as they amplify rounding; more for both signs."""
    h, f, rhs, signs, targets = system(generator, SIZES[size], loss, signed=signed)
    damping = (3.0 if signed else 0.1) * float(torch.linalg.matrix_norm(h, 2)) ** 2
    options = {"loss": loss, "damping": damping, "max_iter": 3, "target": 0.0, "targets": targets}
    exact, expected = plain(torch.float64, h, f, rhs, signs, **options)
    eager, _ = plain(torch.float32, h, f, rhs, signs, **options)
    x, row = kernel(h, f, rhs, signs, **options)
    scale = float(exact.abs().max())
    error, budget = (float((each.double() - exact).abs().max()) / scale for each in (x, eager))
    assert error <= max(2 * budget, 1e-6), (error, budget)
    if expected[cg.SQUARED] > 1e-8 * float(rhs.square().sum()):  # else nothing but rounding is left
        assert row[cg.COUNT] == expected[cg.COUNT]
        assert row[cg.STATUS] == expected[cg.STATUS] == cg.RUNNING
        assert row[cg.SQUARED] == pytest.approx(expected[cg.SQUARED], rel=1e-2)
        assert row[cg.SLOPE] == row[cg.SQUARED]
    assert row[cg.TARGET] == 0
    assert row[cg.STATUS + 1 :] == [0.0] * (cg.ROW - cg.STATUS - 1)


@pytest.mark.parametrize("size", [(40, 2050, 10), (70, 2048, 9), (MANY + 1, 1040, 10), (9, 784, 15), (30, 1540, 7)])
def test_directions_in_parts_and_up_to_all_shared_memory(
    generator: torch.Generator, size: tuple[int, int, int]
) -> None:
    h, f, rhs, *_ = system(generator, size, "cross_entropy", signed=False)
    options = {"loss": "cross_entropy", "damping": float(h.shape[1]), "max_iter": 2, "target": 0.0, "targets": None}
    exact, _ = plain(torch.float64, h, f, rhs, None, **options)
    eager, _ = plain(torch.float32, h, f, rhs, None, **options)
    error, budget = (float((each.double() - exact).abs().max()) for each in (kernel(h, f, rhs, **options)[0], eager))
    assert error <= max(2 * budget, 1e-6 * float(exact.abs().max()))


def test_it_stops_where_the_residual_is_small(generator: torch.Generator) -> None:
    for size in ((60, 20, 5), (530, 20, 10)):
        h, f, rhs, *_ = given = system(generator, size, "cross_entropy", signed=False)[:3]
        target = 1e-3 * float(rhs.norm())
        x, row = kernel(*given, target=target, max_iter=500)
        image = hessian_vector_product_reference(h.double(), f.double(), x.double(), None, None, "cross_entropy", 0.3)[
            0
        ]
        assert row[cg.STATUS] == cg.CONVERGED
        assert float((rhs - image).norm()) <= 1.05 * target
        _, before = kernel(*given, target=target, max_iter=int(row[cg.COUNT]) - 1)
        assert before[cg.STATUS] == cg.RUNNING
        assert before[cg.SQUARED] > target**2 >= row[cg.SQUARED]
        assert row[cg.TARGET] == pytest.approx(target**2)
        same, again = kernel(*given, target=target, max_iter=501)
        assert torch.equal(same, x)
        assert again == row, "iterations after convergence are none"


def test_why_it_stops(generator: torch.Generator) -> None:
    h, f, rhs, *_ = system(generator, (70, 6, 4), "mse", signed=False)  # some blocks
    for change, status, count in (
        ({"signs": -torch.ones_like(h[:, 0])}, cg.NEGATIVE, 1),
        ({"rhs": 0 * rhs}, cg.CONVERGED, 0),
        ({"target": 1e9}, cg.CONVERGED, 0),
        ({"max_iter": 0}, cg.RUNNING, 0),
    ):
        x, row = kernel(**{"features": h, "logits": f, "rhs": rhs, "loss": "mse", **change})
        assert (row[cg.STATUS], row[cg.COUNT]) == (status, count)
        assert torch.equal(x, 0 * rhs)
    for name, bad in (("features", math.nan), ("features", math.inf), ("rhs", math.nan), ("rhs", math.inf)):
        given = {"features": h.clone(), "logits": f, "rhs": rhs.clone()}
        given[name][2, 3] = bad
        x, row = kernel(**given, loss="mse")
        assert row[cg.STATUS] == cg.NOT_FINITE
        assert bool(x.isnan().all())
    # 64 rows of 1/8 and a sign of -1 take away twice their sum of squares: nothing is left of a damping of 2.
    rows = torch.full_like(h[:64, :1], 0.125)
    one = (rows, f[:64, :1].contiguous(), rhs[:1, :1].contiguous())
    x, row = kernel(*one, -torch.ones_like(rows[:, 0]), loss="mse", damping=2.0)
    assert (row[cg.STATUS], row[cg.COUNT], float(x.abs().sum())) == (cg.FLAT, 1, 0.0)
    x, row = kernel(h, f.index_fill(0, torch.tensor(3, device=f.device), math.nan), rhs)
    assert row[cg.STATUS] == cg.NOT_FINITE


def test_signs_of_zero_leave_rows_out(generator: torch.Generator) -> None:
    h, f, rhs, *_ = system(generator, (50, 7, 3), "cross_entropy", signed=False)
    signs = torch.ones_like(h[:, 0])
    signs[20:] = 0
    x, _ = kernel(h, f, rhs, signs)
    alone, _ = kernel(h[:20].contiguous(), f[:20].contiguous(), rhs)
    torch.testing.assert_close(x, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
def test_any_order_of_blocks_and_threads(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch, order: str
) -> None:
    """A missing barrier, of a block or of the grid, would change bits or read poison; that between two sums of a block
    shows at random alone, where some warps get ahead of others."""
    if DEVICE != "cpu":
        pytest.skip("the order is the emulator's")
    for size in ((41, 30, 9), (530, 12, 19)):
        h, f, rhs, *_ = system(generator, size, "cross_entropy", signed=False)
        monkeypatch.delenv("FASTMETA_EMULATION_ORDER", raising=False)
        expected, numbers = kernel(h, f, rhs, max_iter=4)
        monkeypatch.setenv("FASTMETA_EMULATION_ORDER", order)
        for _ in range(4):
            x, row = kernel(h, f, rhs, max_iter=4)
            assert torch.equal(x, expected)
            assert row == numbers


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": torch.ones(5, 4, dtype=torch.float64)}, "features must be Float, got Double"),
        ({"features": torch.ones(4, 5).T}, "features must be contiguous"),
        ({"features": torch.ones(0, 4)}, r"features must have rows and columns, got \[0, 4\]"),
        ({"logits": torch.ones(6, 3)}, r"logits must be \[N, C\] = \[5, 3\], got \[6, 3\]"),
        ({"rhs": torch.ones(33, 4)}, r"rhs must have 1 to 32 rows, got \[33, 4\]"),
        ({"rhs": torch.ones(3, 5)}, r"rhs must be \[C, K\] = \[3, 4\], got \[3, 5\]"),
        ({"rhs": torch.ones(12)}, r"rhs must be 2-D, got \[12\]"),
        ({"rhs": torch.ones(4, 3).T}, "rhs must be contiguous"),
        ({"signs": torch.ones(10)[::2]}, "signs must be contiguous"),
        ({"signs": torch.ones(4)}, r"signs must be \[N\] = \[5\], got \[4\]"),
        ({"loss": "huber"}, "targets must be a tensor, got None"),
        ({"loss": "huber", "targets": torch.ones(5, 2)}, r"targets must be \[N, C\] = \[5, 3\], got \[5, 2\]"),
        ({"damping": 0.0}, "damping must be finite and > 0, got 0"),
        ({"damping": math.nan}, "damping must be finite and > 0, got nan"),
        ({"max_iter": -1}, r"max_iter must be in \[0, 2\^31\), got -1"),
        ({"target": [0.0, 1.0]}, r"target must be one number, got \[2\]"),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {
        "features": torch.ones(5, 4),
        "logits": torch.ones(5, 3),
        "rhs": torch.ones(3, 4),
        **change,
    }
    given = {name: value.to(DEVICE) if isinstance(value, Tensor) else value for name, value in given.items()}
    with pytest.raises(RuntimeError, match=message):
        kernel(**given)


def test_solve_hessian_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eagerly and in a graph, where it gets all iterations, not those that the last solve would allow."""
    calls: list[int] = []
    real = cg.OPERATOR.select

    def select(*arguments: Any) -> Any:
        kernel = real(*arguments)
        assert kernel is not None
        return lambda *given: calls.append(given[-1]) or kernel(*given)

    monkeypatch.setattr(cg.OPERATOR, "select", select)
    monkeypatch.setattr(cg, "serves", lambda tensor: True)
    problem, state = power_law(60, 12, 3), SolverState()
    call = partial(solve, problem, True, True, damping=0.3, tol=1e-3, max_iter=300, state=state, impl="cuda")
    eager = call(solver="auto")
    assert state.solver == "cg"
    assert 0 < eager.iterations < 100
    assert eager.residual <= 1e-3
    assert calls[0] == 300
    expected = solve(problem, True, True, damping=0.3, tol=1e-3, max_iter=300, solver="cg", impl="reference")
    torch.testing.assert_close(eager.weight, expected.weight, rtol=0, atol=2e-3 * float(expected.weight.norm()))
    torch.testing.assert_close(eager.bias, expected.bias, rtol=0, atol=2e-3 * float(expected.weight.norm()))
    monkeypatch.setattr(cg, "capturing", lambda tensor: True)
    state.solution = None
    captured = call(solver="cg")
    assert calls[-1] == 300
    assert isinstance(captured[2], Tensor)
    assert (captured.iterations, captured.residual) == (eager.iterations, eager.residual)
    assert torch.equal(captured.weight, eager.weight)


def test_any_number_of_iterations_may_be_asked_for() -> None:
    solution = solve(power_law(60, 12, 3), True, True, damping=0.3, tol=1e-3, max_iter=2**40, solver="cg", impl="cuda")
    assert 0 < solution.iterations < 100


def test_what_it_is_not_for() -> None:
    rows = torch.ones(2, 4, device=DEVICE)
    assert cg.in_one_launch(32, rows, "cuda")
    assert cg.in_one_launch(32, rows.bfloat16(), "cuda"), "solved in float32"
    for outputs, features in ((33, rows), (0, rows), (3, rows.double()), (32, rows.new_ones(1, 5000))):
        assert not cg.in_one_launch(outputs, features, "cuda")
    assert not cg.in_one_launch(3, torch.nn.Parameter(rows), "cuda")
    for name in ("reference", "triton"):
        assert not cg.in_one_launch(3, rows, name)
        with fastmeta.use_impl(name):
            assert not cg.in_one_launch(3, rows, None)
    with fastmeta.use_impl("cuda"):
        assert cg.in_one_launch(3, rows, None)
    assert cg.in_one_launch(3, rows, None) is rows.is_cuda
    with torch.autograd.forward_ad.dual_level():
        assert not cg.in_one_launch(3, rows, "cuda")
    undamped = {"damping": 0.0, "tol": 1e-3, "solver": "cg", "impl": "cuda"}
    assert solve(power_law(60, 12, 3), True, True, **undamped).residual <= 1e-2
