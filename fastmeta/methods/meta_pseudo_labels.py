"""Meta Pseudo Labels (Pham, Dai, Xie, Luong, Le; 2021)."""

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from fastmeta import checks
from fastmeta.derivatives import ExampleWeightGradient, How
from fastmeta.directions import DirectionRule, HoldoutGradient, LookAhead
from fastmeta.methods.base import Method
from fastmeta.methods.batch import Batch, check_on_graph
from fastmeta.methods.example_weights import TwoViews
from fastmeta.methods.inner_rate import InnerRate
from fastmeta.ops.process_group import Group, joined_count, sum_over
from fastmeta.ops.process_group import check as check_group
from fastmeta.state import Number, PartNumber
from fastmeta.updates import PullBack, Refined


class ScoreFunction(PullBack):
    """``loss = weight sum_i h_i (-log q_i)``, q_i the teacher's probability of the label that was drawn.

    REINFORCE, with ``h_i = -dG/dw_i`` what the label was worth to the student: Meta Pseudo Labels, Algorithm 1 and
    Appendix A.

    Args:
        credit: ``batch``: every label is credited with the whole step, ``h = sum_i h_i``, and the sum is a mean, as
            published; ``example``: with its own part. Labels are drawn independently, so that the rest is noise.
        decay: of the average of h that is taken off it, for ``batch``; None: none.
        weight: of the loss.
        process_group: see :class:`PullBack`.

    Attributes:
        average: of h.
    """

    takes = "weights"
    decay = Number(high=1.0)
    average: Tensor

    def __init__(
        self,
        *,
        credit: Literal["batch", "example"] = "batch",
        decay: float | None = 0.99,
        weight: float = 1.0,
        process_group: Group = None,
    ) -> None:
        super().__init__(weight=weight, process_group=process_group)
        checks.choice(credit, "credit", "batch", "example")
        self.credit = credit
        self.decay = 1.0 if decay is None else decay
        self.process_group = process_group
        self.register_buffer("average", torch.zeros((), dtype=torch.float64))

    def forward(self, gradient: Tensor, labels: Tensor, index: Tensor | None) -> Refined:
        """The surrogate of ``labels``, the logarithms of the probabilities of the drawn ones ``[N, 1]``, on the graph.

        It goes with weights of 1; the labels are for the method to put in.
        """
        worth = -gradient
        if self.credit == "batch":
            ((total,),) = sum_over([worth.sum().view(1)], self.process_group)
            if self.average.device != total.device:
                self.to(total.device)
            moved = self.average.lerp(total.to(self.average.dtype), 1 - self.decay)
            self.average.copy_(moved.where(total.isfinite(), self.average))
            count = joined_count(len(labels), self.process_group, labels.device)
            worth = ((total - self.average.to(total)) / max(count, 1)).expand(len(labels))
        return super().forward(-worth.unsqueeze(-1), labels, index)


