"""Calls of a function side by side, in processes that share nothing: one that is killed leaves no lock behind."""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, TypeVar

A = TypeVar("A")

_WAKE = 0.2  # s, in which a request to stop is seen


class WorkerError(RuntimeError):
    """A call failed in another process, or the process died."""


class Caller:
    """Who waits for a call, as the call sees it."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection

    def tell(self, message: Any) -> None:
        """How far the call is."""
        with contextlib.suppress(ConnectionError):
            self._connection.send((message, None, None))

    def is_gone(self) -> bool:
        """Whether nobody waits any more. While a call runs nothing is sent to it: all there is to read is the end."""
        return bool(self._connection.poll())


def available_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def side_by_side(
    function: Callable[[A, Caller], Any],
    arguments: Iterable[A],
    workers: int,
    *,
    on_message: Callable[[A, Any], None] = lambda argument, message: None,
    should_stop: Callable[[], bool] = lambda: False,
    patient: bool = False,
) -> Generator[tuple[A, Any], None, None]:
    """Pairs of argument and result as they come; closing it, or its end, ends the processes.

    Args:
        function: of the module level, so that another process can find it.
        arguments: taken in order, each when a process is free.
        workers: processes.
        on_message: called with an argument and what its call tells.
        should_stop: when true, no further call is begun and no result is waited for.
        patient: calls that still run at the end see that their caller is gone, and are waited for; else they are ended.

    Raises:
        WorkerError: a call failed, or its process died.
    """
    waiting = iter(arguments)
    processes: list[_Process] = []
    running: dict[Any, _Process] = {}

    def begin(process: _Process) -> None:
        for argument in waiting:
            process.begin(argument)
            running[process.connection] = process
            return

    try:
        for _ in range(workers):
            processes.append(_Process(function))
            begin(processes[-1])
        while running and not should_stop():
            ready: list[Any] = multiprocessing.connection.wait(list(running), timeout=_WAKE)
            for process in [running[connection] for connection in ready]:
                message, result, error = process.receive()
                if message is not None:
                    on_message(process.argument, message)
                    continue
                del running[process.connection]
                if error is not None:
                    raise WorkerError(f"{process.argument}:\n{error}")
                argument = process.argument
                begin(process)
                yield argument, result
    finally:
        for process in processes:
            process.connection.close()
            if not patient:
                process.process.terminate()
        for process in processes:
            process.process.join()


class _Process:
    """One that makes calls, one after the other."""

    def __init__(self, function: Callable[[Any, Caller], Any]) -> None:
        # Not fork: a forked child would inherit torch's threads in an undefined state.
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(function, theirs), daemon=True)
        self.process.start()
        theirs.close()  # else nobody would hear that the process died
        self.argument: Any = None

    def begin(self, argument: Any) -> None:
        self.argument = argument
        with self._alive():
            self.connection.send(argument)

    def receive(self) -> Any:
        with self._alive():
            return self.connection.recv()

    @contextlib.contextmanager
    def _alive(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, ConnectionError):
            self.process.join()
            code = self.process.exitcode
            raise WorkerError(f"{self.argument}: its process died with exit code {code}") from None


def _serve(function: Callable[[Any, Caller], Any], connection: Any) -> None:
    """Until the other side is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    caller = Caller(connection)
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            argument = connection.recv()
            result = error = None
            try:
                result = function(argument, caller)
            except Exception:  # whatever it is, the parent says which call it was
                error = traceback.format_exc()
            connection.send((None, result, error))
