"""Signs of life between the processes of one command: a process that dies or hangs ends the others, with the reason."""

import contextlib
import os
import sys
import threading
import time
from typing import Any

from segtrain.console import launcher_note
from segtrain.errors import SegtrainError

BEAT = 2.0  # seconds between signs of life
# Seconds without one after which a process counts as dead; a blocked collective never ends by itself. torchrun waits
# 30 s for a frozen process before it kills it, and all ends within a minute.
SILENCE = 15.0


class PeerDied(SegtrainError):
    """Another process of this run has ended, so this one cannot continue."""

    def __init__(self, text: str, exit_status: int = 1, quiet: bool = False) -> None:
        super().__init__(text)
        self.exit_status = exit_status
        self.quiet = quiet  # another process reports it


def connection_lost(error: Exception) -> PeerDied:
    return PeerDied(
        f"lost the connection to the other processes of this run ({error}); the same command goes on from the last "
        "checkpoint"
    )


class Watchdog(threading.Thread):
    """A thread that ends this process when another one is silent for SILENCE seconds or announces its failure.

    Every process increments a counter under its own key of the store. The others watch whether the counter changes,
    not the clock of another machine.
    """

    def __init__(self, rank: int, size: int, store: Any) -> None:
        super().__init__(name="watchdog", daemon=True)
        self.rank = rank
        self.size = size
        self.store = store
        self.stop = threading.Event()
        self.lock = threading.Lock()
        self.seen = [(b"", time.monotonic())] * size
        self.beats = 0
        self.dead: PeerDied | None = None
        self.looked = self.turned = time.monotonic()
        self.beat()

    def key(self, rank: int) -> str:
        return f"alive/{rank}"

    def beat(self) -> None:
        self.beats += 1
        self.store.set(self.key(self.rank), str(self.beats))

    def announce_failure(self, status: int, text: str) -> None:
        self.end()
        with contextlib.suppress(RuntimeError), self.lock:
            self.store.set(self.key(self.rank), f"failed {status} {text}")

    def announce_done(self) -> None:
        """This process has finished its work; the others may continue."""
        self.end()
        with contextlib.suppress(RuntimeError), self.lock:
            self.store.set(self.key(self.rank), "done")

    def end(self) -> None:
        self.stop.set()
        if self.is_alive() and threading.current_thread() is not self:
            self.join(timeout=5)

    def start(self) -> None:
        super().start()
        threading.Thread(target=self.watch_the_store, name="watchdog-store", daemon=True).start()

    def watch_the_store(self) -> None:
        """End this process if the store does not answer: on a machine that lost power it neither replies nor fails."""
        before = time.monotonic()
        while not self.stop.wait(BEAT):
            now = time.monotonic()
            if now - before > SILENCE / 2:  # this process was stopped
                self.turned = now
            before = now
            if now - self.turned > SILENCE:
                self.leave(PeerDied("the machine of this run's first process does not answer any more"))

    def run(self) -> None:
        while not self.stop.wait(BEAT):
            self.turned = time.monotonic()
            try:
                with self.lock:
                    self.beat()
                    self.dead = self.look()
            except RuntimeError as error:  # the store is gone, and with it the launcher or the first process
                if self.stop.is_set():
                    return
                self.dead = PeerDied(f"the launcher of this run, or its first process, is gone ({error})")
            if self.dead is not None:
                self.leave(self.dead)

    def look(self) -> PeerDied | None:
        """The first dead process found. Its death is reported by the lowest rank that lives."""
        now = time.monotonic()
        if now - self.looked > SILENCE / 2:  # this process itself was stopped, so that time proves nothing
            self.seen = [(value, now) for value, _ in self.seen]
        self.looked = now
        keys = [self.key(rank) for rank in range(self.size)]
        if not self.store.check(keys):
            return None  # a process is still starting, for which the launcher has its own time limit
        for rank, value in enumerate(self.store.multi_get(keys)):
            if value != self.seen[rank][0]:
                self.seen[rank] = value, now
            if rank == self.rank or value == b"done":
                continue
            dead = self.judge(rank, value.decode(), now - self.seen[rank][1])
            if dead is not None:
                return dead
        return None

    def judge(self, rank: int, value: str, silent: float) -> PeerDied | None:
        """PeerDied if the value of a process announces a failure, or is older than SILENCE (`silent`: its age, s)."""
        if value.startswith("failed "):
            _, status, reason = value.split(" ", 2)
            # Wrong options (2) are wrong in every process; the first process of each machine reports them.
            reported = int(status) != 2 or rank % int(os.environ.get("LOCAL_WORLD_SIZE", "1")) == 0
            text = f"rank {rank} has ended, and with it the run: {reason}"
            return PeerDied(text, int(status), quiet=reported or self.rank != 0)
        if silent > SILENCE:
            return PeerDied(
                f"rank {rank} has given no sign of life for {silent:.0f} s: it was killed (out of memory?), or its "
                "machine is gone. The run ends; the same command goes on from the last checkpoint",
                quiet=self.rank != (1 if rank == 0 else 0),
            )
        return None

    def raise_if_one_died(self, patience: float = 0.0) -> None:
        """PeerDied if a process is known to be dead, or announces it within `patience` seconds."""
        until = time.monotonic() + patience
        while True:
            if self.lock.acquire(timeout=patience + 1):
                with contextlib.suppress(RuntimeError):
                    self.dead = self.dead or self.look()
                self.lock.release()
            if self.dead is not None:
                self.stop.set()  # this thread leaves by itself, and may have a checkpoint to finish
                raise self.dead
            if time.monotonic() >= until:
                return
            time.sleep(0.2)

    def leave(self, why: PeerDied) -> None:
        """End this process although its main thread may wait for ever in a collective.

        A main thread that computes gets a few seconds first: a failing collective gives the better message.
        """
        self.stop.wait(2 * BEAT)
        if self.stop.is_set():
            return
        if not why.quiet:
            print(f"segtrain: rank {self.rank}: {why}{launcher_note()}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(why.exit_status)
