"""Repeat recorded launches on other builds of the kernels: under a sanitizer, from PTX, or with a seeded bug.

    python -m tests.abn.cuda_emulator.replay SANITIZER TEXT LAUNCHES ORDERS    -> prints OK, or FAULT or WRONG and what

Needs neither torch nor segtrain, which would take ten seconds to load under a sanitizer.
"""

import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tests.abn.cuda_emulator import emu

TOLERANCES = {"float64": 1e-12, "float32": 1e-5, "float16": 1.5e-3, "bfloat16": 1e-2, "uint8": 0}


class Launch(NamedTuple):
    """One launch. The dicts have the numbers of arguments as keys; values are scalars, or the elements of tensors."""

    kernel: str
    grid: tuple[int, int]
    block: int
    arguments: int  # their number; those not told below are null pointers
    numbers: dict[int, np.generic]
    places: dict[int, int]  # of a tensor: the first argument with the same memory
    kinds: dict[int, str]  # torch's names of the dtypes
    before: dict[int, np.ndarray]
    after: dict[int, np.ndarray]


def save(launches: list[Launch], path: Path) -> None:
    path.write_bytes(pickle.dumps([tuple(launch) for launch in launches]))


def load(path: Path) -> list[Launch]:
    return [Launch(*fields) for fields in pickle.loads(path.read_bytes())]


def telling(launches: list[Launch]) -> list[Launch]:
    """For each kernel, the launches with the most blocks, turns of a thread, stripes to merge, and given arguments."""
    measures: list[Callable[[Launch], float]] = [
        lambda launch: launch.grid[0] * launch.grid[1],
        lambda launch: max(t.size for t in launch.before.values()) / (launch.grid[0] * launch.grid[1]),
        lambda launch: max((int(n) for n in launch.numbers.values() if n.dtype == np.int32), default=0),
        lambda launch: len(launch.places),
    ]
    chosen = []
    for name in names(launches):
        same = [launch for launch in launches if launch.kernel == name]
        best = [max(same, key=measure) for measure in measures]
        chosen += list({id(launch): launch for launch in best}.values())
    return chosen


def names(launches: list[Launch]) -> list[str]:
    return list(dict.fromkeys(launch.kernel for launch in launches))


def numbers_of(values: np.ndarray, kind: str) -> np.ndarray:
    if kind == "bfloat16":
        values = (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float64)


def difference(got: np.ndarray, want: np.ndarray, kind: str) -> float:
    """Largest difference in units of max(1, largest expected number). NaNs that stay uninitialised do not differ."""
    a, b = numbers_of(got, kind), numbers_of(want, kind)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    unit = max(1.0, float(np.max(np.abs(b), where=np.isfinite(b), initial=0)))
    with np.errstate(invalid="ignore", over="ignore"):
        return float(np.where(same, 0, np.abs(a - b) / unit).max(initial=0))


def replay(module: emu.Module, launches: list[Launch], exact: bool, orders: tuple[int, ...] = (0,)) -> list[str]:
    """What differs from the recorded results, '' if nothing does."""
    wrong = []
    for launch in launches:
        for order in orders:
            memories = {place: launch.before[place].copy() for place in set(launch.places.values())}
            args: list[object] = [0] * launch.arguments
            for i, number in launch.numbers.items():
                args[i] = number
            for i, place in launch.places.items():
                args[i] = memories[place].ctypes.data
            module.order = order
            module.launch(launch.kernel, launch.grid, launch.block, tuple(args))
            for i, place in launch.places.items():
                want = launch.after[i]
                off = difference(memories[place], want, launch.kinds[i])
                different = memories[place].tobytes() != want.tobytes() if exact else False
                if different or not off <= TOLERANCES[launch.kinds[i]]:
                    wrong.append(f"{launch.kernel}: argument {i} off by {off:.1e}, thread order {order}")
    return wrong


def main(sanitizer: str, text: str, path: str, orders: str) -> int:
    launches = load(Path(path))
    module = emu.from_text(Path(text).read_text(), names(launches), sanitizer)
    try:
        wrong = replay(module, launches, True, tuple(map(int, orders.split(","))))
    except emu.Fault as fault:
        print("FAULT", fault)
        return 3
    print(f"WRONG {len(wrong)} times, {wrong[0]}" if wrong else "OK")
    return 2 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
