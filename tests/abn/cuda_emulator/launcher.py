"""The replacement of cupy_ops.launch: the emulator runs the same launches on CPU tensors, and they can be recorded."""

import contextlib
from collections.abc import Callable, Iterator

import numpy as np
import torch

from segtrain.abn.backends import cupy as cupy_ops
from segtrain.abn.backends import cupy_kernels, cupy_launch
from tests.abn.cuda_emulator import emu
from tests.abn.cuda_emulator.replay import Launch

SMALL_BLOCK = 64  # two warps: every kind of barrier and shuffle, a quarter of the fibers
ORDERS = (0, 1, 7)  # threads and blocks forward, backward, shuffled


def memory(t: torch.Tensor) -> np.ndarray:
    """View of the elements of a dense tensor in memory order, bfloat16 as uint16."""
    flat = torch.as_strided(t, (t.numel(),), (1,))
    return (flat.view(torch.uint16) if t.dtype == torch.bfloat16 else flat).numpy()


def from_text(key: tuple) -> emu.Module:
    kernels = cupy_kernels.instances(*key)
    return emu.from_text(cupy_kernels.text_of(kernels[0].module.bits), [kernel.expression for kernel in kernels])


class Launcher:
    """cupy_ops.launch for CPU tensors. Every launch runs in all ORDERS, which must give the same bits.

    make: module key -> emulated kernels; called once for each key.
    """

    def __init__(self, make: Callable[[tuple], emu.Module] = from_text) -> None:
        self.make = make
        self.modules: dict[tuple, emu.Module] = {}
        self.orders: tuple[int, ...] = ORDERS
        self.only_block = -1
        self.seen: list[tuple[cupy_kernels.Kernel, tuple[int, int]]] = []
        self.recorded: list[Launch] | None = None  # a list takes all launches from now on

    def module(self, key: tuple) -> emu.Module:
        built = *key, cupy_kernels.BLOCK
        if built not in self.modules:
            self.modules[built] = self.make(key)
        return self.modules[built]

    def __call__(
        self, kernel: cupy_kernels.Kernel, grid: tuple[int, int], block: int, args: tuple[cupy_launch.Argument, ...]
    ) -> None:
        self.seen.append((kernel, grid))
        module = self.module(kernel.module)
        cells = [a.data_ptr() if isinstance(a, torch.Tensor) else 0 if a is None else a for a in args]
        tensors = {i: memory(a) for i, a in enumerate(args) if isinstance(a, torch.Tensor)}
        alone = len(self.orders) == 1 and self.recorded is None
        before = {} if alone else {i: t.copy() for i, t in tensors.items()}
        after: dict[int, np.ndarray] = {}
        for order in self.orders:
            if after:
                for i, t in tensors.items():
                    t[:] = before[i]
            module.order = order
            module.launch(kernel.expression, grid, block, tuple(cells), self.only_block)
            if not alone and not after:
                after = {i: t.copy() for i, t in tensors.items()}
            for i, t in after.items():
                assert t.tobytes() == tensors[i].tobytes(), f"{kernel.expression}: argument {i} depends on the order"
        if self.recorded is not None:
            # Under one number what is one memory: x may be out.
            places = {i: cells.index(cells[i]) for i in tensors}
            numbers = {i: a for i, a in enumerate(args) if isinstance(a, np.generic)}
            kinds = {i: str(a.dtype).removeprefix("torch.") for i, a in enumerate(args) if isinstance(a, torch.Tensor)}
            self.recorded.append(
                Launch(kernel.expression, grid, block, len(args), numbers, places, kinds, before, after)
            )


@contextlib.contextmanager
def installed(launcher: Launcher, blocks: int = 8) -> Iterator[Launcher]:
    """Inside, cupy_ops launches through `launcher`, about `blocks` blocks of SMALL_BLOCK threads."""
    before = cupy_ops.launch, cupy_kernels.BLOCK, cupy_ops.BLOCKS
    cupy_ops.launch, cupy_kernels.BLOCK, cupy_ops.BLOCKS = launcher, SMALL_BLOCK, blocks
    try:
        yield launcher
    finally:
        cupy_ops.launch, cupy_kernels.BLOCK, cupy_ops.BLOCKS = before
