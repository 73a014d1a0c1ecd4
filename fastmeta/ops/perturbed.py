"""Parameters moved along a direction for two forward passes, and put back bit for bit."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from fastmeta import checks
from fastmeta.dispatch import Operator, in_place
from fastmeta.ops import _in_place, _lists, _workspace


def _wide(direction: Sequence[Tensor]) -> torch.dtype:
    return torch.float64 if any(v.dtype == torch.float64 for v in direction) else torch.float32


def _fake_epsilon(direction: list[Tensor], radius: float) -> Tensor:
    return torch.empty((), dtype=_wide(direction), device=direction[0].device if direction else "cpu")


EPSILON = Operator("perturb_epsilon", fake=_fake_epsilon)
MOVE = Operator("perturb_", fake=in_place)
RESTORE = Operator("perturb_restore_", fake=in_place)
_ALIGN = 64  # of each tensor's copy in the backup, and the size of its header; as in csrc/list_checks.h


def perturb_epsilon_reference(direction: Sequence[Tensor], radius: float) -> Tensor:  # []
    """``radius / ||v||`` over all tensors; ``radius`` where the norm is 0. float64 if one tensor is."""
    wide = _wide(direction)
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
        norm: ``||v||``, a tensor ``[]``, where these tensors are a part of v; None: theirs.
        impl: implementation to use; see :func:`fastmeta.use_impl`.

    Attributes:
        epsilon: tensor ``[]`` on the parameters' device, float32 (float64 if a parameter is); known after entry.

    Raises:
        ValueError: a length, key or shape does not fit, tensors share memory, or the radius is out of range.
        TypeError: a dtype does not fit.
        RuntimeError: entered inside itself, :meth:`flip` outside the block, the named ``impl`` is not available, or a
            tensor was given other memory inside the block (``theta.data = ...``): such a parameter keeps that, the
            others are restored.

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
        norm: Tensor | None = None,
        impl: str | None = None,
    ) -> None:
        self._params, self._direction, self._keys = _pair(params, direction)
        self._radius = radius
        self._norm = norm
        self._impl = impl
        self._epsilon: Tensor | None = None
        self._moved: _ByReference | _ByKernel | _ByTable | None = None
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
            moved = self._choose()
            self._versions = _in_place.versions(self._params)
            self._moved = moved
            try:
                self._epsilon = self._moved.enter(self._radius, self._norm)
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
            for which, argument in enumerate(("params", "direction")):
                self._refuse(argument, self._moved.replaced(which))
            self._moved.move(self.epsilon, -self._sign)
        self._sign = -self._sign

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with torch.no_grad():
            self._restore()

    def _choose(self) -> "_ByReference | _ByKernel | _ByTable":
        checks.number(self._radius, "radius", low=0.0)
        table = None if self._norm is not None else _ByTable.made(self._impl, self._params, self._direction)
        if table is not None:
            return table
        kernel = MOVE.select(self._impl, *self._params, *self._direction)
        if kernel is None or not all(isinstance(p, Tensor) for p in self._params):
            self._check()
        if kernel is None:
            return _ByReference(self._params, self._direction)
        return _ByKernel(kernel, self._impl, self._check, self._params, self._direction)

    def _refuse(self, argument: str, replaced: list[int]) -> None:
        if replaced:
            raise RuntimeError(
                f"perturbed: {argument}{self._name(replaced[0])} was given other memory inside the block"
            )

    def _restore(self) -> None:
        if self._moved is None:
            return
        replaced = self._moved.replaced(0)
        try:
            self._moved.leave(replaced)
        finally:
            self._moved = None
            # The values are those that autograd saved, so their version is too.
            params, versions = tuple(self._params), tuple(self._versions)
            if replaced or -1 in versions:
                left = set(replaced)
                kept = [i for i, version in enumerate(versions) if version >= 0 and i not in left]
                params, versions = tuple(params[i] for i in kept), tuple(versions[i] for i in kept)
            torch._C._autograd._unsafe_set_version_counter(params, versions)
        self._refuse("params", replaced)

    def _name(self, index: int) -> str:
        """How an error names an element."""
        return f"[{index}]" if self._keys is None else f"[{self._keys[index]!r}]"

    def _check(self) -> None:
        names = [self._name(index) for index in range(len(self._params))]
        for name, theta, v in zip(names, self._params, self._direction, strict=True):
            checks.floating(theta, f"params{name}")
            checks.shaped(v, f"direction{name}", f"the shape of params{name}", theta.shape)
            checks.like(theta, f"params{name}", **{f"direction{name}": v})
        _in_place.disjoint(
            [(f"params{name}", theta) for name, theta in zip(names, self._params, strict=True)],
            [(f"direction{name}", v) for name, v in zip(names, self._direction, strict=True)],
        )


class _InPlaces:
    """Knows where two lists of tensors were when it was made."""

    def __init__(self, params: list[Tensor], direction: list[Tensor]) -> None:
        self.params, self.direction = params, direction
        self.addresses = [_in_place.addresses(tensors) for tensors in (params, direction)]

    def given(self, radius: float, norm: Tensor) -> Tensor:
        """``radius / norm``, as :func:`perturb_epsilon_reference` gives it."""
        return (radius / norm).to(_wide(self.direction))

    def replaced(self, which: int) -> list[int]:
        """The places of the parameters (0) or directions (1) that have other memory now."""
        now, before = _in_place.addresses((self.params, self.direction)[which]), self.addresses[which]
        return [index for index, address in enumerate(now) if address != before[index]]


class _ByReference(_InPlaces):
    """Moves parameters with torch, the copies one for each parameter."""

    def __init__(self, params: list[Tensor], direction: list[Tensor]) -> None:
        super().__init__(params, direction)
        self.saved: list[Tensor] = []

    def enter(self, radius: float, norm: Tensor | None) -> Tensor:
        epsilon = perturb_epsilon_reference(self.direction, radius) if norm is None else self.given(radius, norm)
        self.saved = [theta.clone() for theta in self.params]
        self.move(epsilon, 1.0)
        return epsilon

    def move(self, epsilon: Tensor, sign: float) -> None:
        perturb_reference_(self.params, self.saved, self.direction, epsilon, sign)

    def leave(self, replaced: Sequence[int]) -> None:
        left = set(replaced)
        for index, (theta, start) in enumerate(zip(self.params, self.saved, strict=False)):  # none saved: none moved
            if index not in left:
                theta.copy_(start)
        self.saved = []


class _ByKernel(_InPlaces):
    """Moves parameters with a kernel, the copies in one buffer."""

    def __init__(
        self,
        move: Callable[..., Any],
        impl: str | None,
        check: Callable[[], None],
        params: list[Tensor],
        direction: list[Tensor],
    ) -> None:
        super().__init__(params, direction)
        self.check = check
        size_epsilon, restore = EPSILON.select(impl, *direction), RESTORE.select(impl, *params)
        assert size_epsilon is not None
        assert restore is not None
        self.kernels = size_epsilon, move, restore
        self.layouts = [(theta.shape, theta.stride()) for theta in params]
        self.backup: Tensor | None = None

    def enter(self, radius: float, norm: Tensor | None) -> Tensor:
        size_epsilon, move, _ = self.kernels
        epsilon = (
            checks.run(size_epsilon, (self.direction, radius), self.check) if norm is None else self.given(radius, norm)
        )
        copies = (-(-theta.numel() * theta.element_size() // _ALIGN) * _ALIGN for theta in self.params)
        self.backup = _workspace.take(_ALIGN + sum(copies), epsilon.device)
        checks.run(move, (self.params, self.direction, self.backup, epsilon, 1.0, True), self.check)
        _in_place.written(self.params)
        return epsilon

    def move(self, epsilon: Tensor, sign: float) -> None:
        self.kernels[1](self.params, self.direction, self.backup, epsilon, sign, False)
        _in_place.written(self.params)

    def leave(self, replaced: Sequence[int]) -> None:
        if self.backup is not None:
            kept = list(self.params)
            for index in replaced:  # the backup's layout is that of the memory before
                kept[index] = torch.empty_strided(
                    *self.layouts[index], dtype=kept[index].dtype, device=self.backup.device
                )
            self.kernels[2](kept, self.backup)  # does nothing if the backup was not filled
            _in_place.written(self.params)
            _workspace.give(self.backup)
            self.backup = None


class _ByTable:
    """Moves parameters with a kernel past the dispatcher: what it needs to know of each tensor is written down once."""

    def __init__(self, params: list[Tensor], block: Any, backup: Tensor) -> None:
        self.params, self.block = params, block
        self.backup: Tensor | None = backup

    @classmethod
    def made(cls, impl: str | None, params: list[Tensor], direction: list[Tensor]) -> "_ByTable | None":
        """None where the dispatcher must see the calls, or word an error."""
        unseen = _lists.unseen(impl)
        if unseen is None:
            return None
        kernels, named = unseen
        num_bytes = kernels.backup_bytes(params)
        if num_bytes is None:
            return None
        backup = _workspace.take(num_bytes, params[0].device)
        block = kernels.perturb(named, params, direction, backup)
        if block is None:
            _workspace.give(backup)
            return None
        return cls(params, block, backup)

    def enter(self, radius: float, norm: Tensor | None) -> Tensor:
        self.block.enter(radius)
        _in_place.written(self.params)
        epsilon: Tensor = self.block.epsilon()
        return epsilon

    def replaced(self, which: int) -> list[int]:
        return list(self.block.replaced(which))

    def move(self, epsilon: Tensor, sign: float) -> None:
        self.block.move(sign)
        _in_place.written(self.params)

    def leave(self, replaced: Sequence[int]) -> None:
        if self.backup is not None:
            if replaced:
                self.block.leave_out(replaced)
            self.block.restore()  # does nothing if the backup was not filled
            _in_place.written(self.params)
            _workspace.give(self.backup)
            self.backup = None


def _pair(
    params: Mapping[str, Tensor] | Iterable[Tensor], direction: Mapping[str, Tensor] | Iterable[Tensor]
) -> tuple[list[Tensor], list[Tensor], list[str] | None]:
    """Both as lists in one order, and the keys if they are dicts."""
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
        return list(params.values()), [direction[key] for key in params], list(params)
    assert not isinstance(direction, Mapping)
    thetas, vs = list(params), list(direction)
    if len(thetas) != len(vs):
        raise ValueError(f"direction must have {len(thetas)} tensors like params, got {len(vs)}")
    return thetas, vs, None
