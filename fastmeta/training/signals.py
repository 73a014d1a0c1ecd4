"""Stop when asked to: Ctrl-C and SIGTERM become a question that the loop asks between two steps."""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed

from fastmeta.ops.process_group import running_processes
from fastmeta.training.processes import TIMEOUT

SAME_REQUEST = 3.0  # s


class StopRequest:
    """Called once a step: whether to stop, in a process group the same answer on every process.

    There no call waits for the network: what the processes say travels until the next call.
    """

    def __init__(self) -> None:
        self.signal: int = 0
        """What asked to stop; SIGTERM where processes were sent both; 0 while nothing did."""
        # On the CPU, whatever the steps use.
        self._group = torch.distributed.new_group(backend="gloo", timeout=TIMEOUT) if running_processes() > 1 else None
        self._answer = torch.zeros(1, dtype=torch.int32)
        self._work: Any = None

    @property
    def is_termination(self) -> bool:
        """Whether it was SIGTERM: the machine asks, and no person waits for an exit status other than 0."""
        return self.signal == signal.SIGTERM

    def __call__(self) -> bool:
        """Whether to stop."""
        if self._group is None:
            return self.signal != 0
        if self._work is not None:
            self._work.wait()
        agreed = int(self._answer)
        self._answer.fill_(max(self.signal, agreed))  # SIGTERM is 15, SIGINT 2
        self._work = torch.distributed.all_reduce(
            self._answer, torch.distributed.ReduceOp.MAX, group=self._group, async_op=True
        )
        if agreed:
            self.signal = agreed
        return agreed != 0


@contextlib.contextmanager
def stop_requested() -> Iterator[StopRequest]:
    """Within the block a first Ctrl-C or SIGTERM is only noted, for the loop to ask; a later one acts as usual.

    Those of the first seconds are one request: a batch system sends SIGTERM to all processes, and torchrun, which is
    one of them, sends it on.

    >>> with stop_requested() as should_stop:
    ...     should_stop()
    False
    """
    request = StopRequest()
    before: dict[int, Any] = {}
    asked: list[float] = []
    owner = os.getpid()

    def handle(number: int, frame: Any) -> None:
        if os.getpid() != owner:  # a forked worker: Ctrl-C reaches the whole group, and this process decides
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        if not asked:
            asked.append(time.monotonic())
            if os.environ.get("RANK", "0") == "0":
                print("\nstopping at the next step (once more: at once)", file=sys.stderr, flush=True)
        elif time.monotonic() - asked[0] > SAME_REQUEST:
            _restore(before)
            os.kill(os.getpid(), number)
        request.signal = max(number, request.signal)

    with contextlib.suppress(ValueError):  # not the main thread: signals go elsewhere
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, handle)
    try:
        yield request
    finally:
        _restore(before)


def _restore(handlers: dict[int, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, signal.SIG_DFL if handler is None else handler)
