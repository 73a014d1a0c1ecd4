"""Everything that can be seen of a model and its inputs at one moment: to be compared, and put back.

The derivatives of the package put back parameters, buffers, modes and random states. This looks further, so that it can
tell whether they do and whether it is enough: plain attributes, containers and objects inside of modules, attributes of
their classes, closures of functions, and the globals that the user's own code reads.
"""

import functools
import random
from collections.abc import Iterator
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from fastmeta.verification.saved import SavedGenerator, is_same, same_value
from fastmeta.verification.walk import Walk


class State:
    """A snapshot of a model, its inputs and every random state.

    Args:
        model: the module.
        inputs: what it is called with.

    >>> model, x = nn.Linear(2, 1), torch.zeros(3, 2)
    >>> state = State(model, x)
    >>> with torch.no_grad():
    ...     _ = model.weight.add_(1), x.fill_(2)
    >>> state.touched()
    ['parameter weight', 'inputs']
    >>> state.restore()
    >>> state.touched(), x.sum()
    ([], tensor(0.))
    """

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        walk = Walk()
        walk.visit(model, "", "attribute")
        walk.visit(inputs, "inputs", "inputs")
        self._holders = walk.holders
        self._tensors = walk.tensors
        self._generators = [*_random_states(), *walk.generators]

    def touched(self) -> list[str]:
        """Names of what is not as it was; an equal tensor or container in place of another is no change."""
        names = [name for holder in self._holders for name in holder.changed(same_value)]
        names += [saved.name for saved in self._tensors if saved.is_changed()]
        names = [name for name in names if name]
        names += [saved.name for saved in self._generators if not is_same(saved.read(), saved.value)]
        return list(dict.fromkeys(names))

    def restore(self) -> None:
        """Put everything back."""
        for holder in self._holders:
            holder.restore()
        for saved in self._tensors:
            saved.restore()
        for generator in self._generators:
            generator.write(generator.value)

    def with_new_gradient(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors whose ``.grad`` is not as it was, with their names; none of the inputs."""
        return (
            (saved.name, saved.tensor) for saved in self._tensors if saved.has_new_gradient() and saved.name != "inputs"
        )

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor that was seen, with its name."""
        return ((saved.name, saved.tensor) for saved in self._tensors)


def is_promised(name: str) -> bool:
    """Whether the package promises to leave this as it was, whatever the model does with it."""
    return not name.startswith(("attribute ", "global ", "closure ", "class attribute "))


def _random_states() -> list[SavedGenerator]:
    states = [
        SavedGenerator("random state of torch", torch.get_rng_state, torch.set_rng_state, torch.get_rng_state()),
        SavedGenerator("random state of Python", random.getstate, random.setstate, random.getstate()),
        SavedGenerator(
            "random state of NumPy", numpy.random.get_state, numpy.random.set_state, numpy.random.get_state()
        ),
    ]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        for device in range(torch.cuda.device_count()):
            read = functools.partial(torch.cuda.get_rng_state, device)
            write = functools.partial(torch.cuda.set_rng_state, device=device)
            states.append(SavedGenerator(f"random state of cuda:{device}", read, write, read()))
    return states
