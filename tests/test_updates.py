"""Updates: steps on labels, the pull-back, and tables under Masked Adam and others."""

import copy

import pytest
import torch
from brute_force import assert_close
from torch import Tensor

from fastmeta.updates import LabelLogitStep, LabelStep, LabelTable, MaskedAdamTable, PullBack, WeightTable


def test_label_step(draw):
    labels, gradient = draw.probabilities(5, 3), draw.normal(5, 3)
    moved = labels - 0.4 * gradient
    assert_close(LabelStep(step=0.4, project=False)(gradient, labels, None).labels, moved)
    projected = LabelStep(step=0.4)(gradient, labels, None)
    clipped = moved.clamp_min(0)
    assert_close(projected.labels, clipped / clipped.sum(-1, keepdim=True))
    assert torch.equal(projected.weights, torch.ones(5, dtype=torch.float64))


def test_a_row_left_all_zero_becomes_uniform():
    refined = LabelStep(step=1.0)(torch.full((1, 4), 2.0), torch.full((1, 4), 0.25), None)
    assert torch.equal(refined.labels, torch.full((1, 4), 0.25))


def test_label_logit_step(draw):
    q, gradient = draw.normal(5, 3).requires_grad_(), draw.normal(5, 3)
    moved = q - 0.4 * torch.autograd.grad((gradient * q.softmax(-1)).sum(), q)[0]
    labels = q.softmax(-1).detach()
    assert_close(LabelLogitStep(step=0.4)(gradient, labels, None).labels, moved.softmax(-1))


@pytest.mark.parametrize("grad_mode", [True, False])
def test_pull_back_is_a_vector_jacobian_product(draw, grad_mode):
    q, gradient = draw.normal(5, 3).requires_grad_(), draw.normal(5, 3)
    labels = (2 * q).sigmoid()
    with torch.set_grad_enabled(grad_mode):
        refined = PullBack(weight=0.3)(gradient, labels, None)
    expected = torch.autograd.grad(labels, q, 0.3 * gradient, retain_graph=True)[0]
    assert_close(torch.autograd.grad(refined.loss, q)[0], expected)
    assert torch.equal(refined.labels, labels)
    assert not refined.labels.requires_grad


def random_steps(table: MaskedAdamTable, draw, count: int) -> list[tuple[Tensor, Tensor]]:
    steps = []
    for _ in range(count):
        index = draw.classes(6, len(table.values))
        steps.append((index, draw.normal(6, *table.values.shape[1:])))
    return steps


@pytest.mark.parametrize("shape", [(9,), (9, 3)])
def test_masked_adam_table_is_one_adam_for_each_row(draw, shape):
    """Torch's Adam, run separately on every row that was ever sampled; repeated places are summed first."""
    table = MaskedAdamTable(torch.zeros(shape, dtype=torch.float64), lr=0.05)
    rows = [torch.zeros(shape[1:], dtype=torch.float64, requires_grad=True) for _ in range(9)]
    adams = [torch.optim.Adam([row], lr=0.05) for row in rows]
    for index, gradient in random_steps(table, draw, 5):
        table.step_(index, gradient)
        for place in index.unique().tolist():
            rows[place].grad = gradient[index == place].sum(0)
            adams[place].step()
    assert_close(table.values, torch.stack(rows))


@pytest.mark.parametrize("shape", [(9,), (9, 3)])
@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_a_plain_optimizer_has_a_gradient_of_zero_for_all_other_rows(draw, shape, name):
    table = MaskedAdamTable(torch.zeros(shape, dtype=torch.float64), lr=0.05, optimizer=name, low=-0.1)
    rows = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([rows], lr=0.05) if name == "adam" else torch.optim.SGD([rows], lr=0.05)
    for index, gradient in random_steps(table, draw, 5):
        table.step_(index, gradient)
        rows.grad = torch.zeros_like(rows)
        for place, row in zip(index.tolist(), gradient, strict=True):
            rows.grad[place] += row
        optimizer.step()
        with torch.no_grad():
            rows.clamp_(min=-0.1)
        assert_close(table.values, rows.detach())
    before = copy.deepcopy(table.state_dict())
    table.step_(torch.tensor([2]), torch.full((1, *shape[1:]), torch.nan, dtype=torch.float64))
    assert all(value.equal(before[key]) for key, value in table.state_dict().items())


@pytest.mark.parametrize("optimizer", ["masked_adam", "adam", "sgd"])
def test_a_table_resumes_bit_for_bit(draw, optimizer):
    table, other = (MaskedAdamTable(torch.ones(9), lr=0.05, optimizer=optimizer, low=0.9) for _ in range(2))
    steps = random_steps(table, draw, 6)
    for index, gradient in steps[:3]:
        table.step_(index, gradient)
    state = table.state_dict()
    other.load_state_dict(state)
    for one in (table, other):
        for index, gradient in steps[3:]:
            one.step_(index, gradient)
    for name, tensor in table.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor)
        unused = optimizer == "sgd" and name != "values"
        assert torch.equal(state[name], tensor) == unused, "the saved state must not move on"


def test_loading_checks_shapes_before_it_changes_anything():
    table = MaskedAdamTable(torch.ones(9), lr=0.05)
    state = MaskedAdamTable(torch.zeros(9), lr=0.05).state_dict()
    with pytest.raises(ValueError, match=r"exp_avg must be \[9\] like that of MaskedAdamTable, got \[8\]"):
        table.load_state_dict(state | {"exp_avg": torch.zeros(8)})
    del state["steps"]
    with pytest.raises(ValueError, match="state must have a tensor 'steps'"):
        table.load_state_dict(state)
    assert torch.equal(table.values, torch.ones(9))


@pytest.mark.parametrize("index", [[0, 9], [-1, 2]])
def test_places_outside_the_unlabeled_set(index):
    table = MaskedAdamTable(torch.ones(9), lr=0.05)
    with pytest.raises(IndexError, match=r"index must be places in the unlabeled set, in \[0, 9\), got (9|-1)"):
        table.rows(torch.tensor(index))


def test_tables_start_at_one_and_at_uniform():
    imputed = torch.zeros(2, 4)
    index = torch.tensor([3, 1])
    assert torch.equal(WeightTable(5).weights(imputed, index), torch.ones(2))
    assert torch.equal(LabelTable(5, 4).labels(imputed, index), torch.full((2, 4), 0.25))


def test_a_table_moves_to_the_device_of_its_index():
    table = MaskedAdamTable(torch.ones(9), lr=0.05)
    table.to("meta")
    state = table.state_dict()
    assert {tensor.device.type for tensor in state.values()} == {"meta"}
    assert table.rows(torch.zeros(3, dtype=torch.int64, device="meta")).shape == (3,)
