"""Threads that do a few things at a time, in order; processes that end with the one that started them; garbage."""

import contextlib
import gc
import itertools
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.process import BaseProcess
from statistics import median
from types import TracebackType
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")
TRIED, QUICK = 64, 3e-4  # items that are tried, and seconds: of files of few kilobytes, two threads read half as many


def cpus() -> int:
    """Those this process may use, not the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe_load() -> str | None:
    """How busy the machine is, if more processes want to compute than it has cores; None if not, or not known."""
    try:
        load = os.getloadavg()[0]
    except (AttributeError, OSError):
        return None
    cores = os.cpu_count() or 1
    return f"load {load:.1f} on {cores} cores: other programs compute too, which slows all" if load > cores else None


def threaded_map(
    function: Callable[[T], R], items: Iterable[T], ahead: int = 4, at_once: int = 1, threads: int | None = None
) -> Generator[R, None, None]:
    """function(item) for each item, in order; at most `ahead` results a thread wait to be taken.

    at_once: items that a thread gets at a time, each of which counts as one for `ahead`. threads: None: one for each
    CPU of this process. Closing waits for the calls that have begun.

    With at_once > 1, this thread works on the first of them, and on all if most take less than QUICK: threads would
    only take Python's lock from each other.
    """
    threads = threads or cpus()
    waiting: deque[Future[list[R]]] = deque()
    remaining = iter(items)
    if at_once > 1:
        took = []
        for item in itertools.islice(remaining, TRIED):
            began = time.perf_counter()
            result = function(item)
            took.append(time.perf_counter() - began)
            yield result
        if took and median(took) < QUICK:
            yield from map(function, remaining)
            return

    def several(some: list[T]) -> list[R]:
        return [function(item) for item in some]

    with ThreadPoolExecutor(threads) as pool:
        try:
            while some := list(itertools.islice(remaining, at_once)):
                waiting.append(pool.submit(several, some))
                if len(waiting) >= ahead * threads:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


class Background:
    """Calls functions in other threads, which begin in the order in which they are given, while the caller goes on.

    At most `threads` + 1 calls are unfinished: then the next one waits. The first error is raised by a later `call` or
    at the end of the context, and what has not begun by then is left out. An error of the caller is raised after the
    calls that were given before it.
    """

    def __init__(self, threads: int) -> None:
        self.pool = ThreadPoolExecutor(threads, "background")
        self.most = threads + 1
        self.unfinished: deque[Future[None]] = deque()
        self.failed = threading.Event()

    def call(self, function: Callable[..., None], *arguments: Any) -> None:
        while self.unfinished and (len(self.unfinished) == self.most or self.unfinished[0].done()):
            self.unfinished.popleft().result()
        self.unfinished.append(self.pool.submit(self.begin, function, arguments))

    def begin(self, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        if self.failed.is_set():
            return
        try:
            function(*arguments)
        except BaseException:
            self.failed.set()
            raise

    def __enter__(self) -> "Background":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.pool.shutdown()
        if error is None:  # else that error is the one to report
            for one in self.unfinished:
                one.result()


def portion(items: int) -> int:
    """How many of so many items a thread gets at a time: several where waiting takes longer than a look at one."""
    return max(1, min(256, items // (16 * cpus())))


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Inside, Python's garbage collector rests, which would walk a growing list of files again and again."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def child_processes() -> set[BaseProcess]:
    """Those that multiprocessing has started here and that live."""
    return set(multiprocessing.active_children())


ENDING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


@contextlib.contextmanager
def undisturbed() -> Iterator[list[int]]:
    """Inside, signals that end the program are only noted, in the list, and the first is raised at the end.

    For where this process starts others and waits for them: an error at any place there leaves some half started, or
    the waiting in an impossible state.
    """
    came: list[int] = []
    here = threading.current_thread() is threading.main_thread()
    handlers = {number: signal.getsignal(number) for number in ENDING if here}
    handlers = {number: handler for number, handler in handlers.items() if handler not in (None, signal.SIG_IGN)}
    for number in handlers:
        signal.signal(number, lambda number, frame: came.append(number))
    try:
        yield came
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])
            raise KeyboardInterrupt  # where its handler goes on: what was begun here has been left


@contextlib.contextmanager
def unsignalled() -> Iterator[None]:
    """What is started inside does not get the signals that end the program: it inherits the mask, but no handler."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def begin_child() -> None:
    """In a process that multiprocessing has started: it ends with its parent, whose part the signals are."""
    end_with_parent()
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)


def end_with_parent() -> None:
    """End this process, which multiprocessing has started, within a second of its parent, also of one that is killed.

    Linux could send a signal instead, but sends it when the parent's *thread* ends that started this process.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    end_unless(parent.is_alive if os.name == "nt" else lambda: os.getppid() == parent.pid)


def end_unless(is_wanted: Callable[[], bool]) -> None:
    """End this process as soon as that is false, which is asked twice a second."""

    def watch() -> None:
        while is_wanted():
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()
