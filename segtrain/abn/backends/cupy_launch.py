"""Compile, load and launch the CUDA kernels through CuPy. The only module that imports CuPy.

The environment variable SEGTRAIN_CACHE moves CuPy's folder of compiled kernels to `cupy` below it, unless
CUPY_CACHE_DIR is set.
"""

import functools
import importlib
import importlib.util
import os
import sys
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from segtrain.abn.backends.cupy_kernels import Kernel, Module, instances, text_of
from segtrain.native.folders import folder_for

if TYPE_CHECKING:
    import numpy as np

Argument: TypeAlias = "Tensor | np.generic | None"  # None: a null pointer


def install_advice() -> str:
    return f"pip install cupy-cuda{(torch.version.cuda or '13').split('.')[0]}x"


def import_cupy() -> Any:
    """The cupy module, with its folder of compiled kernels set from SEGTRAIN_CACHE."""
    if "cupy" not in sys.modules and os.environ.get("SEGTRAIN_CACHE") and "CUPY_CACHE_DIR" not in os.environ:
        os.environ["CUPY_CACHE_DIR"] = str(folder_for("cupy"))
    return importlib.import_module("cupy")


def available() -> str:
    """'' if these kernels can run here, else the reason, in one sentence."""
    if torch.version.hip is not None:
        return "torch is built for AMD GPUs"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    if importlib.util.find_spec("cupy") is None:
        return f"CuPy is not installed: {install_advice()}"
    try:
        cupy = import_cupy()
        built = cupy.cuda.runtime.runtimeGetVersion() // 1000
        wanted = int((torch.version.cuda or "0").split(".")[0])
        if built != wanted:
            return f"CuPy is built for CUDA {built} and torch for CUDA {wanted}: {install_advice()}"
        cupy.cuda.nvrtc.getVersion()
    except (ImportError, RuntimeError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        return f"CuPy does not work here ({type(error).__name__}: {reason})"
    return ""


@functools.cache
def raw_module(module: Module, device: int) -> Any:
    """The compiled module for a device, which must be the current one when it is used."""
    names = [kernel.expression for kernel in instances(*module)]
    return import_cupy().RawModule(code=text_of(module.bits), options=("--std=c++17",), name_expressions=names)


@functools.cache
def loaded_kernel(kernel: Kernel, device: int) -> Any:
    """The loaded kernel. The device must be the current one."""
    return raw_module(kernel.module, device).get_function(kernel.expression)


class Raw:
    """A CUDA stream by its address, in the protocol by which CuPy accepts foreign streams."""

    def __init__(self, pointer: int) -> None:
        self.pointer = pointer

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.pointer


@functools.cache
def stream(pointer: int, device: int) -> Any:
    return import_cupy().cuda.Stream.from_external(Raw(pointer))


def launch(kernel: Kernel, grid: tuple[int, int], block: int, args: tuple[Argument, ...]) -> None:
    """Enqueue a kernel on torch's current stream of the tensors' device. grid: blocks in x and y. block: threads."""
    device = next(a for a in args if isinstance(a, Tensor)).device.index
    if device == torch.cuda.current_device():
        launch_here(kernel, grid, block, args, device)
    else:
        with torch.cuda.device(device):
            launch_here(kernel, grid, block, args, device)


def launch_here(kernel: Kernel, grid: tuple[int, int], block: int, args: tuple[Argument, ...], device: int) -> None:
    """As `launch`, on the current device, which has that number."""
    cupy = sys.modules.get("cupy") or import_cupy()
    # An autograd thread may not have used any device yet: this makes the context current for CuPy too.
    cupy.cuda.runtime.setDevice(device)
    cells = tuple([a.data_ptr() if isinstance(a, Tensor) else 0 if a is None else a for a in args])
    # torch.cuda.current_stream would make an object for each launch.
    with stream(torch._C._cuda_getCurrentRawStream(device), device):
        loaded_kernel(kernel, device)(grid, (block,), cells)
