"""The primitives on CUDA: kernels/abn.cu, compiled at first use through CuPy. Same functions as aten_ops, which see.

A forward pass reads the tensor twice and writes it once; a backward pass reads the kept tensor and dz twice (and a
shortcut) and writes dx once (and a shortcut's gradient). torch allocates everything and owns the stream; CuPy compiles,
loads and launches. Everything goes through `launch`, for which the tests put an emulator.

    SEGTRAIN_CACHE   moves CuPy's folder of compiled kernels to `cupy` below it, unless CUPY_CACHE_DIR is set
"""

import functools
import importlib
import importlib.util
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from segtrain.abn.backends.aten import CODES, Activation, layout, statistics_dtype
from segtrain.native.folders import folder_for

if TYPE_CHECKING:
    import numpy as np

KERNELS = Path(__file__).parent / "kernels"
# dtype -> C++ type
TYPES = {
    torch.float32: "float", torch.float16: "__half", torch.bfloat16: "__nv_bfloat16", torch.float64: "double",
}  # fmt: skip
DTYPES = frozenset(TYPES)
BLOCK = 256  # threads a block, a multiple of 32
ACCESS = 16  # bytes of the widest memory access
BLOCKS = 16  # blocks for each multiprocessor, where the tensor has work for as many: two waves
TURNS = 64  # a thread adds up no longer chain than this, so that float32 sums stay exact to a few units
HIGHEST_GRID = 65535  # in y


class Kernel(NamedTuple):
    """An instance of a template of abn.cu."""

    function: str
    arguments: tuple[str | int, ...]  # of the template
    module: tuple[str, int | None]  # C++ type, activation code or None: what is compiled together

    @property
    def expression(self) -> str:
        return f"abn::{self.function}<{', '.join(map(str, self.arguments))}>"


Argument: TypeAlias = "Tensor | np.generic | None"  # None: a null pointer


# ------------------------------------------------------------------------------------------------------- the text


@functools.cache
def source() -> str:
    """One text: CuPy's cache does not notice a change of an included file."""
    header = (KERNELS / "abn_math.h").read_text()
    return (KERNELS / "abn.cu").read_text().replace('#include "abn_math.h"\n', header)


def widest(ctype: str) -> int:
    """Elements in the widest memory access."""
    return ACCESS // next(dtype.itemsize for dtype, name in TYPES.items() if name == ctype)


def computed_in(ctype: str) -> str:
    return "double" if ctype == "double" else "float"


def over_tensors(function: str, ctype: str, vec: int, last: bool, act: int | None = None, *kept: str) -> Kernel:
    activation = () if act is None else (act,)
    return Kernel(function, (ctype, vec, *activation, *kept, str(last).lower(), BLOCK), (ctype, act))


def over_channels(function: str, ctype: str) -> Kernel:
    return Kernel(function, (computed_in(ctype), BLOCK), (ctype, None))


def instances(ctype: str, act: int | None) -> list[Kernel]:
    """All kernels of one module: the statistics' of a type, or those of a type with an activation."""
    kernels = []
    for last in (False, True):
        for vec in (1, widest(ctype)):
            if act is None:
                kernels.append(over_tensors("statistics", ctype, vec, last))
                continue
            kernels.append(over_tensors("normalise", ctype, vec, last, act))
            for function in ("sums", "gradient"):
                kernels += [over_tensors(function, ctype, vec, last, act, kept) for kept in ("false", "true")]
    if act is None:
        kernels += [over_channels(function, ctype) for function in ("merge_statistics", "merge_sums")]
    return kernels


# --------------------------------------------------------------------------------------------------------- CuPy


def advice() -> str:
    return f"pip install cupy-cuda{(torch.version.cuda or '13').split('.')[0]}x"


def import_cupy() -> Any:
    """The cupy module, with its folder of compiled kernels where SEGTRAIN_CACHE says."""
    if "cupy" not in sys.modules and os.environ.get("SEGTRAIN_CACHE") and "CUPY_CACHE_DIR" not in os.environ:
        os.environ["CUPY_CACHE_DIR"] = str(folder_for("cupy"))
    return importlib.import_module("cupy")


