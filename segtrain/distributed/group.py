"""Several processes of one command, started by torchrun: who they are, what they agree on, and who died of what."""

import contextlib
import datetime
import itertools
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from segtrain.console import process_count
from segtrain.errors import SegtrainError

if TYPE_CHECKING:
    pass

BEAT = 2.0  # seconds between signs of life
meetings = itertools.count()  # of the processes of one launch: a sweep trains several times
SILENCE = 30.0  # seconds without one after which a process counts as dead; a stopped collective never ends by itself


class PeerDied(SegtrainError):
    """Another process of this run has ended, so that this one cannot go on."""

    def __init__(self, text: str, exit_status: int = 1, quiet: bool = False) -> None:
        super().__init__(text)
        self.exit_status = exit_status
        self.quiet = quiet  # another process says it


class World:
    """The processes of this command: this one's rank, how many there are, and what they tell each other.

    One process alone has rank 0 of 1, and every method is then free. Talk between the processes is about control
    (counts, signals, failures) and goes over the CPU; gradients and statistics are torch.distributed's own matter.
    """

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0, store: Any = None) -> None:
        self.rank = rank
        self.size = size
        self.local_rank = local_rank
        self.main = rank == 0
        self.store = store
        self.pulse: Watchdog | None = None
        self.turns = 0

    def all_reduce(self, *values: float) -> list[float]:
        """The sums over all processes, of whole numbers up to 2**53 exactly."""
        if self.size == 1:
            return list(values)
        import torch
        from torch import distributed

        total = torch.tensor(values, dtype=torch.float64)
        with self.explained():
            distributed.all_reduce(total)
        result: list[float] = total.tolist()
        return result

    def all_gather(self, value: Any) -> list[Any]:
        """What each process gave, by rank: numbers, text, lists and dicts of them."""
        if self.size == 1:
            return [value]
        from torch import distributed

        everyone: list[Any] = [None] * self.size
        with self.explained():
            distributed.all_gather_object(everyone, value)
        return everyone

    @contextlib.contextmanager
    def main_process_first(self) -> Iterator[None]:
        """The body runs in the first process, then in all others: they find what it has made.

        Waiting is no collective, so it may take hours; if the first one fails, so do the others.
        """
        self.turns += 1
        key = f"turn/{self.turns}"
        if not self.main:
            while not self.store.check([key]):
                if self.pulse is not None:
                    self.pulse.raise_if_one_died()
                time.sleep(0.05)
        yield
        if self.main and self.size > 1:
            self.store.set(key, b"1")

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """A collective that fails because another process has died says so instead of 'connection closed by peer'."""
        try:
            yield
        except RuntimeError as error:
            if self.pulse is not None:
                self.pulse.raise_if_one_died(patience=5.0)
            raise lost(error) from error

    def raise_if_peer_died(self, error: Exception) -> None:
        """PeerDied if that is why `error` came: gradients too go round, and their collectives fail like all others."""
        if self.pulse is None or not isinstance(error, RuntimeError):
            return
        self.pulse.raise_if_one_died(patience=5.0)
        signs = ("onnection closed", "onnection reset", "remote process", "gloo/transport")
        if any(sign in str(error) for sign in signs):
            raise lost(error) from error

    def failed(self, error: BaseException) -> None:
        """Tell the others what this process dies of, if they do not know it or die of it too."""
        if self.pulse is None:
            return
        if isinstance(error, PeerDied):
            self.pulse.end()
        elif getattr(error, "everywhere", False):
            self.pulse.announce_done()
        else:
            status = getattr(error, "exit_status", 1)
            text = str(error) if isinstance(error, SegtrainError) else f"{type(error).__name__}: {error}"
            self.pulse.announce_failure(status, text)


def lost(error: Exception) -> PeerDied:
    return PeerDied(
        f"lost the connection to the other processes of this run ({error}); the same command goes on from the last "
        "checkpoint"
    )


