"""Kernels on tensors of more than 2^31 elements, most of which are never allocated."""

import mmap

import numpy as np

from segtrain.abn.backends import cupy_kernels
from tests.abn.cuda_emulator.launcher import Launcher, installed


def zeros(count: int) -> np.ndarray:
    """float32 zeros whose memory is neither allocated nor reserved until they are touched."""
    no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Linux; Python names it since 3.13
    room = mmap.mmap(-1, count * 4, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    room.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(room, np.float32)


def check_beyond_32_bits(layout: tuple[int, int, int], stripes: int, launcher: Launcher) -> None:
    """Run the last block of `gradient` and `sums` on tensors (outer, channels, inner) of 3 * 2^30 elements or more."""
    outer, channels, inner = layout
    last = inner == 1
    packs = (channels if last else inner) // 4
    with installed(launcher):
        block, module = cupy_kernels.BLOCK, launcher.module(("float", 2))
        gradient, sums = (
            cupy_kernels.over_tensors(name, "float", 4, last, 2, "false") for name in ("gradient", "sums")
        )
    # The first and the last of what the block's first thread visits.
    high, count = (block // 32, outer) if last else (block, outer * packs)
    first, step = (stripes - 1) * high, stripes * high
    visits = first, first + (count - 1 - first) // step * step
    assert visits[0] < visits[1]
    places = [(at, channels - 1, 0) if last else (at // packs, channels - 1, at % packs * 4) for at in visits]
    x, dz, dx = (zeros(outer * channels * inner) for _ in range(3))
    nothing, inverse, factor = (zeros(2 * channels) for _ in range(3))
    part = zeros(channels * stripes * 2)
    for n, place in enumerate(places):
        assert np.ravel_multi_index(place, layout) > 2**31 or n == 0
        x.reshape(layout)[place], dz.reshape(layout)[place] = 3 + n, 5 + n
    inverse[channels - 4 : channels], factor[channels - 4 : channels] = 1, 2
    grid = (-(-packs // 32) if last else channels), stripes
    shape = np.int64(outer), np.int64(channels), np.int64(inner), np.int32(5 if last else 0)
    zero, one, two = (v.ctypes.data for v in (nothing, inverse, factor))
    kept = (x.ctypes.data, dz.ctypes.data, 0, zero, one, 0, 0, *[np.float32(1)] * 3)
    only = grid[0] * grid[1] - 1
    module.launch(gradient.expression, grid, block, (*kept, two, zero, dx.ctypes.data, 0, *shape), only)
    assert [float(dx.reshape(layout)[place]) for place in places] == [10, 12]
    module.launch(sums.expression, grid, block, (*kept, part.ctypes.data, *shape), only)
    assert part[-2:].tolist() == [5 + 6, 3 * 5 + 4 * 6]
