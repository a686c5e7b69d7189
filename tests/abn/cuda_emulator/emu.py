"""Build CUDA source, or PTX compiled from it, with the emulator, and run its kernels with the arguments of a launch.

Needs no torch: under a sanitizer a child process imports only this and numpy.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np

from tests.abn.cuda_emulator import ptx as translator

HERE = Path(__file__).resolve().parent
COMPILER = os.environ.get("CXX") or shutil.which("g++")
# sanitizer -> options for the kernels' object, options for the engine's
SANITIZERS = {
    "plain": ([], []),
    "asan": (["-fsanitize=address", "-fno-omit-frame-pointer"], ["-DEMU_ASAN"]),
    "ubsan": (["-fsanitize=undefined", "-fno-sanitize-recover=all"], []),
    "tsan": (["-fsanitize=thread"], ["-DEMU_TSAN"]),
}
KINDS = {0: "an integer", 1: "a floating-point number", 2: "a pointer"}


class Fault(RuntimeError):
    """An error that would hang or crash a device: a missed barrier, a shuffle of absent lanes, an impossible launch."""


def build_folder() -> Path:
    """Folder of the libraries, shared by a user's runs; a library's name has a hash of all that it was built from."""
    folder = Path(os.environ.get("CUDA_EMULATOR_BUILD") or Path(tempfile.gettempdir()) / f"cuda_emulator_{os.getuid()}")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def run(command: list[str]) -> None:
    # A sanitizer that this process runs under is not for the compiler.
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[:4000]}")


def engine_object(command: list[str], text: str) -> Path:
    """The emulator's engine, compiled once for all kernels."""
    key = hashlib.sha256("\0".join([text, *command]).encode()).hexdigest()[:20]
    made = build_folder() / f"{key}.o"
    if not made.exists():
        partial = build_folder() / f"{key}.{os.getpid()}.o"
        run([*command, "-c", f"{HERE}/cuda_emu.cpp", "-o", str(partial)])
        partial.replace(made)
    return made


def build(text: str, options: list[str], sanitizer: str) -> ctypes.CDLL:
    """Build a shared library from `text`, C++ kernels that include cuda_emu.h, and the engine."""
    assert COMPILER
    kernel_options, engine_options = SANITIZERS[sanitizer]
    base = [COMPILER, "-std=c++17", "-fPIC", "-g1", f"-I{HERE}"]
    kernels = [*base, "-fno-strict-aliasing", "-ffp-contract=off", *options, *kernel_options]
    engine = "".join(path.read_text() for path in sorted(HERE.glob("cuda_*")))
    key = hashlib.sha256("\0".join([text, engine, *kernels, *engine_options]).encode()).hexdigest()[:20]
    library = build_folder() / f"{key}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=build_folder()) as folder:
            at = Path(folder)
            (at / "kernels.cpp").write_text(text)
            run([*kernels, "-c", f"{at}/kernels.cpp", "-o", f"{at}/kernels.o"])
            made = [f"{at}/kernels.o", str(engine_object([*base, "-O2", *engine_options], engine))]
            run([COMPILER, "-shared", *kernel_options, *made, "-o", f"{at}/library.so"])
            (at / "library.so").replace(library)
    loaded = ctypes.CDLL(str(library))
    loaded.emu_error.restype = ctypes.c_char_p
    return loaded


class Module:
    """Kernels by name expression. order: of threads and blocks; 0: forward, 1: backward, others: seed of a shuffle."""

    def __init__(self, library: ctypes.CDLL, numbers: dict[str, int]) -> None:
        self.library = library
        self.numbers = numbers
        self.order = 0
        self.parameters: dict[str, list[int]] = {}

    def kinds(self, name: str) -> list[int]:
        if name not in self.parameters:
            found = (ctypes.c_int * 64)()
            count = getattr(self.library, f"emu_parameters_{self.numbers[name]}")(found)
            self.parameters[name] = list(found[:count])
        return self.parameters[name]

    def check(self, name: str, args: tuple) -> None:
        """TypeError unless every argument (an int for a pointer, or a numpy scalar) has the type of its parameter."""
        kinds = self.kinds(name)
        if len(args) != len(kinds):
            raise TypeError(f"{name} takes {len(kinds)} arguments, not {len(args)}")
        for i, (arg, parameter) in enumerate(zip(args, kinds, strict=True)):
            if isinstance(arg, int):
                found = 2, 8
            elif isinstance(arg, np.generic):
                found = int(arg.dtype.kind == "f"), arg.itemsize
            else:
                raise TypeError(f"{name} argument {i}: {type(arg).__name__} has no certain size on a device")
            # A compiler that does not declare pointers says the size alone.
            wrong = found[1] != -parameter if parameter < 0 else found != divmod(parameter, 100)
            if wrong:
                raise TypeError(
                    f"{name} argument {i}: {KINDS[found[0]]} of {found[1]} bytes where the kernel has "
                    f"{KINDS.get(parameter // 100, 'something')} of {abs(parameter) % 100}"
                )

    def launch(self, name: str, grid: tuple[int, int], block: int, args: tuple, only_block: int = -1) -> None:
        """Run a kernel. args: addresses as Python ints, numbers as numpy scalars. only_block: run only this block."""
        self.check(name, args)
        values = [np.asarray(np.uint64(arg) if isinstance(arg, int) else arg) for arg in args]
        cells = (ctypes.c_void_p * len(args))(*(value.ctypes.data for value in values))
        dims = (ctypes.c_int * 6)(*grid, 1, block, 1, 1)
        function = getattr(self.library, f"emu_run_{self.numbers[name]}")
        if function(cells, dims, self.order, ctypes.c_longlong(only_block)):
            raise Fault(f"{name}: {self.library.emu_error().decode()}")

    def watch(self, ranges: list[tuple[int, int]]) -> None:
        """Count the accesses to these ranges (address, bytes) from now on. For PTX only, where all are visible."""
        begins = (ctypes.c_uint64 * len(ranges))(*(begin for begin, _ in ranges))
        sizes = (ctypes.c_uint64 * len(ranges))(*(size for _, size in ranges))
        self.library.emu_watch(len(ranges), begins, sizes)
        self.watched = len(ranges)

    def traffic(self) -> list[tuple[int, int, int]]:
        """(bytes loaded, bytes stored, accesses) of each range."""
        found = (ctypes.c_ulonglong * (3 * self.watched))()
        self.library.emu_traffic(found)
        return [(found[3 * i], found[3 * i + 1], found[3 * i + 2]) for i in range(self.watched)]


def from_text(text: str, names: list[str], sanitizer: str = "plain") -> Module:
    """The kernels, compiled from their source by g++."""
    exports = "".join(f"EMU_EXPORT({i}, {name})\n" for i, name in enumerate(names))
    whole = f'#include "cuda_emu.h"\n#line 1 "kernels.cu"\n{text}\n#line 1 "exports"\n{exports}'
    warnings = ["-Wall", "-Wno-unknown-pragmas"]
    return Module(build(whole, ["-O1", *warnings], sanitizer), {name: i for i, name in enumerate(names)})


def from_ptx(ptx: str, lowered: dict[str, str], sanitizer: str = "plain") -> Module:
    """The kernels, translated from the PTX of NVRTC. lowered: name expression -> mangled name."""
    cpp, order = translator.translate(ptx)
    library = build(cpp, ["-O0", "-w"], sanitizer)
    return Module(library, {name: order.index(mangled) for name, mangled in lowered.items()})
