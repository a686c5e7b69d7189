"""Threads that do a few things at a time, in order; processes that end with the one that started them; garbage."""

import contextlib
import gc
import itertools
import multiprocessing
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.process import BaseProcess
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


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
    function: Callable[[T], R], items: Iterable[T], ahead: int = 4, at_once: int = 1
) -> Iterator[R]:  # fmt: skip
    """function(item) for each item, in order; at most `ahead` results a thread wait to be taken.

    at_once: items that a thread gets at a time, each of which counts as one for `ahead`.
    """
    waiting: deque[Future[list[R]]] = deque()
    remaining = iter(items)

    def several(some: list[T]) -> list[R]:
        return [function(item) for item in some]

    with ThreadPoolExecutor(cpus()) as pool:
        try:
            while some := list(itertools.islice(remaining, at_once)):
                waiting.append(pool.submit(several, some))
                if len(waiting) >= ahead * cpus():
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


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
