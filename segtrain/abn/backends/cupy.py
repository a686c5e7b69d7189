"""The primitives on CUDA: kernels/abn.cu, compiled at first use through CuPy. The same functions as in aten.py.

A forward pass reads the tensor twice and writes it once; a backward pass reads the kept tensor and dz twice (and a
shortcut) and writes dx once (and a shortcut's gradient). torch allocates everything and owns the stream; CuPy compiles,
loads and launches. Every kernel goes through `launch`, which the tests replace by an emulator.
"""

import functools
import importlib
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from segtrain.abn.backends import cupy_kernels as kernels
from segtrain.abn.backends.aten import CODES, Activation, layout, statistics_dtype
from segtrain.abn.backends.cupy_kernels import ACCESS, TYPES, Kernel, over_channels, over_tensors
from segtrain.abn.backends.cupy_launch import Argument
from segtrain.abn.backends.cupy_launch import available as available
from segtrain.abn.backends.cupy_launch import launch as launch

if TYPE_CHECKING:
    import numpy as np

DTYPES = frozenset(TYPES)
BLOCKS = 16  # blocks per multiprocessor, two waves, if the tensor is large enough
TURNS = 64  # most packs that a thread adds up, so that float32 sums stay exact to a few units in the last place
HIGHEST_GRID = 65535  # most blocks in y
MOST_PLANS = 1024  # geometries that are remembered; a network in training has a few for each of its layers
plans: dict[Any, "Geometry"] = {}
LOWEST = {dtype: torch.finfo(dtype).eps - 1 for dtype in TYPES}  # z / alpha of ELU that is inverted


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 for CPU tensors, which the emulator runs."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


class Geometry(NamedTuple):
    """How threads are distributed over a tensor (outer, channels, inner), see abn.cu: the plan of its launches."""

    vec: int  # elements a thread moves at once
    last: bool  # channels are last
    grid: tuple[int, int]  # channel groups, stripes
    shape: "tuple[np.generic, ...]"  # the kernels' last arguments: outer, channels, inner, shift_x
    wide: bool  # vec elements by one access
    merge_grid: tuple[int, int]  # of the kernels over channels
    merge_shape: "tuple[np.generic, ...]"  # their arguments: channels, stripes, values of a channel
    made: dict[Any, Kernel]  # kernels that have been launched with this geometry

    def kernel(self, function: str, dtype: torch.dtype, *arguments: Any) -> Kernel:
        """An instance of a template over tensors."""
        key = function, arguments
        found = self.made.get(key)
        if found is None:
            found = self.made[key] = over_tensors(function, TYPES[dtype], self.vec, self.last, *arguments)
        return found

    def merge_kernel(self, function: str, dtype: torch.dtype) -> Kernel:
        """An instance of a template over channels."""
        found = self.made.get(function)
        if found is None:
            found = self.made[function] = over_channels(function, TYPES[dtype])
        return found


def geometry(*tensors: Tensor | None, narrow: int = 1, apart: int = 1) -> Geometry:
    """The launch geometry for tensors of one shape, dtype and layout, none of them empty.

    narrow: elements a thread takes where one access cannot move several. apart: parts of equal size that the tensors
    are divided into along `outer`, which have blocks of their own; `shape` is then that of a part.
    """
    aligned, x = True, None
    for t in tensors:
        if t is not None:
            x = t if x is None else x
            if t.data_ptr() % ACCESS:
                aligned = False
    assert x is not None
    key = x.shape, x.stride(), x.dtype, x.device, aligned, narrow, apart, kernels.BLOCK, BLOCKS
    found = plans.get(key)
    if found is None:
        if len(plans) >= MOST_PLANS:
            plans.clear()
        found = plans[key] = worked_out(x, aligned, narrow, apart)
    return found


