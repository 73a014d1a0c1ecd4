"""One batch of a small net as the brute force and as fastmeta take it, and its dense curvature."""

from typing import Any

import torch
from torch import Tensor
from whole_model_brute_force import Bilevel, flatten, forward, loss_gradient, losses_of, trainable
from whole_model_nets import NETS

from fastmeta.problem import LastLayerProblem, Rows, WholeModelProblem
from fastmeta.problem.model_function import ModelFunction

MODELS = [(net, mode) for net in NETS for mode in ("train", "eval") if net in ("conv", "text") or mode == "train"]
# Small, for their dense Hessians.
SHAPES = {"conv": {"width": 2}, "text": {"tokens": 4, "length": 3, "heads": 1}, "tied": {}, "mlp": {}}
LAYERS = {"conv": ("body.4", "fc"), "text": ("norm", "fc"), "tied": ("encoder", "fc.bias"), "mlp": ("2", "fc")}


def make(generator: torch.Generator, net: str, mode: str = "train", loss: str = "cross_entropy") -> Bilevel:
    model, make_inputs = NETS[net](generator, **SHAPES[net])
    labels = torch.rand(4, 3, generator=generator, dtype=torch.float64)
    return Bilevel(
        model.train(mode == "train"),
        unlabeled=make_inputs(4),
        labels=labels / labels.sum(1, keepdim=True),
        holdout=make_inputs(3),
        targets=torch.randint(3, (3,), generator=generator),
        weights=torch.rand(4, generator=generator, dtype=torch.float64),
        mask=torch.tensor([1.0, 0.0, 1.0, 1.0], dtype=torch.float64),
        loss=loss,
        labeled_loss=loss,
        labeled_weight=1.0,
    )


def problem_of(brute: Bilevel) -> WholeModelProblem:
    return WholeModelProblem(
        ModelFunction(brute.model),
        brute.unlabeled,
        brute.labels,
        brute.holdout,
        brute.targets,
        weights=brute.weights,
        mask=brute.mask,
    )


def last_layer_of(brute: Bilevel) -> LastLayerProblem:
    function = ModelFunction(brute.model)
    seen = [function.outputs(inputs) for inputs in (brute.unlabeled, brute.holdout)]
    rows_u, rows_h = (Rows(outputs.features.detach(), outputs.logits.detach()) for outputs in seen)
    return LastLayerProblem(rows_u, brute.labels, rows_h, brute.targets, brute.weights, brute.mask)


def names_of(brute: Bilevel, layers: tuple[str, ...] | None) -> tuple[str, ...]:
    everything = tuple(trainable(brute.model))
    if layers is None:
        return everything
    return tuple(name for name in everything if any(name == part or name.startswith(part + ".") for part in layers))


def prediction(logits: Tensor, loss: str) -> Tensor:
    """What a sum of squares is taken of."""
    return {"mse": lambda f: f, "mse_probs": lambda f: f.softmax(-1), "mse_tanh": torch.tanh}[loss](logits)


def gauss_newton_of(brute: Bilevel, inputs: Any, targets: Tensor, weights: Tensor, names: tuple[str, ...]) -> Tensor:
    """``sum_i w_i J_i^T C_i J_i``: of a square, J is that of the prediction and C twice the identity. ``[P, P]``."""
    theta = {name: value.clone().requires_grad_() for name, value in trainable(brute.model).items()}
    logits = forward(brute.model, inputs, theta)
    squares = brute.loss.startswith("mse")
    outputs = prediction(logits, brute.loss) if squares else logits
    by = [theta[name] for name in names]
    entries = [torch.autograd.grad(e, by, retain_graph=True, materialize_grads=True) for e in outputs.flatten()]
    jacobian = torch.stack([torch.cat([g.flatten() for g in grads]) for grads in entries])
    jacobian = jacobian.unflatten(0, logits.shape)
    total = jacobian.new_zeros(jacobian.shape[2], jacobian.shape[2])
    for f, y, w, j in zip(logits.detach(), targets, weights, jacobian, strict=True):
        c = 2 * torch.eye(len(f), dtype=f.dtype)
        if not squares:
            loss, y_row = brute.loss, y.unsqueeze(0)
            c = torch.func.hessian(lambda g, y_row=y_row, loss=loss: losses_of(g.unsqueeze(0), y_row, loss)[0])(f)
        total += w * j.T @ c @ j
    return total


def dense_gauss_newton(brute: Bilevel, names: tuple[str, ...]) -> Tensor:
    """That of ``C^U + C^T``."""
    weights = brute.weights * brute.mask / len(brute.labels)
    count = len(brute.targets)
    one_hot = torch.eye(3, dtype=torch.float64)[brute.targets]
    labeled = gauss_newton_of(
        brute, brute.holdout, one_hot, torch.full((count,), 1 / count, dtype=torch.float64), names
    )
    return labeled + gauss_newton_of(brute, brute.unlabeled, brute.labels, weights, names)


def identity_like(matrix: Tensor) -> Tensor:
    return torch.eye(len(matrix), dtype=matrix.dtype)


def rhs_of(brute: Bilevel, names: tuple[str, ...]) -> Tensor:
    return flatten(loss_gradient(brute.model, brute.holdout, brute.targets), names)


def dense_solution(brute: Bilevel, matrix: Tensor, damping: float, names: tuple[str, ...]) -> Tensor:
    return torch.linalg.solve(matrix + damping * identity_like(matrix), rhs_of(brute, names))
