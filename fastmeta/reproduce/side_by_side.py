"""Calls of a function one a core, each core a process of its own."""

import contextlib
import multiprocessing
import multiprocessing.connection
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from fastmeta.training.workers import WorkerError


def side_by_side(
    function: Callable[[Any], Any], arguments: Iterable[Any], workers: int, late: Callable[[], bool]
) -> Iterator[tuple[Any, Any]]:
    """Pairs of argument and result as they come.

    Args:
        function: of the module level, so that another process can find it.
        arguments: taken in order.
        workers: processes; 1: this one.
        late: when true, no further call is begun.

    Raises:
        WorkerError: a call failed, or its process died.
    """
    waiting = iter(arguments)
    if workers == 1:
        for argument in waiting:
            if late():
                return
            yield argument, function(argument)
        return
    # Not fork: a forked child would inherit torch's threads in an undefined state.
    context = multiprocessing.get_context("spawn")
    processes: list[Any] = []
    running: dict[Any, Any] = {}
    try:
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(function, theirs), daemon=True)
            process.start()
            theirs.close()  # else nobody would hear that the process died
            processes.append(process)
            _begin(running, ours, waiting, late)
        while running:
            ready: list[Any] = multiprocessing.connection.wait(list(running))
            for connection in ready:
                argument = running.pop(connection)
                with _died(argument):
                    error, result = connection.recv()
                if error:
                    raise WorkerError(f"{argument}:\n{error}")
                _begin(running, connection, waiting, late)
                yield argument, result
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _begin(running: dict[Any, Any], connection: Any, waiting: Iterator[Any], late: Callable[[], bool]) -> None:
    if late():
        return
    for argument in waiting:
        with _died(argument):
            connection.send(argument)
        running[connection] = argument
        return


@contextlib.contextmanager
def _died(argument: Any) -> Iterator[None]:
    """What a connection says of a process that is gone."""
    try:
        yield
    except (EOFError, ConnectionError):
        raise WorkerError(f"the process that had {argument} died") from None


def _serve(function: Callable[[Any], Any], connection: Any) -> None:
    """Until the other side is gone."""
    torch.set_num_threads(1)
    try:
        while True:
            argument = connection.recv()
            error = result = None
            try:
                result = function(argument)
            except Exception:  # whatever it is, the parent says which call it was
                error = traceback.format_exc()
            connection.send((error, result))
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        return
