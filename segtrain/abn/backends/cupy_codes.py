"""Coded maps on CUDA: kernels/abn_codes.cu, in the ways of cupy.py. The functions of codes.py, with the same arguments.

Forward and backward read or write a map eight times, and its codes four times: `statistics_extremes` reads x; `encode`
reads it, and writes z and codes; `decode` reads codes and writes z; `coded_sums` reads codes and dz; `coded_gradient`
reads codes and dz, and writes dx. Without the extremes, `encode` reads x (and a shortcut) once more.
"""

import torch
from torch import Tensor

from segtrain.abn.backends import cupy, cupy_kernels
from segtrain.abn.backends.aten import CODES, Activation, statistics_dtype
from segtrain.abn.backends.codes import (
    Coded,
    CodedShortcut,
    KnownRanges,
    Shortcut,
    empty_codes,
    ranged_samples,
    squeezes,
)
from segtrain.abn.backends.cupy import Geometry, blocks_of_warps, geometry, number, scalar
from segtrain.abn.backends.cupy_kernels import SEARCHES, TYPES, over_channels, over_codes, over_ranges
from segtrain.abn.backends.cupy_launch import Argument

DTYPES = cupy.DTYPES
PAIR = 2  # values of a row that a thread takes at least: they share a byte of 4-bit codes


