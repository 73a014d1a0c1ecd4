import math

import pytest
import torch
from scipy import stats

from fastmeta.data import KeyedRandom
from fastmeta.ssl import kl_divergence, mix_up


def batches(generator, count, shape=(2, 3), classes=4):
    def draw(*size):
        return torch.randn(count, *size, generator=generator, dtype=torch.float64)

    return draw(*shape), draw(classes).softmax(1), draw(*shape), draw(classes).softmax(1)


def shares(generator, count, alpha):
    """lambda of each example: mixing ones with zeros shows it."""
    ones, zeros = torch.ones(count, 1, dtype=torch.float64), torch.zeros(count, 1, dtype=torch.float64)
    return mix_up(ones, ones, zeros, zeros, alpha=alpha, generator=generator).inputs.flatten()


@pytest.mark.parametrize("shape", [(), (5,), (1, 3, 2)])
def test_inputs_and_targets_are_mixed_by_one_share_per_example(generator, shape):
    first, first_targets, second, second_targets = batches(generator, 6, shape)
    mixed = mix_up(first, first_targets, second, second_targets, alpha=1.0, generator=generator)
    found = set()
    for i in range(6):
        apart = first_targets[i] - second_targets[i]
        share = ((mixed.targets[i] - second_targets[i]) @ apart / (apart @ apart)).item()
        assert 0 < share < 1
        for row, one, other in zip(mixed, (first, first_targets), (second, second_targets), strict=True):
            assert torch.allclose(row[i], share * one[i] + (1 - share) * other[i], rtol=1e-9)
        found.add(round(share, 9))
    assert len(found) == 6


@pytest.mark.parametrize("alpha", [0.1, 1.0, 4.0])
def test_shares_have_the_moments_of_the_beta_distribution(generator, alpha):
    share = shares(generator, 40_000, alpha)
    variance = 1 / (4 * (2 * alpha + 1))
    fourth = variance**2 * (3 - 6 / (2 * alpha + 3))  # kurtosis of Beta(alpha, alpha)
    assert abs(share.mean() - 0.5) < 5 * math.sqrt(variance / len(share))
    error = math.sqrt((fourth - variance**2) / len(share))
    assert abs(share.var(unbiased=False) - variance) < 5 * error
    assert (share < 0.5).double().mean() == pytest.approx(0.5, abs=5 * 0.5 / 200)  # nobody takes the larger one


def test_shares_of_a_tiny_alpha_do_not_underflow(generator):
    share = shares(generator, 2000, 1e-4)
    assert bool(share.isfinite().all())
    assert ((share < 1e-6) | (share > 1 - 1e-6)).double().mean() > 0.95
    assert 800 < share.sum() < 1200


def test_the_same_generator_mixes_the_same(generator):
    arguments = batches(generator, 5)
    first, second = (mix_up(*arguments, alpha=0.3, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert first.inputs.equal(second.inputs)
    assert first.targets.equal(second.targets)
    state = torch.get_rng_state()
    mix_up(*arguments, alpha=0.3, generator=generator)
    assert torch.get_rng_state().equal(state)
    mix_up(*arguments, alpha=0.3)
    assert not torch.get_rng_state().equal(state)


def test_dtypes_stay(generator):
    images, targets, others, other_targets = batches(generator, 3)
    mixed = mix_up(images.half(), targets.float(), others.half(), other_targets.float(), alpha=1.0)
    assert (mixed.inputs.dtype, mixed.targets.dtype) == (torch.float16, torch.float32)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"second": torch.zeros(2, 2, 3)}, ValueError, r"second must be \[N, ...\] = \[3, 2, 3\], got \[2, 2, 3\]"),
        ({"second": torch.zeros(3, 3, 2)}, ValueError, r"second must be .*, got \[3, 3, 2\]"),
        ({"first": torch.tensor(1.0)}, ValueError, r"first must be \[N, ...\], got a single number"),
        ({"first": torch.zeros(3, 2, 3, dtype=torch.uint8)}, TypeError, "first must be float32.*, got uint8"),
        ({"first_targets": torch.zeros(2, 4)}, ValueError, r"first_targets must be \[N, C\] = \[3, 4\], got \[2, 4\]"),
        ({"second_targets": torch.zeros(3, 5)}, ValueError, r"second_targets must be \[N, C\] = \[3, 4\], got"),
        ({"first_targets": torch.tensor([1, 2, 0])}, TypeError, "first_targets must be float32.*, got int64"),
        ({"second": torch.zeros(3, 2, 3).double()}, TypeError, "second must be float32 like first, got float64"),
        ({"alpha": 0.0}, ValueError, "alpha must be above 0, got 0.0"),
        ({"alpha": math.nan}, ValueError, "alpha must be finite, got nan"),
    ],
)
def test_bad_arguments_are_named(changes, error, message):
    first, first_targets = torch.zeros(3, 2, 3), torch.zeros(3, 4)
    arguments = {"first": first, "first_targets": first_targets, "second": first, "second_targets": first_targets}
    with pytest.raises(error, match=message):
        mix_up(**{**arguments, "alpha": 1.0, **changes})


def test_divergence_to_the_targets_by_hand(generator):
    logits = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    targets = torch.randn(3, 4, generator=generator, dtype=torch.float64).softmax(1)
    targets[0] = torch.tensor([0.0, 1.0, 0.0, 0.0])  # 0 log 0 = 0
    expected = 0.0
    for f, y in zip(logits.tolist(), targets.tolist(), strict=True):
        total = sum(math.exp(value) for value in f)
        expected += sum(t * math.log(t * total / math.exp(value)) for t, value in zip(y, f, strict=True) if t)
    assert kl_divergence(logits, targets).item() == pytest.approx(expected / 3, rel=1e-12)


def test_divergence_differs_from_the_cross_entropy_by_a_constant_of_the_model(generator):
    logits = torch.randn(3, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.randn(3, 4, generator=generator, dtype=torch.float64).softmax(1)
    (slope,) = torch.autograd.grad(kl_divergence(logits, targets), logits)
    assert torch.allclose(slope, (logits.softmax(1) - targets) / 3, atol=1e-15)
    assert not kl_divergence(logits.detach(), targets.requires_grad_()).requires_grad


def test_divergence_of_half_precision_logits_is_computed_in_float32(generator):
    logits = torch.randn(64, 10, generator=generator).bfloat16()
    loss = kl_divergence(logits, logits.float().softmax(1))
    assert loss.dtype == torch.float32
    assert abs(loss.item()) < 1e-6


@pytest.mark.parametrize("alpha", [0.1, 0.75, 1.0, 4.0])
def test_shares_keyed_by_example_are_of_the_beta_distribution(alpha):
    ones, zeros = torch.ones(20_000, 1, dtype=torch.float64), torch.zeros(20_000, 1, dtype=torch.float64)
    keys = torch.arange(20_000)

    def share(rows):
        random = KeyedRandom(3, "labeled", "mix-up", keys[rows])
        return mix_up(ones[rows], ones[rows], zeros[rows], zeros[rows], alpha=alpha, random=random).inputs.flatten()

    everything = share(slice(None))
    assert stats.kstest(everything.numpy(), "beta", args=(alpha, alpha)).pvalue > 1e-4
    assert share(slice(7, 9)).equal(everything[7:9])
