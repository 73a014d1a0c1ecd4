"""Signals to all processes of a run, as Ctrl-C and batch systems send them, must not end workers before it has saved.

A SIGTERM that the parent itself sends still ends them: Python sends it at its exit, where a worker may be blocked for
good by a lock that a killed one holds.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

_AVAILABLE = hasattr(signal, "sigwaitinfo")  # not on macOS, where a SIGTERM to all ends workers, too


@contextlib.contextmanager
def sigterm_blocked() -> Iterator[None]:
    """Processes started within it have SIGTERM blocked in all of their threads, those of libraries, too."""
    if not _AVAILABLE:
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_signals_to_the_parent(worker: int) -> None:
    """In a worker: ignore SIGINT, and SIGTERM unless it comes from the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if _AVAILABLE:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_the_parent_says_so, daemon=True).start()


def _end_when_the_parent_says_so() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
