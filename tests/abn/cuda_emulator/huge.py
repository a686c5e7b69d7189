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


def visited(layout: tuple[int, int, int], stripes: int, block: int) -> list[tuple[int, int, int]]:
    """Places of the first and the last pack of four that the first thread of the last block visits."""
    outer, channels, inner = layout
    last, packs = inner == 1, inner // 4
    high, count = (block // 32, outer) if last else (block, outer * packs)
    first, step = (stripes - 1) * high, stripes * high
    visits = first, first + (count - 1 - first) // step * step
    assert visits[0] < visits[1]
    return [(at, channels - 1, 0) if last else (at // packs, channels - 1, at % packs * 4) for at in visits]


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
    places = visited(layout, stripes, block)
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


def check_codes_beyond_32_bits(layout: tuple[int, int, int], stripes: int, bits: int, launcher: Launcher) -> None:
    """Run the last block of `encode` and `coded_gradient` likewise, with ranges of cells of size 1 from 0 on."""
    outer, channels, inner = layout
    last = inner == 1
    with installed(launcher):
        block, module = cupy_kernels.BLOCK, launcher.module(("float", 0, bits))
        encode, gradient = (
            cupy_kernels.over_codes(name, "float", 4, True, 0, bits, last) for name in ("encode", "coded_gradient")
        )
    places = visited(layout, stripes, block)
    x, dz, dx = (zeros(outer * channels * inner) for _ in range(3))
    codes = zeros(outer * channels * inner // 4).view(np.uint8)
    ranges, one, zero = (zeros(3 * channels) for _ in range(3))
    means, first = zeros(2 * channels), max(channels - 4, 0)
    ranges[2 * channels + first :], one[first:channels], means[channels + first :] = 1, 1, 1
    for n, place in enumerate(places):
        assert np.ravel_multi_index(place, layout) > 2**31 or n == 0
        x.reshape(layout)[place], dz.reshape(layout)[place] = 3 + 4 * n, 5 + n
    grid = (-(-channels // 4 // 32) if last else channels), stripes
    shape = np.int64(1), np.int64(outer), np.int64(channels), np.int64(inner), np.int32(5 if last else 0)
    only, slope = grid[0] * grid[1] - 1, np.float32(1)
    at = {name: v.ctypes.data for name, v in locals().items() if isinstance(v, np.ndarray)}
    written = at["dx"], 0, at["one"], at["zero"], at["ranges"], slope, at["codes"]
    module.launch(encode.expression, grid, block, (at["x"], *written, *shape), only)
    assert [float(dx.reshape(layout)[place]) for place in places] == [3, 7]
    for n, place in enumerate(places):
        index = int(np.ravel_multi_index(place, layout))
        cell = codes[index] if bits == 8 else codes[index // 2] >> 4 * (index % 2) & 15
        assert cell == 3 + 4 * n
    given = at["codes"], at["ranges"], at["dz"], 0, 0, 0, np.int32(0), slope, at["zero"], at["one"], slope
    module.launch(gradient.expression, grid, block, (*given, at["one"], at["means"], at["dx"], 0, *shape), only)
    # dz - (y - 0), y being the middle of a cell
    assert [float(dx.reshape(layout)[place]) for place in places] == [5 - 3.5, 6 - 7.5]