def worked_out(x: Tensor, aligned: bool, narrow: int, apart: int) -> Geometry:
    """The geometry for tensors like x. aligned: whether all of them begin at multiples of ACCESS bytes."""
    outer, channels, inner = layout(x)
    last = inner == 1
    outer //= apart
    vec = ACCESS // x.element_size()
    wide = (channels if last else inner) % vec == 0 and aligned
    if not wide:
        vec = narrow
    shift = 0
    packs = -(-(channels if last else inner) // vec)
    if last:
        shift = min(5, (packs - 1).bit_length())
        groups = -(-packs // (1 << shift)) * apart
        turns = -(-outer // (kernels.BLOCK >> shift))
    else:
        groups = channels * apart
        turns = -(-outer * packs // kernels.BLOCK)
    stripes = max(-(-BLOCKS * processors(x.device) // groups), -(-turns // TURNS))
    stripes = min(stripes, turns, HIGHEST_GRID)
    shape = number("int64", outer), number("int64", channels), number("int64", inner), number("int32", shift)
    merged = number("int64", channels), number("int32", stripes), number("float64", x.numel() // channels)
    return Geometry(vec, last, (groups, stripes), shape, wide, blocks_of_warps(channels), merged, {})


def blocks_of_warps(channels: int) -> tuple[int, int]:
    """The grid that has one warp for each channel."""
    return -(-channels * 32 // kernels.BLOCK), 1


@functools.lru_cache(maxsize=MOST_PLANS)
def number(kind: str, value: float) -> "np.generic":
    """A numpy scalar, which CuPy needs for numbers of a given width. Nothing else in the layer needs numpy."""
    made: np.generic = getattr(importlib.import_module("numpy"), kind)(value)
    return made


def scalar(value: float, like: Tensor) -> "np.generic":
    """A kernel argument of the dtype of the channel vectors `like`."""
    return number("float64" if like.dtype == torch.float64 else "float32", value)


def launch_statistics(x: Tensor) -> tuple[Tensor, Geometry]:
    """(Moments of each stripe (C, stripes, 3), the geometry they were computed with)."""
    how = geometry(x)
    part = x.new_empty((x.shape[1], how.grid[1], 3), dtype=statistics_dtype(x))
    launch(how.kernel("statistics", x.dtype), how.grid, kernels.BLOCK, (x, part, *how.shape))
    return part, how


def launch_merge_statistics(
    x: Tensor, how: Geometry, part: Tensor, eps: float, momentum: float, gamma: Tensor | None, mean: Tensor,
    var: Tensor | None, rstd: Tensor | None, scale: Tensor | None, running_mean: Tensor | None,
    running_var: Tensor | None,
) -> None:  # fmt: skip
    numbers = *how.merge_shape, scalar(eps, part), scalar(momentum, part)
    launch(
        how.merge_kernel("merge_statistics", x.dtype), how.merge_grid, kernels.BLOCK,
        (part, *numbers, gamma, mean, var, rstd, scale, running_mean, running_var, number("int32", 0), None),
    )  # fmt: skip


def launch_normalise(
    x: Tensor, out: Tensor, center: Tensor | None, scale: Tensor, shift: Tensor, activation: Activation,
    shortcut: Tensor | None,
) -> None:  # fmt: skip
    how = geometry(x, out, shortcut)
    launch(
        how.kernel("normalise", x.dtype, CODES.index(activation.name)), how.grid, kernels.BLOCK,
        (x, out, shortcut, center, scale, shift, scalar(activation.param, scale), *how.shape),
    )  # fmt: skip


def statistics(x: Tensor) -> Tensor:
    found = x.new_empty((2, x.shape[1]), dtype=statistics_dtype(x))
    if x.numel() == 0:
        return found.zero_()
    part, how = launch_statistics(x)
    launch_merge_statistics(x, how, part, 0, 0, None, found[0], found[1], None, None, None, None)
    return found


def normalise(
    x: Tensor, out: Tensor, scale: Tensor, shift: Tensor, activation: Activation, shortcut: Tensor | None
) -> None:
    if x.numel():
        launch_normalise(x, out, None, scale.contiguous(), shift.contiguous(), activation, shortcut)


def forward(
    x: Tensor, out: Tensor, gamma: Tensor, beta: Tensor, running_mean: Tensor | None, running_var: Tensor | None,
    momentum: float, eps: float, activation: Activation, shortcut: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As in aten.py. Subtracts the mean first, so that a large mean costs no digits."""
    part, how = launch_statistics(x)
    mean, rstd, scale = gamma.new_empty((3, x.shape[1])).unbind()
    running = [None if t is None else t.contiguous() for t in (running_mean, running_var)]
    launch_merge_statistics(x, how, part, eps, momentum, gamma.contiguous(), mean, None, rstd, scale, *running)
    for mine, theirs in zip(running, (running_mean, running_var), strict=True):
        if mine is not None and theirs is not None and mine is not theirs:
            theirs.copy_(mine)
    launch_normalise(x, out, mean, scale, beta.contiguous(), activation, shortcut)
    return mean, rstd


def recovery(activation: Activation, dtype: torch.dtype, like: Tensor) -> "tuple[np.generic, ...]":
    """The numbers by which an activation is inverted: its parameter, one over that, the lowest z / alpha of ELU."""
    param = activation.param
    return scalar(param, like), scalar(1 / param if param else 0, like), scalar(LOWEST[dtype], like)


def kept_arguments(
    kept: Tensor, dz: Tensor, center: Tensor, inverse: Tensor, activation: Activation,
    shortcut: Tensor | None, affine: tuple[Tensor, Tensor] | None,
) -> tuple[Argument, ...]:  # fmt: skip
    """The first arguments of `sums` and `gradient`."""
    scale, shift = (None, None) if affine is None else (affine[0].contiguous(), affine[1].contiguous())
    numbers = recovery(activation, kept.dtype, center)
    added = None if affine else shortcut
    return kept, dz, added, center.contiguous(), inverse.contiguous(), scale, shift, *numbers


def launch_sums(common: tuple[Argument, ...], activation: Activation, divided: bool) -> tuple[Tensor, Tensor | None]:
    """(sums, means if `divided`, else None), both (2, C)."""
    kept, dz, shortcut, center, _, scale = common[:6]
    assert isinstance(kept, Tensor) and isinstance(center, Tensor)
    how = geometry(kept, dz, shortcut)  # type: ignore[arg-type]
    channels = kept.shape[1]
    part = center.new_empty((channels, how.grid[1], 2))
    form = "false" if scale is None else "true"
    launch(
        how.kernel("sums", kept.dtype, CODES.index(activation.name), form), how.grid, kernels.BLOCK,
        (*common, part, *how.shape),
    )  # fmt: skip
    found = center.new_empty((2, channels))
    means = torch.empty_like(found) if divided else None
    merge = how.merge_kernel("merge_sums", kept.dtype)
    launch(merge, how.merge_grid, kernels.BLOCK, (part, *how.merge_shape, found, None, means, None))
    return found, means


def launch_gradient(
    common: tuple[Argument, ...], activation: Activation, factor: Tensor, means: Tensor, dshortcut: Tensor | None
) -> Tensor:
    kept, dz, shortcut, _, _, scale = common[:6]
    assert isinstance(kept, Tensor)
    dx = torch.empty_like(kept)
    how = geometry(kept, dz, shortcut, dx, dshortcut)  # type: ignore[arg-type]
    form = "false" if scale is None else "true"
    launch(
        how.kernel("gradient", kept.dtype, CODES.index(activation.name), form), how.grid, kernels.BLOCK,
        (*common, factor.contiguous(), means.contiguous(), dx, dshortcut, *how.shape),
    )  # fmt: skip
    return dx


def sums(
    kept: Tensor, dz: Tensor, center: Tensor, inverse: Tensor, activation: Activation,
    shortcut: Tensor | None, affine: tuple[Tensor, Tensor] | None,
) -> Tensor:  # fmt: skip
    if kept.numel() == 0:
        return center.new_zeros((2, kept.shape[1]))
    common = kept_arguments(kept, dz, center, inverse, activation, shortcut, affine)
    return launch_sums(common, activation, divided=False)[0]


def gradient(
    kept: Tensor, dz: Tensor, center: Tensor, inverse: Tensor, activation: Activation,
    shortcut: Tensor | None, affine: tuple[Tensor, Tensor] | None,
    factor: Tensor, means: Tensor, dshortcut: Tensor | None,
) -> Tensor:  # fmt: skip
    if kept.numel() == 0:
        return torch.empty_like(kept)
    common = kept_arguments(kept, dz, center, inverse, activation, shortcut, affine)
    return launch_gradient(common, activation, factor, means, dshortcut)


def backward(
    kept: Tensor, dz: Tensor, center: Tensor, inverse: Tensor, activation: Activation,
    shortcut: Tensor | None, affine: tuple[Tensor, Tensor] | None, factor: Tensor, dshortcut: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    common = kept_arguments(kept, dz, center, inverse, activation, shortcut, affine)
    found, means = launch_sums(common, activation, divided=True)
    assert means is not None
    return launch_gradient(common, activation, factor, means, dshortcut), found


def warm_up(
    dtypes: tuple[torch.dtype, ...] = (torch.float32,), activations: tuple[str, ...] = CODES,
    device: torch.device | str | int = "cuda",
) -> None:  # fmt: skip
    """Compile, load and run every kernel of these types and activations once, because no kernel can be loaded while a
    CUDA graph is captured."""
    for dtype in dtypes:
        vec = ACCESS // dtype.itemsize
        for name in activations:
            # Both layouts, each with and without wide accesses.
            for shape in ((2, 3, vec), (2, 3, vec + 1), (4, vec), (4, vec + 1)):
                x = torch.zeros(shape, dtype=dtype, device=device)
                gamma = torch.ones(shape[1], dtype=statistics_dtype(x), device=device)
                activation = Activation(name, 0.5)
                statistics(x)
                forward(x, x, gamma, gamma, None, None, 0.1, 1e-5, activation, None)
                for affine in (None, (gamma, gamma)):
                    backward(x, x.clone(), gamma, gamma, activation, None, affine, gamma, None)
