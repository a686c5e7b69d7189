"""Loader processes that die, stop or fail: one sentence, no waiting for ever, and none of them is left."""

import gc
import itertools
import multiprocessing
import os
import queue
import signal
import time
from contextlib import closing

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from segtrain.data import workers
from segtrain.data.loader import as_it_is, training_batches
from segtrain.data.order import MicroBatches
from segtrain.data.workers import StopAsked, errors_as_values, items_of, quiet_worker
from segtrain.errors import DataError, SegtrainError
from tests.helpers.samples import training_data


class Numbers(Dataset):
    """Item n is `of(n)`."""

    def __init__(self, of, length=1000):
        self.of = of
        self.length = length

    def __len__(self):
        return self.length

    @errors_as_values
    def __getitem__(self, number):
        return self.of(number)


def reading(of, length=1000, **options):
    loader = DataLoader(
        Numbers(of, length), batch_size=None, collate_fn=as_it_is, num_workers=2, worker_init_fn=quiet_worker
    )
    return closing(items_of(loader, **options))


@pytest.fixture(autouse=True)
def none_is_left():
    """After every test; and none may take long."""
    began = time.monotonic()
    yield
    assert multiprocessing.active_children() == [] and workers.running == []
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("of", [abs, lambda n: np.zeros(1 << 22, np.uint8)], ids=["small", "half sent"])
@pytest.mark.parametrize(
    ("number", "text"),
    [(signal.SIGKILL, "was killed (SIGKILL), as the system does when memory runs out"), (signal.SIGBUS, "(SIGBUS)")],
)
def test_a_killed_process_is_one_sentence_with_the_remedy(of, number, text):
    """Also of one that has sent the half of a large item, which leaves its reader waiting."""
    before = signal.getsignal(signal.SIGCHLD)
    with reading(of) as items:
        next(items)
        assert signal.getsignal(signal.SIGCHLD) == before
        time.sleep(0.3)  # both now wait until the pipe has room
        for process in multiprocessing.active_children():
            os.kill(process.pid, number)
        with pytest.raises(SegtrainError, match="one of 2 loader processes") as caught:
            list(items)
    for part in (text, "/dev/shm has", "fewer loader.workers or more memory, or loader.workers=0"):
        assert part in str(caught.value)


def leave(number):
    return number if number < 6 else os._exit(3 * (number % 2))


@pytest.mark.parametrize(
    "error", [ConnectionResetError(104, "Connection reset by peer"), RuntimeError("worker exited unexpectedly")]
)
def test_an_exit_status_that_comes_after_the_end_of_the_connection_is_waited_for(error):
    class Dying:
        looks = 0

        @property
        def exitcode(self):
            self.looks += 1
            return None if self.looks < 4 else -signal.SIGKILL

    dying = workers.Workers.__new__(workers.Workers)
    dying.processes = {Dying()}
    dying.wanted, dying.taken = queue.SimpleQueue(), queue.SimpleQueue()
    dying.taken.put((None, error))
    with pytest.raises(SegtrainError, match="was killed"):
        dying.next_item(workers.never)


def test_a_process_that_leaves_is_missed():
    with reading(leave) as items, pytest.raises(SegtrainError, match="loader processes has ended with exit status"):
        list(items)


def test_an_error_of_a_plugin_keeps_its_kind_and_traceback():
    def of(number):
        return 1 // (number - 3)

    with reading(of) as items, pytest.raises(ZeroDivisionError, match="in of"):
        list(items)


def test_a_full_disk_in_a_process_is_a_sentence():
    def of(number):
        raise OSError(28, "No space left on device", "cache.npy")

    with reading(of) as items:
        assert str(next(items)) == "cannot write or read cache.npy in a loader process: No space left on device"


def test_a_stopped_process_is_named(monkeypatch, capsys):
    monkeypatch.setattr(workers, "PATIENCE", 1.5)
    monkeypatch.setattr(workers, "REMINDER", 0.5)
    with reading(abs) as items:
        next(items)
        pids = [process.pid for process in multiprocessing.active_children()]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        with pytest.raises(SegtrainError, match=r"no batch came for \d s: loader process .* is stopped") as caught:
            list(items)
    assert all(str(pid) in str(caught.value) for pid in pids)
    assert "waiting    no batch came for 1 s: loader process" in capsys.readouterr().out


def test_a_slow_process_is_waited_for():
    with reading(lambda number: time.sleep(0.7) or number, length=3) as items:
        assert list(items) == [0, 1, 2]


def test_a_stop_is_heard_while_waiting():
    asked = iter([False, False, True])
    with reading(lambda number: time.sleep(60), stopped=lambda: next(asked)) as items, pytest.raises(StopAsked):
        next(items)


def test_a_stop_while_a_batch_is_waited_for_ends_the_batches(scenes):
    data = training_data(scenes)
    data.read = lambda sample: time.sleep(60)
    with closing(training_batches(data, MicroBatches(4, 0, 9), 1, False, stopped=lambda: True)) as batches:
        assert list(batches) == [[]]


def test_full_shared_memory_is_a_sentence(scenes, monkeypatch):
    def full(tensor):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    batches = training_batches(training_data(scenes), MicroBatches(4, 0, 9), 1, False)
    with (
        closing(batches),
        pytest.raises(DataError, match="the batch of step 1: a batch of .* MB finds no room") as said,
    ):
        next(batches)
    assert "docker run --shm-size" in str(said.value)


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_processes_that_cannot_be_started_leave_none(monkeypatch):
    forked, fork = itertools.count(), os.fork

    def scarce():
        if next(forked):
            raise OSError(11, "Resource temporarily unavailable")
        return fork()

    monkeypatch.setattr(os, "fork", scarce)
    with reading(abs) as items, pytest.raises(SegtrainError, match="2 loader processes cannot be started .*Resource"):
        next(items)
    gc.collect()


class Interrupted(BaseException):
    """As a handler of a signal raises, which is not an Exception."""


def interrupt(*_):
    raise Interrupted


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("moment", ["_set_worker_pids", "_set_SIGCHLD_handler"])
def test_a_signal_while_processes_are_started_leaves_none_and_prints_nothing(moment, monkeypatch):
    before, handler = multiprocessing.active_children(), signal.getsignal(signal.SIGCHLD)
    with monkeypatch.context() as patch:
        patch.setattr(torch.utils.data._utils.signal_handling, moment, interrupt)
        with reading(abs) as items, pytest.raises(Interrupted):
            next(items)
    gc.collect()
    assert signal.getsignal(signal.SIGCHLD) == handler
    until = time.monotonic() + 10
    while set(multiprocessing.active_children()) - set(before):
        assert time.monotonic() < until
        time.sleep(0.01)
    with reading(abs) as items:
        assert list(items)[:2] == [0, 1]


def test_a_fork_does_not_end_the_processes_of_its_parent():
    with reading(abs) as items:
        next(items)
        if (child := os.fork()) == 0:
            workers.end_all()
            os._exit(0)
        os.waitpid(child, 0)
        assert len(multiprocessing.active_children()) == 2
        assert list(itertools.islice(items, 5)) == [1, 2, 3, 4, 5]