class MetaPseudoLabels(Method):
    r"""A teacher learns from what its pseudo labels did to the student's loss on labeled examples.

    The student steps on labels that are drawn from the teacher, ``theta* = theta - (rate / B) sum_i grad l(f_i, y_i)``,
    ``y_i ~ q_i(psi)``, and

    .. math:: h = \Bigl\langle \nabla C^H(\theta^*), \frac{\text{rate}}{B} \sum_i \nabla \ell(f_i, y_i) \Bigr\rangle,
        \qquad \nabla_\psi = h\, \nabla_\psi \frac{1}{B} \sum_i -\log q_i(y_i)

    (Algorithm 1). It is the direction of Learning to Impute, the derivative of example weights, and a pull-back through
    the logarithm of the drawn label's probability. With ``credit="example"`` and without a look-ahead its mean over all
    draws is :class:`fastmeta.L2I`'s pull-back of the same teacher's soft labels (a test sums over all of them), which
    needs no draws; that is the form to prefer.

    ``h`` is the derivative; the published code has the difference of the student's losses before and after its step,
    less an average of such differences. (There it multiplies the cross-entropy of the teacher's soft labels against
    themselves, which has no gradient.)

    The loop: ``labels`` are the teacher's probabilities on the graph of its parameters, ``unlabeled`` and ``holdout``
    the student's; the student learns ``Refined.labels``, and ``Refined.loss`` is added to the teacher's own.

    Args:
        draw: labels that are not given are a ``sample`` from the probabilities (as published) or their ``argmax``.
        how: ``last_layer``: in closed form, where only the student's last layer moves; else its whole model, as
            published, and how the derivative is taken. :meth:`refine` then needs the student as ``model``.
        radius: length of the perturbation of a difference.
        mode: of the model in the method's own passes, ``train`` or ``eval``; None: as it stands.
        inner_loss: of the student on the pseudo labels; one with a softmax.
        outer_loss: of the labeled examples.
        rate: of the student's step. May be changed between calls, to follow its learning rate.
        look_ahead: take the hold-out gradient at theta* (as published) or at theta.
        credit: see :class:`ScoreFunction`.
        decay: see there.
        weight: of the loss.
        process_group: processes that the batch is spread over.

    Raises:
        ValueError: an option is not one of those named, or a number is out of its range.

    >>> import torch, fastmeta
    >>> teacher, student = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
    >>> x_l, x_u, y_l = torch.randn(5, 4), torch.randn(6, 4), torch.randint(3, (5,))
    >>> refined = MetaPseudoLabels(how="jvp").refine(
    ...     model=student, unlabeled=x_u, labels=teacher(x_u).softmax(1), holdout=x_l, targets=y_l)
    >>> refined.loss.backward()
    >>> teacher.weight.grad is not None, student.weight.grad is None, refined.labels.sum(1)
    (True, True, tensor([1., 1., 1., 1., 1., 1.]))
    """

    update: ScoreFunction
    rate = InnerRate()
    weight = PartNumber("update", "weight")

    def __init__(
        self,
        *,
        draw: Literal["sample", "argmax"] = "sample",
        how: How = "last_layer",
        radius: float = 0.01,
        mode: Literal["train", "eval"] | None = None,
        inner_loss: str = "cross_entropy",
        outer_loss: str = "cross_entropy",
        rate: float = 0.1,
        look_ahead: bool = True,
        credit: Literal["batch", "example"] = "batch",
        decay: float | None = 0.99,
        weight: float = 1.0,
        process_group: Group = None,
    ) -> None:
        check_group(process_group)
        checks.choice(draw, "draw", "sample", "argmax")
        checks.choice(inner_loss, "inner_loss", "cross_entropy", "mse_probs")
        checks.loss_code(outer_loss, "outer_loss")
        checks.number(rate, "rate", low=0.0)
        if mode is not None:
            checks.choice(mode, "mode", "train", "eval")
        self.mode = mode
        self.draw = draw
        self.inner_loss = inner_loss
        direction: DirectionRule = HoldoutGradient(outer_loss)
        if look_ahead:
            direction = LookAhead(direction, rate=rate, loss=inner_loss)
        gradient = ExampleWeightGradient(inner_loss, rate=rate, reduction="mean", how=how, radius=radius)
        update = ScoreFunction(credit=credit, decay=decay, weight=weight, process_group=process_group)
        super().__init__(direction, gradient, update, process_group=process_group)

    def refine(self, *, labels: Tensor | None = None, pseudo_labels: Tensor | None = None, **batch: Any) -> Refined:
        """See :meth:`fastmeta.Method.refine`; what comes back as labels are the drawn ones.

        Args:
            labels: probabilities of the teacher ``[N, C]``, on the graph.
            pseudo_labels: classes ``[N]`` that were drawn from them; None: they are drawn here, from torch's global
                random state.
            batch: the arguments of :meth:`fastmeta.Method.refine`.

        Raises:
            ValueError: no labels are given.
        """
        if labels is None:
            raise ValueError("labels must be the probabilities of the teacher [N, C], got None")
        given = TwoViews(labels=labels, pseudo_labels=pseudo_labels, **batch)
        if pseudo_labels is None and isinstance(given.labels, Tensor) and given.labels.is_floating_point():
            q = given.labels.detach()
            classes = q.argmax(1) if self.draw == "argmax" else torch.multinomial(q, 1).squeeze(1)
            given = replace(given, pseudo_labels=classes)
        return self._refine(given)

    def _finish(self, computed: Refined | Tensor, imputed: Tensor, batch: Batch) -> Refined:
        check_on_graph(imputed, "labels")
        drawn = batch.inner_labels(imputed.detach())
        with torch.enable_grad():
            log_q = (drawn * imputed.clamp_min(torch.finfo(imputed.dtype).tiny).log()).sum(1, keepdim=True)
        return super()._finish(computed, log_q, batch)._replace(labels=drawn)
