"""Masked Adam on a table with one entry for each unlabeled example."""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fastmeta
from bench.case import TOLERANCE, Case, Cost, Error, Role, Variant, Workload, compiled, distance_to

OPERATOR = "masked_adam_"
LR, BETAS, EPS, LOW, HIGH = 0.05, (0.9, 0.999), 1e-8, 0.0, 2.0
STEPS = 10  # updates that the rows of the first batch have had
BATCHES = 64  # different sets of rows, in turn, as an epoch brings them
CACHE_LINE = 64


class State:
    """Table and averages as they stand before the first batch."""

    def __init__(self, entries: int, rows: int, device: str = "cpu") -> None:
        generator = torch.Generator(device).manual_seed(0)
        visited = torch.randperm(entries, generator=generator, device=device)[: BATCHES * rows]
        # Sorted and without repetition, which the eager forms and SparseAdam's fast path need.
        self.batches = [batch.sort().values for batch in visited.split(rows)]
        self.grad = torch.randn(rows, generator=generator, device=device)
        first = self.batches[0]
        self.table = torch.rand(entries, generator=generator, device=device) + 0.5
        self.exp_avg = torch.zeros(entries, device=device)
        self.exp_avg_sq = torch.zeros(entries, device=device)
        self.exp_avg[first] = 0.1 * torch.randn(rows, generator=generator, device=device)
        self.exp_avg_sq[first] = torch.rand(rows, generator=generator, device=device)
        self.steps = torch.zeros(entries, dtype=torch.int32, device=device)
        self.steps[first] = STEPS
        self.count = itertools.cycle(self.batches)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.table, self.exp_avg, self.exp_avg_sq, self.steps

    def restart(self, start: "State") -> None:
        for target, source in zip(self.tensors(), start.tensors(), strict=True):
            target.copy_(source)
        self.count = itertools.cycle(self.batches)


def ours(index: Tensor, grad: Tensor, table: Tensor, m: Tensor, v: Tensor, steps: Tensor) -> Tensor:
    return fastmeta.ops.masked_adam_(table, index, grad, m, v, steps, lr=LR, betas=BETAS, eps=EPS, low=LOW, high=HIGH)


def eager(index: Tensor, grad: Tensor, table: Tensor, m: Tensor, v: Tensor, steps: Tensor) -> Tensor:
    t = steps.index_select(0, index) + 1
    m_new = m.index_select(0, index).lerp_(grad, 1 - BETAS[0])
    v_new = v.index_select(0, index).mul_(BETAS[1]).addcmul_(grad, grad, value=1 - BETAS[1])
    m_hat = m_new / (1 - BETAS[0] ** t)
    v_hat = v_new / (1 - BETAS[1] ** t)
    w = table.index_select(0, index).addcdiv_(m_hat, v_hat.sqrt_().add_(EPS), value=-LR).clamp_(LOW, HIGH)
    steps.index_copy_(0, index, t)
    m.index_copy_(0, index, m_new)
    v.index_copy_(0, index, v_new)
    return table.index_copy_(0, index, w)


def eager_shared_count(index: Tensor, grad: Tensor, table: Tensor, m: Tensor, v: Tensor, _: Tensor) -> Tensor:
    """One count of steps for all entries, as SparseAdam has: fewer operations, but not the paper's bias correction."""
    t = STEPS + 1
    m_new = m.index_select(0, index).lerp_(grad, 1 - BETAS[0])
    v_new = v.index_select(0, index).mul_(BETAS[1]).addcmul_(grad, grad, value=1 - BETAS[1])
    denominator = v_new.sqrt().mul_((1 - BETAS[1] ** t) ** -0.5).add_(EPS)
    w = table.index_select(0, index).addcdiv_(m_new, denominator, value=-LR / (1 - BETAS[0] ** t)).clamp_(LOW, HIGH)
    m.index_copy_(0, index, m_new)
    v.index_copy_(0, index, v_new)
    return table.index_copy_(0, index, w)


