"""Learning to Impute in a mean-teacher loop of one's own, on digits with two labels for each class.

The order of the published code: an update of the base, then one at the parameters it left, on labels that the student
imputes from a second view. Not as published: the hold-out gradient is taken before the inner step and has length 1 (the
published update is ``L2I.from_preset("official_code")``), and learning rate, averaging and weight decay are others.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastmeta import L2I
from fastmeta.data import load_digits, split_digits, weak_augment
from fastmeta.methods.l2i import training
from fastmeta.models import ConvNet

LOOP = training("official_code", "V2")
BATCH, SEEDS = 48, (0, 1)


def train(meta: L2I | None, steps: int, seed: int) -> float:
    """Test accuracy of the averaged model in percent; without the method it is the mean teacher's."""
    digits = load_digits()
    split = split_digits(digits, labels_per_class=2, seed=seed)
    x_l, y_l = digits.images[split.labeled], digits.targets[split.labeled]
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = ConvNet(1, 10, width=8)
    teacher = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)

    for step in range(steps):
        places = split.unlabeled[torch.randint(len(split.unlabeled), (BATCH,), generator=generator)]
        x_u, x_u2, x_h = (weak_augment(x, generator) for x in (digits.images[places], digits.images[places], x_l))
        with torch.no_grad():
            labels = teacher(x_u2).softmax(1)
        loss = functional.cross_entropy(model(weak_augment(x_l, generator)), y_l)
        loss = loss + LOOP.unlabeled_weight_at(step / steps) * (model(x_u).softmax(1) - labels).square().mean()
        _update(optimizer, loss)
        if meta is not None:
            # At the parameters that the base's update left; the student imputes.
            labels = model(x_u2).softmax(1)
            refined = meta.refine(model=model, unlabeled=x_u, holdout=x_h, targets=y_l, labels=labels)
            _update(optimizer, refined.loss)
        _follow(teacher, model, min(1 - 1 / (step + 1), 0.98))

    teacher.eval()
    return _accuracy(teacher, digits.images[split.test], digits.targets[split.test])


def _update(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


@torch.no_grad()
def _follow(teacher: nn.Module, model: nn.Module, decay: float) -> None:
    for average, value in zip(teacher.state_dict().values(), model.state_dict().values(), strict=True):
        average.lerp_(value, 1 - decay) if average.is_floating_point() else average.copy_(value)


@torch.no_grad()
def _accuracy(model: nn.Module, images: Tensor, targets: Tensor) -> float:
    return 100 * float((model(images).argmax(1) == targets).float().mean())


def main(steps: int = 160) -> float:
    """Trains with and without the method; returns the mean with it."""
    method = L2I(how="jvp", weight=1.0)
    before, after = (sum(train(meta, steps, seed) for seed in SEEDS) / len(SEEDS) for meta in (None, method))
    print(f"test accuracy, mean of {len(SEEDS)} seeds: mean teacher {before:.1f}%, with L2I {after:.1f}%")
    return after


if __name__ == "__main__":
    main()
