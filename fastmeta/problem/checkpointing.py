"""Activation checkpointing inside an evaluation: blocks that autograd can differentiate in every way."""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch.utils import checkpoint


@contextlib.contextmanager
def differentiable_checkpoints(*, straight: bool = False) -> Iterator[None]:
    """In the block, reentrant checkpoints are non-reentrant ones, and with ``straight`` no checkpoint is one.

    A reentrant checkpoint runs its function without a graph and calls ``backward`` again later: it gives ``.grad`` of
    leaves, but no tangent, no second derivative and nothing to ``torch.autograd.grad``. The non-reentrant one keeps as
    little, and recomputes by hooks, which all of these go through.

    Args:
        straight: keep all activations, for a graph that outlives the evaluation and could not be recomputed after it.
    """
    reentrant: Any = checkpoint.CheckpointFunction
    module: Any = checkpoint
    own_apply, generator = vars(reentrant).get("apply"), module._checkpoint_without_reentrant_generator
    reentrant.apply = staticmethod(_without_reentry)
    if straight:
        module._checkpoint_without_reentrant_generator = _straight
    try:
        yield
    finally:
        module._checkpoint_without_reentrant_generator = generator
        if own_apply is None:
            del reentrant.apply
        else:
            reentrant.apply = own_apply


def _without_reentry(function: Any, preserve_rng_state: bool, *args: Any) -> Any:
    return checkpoint.checkpoint(function, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state)


def _straight(*args: Any, **kwargs: Any) -> Iterator[None]:
    yield
