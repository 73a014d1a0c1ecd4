"""Label Gradient Alignment with virtual adversarial training, on digits with four labels for each class.

Every unlabeled image has a label of its own, uniform at first, which follows the gradients of the labeled images.
"""

import torch
from torch.nn import functional

from fastmeta import LabelGradientAlignment
from fastmeta.data import load_digits, split_digits, weak_augment
from fastmeta.models import ConvNet
from fastmeta.ssl.virtual_adversarial import virtual_adversarial_loss

BATCH, RADIUS = 64, 1.0


def train(meta: LabelGradientAlignment | None, steps: int, seed: int = 0) -> float:
    """Test accuracy in percent; without the method it is that of virtual adversarial training."""
    digits = load_digits()
    split = split_digits(digits, labels_per_class=4, seed=seed)
    x_l, y_l = digits.images[split.labeled], digits.targets[split.labeled]
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = ConvNet(1, 10, width=8)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)

    for _ in range(steps):
        index = torch.randperm(len(split.unlabeled), generator=generator)[:BATCH]
        x = weak_augment(x_l, generator)
        x_u = weak_augment(digits.images[split.unlabeled[index]], generator)
        logits, logits_u = model(x), model(x_u)
        loss = functional.cross_entropy(logits, y_l)
        loss = loss + virtual_adversarial_loss(model, x_u, logits_u, radius=RADIUS, generator=generator)
        if meta is not None:
            refined = meta.refine(
                model=model, unlabeled=x_u, holdout=x, targets=y_l, index=index, labeled_logits=logits
            )
            # Refined.loss makes the labeled loss above weigh T(i).
            loss = loss + functional.cross_entropy(logits_u, refined.labels) + refined.loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    model.eval()
    with torch.no_grad():
        return 100 * float((model(digits.images[split.test]).argmax(1) == digits.targets[split.test]).float().mean())


def main(steps: int = 200) -> float:
    """Train without and with the method; prints both and returns the second."""
    digits = load_digits()
    truth = digits.targets[split_digits(digits, labels_per_class=4, seed=0).unlabeled]
    meta = LabelGradientAlignment(
        len(truth), 10, how="jvp", lr=0.5, decay=0.9, decay_norm=0.9, labeled_weight=lambda step: 2.0
    )
    before, after = train(None, steps), train(meta, steps)
    right = 100 * float((meta.label_logits.argmax(1) == truth).float().mean())
    print(f"learned labels of the unlabeled images: {right:.1f}% right, from 10.0% by chance")
    print(f"test accuracy after {steps} steps: VAT {before:.1f}%, LGA + VAT {after:.1f}%")
    return after


if __name__ == "__main__":
    main()
