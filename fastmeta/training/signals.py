"""Stop when asked to: Ctrl-C and SIGTERM become a question that the loop asks between two steps."""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed

from fastmeta.ops.process_group import running_processes


@contextlib.contextmanager
def stop_requested() -> Iterator[Callable[[], bool]]:
    """Within the block a first Ctrl-C or SIGTERM only sets a flag; a second one acts as usual.

    Yields a function that tells whether to stop. In a process group every process asks once a step and all are told
    the same: true at a call after the one at which the first process was asked to stop. No call waits for the network:
    what the processes say travels until the next call.

    >>> with stop_requested() as should_stop:
    ...     should_stop()
    False
    """
    flag = {"stop": False}
    before: dict[int, Any] = {}
    owner = os.getpid()

    def handle(number: int, frame: Any) -> None:
        if os.getpid() != owner:  # a forked worker: Ctrl-C reaches the whole group, and this process decides
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        flag["stop"] = True
        _restore(before)
        print("\nstopping at the next step (once more: at once)", file=sys.stderr, flush=True)

    with contextlib.suppress(ValueError):  # not the main thread: signals go elsewhere
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, handle)
    try:
        yield _Agreement(lambda: flag["stop"]) if running_processes() > 1 else lambda: flag["stop"]
    finally:
        _restore(before)


def _restore(handlers: dict[int, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, signal.SIG_DFL if handler is None else handler)


class _Agreement:
    """Whether any process wants to stop, by a maximum that each call starts and the next one reads."""

    def __init__(self, wanted: Callable[[], bool]) -> None:
        self._wanted = wanted
        self._group = torch.distributed.new_group(backend="gloo")  # on the CPU, whatever the steps use
        self._work: Any = None
        self._answer = torch.zeros(1, dtype=torch.int32)

    def __call__(self) -> bool:
        if self._work is not None:
            self._work.wait()
        agreed = bool(self._answer)
        self._answer.fill_(self._wanted())
        self._work = torch.distributed.all_reduce(
            self._answer, torch.distributed.ReduceOp.MAX, group=self._group, async_op=True
        )
        return agreed