class TorchAdam:
    """An optimizer of torch on the whole table, then the table or its rows clamped."""

    def __init__(self, state: State, optimizer: Callable[..., torch.optim.Optimizer], **options: Any) -> None:
        self.state = state
        self.table = torch.nn.Parameter(state.table)
        self.optimizer = optimizer([self.table], lr=LR, betas=BETAS, eps=EPS, **options)

    def restart(self, start: State) -> None:
        self.state.restart(start)
        averages = {"exp_avg": self.state.exp_avg, "exp_avg_sq": self.state.exp_avg_sq}
        self.optimizer.state[self.table] = {"step": self.step_count(), **averages}

    def step_count(self) -> Any:
        return STEPS


class SparseAdam(TorchAdam):
    """Gradients that need no coalescing; only the rows are clamped."""

    def __call__(self) -> Tensor:
        index, grad = next(self.state.count), self.state.grad
        self.table.grad = torch.sparse_coo_tensor(
            index.unsqueeze(0), grad, self.table.shape, is_coalesced=True, check_invariants=False
        )
        self.optimizer.step()
        return self.state.table.index_copy_(0, index, self.state.table.index_select(0, index).clamp_(LOW, HIGH))


class DenseAdam(TorchAdam):
    """Entries outside the batch move too."""

    def step_count(self) -> Any:
        self.table.grad = torch.zeros_like(self.state.table)
        self.table.grad.index_copy_(0, self.state.batches[0], self.state.grad)
        return torch.tensor(float(STEPS), device=self.table.device)

    def __call__(self) -> Tensor:
        self.optimizer.step()
        return self.state.table.clamp_(LOW, HIGH)


def error_of_step(state: State) -> Error:
    """Relative error of the change of the whole table, against the step in float64."""
    index, g = state.batches[0], state.grad.double()
    t = state.steps[index].double() + 1
    m = BETAS[0] * state.exp_avg[index].double() + (1 - BETAS[0]) * g
    v = BETAS[1] * state.exp_avg_sq[index].double() + (1 - BETAS[1]) * g * g
    step = LR * (m / (1 - BETAS[0] ** t)) / ((v / (1 - BETAS[1] ** t)).sqrt() + EPS)
    before = state.table.double()
    after = before.clone()
    after[index] = (before[index] - step).clamp(LOW, HIGH)
    distance = distance_to(after - before)
    return lambda table: distance(table.double() - before)


def build(entries: int, rows: int, dtype: torch.dtype, device: str) -> Workload:
    start = State(entries, rows, device)

    def on_rows(name: str, function: Callable[..., Tensor], role: Role, note: str = "") -> Variant:
        state = State(entries, rows, device)
        run = compiled(function) if role == "compile" else function

        def call() -> Tensor:
            return run(next(state.count), state.grad, *state.tensors())

        return Variant(name, call, role, prepare=partial(state.restart, start), note=note)

    sparse = SparseAdam(State(entries, rows, device), torch.optim.SparseAdam)
    dense = DenseAdam(State(entries, rows, device), torch.optim.Adam, fused=True)
    shared_count = "one count of steps for all entries"
    variants = [
        on_rows("fastmeta", ours, "fastmeta"),
        on_rows("eager", eager, "eager"),
        on_rows("eager, one count", eager_shared_count, "peer", shared_count),
        on_rows("torch.compile", eager, "compile"),
        Variant("SparseAdam", sparse, prepare=partial(sparse.restart, start), graph=False, note=shared_count),
        Variant("Adam(fused)", dense, prepare=partial(dense.restart, start), graph=False, note="moves the whole table"),
    ]
    # Four tables, a line of each row read and written; the index and the gradient read.
    cost = Cost(0, rows * (4 * 2 * CACHE_LINE + 8 + 4), working_set=4 * 4 * entries)
    return Workload(variants, error_of_step(start), cost, TOLERANCE[dtype])


# An entry for each image of ImageNet's training set, 768 of them in a batch.
NOTE = "Other rows in every call. The floor is at the rate of a copy in order; the rows are not in order."


def cases(device: str) -> list[Case]:
    return [Case(OPERATOR, "768 of 1,281,167", partial(build, 1_281_167, 768), dtypes=(torch.float32,), note=NOTE)]