def statistics_extremes(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    samples, channels, dtype = ranged_samples(x, bits), x.shape[1], statistics_dtype(x)
    found, extremes = x.new_empty((2, channels), dtype=dtype), x.new_empty((2, samples, channels), dtype=dtype)
    if x.numel() == 0:
        return found.zero_(), extremes.zero_()
    how = geometry(x, apart=samples)
    part = x.new_empty((samples, channels, how.grid[1], 5), dtype=dtype)  # three moments and two ends
    ctype = TYPES[x.dtype]
    cupy.launch(
        over_ranges("summarise", ctype, how.vec, how.last), how.grid, cupy_kernels.BLOCK,
        (x, part, number("int64", samples), *how.shape),
    )  # fmt: skip
    cupy.launch(
        over_channels("merge_summaries", ctype, SEARCHES), blocks_of_warps(channels), cupy_kernels.BLOCK,
        (
            part, number("int64", samples), number("int64", channels), number("int32", how.grid[1]),
            number("float64", x.numel() // channels), found[0], found[1], extremes,
        ),
    )  # fmt: skip
    return found, extremes


def launch_ranges(
    x: Tensor, ranges: Tensor, scale: Tensor, shift: Tensor, activation: Activation, shortcut: Tensor | None, bits: int,
    extremes: Tensor | None, known: KnownRanges | None,
) -> None:  # fmt: skip
    """Fill the ranges of y = scale * x + shift (+ shortcut), from the extremes of x if these are given, and from the
    known ranges of the shortcut if there are such."""
    samples, count = ranges.shape[1], ranges.shape[1] * x.shape[1]
    limits = (
        *known_arguments(known, ranges), scalar(0.5 if squeezes(activation) else 1, ranges),
        scalar(2**bits - 1, ranges), scalar(torch.finfo(ranges.dtype).tiny, ranges),
    )  # fmt: skip
    ctype = TYPES[x.dtype]
    if extremes is not None:
        cupy.launch(
            over_channels("map_ranges", ctype, SEARCHES), (-(-count // cupy_kernels.BLOCK), 1), cupy_kernels.BLOCK,
            (extremes, scale, shift, number("int64", x.shape[1]), number("int64", count), *limits, ranges),
        )  # fmt: skip
        return
    shortcut = None if known else shortcut
    how = geometry(x, shortcut, apart=samples)
    part = ranges.new_empty((count, how.grid[1], 2))
    cupy.launch(
        over_ranges("search", ctype, how.vec, how.last), how.grid, cupy_kernels.BLOCK,
        (x, shortcut, scale, shift, part, number("int64", samples), *how.shape),
    )  # fmt: skip
    cupy.launch(
        over_channels("merge_ranges", ctype, SEARCHES), blocks_of_warps(count), cupy_kernels.BLOCK,
        (part, number("int64", count), number("int32", how.grid[1]), *limits, ranges),
    )  # fmt: skip


def kernel_for(function: str, x: Tensor, how: Geometry, activation: Activation, bits: int) -> cupy_kernels.Kernel:
    act = CODES.index(activation.name)
    return over_codes(function, TYPES[x.dtype], how.vec, how.wide, act, bits, how.last)


def encode(
    x: Tensor, out: Tensor, codes: Tensor, ranges: Tensor, scale: Tensor, shift: Tensor, activation: Activation,
    shortcut: Tensor | None, bits: int, extremes: Tensor | None = None, known: KnownRanges | None = None,
) -> None:  # fmt: skip
    if x.numel() == 0:
        ranges.zero_()
        return
    launch_ranges(x, ranges, scale, shift, activation, shortcut, bits, extremes, known)
    how = geometry(x, out, shortcut, narrow=PAIR)
    cupy.launch(
        kernel_for("encode", x, how, activation, bits), how.grid, cupy_kernels.BLOCK,
        (
            x, out, shortcut, scale, shift, ranges, scalar(activation.param, ranges), codes,
            number("int64", ranges.shape[1]), *how.shape,
        ),
    )  # fmt: skip


def decode(coded: Coded, dtype: torch.dtype, activation: Activation) -> Tensor:
    codes, ranges, bits, size, stride = coded
    out = torch.empty_strided(size, stride, dtype=dtype, device=codes.device)
    if out.numel():
        how = geometry(out, narrow=PAIR)
        cupy.launch(
            kernel_for("decode", out, how, activation, bits), how.grid, cupy_kernels.BLOCK,
            (codes, ranges, out, scalar(activation.param, ranges), number("int64", ranges.shape[1]), *how.shape),
        )  # fmt: skip
    return out


def map_of(shortcut: Shortcut) -> Tensor | None:
    return shortcut if isinstance(shortcut, Tensor) else None


def known_arguments(known: KnownRanges | None, like: Tensor) -> tuple[Argument, ...]:
    """The kernels' arguments for known ranges: these, number and parameter of the activation."""
    if known is None:
        return None, number("int32", 0), scalar(0, like)
    return known.ranges, number("int32", CODES.index(known.activation.name)), scalar(known.activation.param, like)


def shortcut_arguments(shortcut: Shortcut, like: Tensor) -> tuple[Argument, ...]:
    """The kernels' arguments for a shortcut: map, codes, ranges, number and parameter of the activation."""
    if isinstance(shortcut, CodedShortcut):
        return None, shortcut.codes, *known_arguments(KnownRanges(*shortcut[1:]), like)
    return shortcut, None, *known_arguments(None, like)


def coded_sums(
    coded: Coded, dz: Tensor, center: Tensor, inverse: Tensor, activation: Activation, shortcut: Shortcut
) -> Tensor:
    return launch_coded_sums(coded, dz, center, inverse, activation, shortcut)[0]


def launch_coded_sums(
    coded: Coded, dz: Tensor, center: Tensor, inverse: Tensor, activation: Activation, shortcut: Shortcut
) -> tuple[Tensor, Tensor]:
    """(sums, their means over the tensor), both (2, C)."""
    codes, ranges, bits = coded[:3]
    channels = dz.shape[1]
    found = center.new_zeros((2, channels))
    if dz.numel() == 0:
        return found, torch.zeros_like(found)
    means = torch.empty_like(found)
    how = geometry(dz, map_of(shortcut), narrow=PAIR)
    part = center.new_empty((channels, how.grid[1], 2))
    cupy.launch(
        kernel_for("coded_sums", dz, how, activation, bits), how.grid, cupy_kernels.BLOCK,
        (
            codes, ranges, dz, *shortcut_arguments(shortcut, ranges), center, inverse,
            scalar(activation.param, ranges), part, number("int64", ranges.shape[1]), *how.shape,
        ),
    )  # fmt: skip
    merge = how.merge_kernel("merge_sums", dz.dtype)
    cupy.launch(merge, how.merge_grid, cupy_kernels.BLOCK, (part, *how.merge_shape, found, None, means, None))
    return found, means


def coded_gradient(
    coded: Coded, dz: Tensor, center: Tensor, inverse: Tensor, activation: Activation, shortcut: Shortcut,
    factor: Tensor, means: Tensor, dshortcut: Tensor | None,
) -> Tensor:  # fmt: skip
    codes, ranges, bits = coded[:3]
    dx = torch.empty_like(dz)
    if dz.numel():
        how = geometry(dz, map_of(shortcut), dx, dshortcut, narrow=PAIR)
        cupy.launch(
            kernel_for("coded_gradient", dz, how, activation, bits), how.grid, cupy_kernels.BLOCK,
            (
                codes, ranges, dz, *shortcut_arguments(shortcut, ranges), center, inverse,
                scalar(activation.param, ranges), factor, means.contiguous(), dx, dshortcut,
                number("int64", ranges.shape[1]), *how.shape,
            ),
        )  # fmt: skip
    return dx


def coded_backward(
    coded: Coded, dz: Tensor, center: Tensor, inverse: Tensor, activation: Activation, shortcut: Shortcut,
    factor: Tensor, dshortcut: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    found, means = launch_coded_sums(coded, dz, center, inverse, activation, shortcut)
    return coded_gradient(coded, dz, center, inverse, activation, shortcut, factor, means, dshortcut), found


def warm_up_codes(
    bits: int, dtypes: tuple[torch.dtype, ...] = (torch.float32,), activations: tuple[str, ...] = CODES,
    device: torch.device | str | int = "cuda",
) -> None:  # fmt: skip
    """As `cupy.warm_up`, for maps of that many bits."""
    for dtype in dtypes:
        vec = cupy_kernels.ACCESS // dtype.itemsize
        for name in activations:
            for shape in ((2, 3, vec), (2, 3, vec + 1), (4, vec), (4, vec + 1)):
                x, activation = torch.zeros(shape, dtype=dtype, device=device), Activation(name, 0.5)
                one = torch.ones(shape[1], dtype=statistics_dtype(x), device=device)
                _, extremes = statistics_extremes(x, bits)
                for found in (extremes, None):
                    codes, ranges = empty_codes(x, bits)
                    encode(x, x, codes, ranges, one, one, activation, None, bits, found)
                coded = Coded(codes, ranges, bits, list(x.shape), list(x.stride()))
                decode(coded, dtype, activation)
                coded_backward(coded, x, one, one, activation, None, one, None)