class Watchdog(threading.Thread):
    """Signs of life. A process that is silent for SILENCE seconds, or says that it fails, ends all others.

    Every process counts up under its own key of the store; the others watch the counts, not the clocks, of each other.
    """

    def __init__(self, world: World, store: Any) -> None:
        super().__init__(name="pulse", daemon=True)
        self.world = world
        self.store = store
        self.stop = threading.Event()
        self.lock = threading.Lock()
        self.seen = [(b"", time.monotonic())] * world.size
        self.beats = 0
        self.dead: PeerDied | None = None
        self.looked = self.turned = time.monotonic()
        self.beat()

    def key(self, rank: int) -> str:
        return f"pulse/{rank}"

    def beat(self) -> None:
        self.beats += 1
        self.store.set(self.key(self.world.rank), str(self.beats))

    def announce_failure(self, status: int, text: str) -> None:
        self.end()
        with contextlib.suppress(RuntimeError), self.lock:
            self.store.set(self.key(self.world.rank), f"failed {status} {text}")

    def announce_done(self) -> None:
        """This process has done its part; the others may go on."""
        self.end()
        with contextlib.suppress(RuntimeError), self.lock:
            self.store.set(self.key(self.world.rank), "done")

    def end(self) -> None:
        self.stop.set()
        if self.is_alive() and threading.current_thread() is not self:
            self.join(timeout=5)

    def start(self) -> None:
        super().start()
        threading.Thread(target=self.watch_the_store, name="pulse-store", daemon=True).start()

    def watch_the_store(self) -> None:
        """A store on a machine that has lost its power answers neither yes nor no."""
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
        """The first process found dead. Its own death is told by the lowest rank that lives."""
        now = time.monotonic()
        if now - self.looked > SILENCE / 2:  # this process itself was stopped: nobody can be judged by that time
            self.seen = [(value, now) for value, _ in self.seen]
        self.looked = now
        keys = [self.key(rank) for rank in range(self.world.size)]
        if not self.store.check(keys):
            return None  # somebody is still starting, for which the launcher has its own time limit
        for rank, found in enumerate(self.store.multi_get(keys)):
            if found != self.seen[rank][0]:
                self.seen[rank] = found, now
            text = found.decode()
            if rank == self.world.rank or text == "done":
                continue
            quiet = self.world.rank != (1 if rank == 0 else 0)
            if text.startswith("failed "):
                _, status, reason = text.split(" ", 2)
                # What is wrong with options (2) is the same everywhere, and told by the first process only.
                told = int(status) != 2 or rank % int(os.environ.get("LOCAL_WORLD_SIZE", "1")) == 0
                text = f"rank {rank} has ended, and with it the run: {reason}"
                return PeerDied(text, int(status), quiet=told or self.world.rank != 0)
            silent = now - self.seen[rank][1]
            if silent > SILENCE:
                return PeerDied(
                    f"rank {rank} has given no sign of life for {silent:.0f} s: it was killed (out of memory?), or its "
                    "machine is gone. The run ends; the same command goes on from the last checkpoint", quiet=quiet,
                )  # fmt: skip
        return None

    def raise_if_one_died(self, patience: float = 0.0) -> None:
        """PeerDied if a process is known to be dead, or says so within `patience` seconds."""
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
        """End this process while its main thread may be waiting for ever in a collective: first politely, for a main
        thread that computes, then at once."""
        self.stop.wait(3 * BEAT)  # a failing collective says it better
        if self.stop.is_set():
            return
        if not why.quiet:
            print(f"segtrain: rank {self.world.rank}: {why}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(why.exit_status)


@contextlib.contextmanager
def init_distributed() -> Iterator[World]:
    """The world of this process, (rank 0 of 1) without a launcher. Processes may talk while inside.

    Over gloo on the CPU and NCCL between cards. A process that leaves by an error takes the others with it.
    """
    if process_count() == 1:
        yield World()
        return
    import torch
    from torch import distributed
    from torch._C import _distributed_c10d as c10d

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    cards = torch.cuda.is_available()
    if cards and local_rank < torch.cuda.device_count():
        torch.cuda.set_device(local_rank)
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    hosts = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    patience = datetime.timedelta(minutes=5)
    # Every start of torchrun has a store of its own, a restart of its workers has not.
    prefix = f"segtrain/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{next(meetings)}"

    def connect(server: bool) -> Any:
        store = c10d.TCPStore(host, port, size, server, patience, wait_for_workers=False, multi_tenant=True)
        return c10d.PrefixStore(prefix, store)

    store = connect(hosts)
    world = World(rank, size, local_rank, store)
    distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if cards else "gloo", store=store, rank=rank, world_size=size,
        timeout=datetime.timedelta(minutes=30),  # a dead process is found by the pulse, long before
    )  # fmt: skip
    world.pulse = Watchdog(world, connect(False))
    world.pulse.start()
    try:
        yield world
    except BaseException as error:
        world.failed(error)
        raise
    else:
        world.all_reduce(0.0)  # nobody leaves while another one still talks
        world.pulse.announce_done()
    finally:
        if sys.exc_info()[0] is None:
            distributed.destroy_process_group()


def all_reduce_arrays(*arrays: np.ndarray) -> None:
    """Replace each array by its sum over all processes."""
    if process_count() > 1:
        import torch
        from torch import distributed

        for array in arrays:
            distributed.all_reduce(torch.from_numpy(array))


def chunks(batch_size: int, parts: int) -> list[range]:
    """The pictures 0 .. batch_size - 1 of a batch in `parts` pieces in order, as equal as can be."""
    edges = [batch_size * part // parts for part in range(parts + 1)]
    return [range(first, last) for first, last in zip(edges, edges[1:], strict=False)]
