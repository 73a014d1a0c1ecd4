import copy
import dataclasses
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from fastmeta import LabelGradientAlignment, Refined
from fastmeta.data import load_digits
from fastmeta.models import ConvNet
from fastmeta.ssl import Refiner, TrainingBatch, VirtualAdversarial, virtual_adversarial_loss
from fastmeta.ssl.virtual_adversarial import conditional_entropy, virtual_adversarial_direction

PIXELS, CLASSES = 6, 4


@pytest.fixture
def model(generator):
    torch.manual_seed(generator.initial_seed())
    return nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, 7), nn.Tanh(), nn.Linear(7, CLASSES)).double()


@pytest.fixture
def images(generator):
    return torch.randn(5, 2, 3, generator=generator, dtype=torch.float64)


def same_start():
    return torch.Generator().manual_seed(11)


def start(images):
    rows = torch.randn(images.shape, generator=same_start(), dtype=images.dtype).flatten(1)
    return rows / rows.norm(dim=1, keepdim=True)


def hessians(function, images):
    """Of ``r -> KL(p(x) || p(x + r))`` at 0, an image at a time. ``[N, pixels, pixels]``."""

    def divergence(offset, image):
        fixed = function(image).log_softmax(-1).detach()
        return (fixed.exp() * (fixed - function(image + offset).log_softmax(-1))).sum()

    flat = images.flatten(1)
    return torch.stack([torch.func.hessian(divergence)(torch.zeros_like(image), image) for image in flat])


def one_image(model, images):
    return lambda pixels: model(pixels.view(1, *images.shape[1:]))[0]


def test_one_iteration_multiplies_by_the_hessian(model, images):
    product = torch.einsum("nij,nj->ni", hessians(one_image(model, images), images), start(images))
    exact = functional.normalize(product, dim=1)

    def error(xi):
        found = virtual_adversarial_direction(model, images, model(images), xi=xi, generator=same_start())
        assert found.shape == images.shape
        return (found.flatten(1) - exact).norm().item()

    assert error(1e-6) < 1e-4
    assert error(1e-3) / error(1e-4) == pytest.approx(10, rel=0.2)  # what is left out is O(xi)


def test_many_iterations_find_the_top_eigenvector(model, images):
    matrices = hessians(one_image(model, images), images)
    top = torch.linalg.eigvalsh(matrices)[:, -1]
    direction = virtual_adversarial_direction(
        model, images, model(images), xi=1e-5, power_iterations=300, generator=same_start()
    ).flatten(1)
    assert torch.allclose(direction.norm(dim=1), torch.ones_like(top), rtol=1e-12)
    quotient = torch.einsum("ni,nij,nj->n", direction, matrices, direction)
    assert torch.allclose(quotient, top, rtol=1e-2)
    # and so the loss at a small radius is the largest there is
    loss = virtual_adversarial_loss(
        model, images, model(images), radius=1e-4, xi=1e-5, power_iterations=300, generator=same_start()
    )
    assert loss.item() == pytest.approx(0.5e-8 * top.mean().item(), rel=1e-2)


def test_loss_and_gradient_are_those_of_constant_predictions_and_perturbations(model, images):
    logits = model(images)
    direction = virtual_adversarial_direction(model, images, logits, generator=same_start())
    loss = virtual_adversarial_loss(model, images, logits, radius=0.7, generator=same_start())
    fixed = logits.detach().log_softmax(1)
    written = (fixed.exp() * (fixed - model(images + 0.7 * direction).log_softmax(1))).sum() / len(images)
    assert loss.item() == pytest.approx(written.item(), rel=1e-12)
    expected = torch.autograd.grad(written, list(model.parameters()))
    for got, wanted in zip(torch.autograd.grad(loss, list(model.parameters())), expected, strict=True):
        assert torch.allclose(got, wanted, atol=1e-14)


def test_no_iteration_perturbs_at_random(model, images):
    direction = virtual_adversarial_direction(model, images, model(images), power_iterations=0, generator=same_start())
    assert torch.allclose(direction.flatten(1), start(images))


def test_model_gradients_buffers_and_mode_are_left_alone(model, images):
    model = nn.Sequential(nn.BatchNorm1d(2), model).double()
    model[0].momentum = None  # a cumulative average, which counts its batches
    model(images)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = copy.deepcopy(model)
    with torch.no_grad():
        logits = model(images)
        model[0].load_state_dict(before[0].state_dict())
        loss = virtual_adversarial_loss(model, images, logits, radius=0.5, power_iterations=2)
    assert not loss.requires_grad
    assert loss > 0
    assert virtual_adversarial_loss(model, images, logits, radius=0.5).requires_grad
    assert all(layer.training for layer in model.modules())
    for (name, value), kept in zip(model.state_dict().items(), before.state_dict().values(), strict=True):
        assert value.equal(kept), name
    assert all(bool((parameter.grad == 1).all()) for parameter in model.parameters())
    assert model[0].track_running_stats


