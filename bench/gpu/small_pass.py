"""One pass over every kernel at small, odd shapes, for compute-sanitizer: ``python -m bench.gpu.small_pass``."""

import argparse
import sys

import torch
from torch import Tensor

import fastmeta
from bench import kernels
from bench.gpu.sanitizer import BEGUN, DONE
from bench.inputs import LastLayer, Shape, last_layer
from bench.ops import LAST_LAYER

# The tool slows every launch a hundredfold: a warp's worth of classes, and a tile and a bit, each in one dtype.
PASSES = ((Shape(37, 19, 7), torch.float32), (Shape(35, 40, 300), torch.bfloat16))


def _moved(shape: Shape, dtype: torch.dtype, device: str) -> LastLayer:
    return LastLayer(**{name: value.to(device) for name, value in vars(last_layer(shape, dtype)).items()})


def last_layers(device: str) -> int:
    """Every operator in every form that can be named; returns how many calls there were."""
    calls = 0
    for shape, dtype in PASSES:
        x = _moved(shape, dtype, device)
        similarity = fastmeta.ops.feature_similarity, (x.features, x.features[:15], x.logits[:15])
        runs = [(*similarity, form) for form in kernels.offered("feature_similarity", shape.c, device, dtype)]
        for operator in LAST_LAYER:
            forms = kernels.offered(operator.name, shape.c, device)[1:]
            runs += [(operator.call, operator.arguments(x), form) for form in forms]
        for call, arguments, form in runs:
            with form.around():
                call(*arguments, impl=form.impl)
        fastmeta.ops.finite_difference_labels(x.logits, x.targets, x.targets, 0.5, step=0.1)
        calls += len(runs) + 1
    return calls


def others(device: str) -> None:
    """Lists of tensors, the table with rows that repeat, and a few iterations of the solver."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device)

    sizes = [(33, 7), (1,), (0,), (130,), (3, 5, 2)]
    parameters, direction, g_l, g_u, m, q = ([normal(*size) for size in sizes] for _ in range(6))
    with fastmeta.ops.perturbed(parameters, direction, 0.01) as perturbation:
        perturbation.flip()
    fastmeta.ops.alignment_direction(g_l, g_u, m, [t.abs() for t in q], decay=0.9, decay_norm=0.99, epsilon=1e-3)
    table, exp_avg, exp_avg_sq, grad = normal(50, 3), normal(50, 3), normal(50, 3).abs(), normal(70, 3)
    index = torch.randint(50, (70,), generator=generator).to(device)
    steps = torch.zeros(50, dtype=torch.int32, device=device)
    fastmeta.ops.masked_adam_(table, index, grad, exp_avg, exp_avg_sq, steps, lr=0.1, low=-1.0, high=1.0)
    for shape, _ in PASSES:  # iterations in one launch, and launch by launch
        x = _moved(shape, torch.float32, device)
        rhs = x.direction_weight, x.direction_bias
        fastmeta.ops.solve_hessian(x.features, x.logits, *rhs, damping=100.0, solver="cg", tol=0.1, max_iter=5)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    device = parser.parse_args(arguments).device
    torch.ones(1, device=device).add_(1)
    print(BEGUN, flush=True)
    with torch.no_grad():
        calls = last_layers(device)
        others(device)
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"{calls} calls of last-layer operators.", DONE, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
