"""The primitives on the CPU: kernels/abn_cpu.cpp, compiled at first use if there is a C++ compiler; and the functions
of coded maps, kernels/abn_codes_cpu.cpp, where they are used.

The same functions as in aten.py and codes.py. There is one small library for each storage type;
segtrain/native/compile.py builds them and describes the environment variables.
"""

import ctypes
import functools
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from segtrain.abn.backends.aten import CODES, Activation, layout, statistics_dtype
from segtrain.abn.backends.codes import Coded, CodedShortcut, KnownRanges, Shortcut
from segtrain.native import compile as compiling

KERNELS = Path(__file__).parent / "kernels"
# dtype -> C++ type
TYPES = {
    torch.float32: "float", torch.float64: "double", torch.bfloat16: "bfloat16", torch.float16: "_Float16",
}  # fmt: skip
DTYPES = frozenset(TYPES)
LOWEST = {dtype: torch.finfo(dtype).eps - 1 for dtype in TYPES}  # z / alpha of ELU that is inverted


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


def build_library(dtype: torch.dtype, source: str = "abn_cpu.cpp") -> Path:
    """The library of a source for a storage type, built if it does not exist yet."""
    kind = TYPES[dtype]
    coded = "codes" in source
    name = f"{'codes' if coded else 'abn'}-{kind.lstrip('_')}"
    what = f"the {'kernels of coded maps' if coded else 'In-Place ABN kernels'} for this CPU ({kind})"
    sources = [KERNELS / "abn_math.h", KERNELS / "abn_cpu.h", KERNELS / source]
    return compiling.library_path(name, what, sources, [f"-DABN_TYPE={kind}"])


@functools.cache
def load_library(dtype: torch.dtype) -> Any:
    """The library for a storage type, its argument types declared."""
    p, n, d, i = ctypes.c_void_p, ctypes.c_long, ctypes.c_double, ctypes.c_int
    act = [i, d, d]
    return declared(
        build_library(dtype),
        {
            "abn_statistics": [p, n, n, n, p, p, i],
            "abn_normalise": [p, p, p, n, n, n, p, p, *act, i],
            "abn_forward": [p, p, p, n, n, n, p, p, p, p, d, d, p, p, *act, i],
            "abn_sums": [p, p, p, n, n, n, p, p, p, p, *act, p, i],
            "abn_gradient": [p, p, p, p, p, n, n, n, p, p, p, p, p, p, *act, i],
            "abn_backward": [p, p, p, p, p, n, n, n, p, p, p, p, p, *act, p, i],
            "abn_layer_forward": [p, p, p, n, n, n, p, p, p, p, d, d, i, p, p, *act, i],
            "abn_layer_backward": [p, p, p, p, p, n, n, n, p, p, p, p, i, *act, p, p, i],
        },
    )


@functools.cache
def load_codes(dtype: torch.dtype) -> Any:
    """The library of coded maps for a storage type, its argument types declared."""
    p, n, d, i = ctypes.c_void_p, ctypes.c_long, ctypes.c_double, ctypes.c_int
    act, shape, shortcut = [i, d, d], [n, n, n, n, n, i], [p, p, p, i, d]
    return declared(
        build_library(dtype, "abn_codes_cpu.cpp"),
        {
            "abn_encode": [p, p, p, p, *shape, p, p, p, *act, d, p, i, d, i],
            "abn_decode": [p, p, *shape, p, *act, i],
            "abn_coded_sums": [p, p, *shortcut, *shape, p, p, p, *act, p, i],
            "abn_coded_gradient": [p, p, *shortcut, p, p, *shape, p, p, p, p, p, *act, i],
        },
    )


def declared(path: Path, functions: dict[str, list[Any]]) -> Any:
    """The opened library, with the argument types of its functions."""
    library = compiling.open_library(path)
    for name, arguments in functions.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, None
    return library


# ------------------------------------------------------------------------------------------------------ the primitives


