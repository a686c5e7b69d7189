"""The processes that read batches: how they are started, waited for and ended, whatever happens to them."""

import atexit
import contextlib
import errno
import functools
import os
import queue
import shutil
import signal
import threading
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, TypeVar

import cv2
import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from segtrain.console import say
from segtrain.errors import DataError, SegtrainError
from segtrain.threads import child_processes, end_with_parent

PATIENCE = 600.0  # seconds without a batch after which the command ends
REMINDER = 60.0  # seconds between two lines that say why it waits
EXIT = 2.0  # seconds in which a process whose connection ended is expected to have an exit status
EXITED = "exited unexpectedly"  # in torch's words
LOOK = 0.2  # seconds between two looks at the processes while waiting
SHARED = Path("/dev/shm")
REMEDY = "give fewer loader.workers or more memory, or loader.workers=0 to read in the main process"

Get = TypeVar("Get", bound=Callable[..., Any])
running: list["Workers"] = []  # those of this process that have not been ended


class StopAsked(Exception):
    """The command was asked to stop while it waited for a batch."""


def never() -> bool:
    return False


def items_of(loader: "DataLoader[Any]", stopped: Callable[[], bool] = never) -> Generator[Any, None, None]:
    """The items of a loader, errors among them. Its processes end with the iteration, however that ends.

    stopped: whether the command was asked to stop; StopAsked if so while an item is waited for. SegtrainError, with the
    remedy, for a process that died, or that gives nothing for PATIENCE seconds.
    """
    if loader.num_workers == 0:
        yield from loader
        return
    workers = Workers(loader)
    try:
        while (item := workers.next_item(stopped)) is not workers:
            yield item
    finally:
        workers.end()


class Started(_MultiProcessingDataLoaderIter):
    """torch's iterator. Where its __init__ ends early, its __del__ fails and prints a traceback."""

    def __del__(self) -> None:
        if hasattr(self, "_workers_num_tasks"):  # __init__ set it, after all that the end needs
            super().__del__()
        elif getattr(self, "_worker_pids_set", False):
            torch._C._remove_worker_pids(id(self))


@contextlib.contextmanager
def keeping_child_handler() -> Generator[None, None, None]:
    """Restore the handler of SIGCHLD: torch sets one that raises wherever the main thread happens to be."""
    handler = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, handler)


class Workers:
    """The processes of a loader, and the thread that takes items from them.

    Only that thread waits for a process: a process that dies while it sends leaves the receiver waiting for ever.
    """

    def __init__(self, loader: "DataLoader[Any]") -> None:
        before = child_processes()
        try:
            with keeping_child_handler():
                iterator = Started(loader)
        except BaseException as error:  # that of a signal too
            for process in child_processes() - before:
                process.kill()
            if not isinstance(error, OSError):
                raise
            raise SegtrainError(
                f"{loader.num_workers} loader processes cannot be started ({error.strerror or error}): "
                f"{remedy_of(error)}"
            ) from error
        self.processes = child_processes() - before
        self.owner = os.getpid()
        self.wanted: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self.taken: queue.SimpleQueue[tuple[Any, Exception | None]] = queue.SimpleQueue()
        running.append(self)
        threading.Thread(target=self.take, args=(iterator,), name="loader", daemon=True).start()

    def take(self, iterator: Any) -> None:
        """In the thread: an item, or the error that came in its place, for each wish."""
        while self.wanted.get():
            try:
                self.taken.put((next(iterator, self), None))
            except Exception as error:  # noqa: BLE001  # raised by next_item
                self.taken.put((None, error))

    def next_item(self, stopped: Callable[[], bool]) -> Any:
        """The next item; these Workers themselves after the last one."""
        self.wanted.put(True)
        began = time.monotonic()
        reminder = REMINDER
        while True:
            try:
                item, error = self.taken.get(timeout=LOOK)
            except queue.Empty:
                waited = time.monotonic() - began
                if stopped():
                    raise StopAsked from None
                self.raise_if_one_died()
                if waited > PATIENCE:
                    raise SegtrainError(f"no batch came for {waited:.0f} s: {self.why_silent()}; {REMEDY}") from None
                if waited > reminder:
                    reminder += REMINDER
                    say(f"waiting    no batch came for {waited:.0f} s: {self.why_silent()}")
                continue
            if error is not None:
                self.raise_if_one_died(error)
                if isinstance(error, ConnectionError | EOFError) or EXITED in str(error):
                    self.wait_for_exit_status(error)
                raise in_words(error) from error
            return item

    def wait_for_exit_status(self, error: Exception) -> None:
        """A dying process closes its files, which ends the connection, a moment before it has an exit status."""
        until = time.monotonic() + EXIT
        while time.monotonic() < until:
            self.raise_if_one_died(error)
            time.sleep(0.01)

    def raise_if_one_died(self, error: Exception | None = None) -> None:
        """SegtrainError if a process ended with another exit status than 0, or, where torch says so, at all."""
        lost = error is not None and EXITED in str(error)
        for process in self.processes:
            if process.exitcode is not None and (process.exitcode != 0 or lost):
                raise SegtrainError(
                    f"one of {len(self.processes)} loader processes {how_it_ended(process.exitcode)}: {REMEDY}"
                ) from error

    def why_silent(self) -> str:
        """What the system knows about processes that give nothing."""
        states = {process.pid: state_of_process(process.pid) for process in self.processes}
        stopped = [str(pid) for pid, state in states.items() if state in ("T", "t")]
        if stopped:
            return f"loader process {', '.join(stopped)} is stopped (kill -CONT {' '.join(stopped)} lets it go on)"
        if "D" in states.values():
            return "the loader processes wait for the disk or the network"
        return f"the loader processes still read or compute; {shared_memory()}"

    def end(self) -> None:
        """End the processes at once; they have nothing to save. May be called again."""
        if self.owner != os.getpid():  # in a fork of it
            return
        if self in running:
            running.remove(self)
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join(timeout=5)
        self.wanted.put(False)  # last: the thread joins them too, and of two that join at once, one may not see the end


