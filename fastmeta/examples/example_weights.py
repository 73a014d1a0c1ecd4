"""Weights for unlabeled examples in a loop of one's own: digits whose imputed labels are wrong in four of ten cases.

Somebody's labeling rule gave every unlabeled image a label. The method finds out by the influence on 30 validation
images which of them hurt, and takes their weight away.
"""

import torch
from torch import Tensor
from torch.nn import functional

import fastmeta
from fastmeta import ExampleWeights
from fastmeta.data import load_digits, split_digits, weak_augment
from fastmeta.models import ConvNet

BATCH, WRONG = 96, 0.4


def train(meta: ExampleWeights | None, imputed: Tensor, steps: int, seed: int = 0) -> float:
    """Test accuracy in percent; without the method every imputed label has weight 1. ``imputed``: classes ``[M]``."""
    digits = load_digits()
    split = split_digits(digits, labels_per_class=2, seed=seed)
    x_l, y_l = digits.images[split.labeled], digits.targets[split.labeled]
    x_v, y_v = digits.images[split.holdout], digits.targets[split.holdout]
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = ConvNet(1, 10, width=8)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)

    for _ in range(steps):
        index = torch.randperm(len(imputed), generator=generator)[:BATCH]
        x_u, labels = digits.images[split.unlabeled[index]], imputed[index]
        views = [weak_augment(images, generator) for images in (x_l, x_v, x_u)]
        with fastmeta.capture_features(model.fc) as tape:
            logits_l, logits_v, logits_u = model(torch.cat(views)).split([len(x_l), len(x_v), BATCH])
        weights = torch.ones(BATCH)
        if meta is not None:
            weights = meta.refine(
                unlabeled=tape.outputs(logits_u),
                pseudo_labels=labels,
                index=index,
                holdout=tape.outputs(logits_v),
                targets=y_v,
                labeled=tape.outputs(logits_l),
                labeled_targets=y_l,
            ).weights
        unlabeled = (weights * functional.cross_entropy(logits_u, labels, reduction="none")).mean()
        loss = functional.cross_entropy(logits_l, y_l) + unlabeled
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    model.eval()
    with torch.no_grad():
        return 100 * float((model(digits.images[split.test]).argmax(1) == digits.targets[split.test]).float().mean())


def main(steps: int = 200) -> float:
    """Train without and with the method; prints both and returns the second."""
    digits = load_digits()
    truth = digits.targets[split_digits(digits, labels_per_class=2, seed=0).unlabeled]
    generator = torch.Generator().manual_seed(0)
    wrong = torch.rand(len(truth), generator=generator) < WRONG
    imputed = torch.where(wrong, (truth + 1) % 10, truth)
    meta = ExampleWeights(len(truth), lr=0.1, damping=1.0)
    before, after = train(None, imputed, steps), train(meta, imputed, steps)
    means = [float(meta.weights[part].mean()) for part in (wrong, ~wrong)]
    print(f"mean weight: of wrong labels {means[0]:.2f}, of right ones {means[1]:.2f}")
    print(f"test accuracy after {steps} steps: weights of 1 {before:.1f}%, learned weights {after:.1f}%")
    return after


if __name__ == "__main__":
    main()
