"""A few things at a time, in order."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def cpus() -> int:
    """Those this process may use, not the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threaded_map(function: Callable[[T], R], items: Iterable[T], ahead: int = 4) -> Iterator[R]:
    """function(item) for each item, in order; at most `ahead` results a thread wait to be taken."""
    waiting: deque[Future[R]] = deque()
    with ThreadPoolExecutor(cpus()) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) >= ahead * cpus():
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