def test_batch_statistics_are_those_of_the_perturbed_batch(model, images):
    # with them examples interact, and without a perturbation nothing moves
    model = nn.Sequential(nn.BatchNorm1d(2), model).double()
    logits = model(images)
    assert virtual_adversarial_loss(model, images, logits, radius=0.0).item() == pytest.approx(0, abs=1e-15)
    direction = virtual_adversarial_direction(model, images, logits, xi=1e-6, generator=same_start())
    offset = (1e-6 * start(images)).view_as(images).requires_grad_()
    fixed = logits.detach().softmax(1)
    (slope,) = torch.autograd.grad(-(fixed * model(images + offset).log_softmax(1)).sum(), offset)
    assert torch.allclose(direction.flatten(1), functional.normalize(slope.flatten(1), dim=1), rtol=1e-6)


def test_dropout_has_one_mask_in_all_passes_of_a_call(images, generator):
    torch.manual_seed(generator.initial_seed())
    weight, top = torch.randn(PIXELS, 32).double(), torch.randn(32, CLASSES).double()
    model = nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, 32), nn.Dropout(0.5), nn.Tanh(), nn.Linear(32, CLASSES))
    model.double()
    weight, bias, top, top_bias = model.parameters()
    logits = model(images)
    state = torch.get_rng_state()
    masks = nn.functional.dropout(torch.ones(5, 32, dtype=torch.float64), 0.5)
    after_one_pass = torch.get_rng_state()

    seen = []
    model[2].register_forward_hook(lambda layer, args, output: seen.append(output / args[0]))
    torch.set_rng_state(state)
    arguments = {"radius": 0.5, "xi": 1e-6, "power_iterations": 2, "generator": same_start()}
    loss = virtual_adversarial_loss(model, images, logits, **arguments)
    assert len(seen) == 4  # p(x), two steps of the search, and the loss
    assert all(torch.allclose(mask, masks) for mask in seen)
    assert torch.get_rng_state().equal(after_one_pass)

    # the direction is that of the net with this mask, although logits were drawn with another
    direction = start(images)
    for _ in range(2):
        rows = []
        for image, mask, row in zip(images, masks, direction, strict=True):

            def masked(pixels, mask=mask):
                return ((pixels @ weight.T + bias) * mask).tanh() @ top.T + top_bias

            rows.append(hessians(masked, image.unsqueeze(0))[0] @ row)
        direction = functional.normalize(torch.stack(rows), dim=1)
    moved = (((images.flatten(1) + 0.5 * direction) @ weight.T + bias) * masks).tanh() @ top.T + top_bias
    fixed = logits.log_softmax(1)
    expected = (fixed.exp() * (fixed - moved.log_softmax(1))).sum(1).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-3)


def test_an_image_without_a_gradient_keeps_its_direction(images):
    model = nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, CLASSES, dtype=torch.float64))
    with torch.no_grad():
        model[1].weight.zero_()
        model[1].weight[0, 0] = 1.0
        images[:, 0, 0] = torch.tensor([3000.0, 0.0, 0.1, 3000.0, -0.2])  # of the first class with probability 1
    direction = virtual_adversarial_direction(model, images, model(images), generator=same_start()).flatten(1)
    assert torch.allclose(direction[[0, 3]], start(images)[[0, 3]])
    assert torch.allclose(direction[[1, 2, 4]].abs(), torch.eye(PIXELS, dtype=torch.float64)[0].expand(3, -1))


def test_tiny_gradients_do_not_underflow(generator):
    model = nn.Linear(PIXELS, 2)
    apart = torch.randn(PIXELS, generator=generator)
    with torch.no_grad():
        model.weight.copy_(torch.stack([1e-22 * apart, -1e-22 * apart]))  # float32 ends at 1e-38, squares are below
    inputs = torch.zeros(3, PIXELS)
    direction = virtual_adversarial_direction(model, inputs, model(inputs), xi=1e22, generator=generator)
    assert torch.allclose((direction @ functional.normalize(apart, dim=0)).abs(), torch.ones(3), rtol=1e-4)


