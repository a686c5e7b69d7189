"""The two loops over pixels that take most time of an evaluation, compiled if there is a C++ compiler."""

import ctypes
import functools
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from segtrain.native import compile as compiling

if TYPE_CHECKING:  # not needed to count, and its import takes longer than to score a hundred images
    import torch

EXACT = 1 << 24  # up to which a float32 counts exactly


@functools.cache
def library(loop: str) -> Any:
    """The library with one of the loops; None, after a message, if it cannot be built."""
    pointer, number = ctypes.c_void_p, ctypes.c_int
    arguments = {
        "joint_histogram": [pointer, pointer, ctypes.c_long, pointer],
        "upsampled_argmax": [pointer, *[number] * 5, pointer, *[number] * 5],
    }[loop]
    reason = compiling.unavailable()
    if not reason:
        try:
            source = Path(__file__).with_suffix(".cpp")
            path = compiling.library_path(loop, f"the loop {loop}", [source], [f"-D{loop.upper()}"])
            found = compiling.open_library(path)
            getattr(found, loop).argtypes, getattr(found, loop).restype = arguments, None
            return found
        except (OSError, subprocess.SubprocessError) as error:
            reason = f"its library could not be built: {error}"
    print(f"segtrain: {loop} is done by OpenCV ({reason})", file=sys.stderr, flush=True)
    return None


def joint_histogram(first: np.ndarray, second: np.ndarray, counts: np.ndarray) -> None:
    """counts[a, b] += number of pixels where first is a and second is b.

    first, second: uint8, of one shape. counts: int64 (256, 256).
    """
    if first.shape != second.shape:
        raise ValueError(f"shapes {first.shape} and {second.shape} differ")
    first, second = np.ascontiguousarray(first, np.uint8), np.ascontiguousarray(second, np.uint8)
    assert counts.dtype == np.int64 and counts.shape == (256, 256) and counts.flags.c_contiguous
    loops = library("joint_histogram")
    if loops is not None:
        loops.joint_histogram(first.ctypes.data, second.ctypes.data, first.size, counts.ctypes.data)
        return
    flat = first.reshape(1, -1), second.reshape(1, -1)
    for start in range(0, first.size, EXACT):
        parts = [part[:, start : start + EXACT] for part in flat]
        counts += cv2.calcHist(parts, [0, 1], None, [256, 256], [0, 256, 0, 256]).astype(np.int64)


def upsampled_argmax(
    logits: "torch.Tensor", size: tuple[int, int], rows: tuple[int, int] | None = None,
    cells: tuple[int, int] | None = None,
) -> np.ndarray:  # fmt: skip
    """logits float32 (C, h, w) on the CPU, C <= 256 -> uint8 (H, W): arg-max of the bilinear enlargement to `size`.

    rows: (first, last + 1) of the H rows, which alone are made; None: all. cells: the logits are the rows from the
    first number on, of as many as the second one says; None: all. Needs no memory of size C x H x W. Equals
    F.interpolate(align_corners=False).argmax except for ties within rounding.
    """
    channels, h, w = logits.shape
    height, width = size
    top, bottom = rows or (0, height)
    first, total = cells or (0, h)
    array = logits.contiguous().numpy()
    loops = library("upsampled_argmax")
    if loops is not None:
        import torch

        out = np.empty((bottom - top, width), np.uint8)
        threads = torch.get_num_threads()
        loops.upsampled_argmax(
            array.ctypes.data, channels, h, w, height, width, out.ctypes.data, threads, top, bottom, first, total
        )
        return out
    enlarge = Enlargement(size, (top, bottom), (first, total), h)
    best = enlarge(array[0])
    found = np.zeros(best.shape, np.uint8)
    for channel in range(1, channels):
        value = enlarge(array[channel])
        better = value > best
        found[better] = channel
        np.maximum(best, value, out=best)
    return found


class Enlargement:
    """Enlarge float32 (h, w) bilinearly by OpenCV; the arguments are those of `upsampled_argmax`."""

    def __init__(self, size: tuple[int, int], rows: tuple[int, int], cells: tuple[int, int], h: int) -> None:
        self.width, self.size = size[1], size
        self.whole = rows == (0, size[0]) and cells == (0, h)
        at = ((np.arange(*rows) + 0.5) * (cells[1] / size[0]) - 0.5).clip(0)
        upper = at.astype(int).clip(0, cells[1] - 1)
        self.upper, self.lower = upper - cells[0], (upper + 1).clip(0, cells[1] - 1) - cells[0]
        self.weight = (at - upper).astype(np.float32)[:, None]

    def __call__(self, plane: np.ndarray) -> np.ndarray:
        if self.whole:
            return np.asarray(cv2.resize(plane, self.size[::-1], interpolation=cv2.INTER_LINEAR))
        blended = plane[self.upper] * (1 - self.weight) + plane[self.lower] * self.weight
        return np.asarray(cv2.resize(blended, (self.width, len(blended)), interpolation=cv2.INTER_LINEAR))
