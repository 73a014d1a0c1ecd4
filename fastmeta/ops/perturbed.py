"""Parameters moved along a direction for two forward passes, and put back bit for bit."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from fastmeta import checks
from fastmeta.dispatch import Operator
from fastmeta.ops import _in_place, _workspace

EPSILON = Operator("perturb_epsilon")
MOVE = Operator("perturb_")
RESTORE = Operator("perturb_restore_")
_ALIGN = 64  # of each tensor's copy in the backup, and the size of its header; as in csrc/list_checks.h


def perturb_epsilon_reference(direction: Sequence[Tensor], radius: float) -> Tensor:  # []
    """``radius / ||v||`` over all tensors; ``radius`` where the norm is 0. float64 if one tensor is."""
    wide = torch.float64 if any(v.dtype == torch.float64 for v in direction) else torch.float32
    if not direction:
        return torch.tensor(radius, dtype=wide)
    norms = [torch.linalg.vector_norm(v, dtype=torch.float64) for v in direction]
    norm = torch.stack([n.to(norms[0].device) for n in norms]).norm()
    epsilon = radius / torch.where(norm == 0, 1.0, norm)
    # A finite factor: infinity times an entry that does not move would be NaN.
    return epsilon.clamp_max(torch.finfo(wide).max).to(wide)


def perturb_reference_(
    params: Sequence[Tensor], saved: Sequence[Tensor], direction: Sequence[Tensor], epsilon: Tensor, sign: float
) -> None:
    """``theta = saved + sign epsilon v``, rounded once."""
    for theta, start, v in zip(params, saved, direction, strict=True):
        wide = torch.float64 if theta.dtype == torch.float64 else torch.float32
        factor = sign * epsilon.to(wide)
        theta.copy_(start.to(wide) + factor.to(theta.device) * v.to(wide))


class perturbed:
    r"""Parameters at ``theta + epsilon v`` inside a ``with`` block, after :meth:`flip` at ``theta - epsilon v``.

    .. math:: \theta^\pm = \theta \pm \epsilon v, \qquad \epsilon = \text{radius} / \lVert v \rVert_2

    the two points of Meta-Gradient, Eq. (16), with its ``epsilon = 0.01 / ||grad L_labeled||`` (Alg. 2) for
    ``radius=0.01``. The norm is over all tensors, added up in float64. Both points are computed from the saved
    parameters, and leaving the block, by an exception too, restores them bit for bit.

    A zero direction leaves the parameters where they are and has ``epsilon = radius``, so that the difference quotient
    is the 0 it should be and not 0/0.

    To autograd the parameters are as before once the block is left: a graph recorded earlier can still be
    differentiated. One recorded inside the block can be until the next :meth:`flip` or the end of the block; later its
    backward raises.

    Args:
        params: parameters, or a dict of them by name. Each has memory of its own: a tied parameter is given once.
        direction: ``v``, of the same shapes and dtypes; for a dict, a dict with the same keys. A constant, even
            if it requires grad. Must not change inside the block.
        radius: length of the step, >= 0.
        impl: implementation to use; see :func:`fastmeta.use_impl`.

    Attributes:
        epsilon: tensor ``[]`` on the parameters' device, float32 (float64 if a parameter is); known after entry.

    Raises:
        ValueError: a length, key or shape does not fit, tensors share memory, or the radius is out of range.
        TypeError: a dtype does not fit.
        RuntimeError: entered inside itself, :meth:`flip` outside the block, or the named ``impl`` is not available.

    >>> theta, v = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
    >>> with perturbed([theta], [v], radius=0.5) as perturbation:
    ...     plus = theta.clone()
    ...     perturbation.flip()
    ...     minus = theta.clone()
    >>> plus, minus, theta, perturbation.epsilon
    (tensor([1.3000, 2.4000]), tensor([0.7000, 1.6000]), tensor([1., 2.]), tensor(0.1000))
    """

    def __init__(
        self,
        params: Mapping[str, Tensor] | Iterable[Tensor],
        direction: Mapping[str, Tensor] | Iterable[Tensor],
        radius: float,
        *,
        impl: str | None = None,
    ) -> None:
        self._params, self._direction, self._names = _pair(params, direction)
        self._radius = radius
        self._impl = impl
        self._epsilon: Tensor | None = None
        self._moved: _ByReference | _ByKernel | None = None
        self._versions: list[int] = []
        self._sign = 1.0

    @property
    def epsilon(self) -> Tensor:
        """``radius / ||v||``; stays readable after the block."""
        if self._epsilon is None:
            raise RuntimeError("perturbed: epsilon is known once the block is entered")
        return self._epsilon

    def __enter__(self) -> "perturbed":
        if self._moved is not None:
            raise RuntimeError("perturbed: already entered; leave the block first")
        with torch.no_grad():
            kernel = MOVE.select(self._impl, *self._params, *self._direction)
            if kernel is None or not all(isinstance(p, Tensor) for p in self._params):
                self._check()
            self._versions = [-1 if p.is_inference() else p._version for p in self._params]
            if kernel is None:
                self._moved = _ByReference(self._params, self._direction)
            else:
                self._moved = _ByKernel(kernel, self._impl, self._check, self._params, self._direction)
            try:
                self._epsilon = self._moved.enter(self._radius)
            except BaseException:  # an interrupt, too
                self._restore()
                raise
        self._sign = 1.0
        return self

    def flip(self) -> None:
        """Go from ``theta + epsilon v`` to ``theta - epsilon v``, or back."""
        if self._moved is None:
            raise RuntimeError("perturbed: flip() is for inside the block")
        with torch.no_grad():
            self._moved.move(self.epsilon, -self._sign)
        self._sign = -self._sign

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with torch.no_grad():
            self._restore()

    def _restore(self) -> None:
        if self._moved is None:
            return
        try:
            self._moved.leave()
        finally:
            self._moved = None
            # The values are those that autograd saved, so their version is too.
            versioned = [(p, version) for p, version in zip(self._params, self._versions, strict=True) if version >= 0]
            if versioned:
                torch._C._autograd._unsafe_set_version_counter(*map(tuple, zip(*versioned, strict=True)))

    def _check(self) -> None:
        checks.number(self._radius, "radius", low=0.0)
        for name, theta, v in zip(self._names, self._params, self._direction, strict=True):
            checks.floating(theta, f"params{name}")
            checks.shaped(v, f"direction{name}", f"the shape of params{name}", theta.shape)
            checks.like(theta, f"params{name}", **{f"direction{name}": v})
        _in_place.disjoint(
            [(f"params{name}", theta) for name, theta in zip(self._names, self._params, strict=True)],
            [(f"direction{name}", v) for name, v in zip(self._names, self._direction, strict=True)],
        )


class _ByReference:
    """Moves parameters with torch, the copies one for each parameter."""

    def __init__(self, params: list[Tensor], direction: list[Tensor]) -> None:
        self.params, self.direction = params, direction
        self.saved: list[Tensor] = []

    def enter(self, radius: float) -> Tensor:
        epsilon = perturb_epsilon_reference(self.direction, radius)
        self.saved = [theta.clone() for theta in self.params]
        self.move(epsilon, 1.0)
        return epsilon

    def move(self, epsilon: Tensor, sign: float) -> None:
        perturb_reference_(self.params, self.saved, self.direction, epsilon, sign)

    def leave(self) -> None:
        for theta, start in zip(self.params, self.saved, strict=False):  # none saved: none moved
            theta.copy_(start)
        self.saved = []


class _ByKernel:
    """Moves parameters with a kernel, the copies in one buffer."""

    def __init__(
        self,
        move: Callable[..., Any],
        impl: str | None,
        check: Callable[[], None],
        params: list[Tensor],
        direction: list[Tensor],
    ) -> None:
        self.params, self.direction, self.check = params, direction, check
        size_epsilon, restore = EPSILON.select(impl, *direction), RESTORE.select(impl, *params)
        assert size_epsilon is not None
        assert restore is not None
        self.kernels = size_epsilon, move, restore
        self.backup: Tensor | None = None

    def enter(self, radius: float) -> Tensor:
        size_epsilon, move, _ = self.kernels
        epsilon = checks.run(size_epsilon, (self.direction, radius), self.check)
        copies = (-(-theta.numel() * theta.element_size() // _ALIGN) * _ALIGN for theta in self.params)
        self.backup = _workspace.take(_ALIGN + sum(copies), epsilon.device)
        checks.run(move, (self.params, self.direction, self.backup, epsilon, 1.0, True), self.check)
        _in_place.written(self.params)
        return epsilon

    def move(self, epsilon: Tensor, sign: float) -> None:
        self.kernels[1](self.params, self.direction, self.backup, epsilon, sign, False)
        _in_place.written(self.params)

    def leave(self) -> None:
        if self.backup is not None:
            self.kernels[2](self.params, self.backup)  # does nothing if the backup was not filled
            _in_place.written(self.params)
            _workspace.give(self.backup)
            self.backup = None


def _pair(
    params: Mapping[str, Tensor] | Iterable[Tensor], direction: Mapping[str, Tensor] | Iterable[Tensor]
) -> tuple[list[Tensor], list[Tensor], list[str]]:
    """Both as lists in one order, and how to name an element in an error."""
    for argument, name in ((params, "params"), (direction, "direction")):
        if isinstance(argument, Tensor):
            raise TypeError(f"{name} must be a list or dict of tensors, got a tensor")
    if isinstance(params, Mapping) != isinstance(direction, Mapping):
        raise TypeError("params and direction must both be lists or both be dicts")
    if isinstance(params, Mapping):
        assert isinstance(direction, Mapping)
        if params.keys() != direction.keys():
            odd = sorted(map(repr, params.keys() ^ direction.keys()))
            raise ValueError(f"direction must have the keys of params, got a difference in {', '.join(odd)}")
        return list(params.values()), [direction[key] for key in params], [f"[{key!r}]" for key in params]
    assert not isinstance(direction, Mapping)
    thetas, vs = list(params), list(direction)
    if len(thetas) != len(vs):
        raise ValueError(f"direction must have {len(thetas)} tensors like params, got {len(vs)}")
    return thetas, vs, [f"[{index}]" for index in range(len(thetas))]
