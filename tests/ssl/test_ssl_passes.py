"""A method on the base's own forward and one that makes its own passes; an update of the method's own."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from fastmeta import L2I, ExampleWeights, LabelGradientAlignment, MetaGradient, Method
from fastmeta.ssl import (
    UDA,
    FixMatch,
    FlexMatch,
    FreeMatch,
    MeanTeacher,
    MixMatch,
    MixUp,
    PiModel,
    PseudoLabel,
    Refiner,
    ReMixMatch,
    TrainingBatch,
)

CLASSES = 3
BASES = [
    FixMatch(threshold=0.5),
    PseudoLabel(threshold=0.5, ramp=0.1),
    MeanTeacher(ramp=0.1),
    MeanTeacher(ramp=0.1, statistics="interleaved"),
    FixMatch(threshold=0.5, statistics="separate"),
    PiModel(ramp=0.1),
    UDA(threshold=0.5, distribution_alignment="uniform"),
    FlexMatch(threshold=0.5),
    FreeMatch(),
    MixUp(),
    MixMatch(ramp=0.0),
    ReMixMatch(views=1, ramp=0.0),
]
METHODS = {
    "L2I V1": lambda: Refiner(L2I("V1")),
    "L2I V2": lambda: Refiner(L2I("V2")),
    "L2I V2, hard labels": lambda: Refiner(L2I("V2", inner_loss="cross_entropy"), "learned", hard=True),
    "MetaGradient": lambda: Refiner(MetaGradient()),
    "ExampleWeights": lambda: Refiner(ExampleWeights(10), "learned", hard=True),
    "LabelGradientAlignment": lambda: Refiner(LabelGradientAlignment(10, CLASSES), "learned"),
}


def net() -> nn.Module:
    """Without batch statistics: there a pass of the unlabeled part alone is another pass."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, CLASSES)).double()


@pytest.fixture
def batch(generator) -> TrainingBatch:
    def images(count: int) -> Tensor:
        return 2 * torch.randn(count, 1, 2, 2, generator=generator, dtype=torch.float64)

    return TrainingBatch(
        labeled=images(4),
        targets=torch.tensor([0, 1, 2, 1]),
        weak=images(6),
        second=images(6),
        index=torch.tensor([5, 0, 3, 9, 1, 2]),
        holdout=images(3),
        holdout_targets=torch.tensor([2, 0, 1]),
    )


@pytest.mark.parametrize("own_holdout", [False, True])
@pytest.mark.parametrize("make", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("base", BASES, ids=lambda base: type(base).__name__)
def test_own_passes_give_what_shared_features_give(batch, base, make, own_holdout):
    """At the last layer and without batch statistics the two are the same numbers, and so are the gradients."""
    if not own_holdout:
        batch = dataclasses.replace(batch, holdout=None, holdout_targets=None)
    model, results = net(), []
    for passes in ("shared", "own"):
        refiner = dataclasses.replace(make(), passes=passes)
        torch.manual_seed(3)
        memory = base.memory(10, CLASSES, model=model, labels=batch.targets)
        for _ in range(2):  # the second step reads the tables that the first has written
            loss = base.loss(model, batch, teacher=net(), progress=0.5, refiner=refiner, memory=memory)
        results.append((loss, torch.autograd.grad(loss.total, list(model.parameters()))))
    (shared, shared_grads), (own, own_grads) = results
    torch.testing.assert_close(own.total, shared.total, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(own.used.soft, shared.used.soft, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(own.used.weights, shared.used.weights, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(own_grads, shared_grads, rtol=1e-11, atol=1e-13)


def test_hard_labels_have_the_derivative_of_the_predictions(batch):
    """FixMatch with L2I as in a loop of one's own: hard labels, the mask, and the strong view that is trained."""
    model = net()
    confidences = model(batch.weak).softmax(1).amax(1).sort().values.tolist()
    threshold = (confidences[2] + confidences[3]) / 2
    refiner = Refiner(L2I("V2", inner_loss="cross_entropy"), "learned", hard=True, passes="own")
    used = FixMatch(threshold).loss(model, batch, teacher=net(), progress=0.5, refiner=refiner).used
    q = model(batch.weak).softmax(1)
    hard = nn.functional.one_hot(q.argmax(1), CLASSES)
    mask = (q.detach().amax(1) >= threshold).double()
    refined = L2I("V2", inner_loss="cross_entropy").refine(
        model=model, unlabeled=batch.second, labels=hard + (q - q.detach()), mask=mask,
        holdout=batch.holdout, targets=batch.holdout_targets, labeled=batch.labeled, labeled_targets=batch.targets,
    )  # fmt: skip
    assert 0 < mask.sum() < len(mask)
    assert used.labels.equal(hard.double())
    found, wanted = (torch.autograd.grad(loss, list(model.parameters())) for loss in (used.loss, refined.loss))
    torch.testing.assert_close(found, wanted)


def test_own_passes_are_given_images_and_the_model(batch):
    class Listening(Method):
        def refine(self, **given):
            self.given = given
            return super().refine(**given)

    rules = L2I("V1")
    for view, images in (("imputed", batch.weak), ("learned", batch.second)):
        method = Listening(rules.direction, rules.derivative, rules.update)
        model = net()
        FixMatch(threshold=0.5).loss(
            model, batch, teacher=net(), progress=0.5, refiner=Refiner(method, view, passes="own")
        )
        assert method.given["model"] is model
        assert method.given["unlabeled"] is images
        assert method.given["holdout"] is batch.holdout
        assert method.given["labeled"] is batch.labeled
