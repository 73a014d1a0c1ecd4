"""Calls in processes of their own: what comes back, what is said of one that fails, and that a kill hangs nothing."""

import multiprocessing
import os
import signal
import time

import pytest

from fastmeta.training.side_by_side import WorkerError, side_by_side


def where(number, caller):
    caller.tell(f"at {number}")
    if number == 13:
        raise ValueError("unlucky")
    return number, os.getpid()


def test_each_process_makes_many_calls_and_one_that_fails_says_which():
    found, told = {}, []
    calls = side_by_side(where, [0, 1, 2, 3, 13, 13], 2, on_message=lambda *said: told.append(said))
    with pytest.raises(WorkerError, match=r"13:\n(.|\n)*unlucky"):
        found.update(calls)
    assert len(found) >= 3
    assert all(number == again for number, (again, _) in found.items())
    assert os.getpid() not in {process for _, process in found.values()}
    assert [(number, f"at {number}") for number, _ in told] == told
    assert {number for number, _ in told} >= found.keys()
    assert multiprocessing.active_children() == []


class Deadly:
    """A process that is given it ends before it has read an argument."""

    def __reduce__(self):
        return os._exit, (1,)


def until_alone(path, caller):
    """Tells that it is there, and how it came to an end."""
    caller.tell(os.getpid())
    while not caller.is_gone():
        time.sleep(0.01)
    caller.tell("nobody hears this")
    path.write_text("ended by itself")


def test_one_that_dies_is_named_and_the_others_see_it(tmp_path):
    pids = {}

    def killed_when_both_are_there(path, pid):
        pids[path] = pid
        if len(pids) == 2:
            os.kill(pids[tmp_path / "a"], signal.SIGKILL)

    paths = [tmp_path / "a", tmp_path / "b"]
    calls = side_by_side(until_alone, paths, 2, on_message=killed_when_both_are_there, patient=True)
    with pytest.raises(WorkerError, match=f"^{tmp_path}/a: its process died with exit code -9$"):
        list(calls)
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
    assert multiprocessing.active_children() == []


def test_one_that_dies_at_once_is_named():
    with pytest.raises(WorkerError, match=r"^6: its process died with exit code 1$"):
        list(side_by_side(Deadly(), [6, 7], 1))


def test_asked_to_stop_it_waits_for_no_result(tmp_path):
    told = []
    paths = [tmp_path / "a", tmp_path / "b"]
    calls = side_by_side(until_alone, paths, 1, on_message=lambda *said: told.append(said), should_stop=lambda: told)
    assert list(calls) == []
    assert [path for path, _ in told] == paths[:1]
    assert multiprocessing.active_children() == []
    assert not list(tmp_path.iterdir())
