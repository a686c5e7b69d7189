"""The primitives compiled for the CPU from kernels/abn_cpu.cpp, at first use, where a C++ compiler is found.

One small library per storage type, loaded by ctypes. It leaves OpenMP's symbols open, so that they resolve to the
pool torch has loaded: one pool, and forked loader workers survive. Same functions as aten_ops, which see.

    SEGTRAIN_CACHE   where the libraries are kept (default ~/.cache/segtrain); `abn` below it
    SEGTRAIN_NATIVE  native (default: all this CPU has) | avx2 | baseline | off
    CXX              the compiler (default: g++, clang++ or c++, whichever is found first)
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from segtrain.abn.aten_ops import CODES, Activation, layout, statistics_dtype

KERNELS = Path(__file__).parent / "kernels"
# dtype -> C++ type
TYPES = {
    torch.float32: "float", torch.float64: "double", torch.bfloat16: "bfloat16", torch.float16: "_Float16",
}  # fmt: skip
DTYPES = frozenset(TYPES)
INSTRUCTIONS = {
    "native": ["-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "baseline": [],
}
# No fast-math: sums have a written order. Without errno and traps, loops with a comparison become vector code.
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math"]


# -------------------------------------------------------------------------------------------------------- building


def compiler() -> str:
    """Path of the C++ compiler, or ''."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    return next((path for path in map(shutil.which, names) if path), "")


@functools.cache
def available() -> str:
    """'' if the libraries can be built and loaded, else the reason in one sentence."""
    if os.environ.get("SEGTRAIN_NATIVE") == "off":
        return "SEGTRAIN_NATIVE=off"
    if sys.platform == "win32":
        return "on Windows there is no compiled CPU back end"
    if not compiler():
        return "no C++ compiler was found (g++ or clang++; Debian and Ubuntu: apt install g++)"
    try:
        load(torch.float32)
    except (OSError, subprocess.SubprocessError) as error:
        return f"its library could not be built: {error}"
    return ""


def cpu_features() -> str:
    """What tells apart machines that share a home folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())


def folders() -> list[Path]:
    """Where a library may lie, the wanted place first."""
    wanted = Path(os.environ.get("SEGTRAIN_CACHE") or "~/.cache/segtrain").expanduser() / "abn"
    user = os.getuid() if hasattr(os, "getuid") else 0
    return [wanted, Path(tempfile.gettempdir()) / f"segtrain-{user}" / "abn"]


def library_path(dtype: torch.dtype) -> Path:
    """The library for a storage type, built if it is not there yet.

    Its name tells everything it depends on; it is moved into place whole, so several processes may build at once.
    OSError or CalledProcessError where that fails.
    """
    source = "".join((KERNELS / name).read_text() for name in ("abn_math.h", "abn_cpu.cpp"))
    choice = os.environ.get("SEGTRAIN_NATIVE") or "native"
    if choice not in INSTRUCTIONS:
        raise OSError(f"SEGTRAIN_NATIVE={choice} is not one of {', '.join(INSTRUCTIONS)}, off")
    command = [compiler(), *FLAGS, *INSTRUCTIONS[choice], f"-DABN_TYPE={TYPES[dtype]}"]
    version = subprocess.run([command[0], "--version"], capture_output=True, text=True, check=True).stdout
    key = repr((source, command, version, cpu_features(), platform.machine(), torch.__version__))
    name = f"abn-{TYPES[dtype].lstrip('_')}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    for folder in folders():
        if (folder / name).exists() and owned(folder):
            return folder / name
    for folder in folders():
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with tempfile.TemporaryDirectory(dir=folder, prefix="build-") as work:
                built = build(command, Path(work))
                built.replace(folder / name)
        except (PermissionError, FileExistsError, NotADirectoryError, OSError) as error:
            if isinstance(error, subprocess.SubprocessError) or folder == folders()[-1]:
                raise
            warnings.warn(
                f"segtrain: {folder} cannot be written ({error.strerror}); the compiled In-Place ABN library goes to "
                f"{folders()[-1]} instead. SEGTRAIN_CACHE=FOLDER chooses another place.",
                stacklevel=2,
            )
            continue
        if owned(folder):
            return folder / name
    raise OSError(f"{folders()[-1]} belongs to somebody else")


def owned(folder: Path) -> bool:
    """Whether nobody else can have put a library there: what lies there is loaded and run."""
    return not hasattr(os, "getuid") or folder.stat().st_uid in (os.getuid(), 0)


def build(command: list[str], work: Path) -> Path:
    """Compiles and links in `work`."""
    print(
        f"segtrain: compiling the In-Place ABN kernels for this CPU ({command[-1][11:]}; once)",
        file=sys.stderr,
        flush=True,
    )
    for arguments in (
        [*command, "-c", str(KERNELS / "abn_cpu.cpp"), "-o", str(work / "abn.o")],
        [command[0], "-shared", str(work / "abn.o"), "-o", str(work / "abn.so")],  # without -fopenmp: see above
    ):
        result = subprocess.run(arguments, capture_output=True, text=True, check=False)
        if result.returncode:
            first = next((line for line in result.stderr.splitlines() if "error" in line), result.stderr.strip())
            raise subprocess.SubprocessError(f"{' '.join(arguments[:4])} ...: {first}")
    return work / "abn.so"


@functools.cache
def load(dtype: torch.dtype) -> Any:
    """The library for a storage type, its argument types declared."""
    library = ctypes.CDLL(str(library_path(dtype)))
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


# ------------------------------------------------------------------------------------------------------ the seam


def address(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def acts(activation: Activation, dtype: torch.dtype) -> tuple[int, float, float]:
    return CODES.index(activation.name), activation.param, torch.finfo(dtype).eps - 1


def statistics(x: Tensor) -> Tensor:
    result = torch.zeros(2, x.shape[1], dtype=statistics_dtype(x))
    if x.numel():
        mean, var = result
        load(x.dtype).abn_statistics(address(x), *layout(x), address(mean), address(var), torch.get_num_threads())
    return result


def normalise(
    x: Tensor, out: Tensor, scale: Tensor, shift: Tensor, activation: Activation, shortcut: Tensor | None
) -> None:
    load(x.dtype).abn_normalise(
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
        load(kept.dtype).abn_sums(
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
    load(kept.dtype).abn_gradient(
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
    load(x.dtype).abn_forward(
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
    load(kept.dtype).abn_backward(
        address(kept), address(dz), address(shortcut), address(dx), address(dshortcut), *layout(kept),
        address(center), address(inverse), address(scale), address(shift), address(factor),
        *acts(activation, kept.dtype), address(result), torch.get_num_threads(),
    )  # fmt: skip
    return dx, result
