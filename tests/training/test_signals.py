"""Ctrl-C and SIGTERM: first a question, then as usual."""

import multiprocessing
import os
import signal
import threading
import time

import pytest
import torch.distributed

from fastmeta.training import signals
from fastmeta.training.signals import stop_requested

FORK = multiprocessing.get_context("fork")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_a_question_and_a_later_one_acts(number, capsys, monkeypatch):
    taken = []
    before = signal.signal(number, lambda *_: taken.append(number))
    try:
        with stop_requested() as should_stop:
            assert not should_stop()
            os.kill(os.getpid(), number)
            assert should_stop()
            assert should_stop.is_termination == (number == signal.SIGTERM)
            assert not taken
            assert "stopping at the next step" in capsys.readouterr().err
            os.kill(os.getpid(), number)  # sent twice, it is one request
            assert not taken
            assert capsys.readouterr().err == ""
            monkeypatch.setattr(signals, "SAME_REQUEST", 0.0)
            os.kill(os.getpid(), number)
            assert len(taken) == 1
        os.kill(os.getpid(), number)
        assert len(taken) == 2
    finally:
        signal.signal(number, before)


def test_in_a_thread_it_never_asks_to_stop():
    answers = []

    def ask():
        with stop_requested() as should_stop:
            answers.append(should_stop())

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert answers == [False]


def test_a_forked_worker_ignores_ctrl_c_and_dies_of_sigterm(capfd):
    with stop_requested() as should_stop:
        worker = FORK.Process(target=time.sleep, args=(60,))
        worker.start()
        os.kill(worker.pid, signal.SIGINT)
        worker.join(0.1)
        assert worker.exitcode is None
        worker.terminate()
        worker.join(10)
        assert worker.exitcode == -signal.SIGTERM
        assert not should_stop()
    assert capfd.readouterr().err == ""


def steps_until_told(rank, world, folder, results):
    torch.distributed.init_process_group("gloo", init_method=(folder / "meeting").as_uri(), rank=rank, world_size=world)
    with stop_requested() as should_stop:
        step = 0
        while not should_stop():
            if (rank, step) == (1, 5):
                os.kill(os.getpid(), signal.SIGTERM)
            step += 1
            time.sleep(0.001 * rank)
    torch.distributed.destroy_process_group()
    results.put((step, should_stop.is_termination))


def test_all_processes_of_a_group_stop_at_the_same_step(tmp_path):
    results = FORK.Queue()
    processes = [FORK.Process(target=steps_until_told, args=(rank, 3, tmp_path, results)) for rank in range(3)]
    for process in processes:
        process.start()
    assert [results.get(timeout=60) for _ in processes] == 3 * [(7, True)]
    for process in processes:
        process.join()
        assert process.exitcode == 0