def test_float32_resolves_the_default_step_and_not_the_published_one(generator):
    torch.manual_seed(generator.initial_seed())
    digits = load_digits().images[:60]
    model = ConvNet(1, 10)
    exact = copy.deepcopy(model).double()
    inputs = digits.double()
    truth = virtual_adversarial_direction(exact, inputs, exact(inputs), xi=1e-6, generator=same_start())

    class Rounded(nn.Module):
        """The net in float32 from float64 images, so that both searches start alike."""

        def forward(self, images):
            return model(images.float())

    def cosine(xi):
        found = virtual_adversarial_direction(Rounded(), inputs, model(digits), xi=xi, generator=same_start())
        return (found * truth).flatten(1).sum(1).mean().item()

    assert cosine(1e-2) > 0.98
    assert cosine(1e-6) < 0.9


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"inputs": torch.zeros(3)}, ValueError, r"inputs must be \[N, ...\], got 1-D \[3\]"),
        ({"inputs": torch.zeros(3, 4).long()}, TypeError, "inputs must be float32.*, got int64"),
        ({"logits": torch.zeros(2, 2)}, ValueError, r"logits must be \[N, C\] = \[3, 2\], got \[2, 2\]"),
        ({"logits": torch.zeros(3)}, ValueError, r"logits must be 2-D \[N, C\], got 1-D \[3\]"),
        ({"radius": -1.0}, ValueError, "radius must be >= 0.0, got -1.0"),
        ({"radius": math.inf}, ValueError, "radius must be finite, got inf"),
        ({"xi": 0.0}, ValueError, "xi must be above 0, got 0.0"),
        ({"power_iterations": -1}, ValueError, "power_iterations must be at least 0, got -1"),
        ({"power_iterations": 1.5}, TypeError, "power_iterations must be an integer, got float"),
    ],
)
def test_bad_arguments_are_named(changes, error, message):
    arguments = {"inputs": torch.zeros(3, 4), "logits": torch.zeros(3, 2), "radius": 1.0}

    def untouched(inputs):
        raise AssertionError("the model ran")

    with pytest.raises(error, match=message):
        virtual_adversarial_loss(untouched, **{**arguments, **changes})


# The base algorithm.


@pytest.fixture
def batch(generator):
    def draw(count):
        return torch.randn(count, 1, 2, 3, generator=generator, dtype=torch.float64)

    targets = torch.tensor([0, 2, 1])
    return TrainingBatch(
        labeled=draw(3), targets=targets, weak=draw(5), second=None, index=torch.tensor([7, 0, 3, 9, 1])
    )


class Spy:
    def __init__(self, count):
        labels = torch.eye(CLASSES, dtype=torch.float64)[torch.arange(count) % CLASSES]
        weights = torch.linspace(0, 2, count, dtype=torch.float64)
        self.answer = Refined(labels, weights, torch.tensor(0.25, dtype=torch.float64))

    def refine(self, **seen):
        self.seen = seen
        return self.answer


def seeded_loss(base, model, batch, refiner=None):
    torch.manual_seed(4)
    return base.loss(model, batch, teacher=model, progress=0.3, refiner=refiner)


def test_base_by_hand(batch):
    # of a linear net with two classes the direction is known but for its sign
    model = nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, 2)).double()
    one = dataclasses.replace(batch, labeled=batch.labeled[:1], targets=torch.tensor([1]), weak=batch.weak[:1])
    base = VirtualAdversarial(radius=0.8, weight=0.6, entropy_weight=0.3)
    weight, bias = model[1].weight.tolist(), model[1].bias.tolist()
    apart = [a - b for a, b in zip(*weight, strict=True)]
    length = math.sqrt(sum(value * value for value in apart))

    def probabilities(pixels):
        logits = [sum(w * x for w, x in zip(row, pixels, strict=True)) + b for row, b in zip(weight, bias, strict=True)]
        return [math.exp(logit) / sum(math.exp(other) for other in logits) for logit in logits]

    def smoothness(pixels, sign):
        p = probabilities(pixels)
        q = probabilities([x + sign * 0.8 * a / length for x, a in zip(pixels, apart, strict=True)])
        return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))

    labeled, weak = one.labeled.flatten().tolist(), one.weak.flatten().tolist()
    entropy = sum(-p * math.log(p) for pixels in (labeled, weak) for p in probabilities(pixels)) / 2
    rest = -math.log(probabilities(labeled)[1]) + 0.3 * entropy
    loss = seeded_loss(base, model, one)
    possible = [
        rest + 0.6 * (smoothness(labeled, first) + smoothness(weak, second)) / 2
        for first in (-1, 1)
        for second in (-1, 1)
    ]
    assert min(abs(loss.total.item() - value) for value in possible) < 1e-9
    assert loss.labeled.item() == pytest.approx(-math.log(probabilities(labeled)[1]))
    assert loss.unlabeled.item() == pytest.approx(loss.total.item() - loss.labeled.item())
    assert loss.imputed.flatten().tolist() == pytest.approx(probabilities(weak))


