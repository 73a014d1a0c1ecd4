"""Learning to Impute for a regression: where in the picture is the digit? Ten pictures say it, a thousand do not.

As published but for the hold-out gradient, which is taken before the inner step and has length 1, and the averaging.
"""

import copy

import torch
from torch import Tensor, nn

from fastmeta import L2I
from fastmeta.data import load_digits
from fastmeta.methods.l2i import training
from fastmeta.models import ConvNet

OUTPUTS, SIZE, BATCH, LR, SEEDS = 2, 14, 24, 0.01, (0, 1, 2)
LOOP = training("paper", "V2", "landmarks", OUTPUTS)


def pictures(count: int) -> tuple[Tensor, Tensor]:
    """Digits somewhere in an empty picture ``[N, 1, 14, 14]``, and where: ``[N, 2]``, of mean 0 and deviation 1."""
    digits = load_digits().images
    places = torch.randint(SIZE - 7, (count, OUTPUTS))
    images = torch.zeros(count, 1, SIZE, SIZE)
    for image, (row, column) in zip(images, places.tolist(), strict=True):
        image[:, row : row + 8, column : column + 8] = digits[torch.randint(len(digits), ())]
    return images, (places - 3.0) / 2.0


def noisy(images: Tensor) -> Tensor:
    """Another view."""
    return images + 0.2 * torch.randn_like(images)


def make_model() -> nn.Module:
    """A net that keeps track of places: the linear layer sees a grid of 4 by 4."""
    body = list(ConvNet(1, OUTPUTS, width=4).body.children())[:-2]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(8 * 4 * 4, OUTPUTS))


def train(meta: L2I | None, steps: int, seed: int) -> float:
    """Mean distance from the truth in pixels; without the method it is the mean teacher's."""
    torch.manual_seed(seed)
    (x_l, y_l), (x_all, _), (x_test, y_test) = pictures(10), pictures(1000), pictures(500)
    model = make_model()
    teacher = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2 * steps // 3])
    for step in range(steps):
        x_u = x_all[torch.randint(len(x_all), (BATCH,))]
        unlabeled = (model(noisy(x_u)) - teacher(noisy(x_u))).square().mean()
        loss = (model(noisy(x_l)) - y_l).square().mean() + LOOP.unlabeled_weight_at(step / steps) * unlabeled
        _update(optimizer, loss)
        if meta is not None:
            meta.rate = LOOP.rate_at(optimizer.param_groups[0]["lr"])
            batch = {"unlabeled": noisy(x_u), "holdout": noisy(x_l), "targets": y_l, "labels": model(noisy(x_u))}
            _update(optimizer, meta.refine(model=model, **batch).loss)
        schedule.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(teacher.parameters()), list(model.parameters()), 0.05)
    return 2 * float((teacher(x_test) - y_test).norm(dim=1).mean())


def _update(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def main(steps: int = 120) -> float:
    """Trains with and without the method; returns the mean with it."""
    method = L2I(how="jvp", inner_loss="mse_tanh", outer_loss="mse", weight=5.0)
    before, after = (sum(train(meta, steps, seed) for seed in SEEDS) / len(SEEDS) for meta in (None, method))
    print(f"error in pixels, mean of {len(SEEDS)} seeds: mean teacher {before:.2f}, with L2I {after:.2f}")
    return after


if __name__ == "__main__":
    main()
