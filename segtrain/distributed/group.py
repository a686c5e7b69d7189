"""The processes of one command, as torchrun starts them: their ranks, and the numbers that they exchange."""

import contextlib
import datetime
import heapq
import itertools
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from segtrain.console import process_count
from segtrain.distributed.watchdog import PeerDied, Watchdog, connection_lost
from segtrain.errors import INTERRUPTED, REQUEUE, SegtrainError, UsageError

meetings = itertools.count()  # of the processes of one launch: a sweep trains several times


class Agreement(NamedTuple):
    """What all processes know before a step: the divisor of the loss, the fraction of the training that is done, the
    exit status of a stop that any process was asked for (0: none), and the sum of the losses."""

    divisor: float
    progress: float
    signal: int
    loss: float


class World:
    """The processes of this command: this one's rank, their number, and the collectives of the control flow.

    A single process has rank 0 of 1, and every method is then free. Control data (counts, signals, failures) is
    exchanged over the CPU; gradients and statistics are torch.distributed's own matter.
    """

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0, store: Any = None) -> None:
        self.rank = rank
        self.size = size
        self.local_rank = local_rank
        self.main = rank == 0
        self.store = store
        self.watchdog: Watchdog | None = None
        self.turns = 0

    def all_reduce(self, *values: float) -> list[float]:
        """The sums over all processes; exact for whole numbers up to 2**53."""
        if self.size == 1:
            return list(values)
        import torch
        from torch import distributed

        total = torch.tensor(values, dtype=torch.float64)
        with self.explained():
            distributed.all_reduce(total)
        result: list[float] = total.tolist()
        return result

    def agree(self, count: float, progress: float, signal: int, loss: float = 0.0) -> Agreement:
        """The one control collective of a training step.

        count, loss: this process's, summed. progress: the first process's counts, whose clock is the run's. signal: 0,
        REQUEUE or INTERRUPTED; Ctrl-C in any process comes before requeueing.
        """
        mine = (count, progress if self.main else 0.0, signal == INTERRUPTED, signal == REQUEUE, loss)
        count, progress, interrupted, requeue, loss = self.all_reduce(*mine)
        return Agreement(count, progress, INTERRUPTED if interrupted else REQUEUE if requeue else 0, loss)

    def all_gather(self, value: Any) -> list[Any]:
        """The value of each process, by rank: numbers, text, lists and dicts of them."""
        if self.size == 1:
            return [value]
        from torch import distributed

        everyone: list[Any] = [None] * self.size
        with self.explained():
            distributed.all_gather_object(everyone, value)
        return everyone

    def require_same(self, options: Mapping[str, Any]) -> None:
        """UsageError if the processes were given different options. A collective call."""
        everyone = self.all_gather(dict(options))
        for rank, theirs in enumerate(everyone):
            keys = sorted(
                everyone[0].keys() | theirs.keys(), key=lambda key: (key == "name", key)
            )  # it follows from others
            differing = [key for key in keys if everyone[0].get(key) != theirs.get(key)]
            if differing:
                listed = ", ".join(f"{key}={theirs.get(key)} and not {everyone[0].get(key)}" for key in differing[:3])
                error = UsageError(f"rank {rank} was given other options than rank 0: {listed}; give all the same")
                error.everywhere = True
                raise error

    @contextlib.contextmanager
    def main_process_first(self) -> Iterator[None]:
        """Run the body in the first process, then in all others, which find what it has made.

        Waiting is no collective, so it may take hours; if the first process fails, so do the others.
        """
        self.turns += 1
        key = f"turn/{self.turns}"
        if not self.main:
            while not self.store.check([key]):
                if self.watchdog is not None:
                    self.watchdog.raise_if_one_died()
                time.sleep(0.05)
        yield
        if self.main and self.size > 1:
            self.store.set(key, b"1")

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Raise PeerDied, with the reason, for a collective that fails because another process has died."""
        try:
            yield
        except RuntimeError as error:
            if self.watchdog is not None:
                self.watchdog.raise_if_one_died(patience=5.0)
            raise connection_lost(error) from error

    def raise_if_peer_died(self, error: Exception) -> None:
        """PeerDied if that caused `error`: the collectives of the gradients fail like all others."""
        if self.watchdog is None or not isinstance(error, RuntimeError):
            return
        self.watchdog.raise_if_one_died(patience=5.0)
        signs = ("onnection closed", "onnection reset", "remote process", "gloo/transport")
        if any(sign in str(error) for sign in signs):
            raise connection_lost(error) from error

    def announce(self, error: BaseException) -> None:
        """Tell the other processes why this one ends, unless they know it or end for the same reason."""
        if self.watchdog is None:
            return
        if isinstance(error, PeerDied):
            self.watchdog.end()
        elif getattr(error, "everywhere", False):
            self.watchdog.announce_done()
        else:
            status = getattr(error, "exit_status", 1)
            text = str(error) if isinstance(error, SegtrainError) else f"{type(error).__name__}: {error}"
            self.watchdog.announce_failure(status, text)


@contextlib.contextmanager
def init_distributed(options: Mapping[str, Any] | None = None) -> Iterator[World]:
    """The World of this process, with its process group while inside; rank 0 of 1 without a launcher.

    options: those that all processes must have in common, else UsageError.

    Gloo on the CPU and NCCL between GPUs. A process that leaves by an error ends the others too.
    """
    if process_count() == 1:
        yield World()
        return
    import torch
    from torch import distributed
    from torch._C import _distributed_c10d as c10d

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    gpus = torch.cuda.is_available()
    if gpus and local_rank < torch.cuda.device_count():
        torch.cuda.set_device(local_rank)
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    hosts = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    patience = datetime.timedelta(minutes=5)
    # Every start of torchrun has a store of its own; a restart of its workers uses the same store again.
    prefix = f"segtrain/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{next(meetings)}"

    def connect(server: bool) -> Any:
        store = c10d.TCPStore(host, port, size, server, patience, wait_for_workers=False, multi_tenant=True)
        return c10d.PrefixStore(prefix, store)

    store = connect(hosts)
    world = World(rank, size, local_rank, store)
    distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if gpus else "gloo", store=store, rank=rank, world_size=size,
        timeout=datetime.timedelta(minutes=30),  # the watchdog finds a dead process long before
    )  # fmt: skip
    world.watchdog = Watchdog(rank, size, connect(False))
    world.watchdog.start()
    try:
        world.require_same(options or {})
        yield world
    except BaseException as error:
        world.announce(error)
        raise
    else:
        world.all_reduce(0.0)  # no process leaves while another one still communicates
        world.watchdog.announce_done()
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


def all_gather_values(value: Any) -> list[Any]:
    """The value of each process of this command, by rank, in every one of them."""
    if process_count() == 1:
        return [value]
    from torch import distributed

    everyone: list[Any] = [None] * process_count()
    distributed.all_gather_object(everyone, value)
    return everyone


def equal_shares(costs: Sequence[int], parts: int) -> list[list[int]]:
    """The numbers of the items of each process, ascending, so that their costs add up to about the same.

    The most expensive item left goes to the process that has least, among equals to the first one. So the largest sum
    is at most 4/3 of the least possible one (Graham 1969), and items of equal cost go round: process r has r,
    r + parts, and so on. The numbers of items may differ.
    """
    loads = [(0, part) for part in range(parts)]
    shares: list[list[int]] = [[] for _ in range(parts)]
    for number in sorted(range(len(costs)), key=lambda number: -costs[number]):
        load, part = loads[0]
        shares[part].append(number)
        heapq.heapreplace(loads, (load + costs[number], part))
    return [sorted(share) for share in shares]


def chunks(batch_size: int, parts: int) -> list[range]:
    """The samples 0 .. batch_size - 1 of a batch in `parts` consecutive ranges of as equal size as possible."""
    edges = [batch_size * part // parts for part in range(parts + 1)]
    return [range(first, last) for first, last in zip(edges, edges[1:], strict=False)]