def test_a_method_adds_the_cross_entropy_of_its_labels(model, batch):
    base, method = VirtualAdversarial(radius=0.5), Spy(5)
    alone = seeded_loss(base, model, batch)
    refined = seeded_loss(base, model, batch, Refiner(method))
    added = method.answer.weights * functional.cross_entropy(model(batch.weak), method.answer.labels, reduction="none")
    assert refined.total.item() == pytest.approx(alone.total.item() + added.mean().item() + 0.25, rel=1e-12)
    assert method.seen["labels"].requires_grad
    assert torch.allclose(method.seen["labels"], model(batch.weak).softmax(1))
    assert method.seen["index"].equal(batch.index)
    assert method.seen["mask"] is None
    slope, wanted = (
        torch.autograd.grad(value, model[1].weight)[0]
        for value in (refined.total, seeded_loss(base, model, batch).total + added.mean())
    )
    assert torch.allclose(slope, wanted, atol=1e-14)


def test_a_method_that_weighs_examples_gets_labels_with_a_gradient(model, batch):
    method = Spy(5)
    seeded_loss(VirtualAdversarial(), model, batch, Refiner(method, view="learned", hard=True))
    assert method.seen["labels"].equal(torch.eye(CLASSES).double()[model(batch.weak).argmax(1)])
    assert method.seen["mask"].equal(torch.ones(5).double())


def test_label_gradient_alignment_with_vat_learns_from_its_table(model, batch):
    base = VirtualAdversarial(radius=0.5)
    method = LabelGradientAlignment(10, CLASSES, lr=0.5, dtype=torch.float64)
    loss = seeded_loss(base, model, batch, Refiner(method, view="learned"))
    alone = seeded_loss(base, model, batch)
    uniform = -model(batch.weak).log_softmax(1).mean()  # labels before the first update
    assert loss.total.item() == pytest.approx(alone.total.item() + uniform.item(), rel=1e-12)
    rows = method.label_logits[batch.index]
    assert bool((rows != 0).any(1).all())
    assert method.label_logits.count_nonzero() == rows.count_nonzero()
    second = seeded_loss(base, model, batch, Refiner(method, view="learned"))
    labels = rows.softmax(1)
    learned = -(labels * model(batch.weak).log_softmax(1)).sum(1).mean()
    assert second.total.item() == pytest.approx(alone.total.item() + learned.item(), rel=1e-12)


def test_predictions_before_and_after_the_perturbation_share_their_statistics(model, batch):
    net = nn.Sequential(nn.BatchNorm2d(1), model).double()
    loss = seeded_loss(VirtualAdversarial(radius=0.0, weight=1e6, entropy_weight=0.5), net, batch)
    examples = torch.cat([batch.labeled, batch.weak])
    assert torch.allclose(net[0].running_mean, 0.1 * examples.mean().reshape(1))  # updated once
    assert net[0].num_batches_tracked == 1
    assert loss.unlabeled.item() == pytest.approx(0.5 * conditional_entropy(net(examples)).item(), rel=1e-8)


def test_the_start_comes_from_the_checkpointed_generator(model, batch):
    base = VirtualAdversarial(radius=0.5)
    first = seeded_loss(base, model, batch).total
    state = torch.get_rng_state()
    second = base.loss(model, batch, teacher=model, progress=0.3).total
    assert not second.equal(first)
    torch.set_rng_state(state)
    assert base.loss(model, batch, teacher=model, progress=0.3).total.equal(second)


def test_a_start_that_is_given(model, images):
    start = torch.randn(images.shape, dtype=images.dtype, generator=same_start())
    options = {"power_iterations": 2}
    drawn = virtual_adversarial_direction(model, images, model(images), generator=same_start(), **options)
    given = virtual_adversarial_direction(model, images, model(images), start=3 * start, **options)
    assert torch.allclose(given, drawn, rtol=1e-9, atol=1e-12)
    with pytest.raises(ValueError, match=r"start must be \[N, ...\]"):
        virtual_adversarial_direction(model, images, model(images), start=start[1:])


def test_the_search_is_not_rounded_by_autocast(model, images):
    model, images = copy.deepcopy(model).float(), images.float()
    exact = virtual_adversarial_direction(model, images, model(images), generator=same_start())
    with torch.autocast("cpu", torch.bfloat16):
        found = virtual_adversarial_direction(model, images, model(images), generator=same_start())
    assert (found * exact).flatten(1).sum(1).min() > 0.999