def address(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def acts(activation: Activation, dtype: torch.dtype) -> tuple[int, float, float]:
    """The library's arguments for an activation: code, parameter, lowest z / alpha that ELU inverts."""
    return CODES.index(activation.name), activation.param, LOWEST[dtype]


class Plan(NamedTuple):
    """What a call on tensors of one shape, memory layout and dtype passes besides addresses."""

    library: Any
    shape: tuple[int, int, int]  # outer, channels, inner
    acts: tuple[int, float, float]


MOST_PLANS = 1024  # that are remembered; a network in training has one for each of its layers at most
plans: dict[Any, Plan] = {}


def plan_for(x: Tensor, activation: Activation) -> Plan:
    """The plan for a dense x. Made once for each shape, memory layout, dtype and activation."""
    key = x.shape, x.stride(), x.dtype, activation
    found = plans.get(key)
    if found is None:
        if len(plans) >= MOST_PLANS:
            plans.clear()
        shape = tuple(layout(x))
        found = plans[key] = Plan(load_library(x.dtype), shape, acts(activation, x.dtype))  # type: ignore[arg-type]
    return found


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
    library, shape, act = plan_for(x, activation)
    library.abn_normalise(
        address(x), address(shortcut), address(out), *shape, address(scale), address(shift), *act,
        torch.get_num_threads(),
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
    library, shape, act = plan_for(x, activation)
    library.abn_forward(
        address(x), address(shortcut), address(out), *shape, address(gamma), address(beta), address(running_mean),
        address(running_var), momentum, eps, address(mean), address(rstd), *act,
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
    library, shape, act = plan_for(kept, activation)
    library.abn_backward(
        address(kept), address(dz), address(shortcut), address(dx), address(dshortcut), *shape, address(center),
        address(inverse), address(scale), address(shift), address(factor), *act, address(result),
        torch.get_num_threads(),
    )  # fmt: skip
    return dx, result


def layer_forward(
    x: Tensor, out: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None,
    running_var: Tensor | None, momentum: float, eps: float, scale: str, activation: Activation,
    shortcut: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    library, shape, act = plan_for(x, activation)
    inverse = torch.empty(shape[1], dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    factor = torch.empty_like(inverse)
    library.abn_layer_forward(
        x.data_ptr(), address(shortcut), out.data_ptr(), *shape, address(weight), address(bias),
        address(running_mean), address(running_var), momentum, eps, scale == "abs", inverse.data_ptr(),
        factor.data_ptr(), *act, torch.get_num_threads(),
    )  # fmt: skip
    return inverse, factor


def layer_backward(
    kept: Tensor, dz: Tensor, weight: Tensor | None, bias: Tensor | None, inverse: Tensor, factor: Tensor, scale: str,
    activation: Activation, shortcut: Tensor | None, dshortcut: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    library, shape, act = plan_for(kept, activation)
    dx, dweight, dbias = torch.empty_like(kept), torch.empty_like(inverse), torch.empty_like(inverse)
    library.abn_layer_backward(
        kept.data_ptr(), dz.data_ptr(), address(shortcut), dx.data_ptr(), address(dshortcut), *shape, address(weight),
        address(bias), inverse.data_ptr(), factor.data_ptr(), scale == "abs", *act, dweight.data_ptr(),
        dbias.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return dx, dweight, dbias


# -------------------------------------------------------------------------------------------- coded maps, see codes.py


def coded_shape(x: Tensor, ranges: Tensor, bits: int) -> tuple[int, ...]:
    """outer, channels, inner, samples, samples with ranges of their own (or 1), bits"""
    return *layout(x), x.shape[0], ranges.shape[1], bits


def encode(
    x: Tensor, out: Tensor, codes: Tensor, ranges: Tensor, scale: Tensor, shift: Tensor, activation: Activation,
    shortcut: Tensor | None, bits: int, extremes: Tensor | None = None, known: KnownRanges | None = None,
) -> None:  # fmt: skip
    if x.numel():
        own = (address(known.ranges), *number_of(known.activation)) if known else (None, 0, 0.0)
        load_codes(x.dtype).abn_encode(
            address(x), address(shortcut), address(out), address(codes), *coded_shape(x, ranges, bits), address(scale),
            address(shift), address(ranges), *acts(activation, x.dtype), torch.finfo(ranges.dtype).tiny,
            *own, torch.get_num_threads(),
        )  # fmt: skip


def decode(coded: Coded, dtype: torch.dtype, activation: Activation) -> Tensor:
    codes, ranges, bits, size, stride = coded
    out = torch.empty_strided(size, stride, dtype=dtype)
    if out.numel():
        load_codes(dtype).abn_decode(
            address(codes), address(out), *coded_shape(out, ranges, bits), address(ranges), *acts(activation, dtype),
            torch.get_num_threads(),
        )  # fmt: skip
    return out


def number_of(activation: Activation) -> tuple[int, float]:
    return CODES.index(activation.name), activation.param


def added(shortcut: Shortcut) -> tuple[int | None, int | None, int | None, int, float]:
    """The library's arguments for a shortcut: map, codes, ranges, number and parameter of the activation."""
    if isinstance(shortcut, CodedShortcut):
        codes, ranges, activation = shortcut
        return None, address(codes), address(ranges), *number_of(activation)
    return address(shortcut), None, None, 0, 0.0


def coded_sums(
    coded: Coded, dz: Tensor, center: Tensor, inverse: Tensor, activation: Activation, shortcut: Shortcut
) -> Tensor:
    codes, ranges, bits = coded[:3]
    result = torch.zeros(2, dz.shape[1], dtype=center.dtype)
    if dz.numel():
        load_codes(dz.dtype).abn_coded_sums(
            address(codes), address(dz), *added(shortcut), *coded_shape(dz, ranges, bits), address(ranges),
            address(center), address(inverse), *acts(activation, dz.dtype), address(result), torch.get_num_threads(),
        )  # fmt: skip
    return result


def coded_gradient(
    coded: Coded, dz: Tensor, center: Tensor, inverse: Tensor, activation: Activation, shortcut: Shortcut,
    factor: Tensor, means: Tensor, dshortcut: Tensor | None,
) -> Tensor:  # fmt: skip
    codes, ranges, bits = coded[:3]
    dx = torch.empty_like(dz)
    if dz.numel():
        load_codes(dz.dtype).abn_coded_gradient(
            address(codes), address(dz), *added(shortcut), address(dx), address(dshortcut),
            *coded_shape(dz, ranges, bits), address(ranges), address(center), address(inverse), address(factor),
            address(means), *acts(activation, dz.dtype), torch.get_num_threads(),
        )  # fmt: skip
    return dx


def coded_backward(
    coded: Coded, dz: Tensor, center: Tensor, inverse: Tensor, activation: Activation, shortcut: Shortcut,
    factor: Tensor, dshortcut: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    found = coded_sums(coded, dz, center, inverse, activation, shortcut)
    means = found / (dz.numel() // dz.shape[1])
    dx = coded_gradient(coded, dz, center, inverse, activation, shortcut, factor, means, dshortcut)
    return dx, found