@atexit.register
def end_all() -> None:
    """Before multiprocessing waits for them at the end of the process: they do not listen to its SIGTERM."""
    for workers in list(running):
        workers.end()


def how_it_ended(code: int) -> str:
    if code == -signal.SIGKILL:
        return f"was killed (SIGKILL), as the system does when memory runs out ({shared_memory()})"
    if code == -getattr(signal, "SIGBUS", 0):
        return f"was killed (SIGBUS), as the system does when shared memory runs out ({shared_memory()})"
    if code < 0:
        return f"crashed ({signal.Signals(-code).name})"
    return f"has ended with exit status {code}"


def in_words(error: Exception) -> Exception:
    """An error of the transport between the processes as one sentence; any other one, such as a plugin's, as it is."""
    text = str(error)
    if text.startswith("Caught "):  # raised in a loader process, whose traceback it brings along
        return error
    if isinstance(error, OSError) or "ancdata" in text or "open files" in text or "shared memory" in text:
        reason = text.partition(". ")[0]
        return SegtrainError(f"a batch cannot be taken from the loader processes ({reason}): {remedy_of(error)}")
    return error


def remedy_of(error: Exception) -> str:
    if getattr(error, "errno", None) == errno.ENOSPC or "shared memory" in str(error):
        return f"{shared_memory()}; give it more room (docker run --shm-size=8g), or {REMEDY.removeprefix('give ')}"
    if getattr(error, "errno", None) == errno.EMFILE or "ancdata" in str(error) or "open files" in str(error):
        return f"raise the number of open files (ulimit -n 65536), or {REMEDY}"
    return REMEDY


def shared_memory() -> str:
    """'/dev/shm has 64 MB, of which 3 are free'"""
    try:
        usage = shutil.disk_usage(SHARED)
    except OSError:
        return "no /dev/shm here"
    return f"{SHARED} has {usage.total / 1e6:.0f} MB, of which {usage.free / 1e6:.0f} are free"


def state_of_process(pid: int | None) -> str:
    """The letter of the process's state in /proc (T: stopped, D: waits for a disk); '' where it is not known."""
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return ""


# ------------------------------------------------------------------------------------------------ in the processes


def quiet_worker(worker: int) -> None:
    """Keep to one core, end with the main process, and leave signals to it: it saves before it ends."""
    end_with_parent()
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    cv2.setNumThreads(0)
    torch.set_num_threads(1)


def errors_as_values(get: Get) -> Get:
    """A dataset's __getitem__ that returns errors about files: raised, they would arrive wrapped in a traceback."""

    @functools.wraps(get)
    def carry(self: Any, number: int) -> Any:
        try:
            return get(self, number)
        except SegtrainError as error:
            return error
        except OSError as error:
            where = f" {error.filename}" if error.filename else ""
            return DataError(f"cannot write or read{where} in a loader process: {error.strerror or error}")

    return carry  # type: ignore[return-value]


def to_shared_memory(*tensors: Tensor) -> DataError | None:
    """Move the tensors of a batch there, in a loader process; an error if it is full.

    Left to the queue between the processes, that error would be printed, and the batch never come.
    """
    if get_worker_info() is None:
        return None
    try:
        for tensor in tensors:
            tensor.share_memory_()
    except RuntimeError as error:
        size = sum(tensor.nbytes for tensor in tensors) / 1e6
        return DataError(f"a batch of {size:.1f} MB finds no room in shared memory: {remedy_of(error)}")
    return None
