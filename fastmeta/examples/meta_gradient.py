"""Meta-Gradient, Algorithm 2: mix-up of labeled images with unlabeled ones and their refined labels, on digits.

The steps are those of the published code; the network, the batch and the schedule of the learning rate are not.
"""

import torch
from torch.nn import functional

from fastmeta import MetaGradient
from fastmeta.data import load_digits, split_digits, weak_augment
from fastmeta.methods.meta_gradient import training
from fastmeta.models import ConvNet
from fastmeta.ssl import kl_divergence, mix_up

LOOP = training("official_code")
BATCH, SEEDS = 40, (0, 1, 2)


def train(meta: MetaGradient | None, steps: int, seed: int) -> float:
    """Test accuracy in percent; without the method the model learns its own soft labels, mixed all the same."""
    digits = load_digits()
    split = split_digits(digits, labels_per_class=4, seed=seed)
    x_l, y_l = digits.images[split.labeled], digits.targets[split.labeled]
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = ConvNet(1, 10, width=8)
    optimizer = torch.optim.SGD(model.parameters(), lr=LOOP.lr, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    for step in range(steps):
        x = weak_augment(x_l, generator)  # all 40 labeled images
        places = split.unlabeled[torch.randint(len(split.unlabeled), (BATCH,), generator=generator)]
        x_u = weak_augment(digits.images[places], generator)
        if meta is None:
            model.eval()
            with torch.no_grad():
                labels = model(x_u).softmax(1)
            model.train()
        else:
            # Its passes have the running statistics; as in the published code beta is the learning rate.
            setattr(meta, LOOP.scheduled, schedule.get_last_lr()[0])
            labels = meta.refine(model=model, unlabeled=x_u, holdout=x, targets=y_l).labels
        mixed = mix_up(x, functional.one_hot(y_l, 10).float(), x_u, labels, alpha=LOOP.mix_up, generator=generator)
        consistency = (model(x_u).softmax(1) - labels).square().sum(1).mean()
        weight = LOOP.consistency_weight_at(step / steps)
        loss = kl_divergence(model(mixed.inputs), mixed.targets) + weight * consistency
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

    model.eval()
    with torch.no_grad():
        return 100 * float((model(digits.images[split.test]).argmax(1) == digits.targets[split.test]).float().mean())


def main(steps: int = 120) -> float:
    """Trains with and without the method; returns the mean with it."""
    method = MetaGradient.from_preset("official_code")
    before, after = (sum(train(meta, steps, seed) for seed in SEEDS) / len(SEEDS) for meta in (None, method))
    print(f"test accuracy, mean of {len(SEEDS)} seeds: own labels {before:.1f}%, with Meta-Gradient {after:.1f}%")
    return after


if __name__ == "__main__":
    main()
