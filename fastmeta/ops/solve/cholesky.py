"""The dense Hessian and its Cholesky factor, in float64: the exact reference."""

import torch
from torch import Tensor

from fastmeta import losses
from fastmeta.ops.solve.system import DampedHessian

# 8 GiB of float64.
MAX_ENTRIES = 2**30


def block_shape(loss: str, num_outputs: int, num_features: int) -> tuple[int, int]:
    """Number and size of the Hessian's diagonal blocks: 1 shared by all outputs, one for each output, or one in all.

    >>> [block_shape(loss, 10, 129) for loss in ("mse", "binary_cross_entropy", "cross_entropy")]
    [(1, 129), (10, 129), (1, 1290)]
    """
    known = losses.of(loss)
    if known.curvature_slope is not None:
        return 1, num_features
    return (1, num_outputs * num_features) if known.has_softmax else (num_outputs, num_features)


def hessian_blocks(system: DampedHessian) -> Tensor:  # [blocks, size, size]
    """``sum_i sign_i C_i (x) g_i g_i^T + damping I`` in float64, one block for each set of unknowns that interact."""
    g = system.features.double()
    signed = g if system.signs is None else system.signs.double().unsqueeze(1) * g
    loss = losses.of(system.loss)
    d, s, p = loss.output_curvature(system.logits.double(), _double(system.targets))
    c, k = system.num_unknowns
    if loss.curvature_slope is not None:
        blocks = loss.curvature_slope * (signed.T @ g).unsqueeze(0)
    else:
        blocks = torch.stack([(signed * d[:, [j]]).T @ g for j in range(c)])
    if s is not None and p is not None:
        rows_s = (s.unsqueeze(2) * signed.unsqueeze(1)).reshape(-1, c * k)
        rows_p = (p.unsqueeze(2) * g.unsqueeze(1)).reshape(-1, c * k)
        mixed = rows_s.T @ rows_p
        dense = -(mixed + mixed.T)
        # The diagonal blocks of [C, K, C, K], with the output as the last dimension.
        dense.view(c, k, c, k).diagonal(dim1=0, dim2=2).add_(blocks.permute(1, 2, 0))
        blocks = dense.unsqueeze(0)
    if system.joined is not None:
        (blocks,) = system.joined.sum(blocks)
    blocks.diagonal(dim1=1, dim2=2).add_(system.damping)
    return blocks


def _double(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.double()


class CholeskySolver:
    """Factor once, solve for any right-hand side.

    Args:
        system: the damped Hessian.

    Raises:
        ValueError: the dense Hessian would take more than 8 GiB.
        torch.linalg.LinAlgError: it is not positive definite.
    """

    def __init__(self, system: DampedHessian) -> None:
        self._is_shared = losses.of(system.loss).curvature_slope is not None  # one block for all outputs
        count, size = block_shape(system.loss, *system.num_unknowns)
        if count * size**2 > MAX_ENTRIES:
            raise ValueError(
                f"solver='cholesky' would hold a dense Hessian of {count} x {size} x {size} float64 "
                f"({count * size**2 * 8 / 2**30:.0f} GiB, at most 8); use solver='pcg'"
            )
        blocks = hessian_blocks(system)
        largest = blocks.diagonal(dim1=1, dim2=2).amax()
        factor, info = torch.linalg.cholesky_ex(blocks)
        pivots = factor.diagonal(dim1=1, dim2=2).square()
        singular = torch.finfo(torch.float64).eps * size * largest
        if bool(info.any()) or bool(pivots.amin() <= singular):
            reason = (
                "some weights are negative" if system.may_be_indefinite else "the features or outputs are dependent"
            )
            raise torch.linalg.LinAlgError(
                f"the damped Hessian is not positive definite (damping {system.damping:g}): {reason}; raise damping"
            )
        self._factor = factor

    def solve(self, rhs: Tensor) -> Tensor:
        """``[C, r]``."""
        c, r = rhs.shape
        shared = rhs.double()
        columns = shared.T.unsqueeze(0) if self._is_shared else shared.reshape(self._factor.shape[0], -1, 1)
        solution = torch.cholesky_solve(columns, self._factor)
        solved = solution[0].T if self._is_shared else solution.reshape(c, r)
        return solved.to(rhs.dtype).contiguous()
