"""Threads that read ahead and that write behind: bounded, in order, and no error is lost."""

import contextlib
import json
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from segtrain import threads
from segtrain.threads import Background, threaded_map

WAIT = 20  # seconds, at most


def test_calls_go_on_beside_the_caller_and_are_bounded():
    open_now, begun, done = threading.Event(), [], []

    def work(number):
        begun.append(number)
        assert open_now.wait(WAIT)
        done.append(number)

    with Background(2) as calls:
        for number in range(3):
            calls.call(work, number)
        assert not done and set(begun) <= {0, 1}
        threading.Timer(0.05, open_now.set).start()
        for number in range(3, 9):
            calls.call(work, number)
            assert len(done) >= number - 2
    assert sorted(done) == list(range(9))


def test_the_first_error_is_raised_and_what_waits_behind_it_is_left_out():
    done, go = [], threading.Event()

    def work(number):
        assert go.wait(WAIT)
        if number == 1:
            raise OSError(f"call {number}")
        done.append(number)

    with pytest.raises(OSError, match="call 1"), Background(1) as calls:
        calls.call(work, 0)
        calls.call(work, 1)
        go.set()
        for number in range(2, 1000):
            calls.call(work, number)
    assert done == [0]


def test_what_is_given_before_the_error_but_begins_after_it_is_left_out():
    done, go = [], threading.Event()

    def fail():
        assert go.wait(WAIT)
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"), Background(1) as calls:
        calls.call(fail)
        calls.call(done.append, 1)
        go.set()
    assert done == []


def test_the_error_of_the_last_call_is_raised_too():
    def fail():
        time.sleep(0.02)
        raise MemoryError

    with pytest.raises(MemoryError), Background(2) as calls:
        calls.call(fail)


def test_an_error_of_the_caller_waits_for_the_calls_before_it():
    done = []

    def work(number):
        time.sleep(0.01)
        done.append(number)

    with pytest.raises(KeyError, match="mine"), Background(1) as calls:
        calls.call(work, 0)
        calls.call(work, 1)
        raise KeyError("mine")
    assert done == [0, 1]


@pytest.mark.parametrize(("threads", "ahead"), [(1, 3), (2, 2)])
def test_results_wait_in_order_as_many_as_asked_for(threads, ahead):
    begun = []

    def work(number):
        begun.append(number)
        time.sleep(0.002 * (number % 3))
        return number

    taken = []
    results = threaded_map(work, range(30), ahead, threads=threads)
    for number in results:
        assert len(begun) <= len(taken) + threads * ahead
        taken.append(number)
        if number == 20:
            results.close()
    assert taken == list(range(21)) and len(begun) <= 21 + threads * ahead


@pytest.mark.parametrize("seconds", [0, 1e-3])
def test_threads_take_over_where_one_item_takes_longer_than_they_cost(seconds):
    workers = []

    def work(number):
        workers.append(threading.current_thread())
        time.sleep(seconds)
        return -number

    assert list(threaded_map(work, range(300), at_once=20, threads=2)) == [-n for n in range(300)]
    here = [worker is threading.current_thread() for worker in workers]
    assert all(here[:64]) and all(one == (seconds == 0) for one in here[64:]) and len(here) == 300
    assert list(threaded_map(work, [], at_once=20)) == []


# ------------------------------------------------------------------------------------------------ signals


def test_signals_wait_where_processes_start():
    """The first is raised at the end, what is ignored stays so, and the handlers are restored."""
    handled = []
    before = signal.signal(signal.SIGTERM, lambda number, _: handled.append(number))
    ignored = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with pytest.raises(KeyboardInterrupt), threads.undisturbed() as came:
            signal.raise_signal(signal.SIGHUP)
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)
            assert came == [signal.SIGTERM, signal.SIGINT]
            assert handled == []
        assert handled == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        with threads.undisturbed() as came:
            pass
        signal.raise_signal(signal.SIGTERM)
        assert (came, handled) == ([], 2 * [signal.SIGTERM])
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGHUP, ignored)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_other_threads_leave_signals_alone():
    handler = signal.getsignal(signal.SIGINT)

    def inside():
        with threads.undisturbed() as came:
            return came, signal.getsignal(signal.SIGINT)

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(inside).result() == ([], handler)


def test_what_starts_masked_gets_no_signal():
    program = "import signal; print(sorted(int(n) for n in signal.pthread_sigmask(signal.SIG_BLOCK, [])))"
    masks = []
    for inside in (threads.unsignalled(), contextlib.nullcontext()):
        with inside:
            masks.append(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout)
    assert set(map(int, threads.ENDING)) <= set(json.loads(masks[0]))
    assert not set(map(int, threads.ENDING)) & set(json.loads(masks[1]))


def test_a_signal_waits_for_the_scenes_that_are_being_drawn(tmp_path):
    """It is not raised where the pool happens to wait, which may leave the pool in an impossible state."""
    from segtrain.data.scenes.layouts import write_scenes

    went_on = []

    def progress(done, total):
        if done == 1:
            signal.raise_signal(signal.SIGINT)
            went_on.append(done)

    before = threads.child_processes()
    with pytest.raises(KeyboardInterrupt):
        write_scenes(tmp_path / "drawn", "cityscapes", {"train": 200}, workers=2, progress=progress)
    assert went_on == [1]
    assert threads.child_processes() == before
    assert 0 < len(list((tmp_path / "drawn").rglob("*_leftImg8bit.png"))) < 200
