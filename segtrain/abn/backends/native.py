"""The primitives on the CPU: kernels/abn_cpu.cpp, compiled at first use if there is a C++ compiler.

The same functions as in aten.py. There is one small library for each storage type; segtrain/native/compile.py builds
them and describes the environment variables.
"""

import ctypes
import functools
import subprocess
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from segtrain.abn.backends.aten import CODES, Activation, layout, statistics_dtype
from segtrain.native import compile as compiling

KERNELS = Path(__file__).parent / "kernels"
# dtype -> C++ type
TYPES = {
    torch.float32: "float", torch.float64: "double", torch.bfloat16: "bfloat16", torch.float16: "_Float16",
}  # fmt: skip
DTYPES = frozenset(TYPES)


@functools.cache
def available() -> str:
    """'' if the libraries can be built and loaded, else the reason in one sentence."""
    reason = compiling.unavailable()
    if not reason:
        try:
            load_library(torch.float32)
        except (OSError, subprocess.SubprocessError) as error:
            reason = f"its library could not be built: {error}"
    return reason


def build_library(dtype: torch.dtype) -> Path:
    """Path of the library for a storage type, built if it does not exist yet."""
    kind = TYPES[dtype]
    name = f"abn-{kind.lstrip('_')}"
    what = f"the In-Place ABN kernels for this CPU ({kind})"
    sources = [KERNELS / "abn_math.h", KERNELS / "abn_cpu.cpp"]
    return compiling.library_path(name, what, sources, [f"-DABN_TYPE={kind}"])


@functools.cache
def load_library(dtype: torch.dtype) -> Any:
    """The library for a storage type, with its argument types declared."""
    library = compiling.open_library(build_library(dtype))
    p, n, d, i = ctypes.c_void_p, ctypes.c_long, ctypes.c_double, ctypes.c_int
    act = [i, d, d]
    for name, arguments in {
        "abn_statistics": [p, n, n, n, p, p, i],
        "abn_normalise": [p, p, p, n, n, n, p, p, *act, i],
        "abn_forward": [p, p, p, n, n, n, p, p, p, p, d, d, p, p, *act, i],
        "abn_sums": [p, p, p, n, n, n, p, p, p, p, *act, p, i],
        "abn_gradient": [p, p, p, p, p, n, n, n, p, p, p, p, p, p, *act, i],
        "abn_backward": [p, p, p, p, p, n, n, n, p, p, p, p, p, *act, p, i],
    }.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, None
    return library


# ------------------------------------------------------------------------------------------------------ the primitives


def address(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def acts(activation: Activation, dtype: torch.dtype) -> tuple[int, float, float]:
    """The library's arguments for an activation: code, parameter, lowest z / alpha that ELU inverts."""
    return CODES.index(activation.name), activation.param, torch.finfo(dtype).eps - 1


def statistics(x: Tensor) -> Tensor:
    result = torch.zeros(2, x.shape[1], dtype=statistics_dtype(x))
    if x.numel():
        mean, var = result
        load_library(x.dtype).abn_statistics(
            address(x), *layout(x), address(mean), address(var), torch.get_num_threads()
        )
    return result


def normalise(
    x: Tensor, out: Tensor, scale: Tensor, shift: Tensor, activation: Activation, shortcut: Tensor | None
) -> None:
    load_library(x.dtype).abn_normalise(
        address(x), address(shortcut), address(out), *layout(x), address(scale), address(shift),
        *acts(activation, x.dtype), torch.get_num_threads(),
    )  # fmt: skip


def sums(
    kept: Tensor, dz: Tensor, center: Tensor, inverse: Tensor, activation: Activation,
    shortcut: Tensor | None, affine: tuple[Tensor, Tensor] | None,
) -> Tensor:  # fmt: skip
    result = torch.zeros(2, kept.shape[1], dtype=center.dtype)
    scale, shift = affine or (None, None)
    if kept.numel():
        load_library(kept.dtype).abn_sums(
            address(kept), address(dz), address(shortcut), *layout(kept), address(center), address(inverse),
            address(scale), address(shift), *acts(activation, kept.dtype), address(result), torch.get_num_threads(),
        )  # fmt: skip
    return result


def gradient(
    kept: Tensor, dz: Tensor, center: Tensor, inverse: Tensor, activation: Activation,
    shortcut: Tensor | None, affine: tuple[Tensor, Tensor] | None,
    factor: Tensor, means: Tensor, dshortcut: Tensor | None,
) -> Tensor:  # fmt: skip
    dx = torch.empty_like(kept)
    scale, shift = affine or (None, None)
    means = means.contiguous()
    load_library(kept.dtype).abn_gradient(
        address(kept), address(dz), address(shortcut), address(dx), address(dshortcut), *layout(kept),
        address(center), address(inverse), address(scale), address(shift), address(factor), address(means),
        *acts(activation, kept.dtype), torch.get_num_threads(),
    )  # fmt: skip
    return dx


def forward(
    x: Tensor, out: Tensor, gamma: Tensor, beta: Tensor, running_mean: Tensor | None, running_var: Tensor | None,
    momentum: float, eps: float, activation: Activation, shortcut: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    mean, rstd = torch.empty_like(gamma), torch.empty_like(gamma)
    load_library(x.dtype).abn_forward(
        address(x), address(shortcut), address(out), *layout(x), address(gamma), address(beta), address(running_mean),
        address(running_var), momentum, eps, address(mean), address(rstd), *acts(activation, x.dtype),
        torch.get_num_threads(),
    )  # fmt: skip
    return mean, rstd


def backward(
    kept: Tensor, dz: Tensor, center: Tensor, inverse: Tensor, activation: Activation,
    shortcut: Tensor | None, affine: tuple[Tensor, Tensor] | None, factor: Tensor, dshortcut: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dx = torch.empty_like(kept)
    result = torch.empty(2, kept.shape[1], dtype=center.dtype)
    scale, shift = affine or (None, None)
    load_library(kept.dtype).abn_backward(
        address(kept), address(dz), address(shortcut), address(dx), address(dshortcut), *layout(kept),
        address(center), address(inverse), address(scale), address(shift), address(factor),
        *acts(activation, kept.dtype), address(result), torch.get_num_threads(),
    )  # fmt: skip
    return dx, result
