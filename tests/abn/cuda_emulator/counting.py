"""What NVRTC makes of the kernels: registers, and the bytes that the PTX moves when the emulator runs it."""

import re

import torch

from segtrain.abn.backends import cupy_kernels
from tests.abn.cuda_emulator import emu, nvrtc
from tests.abn.cuda_emulator.launcher import Launcher


def check_compiles(major: int, arch: int, key: tuple) -> None:
    """Without warnings or spilled registers, and with few enough registers for at least two blocks of 256 threads."""
    kernels = cupy_kernels.instances(*key)
    options = (*nvrtc.PLAIN, "--ptxas-options=-v")
    names = [kernel.expression for kernel in kernels]
    made = nvrtc.compile_text(cupy_kernels.text_of(kernels[0].module.bits), names, arch, "cubin", options, major)
    assert not re.search(r"(\): |ptxas )warning", made.log), made.log[:3000]
    for name, usage in made.usage().items():
        assert usage.spilled == usage.stack == 0, (name, usage)
        assert usage.registers <= 128, (name, usage)
        assert usage.shared <= 48 << 10, (name, usage)


def ptx_module(text: str, names: list[str], arch: int, *options: str) -> emu.Module:
    """Kernels of a text on the emulator, compiled to PTX by NVRTC."""
    made = nvrtc.compile_text(text, names, arch, "ptx", (*nvrtc.PLAIN, *options))
    return emu.from_ptx(made.code.decode(), made.lowered)


class Counting(Launcher):
    """Counts the bytes that each kernel reads and writes of full-size tensors, and of codes."""

    def __init__(self, module: emu.Module, size: int) -> None:
        super().__init__(lambda key: module)
        self.orders = (0,)
        self.size = size
        self.traffic: dict[str, list[int]] = {}  # function -> bytes loaded, bytes stored, accesses

    def __call__(self, kernel, grid, block, args):
        tensors = {
            a.data_ptr(): a
            for a in args if isinstance(a, torch.Tensor) and (a.numel() == self.size or a.dtype == torch.uint8)
        }  # fmt: skip
        module = self.module(kernel.module)
        module.watch([(at, t.numel() * t.element_size()) for at, t in tensors.items()])
        super().__call__(kernel, grid, block, args)
        counts = [sum(column) for column in zip(*module.traffic(), strict=True)] or [0, 0, 0]
        self.traffic[kernel.function] = counts
        # A tensor is read whole and once, or not at all, and written likewise.
        for t, (loaded, stored, _) in zip(tensors.values(), module.traffic(), strict=True):
            assert {loaded, stored} <= {0, t.numel() * t.element_size()}, kernel.expression