def available() -> str:
    """'' where these kernels can run, else why not, in one sentence."""
    if torch.version.hip is not None:
        return "torch is built for AMD cards"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    if importlib.util.find_spec("cupy") is None:
        return f"CuPy is not installed: {advice()}"
    try:
        cupy = import_cupy()
        built = cupy.cuda.runtime.runtimeGetVersion() // 1000
        wanted = int((torch.version.cuda or "0").split(".")[0])
        if built != wanted:
            return f"CuPy is built for CUDA {built} and torch for CUDA {wanted}: {advice()}"
        cupy.cuda.nvrtc.getVersion()
    except (ImportError, RuntimeError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        return f"CuPy does not work here ({type(error).__name__}: {reason})"
    return ""


@functools.cache
def compiled(module: tuple[str, int | None], device: int) -> Any:
    """The RawModule for a device, which must be the current one when it is used."""
    names = [kernel.expression for kernel in instances(*module)]
    return import_cupy().RawModule(code=source(), options=("--std=c++17",), name_expressions=names)


@functools.cache
def function(kernel: Kernel, device: int) -> Any:
    """The loaded kernel. The device must be the current one."""
    return compiled(kernel.module, device).get_function(kernel.expression)


class Raw:
    """torch's stream as CuPy takes any stream, whichever torch it is."""

    def __init__(self, pointer: int) -> None:
        self.pointer = pointer

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.pointer


@functools.cache
def stream(pointer: int, device: int) -> Any:
    return import_cupy().cuda.Stream.from_external(Raw(pointer))


def launch(kernel: Kernel, grid: tuple[int, int], block: int, args: tuple[Argument, ...]) -> None:
    """Enqueues a kernel on torch's current stream of the tensors' device."""
    first = next(a for a in args if isinstance(a, Tensor))
    with torch.cuda.device_of(first):
        device = first.device.index
        # A thread of autograd's has perhaps used no device yet: this makes the context current for CuPy as well.
        import_cupy().cuda.runtime.setDevice(device)
        cells = tuple(a.data_ptr() if isinstance(a, Tensor) else 0 if a is None else a for a in args)
        with stream(torch.cuda.current_stream(device).cuda_stream, device):
            function(kernel, device)(grid, (block,), cells)


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a device; a few for the emulator."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


# ------------------------------------------------------------------------------------------------------ geometry


class Geometry(NamedTuple):
    """How threads are dealt over a tensor (outer, channels, inner), see abn.cu."""

    vec: int  # elements a thread moves at once
    last: bool  # channels are last
    grid: tuple[int, int]  # channel groups, stripes
    shape: "tuple[np.generic, ...]"  # the kernels' last arguments: outer, channels, inner, shift_x


def geometry(*tensors: Tensor | None) -> Geometry:
    """For tensors of one shape, dtype and layout, none of them empty."""
    present = [t for t in tensors if t is not None]
    x = present[0]
    outer, channels, inner = layout(x)
    last = inner == 1
    vec = ACCESS // x.element_size()
    if (channels if last else inner) % vec or any(t.data_ptr() % ACCESS for t in present):
        vec = 1
    shift = 0
    if last:
        packs = channels // vec
        shift = min(5, (packs - 1).bit_length())
        groups = -(-packs // (1 << shift))
        turns = -(-outer // (BLOCK >> shift))
    else:
        groups = channels
        turns = -(-outer * (inner // vec) // BLOCK)
    stripes = max(-(-BLOCKS * processors(x.device) // groups), -(-turns // TURNS))
    stripes = min(stripes, turns, HIGHEST_GRID)
    shape = number("int64", outer), number("int64", channels), number("int64", inner), number("int32", shift)
    return Geometry(vec, last, (groups, stripes), shape)


def blocks_of_warps(channels: int) -> tuple[int, int]:
    """The grid with one warp a channel."""
    return -(-channels * 32 // BLOCK), 1


def number(kind: str, value: float) -> "np.generic":
    """CuPy takes numbers of a stated width as numpy's. It needs numpy, the layers alone do not."""
    made: np.generic = getattr(importlib.import_module("numpy"), kind)(value)
    return made


def scalar(value: float, like: Tensor) -> "np.generic":
    """For a kernel's parameter of the statistics dtype of `like`."""
    return number("float64" if like.dtype == torch.float64 else "float32", value)


# ------------------------------------------------------------------------------------------------- the primitives


def launch_statistics(x: Tensor) -> tuple[Tensor, Geometry]:
    """(stripes' moments, how they lie)"""
    how = geometry(x)
    part = x.new_empty((x.shape[1], how.grid[1], 3), dtype=statistics_dtype(x))
    launch(over_tensors("statistics", TYPES[x.dtype], how.vec, how.last), how.grid, BLOCK, (x, part, *how.shape))
    return part, how


def launch_merge_statistics(
    x: Tensor, part: Tensor, eps: float, momentum: float, gamma: Tensor | None, mean: Tensor, var: Tensor | None,
    rstd: Tensor | None, scale: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None,
) -> None:  # fmt: skip
    channels = x.shape[1]
    launch(
        over_channels("merge_statistics", TYPES[x.dtype]), blocks_of_warps(channels), BLOCK,
        (
            part, number("int64", channels), number("int32", part.shape[1]),
            number("float64", x.numel() // channels), scalar(eps, part), scalar(momentum, part),
            gamma, mean, var, rstd, scale, running_mean, running_var,
        ),
    )  # fmt: skip


def launch_normalise(
    x: Tensor, out: Tensor, center: Tensor | None, scale: Tensor, shift: Tensor, activation: Activation,
    shortcut: Tensor | None,
) -> None:  # fmt: skip
    how = geometry(x, out, shortcut)
    launch(
        over_tensors("normalise", TYPES[x.dtype], how.vec, how.last, CODES.index(activation.name)), how.grid, BLOCK,
        (x, out, shortcut, center, scale, shift, scalar(activation.param, scale), *how.shape),
    )  # fmt: skip


def statistics(x: Tensor) -> Tensor:
    found = x.new_empty((2, x.shape[1]), dtype=statistics_dtype(x))
    if x.numel() == 0:
        return found.zero_()
    part, _ = launch_statistics(x)
    launch_merge_statistics(x, part, 0, 0, None, found[0], found[1], None, None, None, None)
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
    """As aten_ops.forward. The mean is subtracted first, so that no digits are lost where it is large."""
    part, _ = launch_statistics(x)
    mean, rstd, scale = gamma.new_empty((3, x.shape[1])).unbind()
    running = [None if t is None else t.contiguous() for t in (running_mean, running_var)]
    launch_merge_statistics(x, part, eps, momentum, gamma.contiguous(), mean, None, rstd, scale, *running)
    for mine, theirs in zip(running, (running_mean, running_var), strict=True):
        if mine is not None and theirs is not None and mine is not theirs:
            theirs.copy_(mine)
    launch_normalise(x, out, mean, scale, beta.contiguous(), activation, shortcut)
    return mean, rstd


def kept_arguments(
    kept: Tensor, dz: Tensor, center: Tensor, inverse: Tensor, activation: Activation,
    shortcut: Tensor | None, affine: tuple[Tensor, Tensor] | None,
) -> tuple[Argument, ...]:  # fmt: skip
    """The first arguments of `sums` and `gradient`."""
    scale, shift = (None, None) if affine is None else (affine[0].contiguous(), affine[1].contiguous())
    param = activation.param
    least = torch.finfo(kept.dtype).eps - 1  # the lowest z / alpha of ELU that is inverted
    numbers = (scalar(number, center) for number in (param, 1 / param if param else 0, least))
    added = None if affine else shortcut
    return kept, dz, added, center.contiguous(), inverse.contiguous(), scale, shift, *numbers


def launch_sums(common: tuple[Argument, ...], activation: Activation, divided: bool) -> tuple[Tensor, Tensor | None]:
    """(sums, means unless not `divided`), both (2, C)"""
    kept, dz, shortcut, center, _, scale = common[:6]
    assert isinstance(kept, Tensor) and isinstance(center, Tensor)
    how = geometry(kept, dz, shortcut)  # type: ignore[arg-type]
    ctype, channels = TYPES[kept.dtype], kept.shape[1]
    part = center.new_empty((channels, how.grid[1], 2))
    form = "false" if scale is None else "true"
    launch(
        over_tensors("sums", ctype, how.vec, how.last, CODES.index(activation.name), form), how.grid, BLOCK,
        (*common, part, *how.shape),
    )  # fmt: skip
    found = center.new_empty((2, channels))
    means = torch.empty_like(found) if divided else None
    launch(
        over_channels("merge_sums", ctype), blocks_of_warps(channels), BLOCK,
        (
            part, number("int64", channels), number("int32", how.grid[1]),
            number("float64", kept.numel() // channels), found, means,
        ),
    )  # fmt: skip
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
        over_tensors("gradient", TYPES[kept.dtype], how.vec, how.last, CODES.index(activation.name), form),
        how.grid, BLOCK, (*common, factor.contiguous(), means.contiguous(), dx, dshortcut, *how.shape),
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


# ------------------------------------------------------------------------------------------------------- warm-up


def warm_up(
    dtypes: tuple[torch.dtype, ...] = (torch.float32,), activations: tuple[str, ...] = CODES,
    device: torch.device | str | int = "cuda",
) -> None:  # fmt: skip
    """Compiles, loads and runs every kernel of these types and activations once: loading is not allowed while a CUDA
    graph is captured."""
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
