"""Which sample comes when. The order follows from (seed, position), never from workers, processes or restarts.

A training run reads one endless sequence of positions: position p belongs to step p // batch_size, and is the
(p % n)-th sample of the (p // n)-th permutation of the n samples. Starting at any step is therefore free, and so is
dividing a batch among any number of processes and micro-batches.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from segtrain.distributed.group import chunks

TURNS = 1000  # positions in which the parts of a mixture have exactly their shares


@functools.lru_cache(maxsize=2)
def shuffling(samples: int, seed: int, epoch: int) -> np.ndarray:
    """The order, int64 (samples,), of one epoch."""
    return np.random.default_rng(np.random.SeedSequence((seed, epoch))).permutation(samples)


def sample_number(position: int, seed: int, samples: int, parts: Sequence[tuple[int, float]] | None = None) -> int:
    """The sample at a position. parts: (samples, weight) of each part of a mixture, which is shuffled by itself; None:
    all samples are shuffled together."""
    if parts is None:
        epoch, place = divmod(position, samples)
        return int(shuffling(samples, seed, epoch)[place])
    sizes = [size for size, _ in parts]
    part, nth = turn(tuple(weight for _, weight in parts), seed, position)
    epoch, place = divmod(nth, sizes[part])
    return sum(sizes[:part]) + int(shuffling(sizes[part], seed + 7919 * (part + 1), epoch)[place])


@functools.lru_cache(maxsize=2)
def turns(weights: tuple[float, ...], seed: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Which part of a mixture has each of the TURNS positions of a block, int64 (TURNS,), and how many positions each
    part has in any block, int64 (parts,). Because the latter are constant, no position needs counting from the start.
    """
    shares = np.array(weights) / sum(weights) * TURNS
    counts = np.floor(shares).astype(np.int64)
    for part in np.argsort(counts - shares, kind="stable")[: TURNS - counts.sum()]:
        counts[part] += 1
    parts = np.repeat(np.arange(len(weights)), counts)
    return np.random.default_rng(np.random.SeedSequence((seed, block, 2))).permutation(parts), counts


def turn(weights: tuple[float, ...], seed: int, position: int) -> tuple[int, int]:
    """(part, number of earlier positions of that part)"""
    block, place = divmod(position, TURNS)
    parts, counts = turns(weights, seed, block)
    part = int(parts[place])
    return part, int(block * counts[part] + (parts[:place] == part).sum())


class MicroBatches:
    """The positions that one of `size` processes reads, by micro-batch: `accumulation` lists of them for every step.

    A batch is divided in order and as evenly as possible into size x accumulation pieces; the first `size` of them, one
    for each process, are the first micro-batches. stop: step before which to end, None: never.
    """

    def __init__(
        self, batch_size: int, start: int, stop: int | None, rank: int = 0, size: int = 1, accumulation: int = 1
    ) -> None:
        pieces = chunks(batch_size, size * accumulation)
        self.mine = [pieces[number * size + rank] for number in range(accumulation)]
        self.batch_size = batch_size
        self.steps = (start, stop)

    def __iter__(self) -> Iterator[list[int]]:
        start, stop = self.steps
        for step in itertools.count(start) if stop is None else range(start, stop):
            for piece in self.mine:
                yield [step * self.batch_size + place for place in piece]
