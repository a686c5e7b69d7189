"""Small C++ libraries, compiled at first use if there is a compiler, and loaded by ctypes.

They are not linked with OpenMP, so that its symbols resolve to the library that torch has loaded: there is one pool of
threads, and forked loader processes survive.

    SEGTRAIN_CACHE   folder in which the libraries have the folder `abn` (default ~/.cache/segtrain), see folders.py
    SEGTRAIN_NATIVE  instruction set: native (default: this CPU's), avx2 or baseline; off: no libraries
    CXX              compiler (default: g++, clang++ or c++, whichever is found first)
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

from segtrain.native.folders import folder_for, refusal_of_file, refusal_of_folder

INSTRUCTIONS = {
    "native": ["-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "baseline": [],
}
# No fast-math, which would change the order of sums. Without errno and traps, loops with comparisons are vectorised.
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math"]


def compiler() -> str:
    """Path of the C++ compiler, or ''."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    return next((path for path in map(shutil.which, names) if path), "")


def unavailable() -> str:
    """'' if libraries can be built here, else the reason in one sentence."""
    if os.environ.get("SEGTRAIN_NATIVE") == "off":
        return "SEGTRAIN_NATIVE=off"
    if sys.platform == "win32":
        return "on Windows there is no compiled CPU back end"
    if not compiler():
        return "no C++ compiler was found (g++ or clang++; Debian and Ubuntu: apt install g++)"
    return ""


def cpu_features() -> str:
    """The features of this CPU: machines of several kinds may share a home folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())


def library_path(name: str, what: str, sources: list[Path], defines: list[str]) -> Path:
    """Path of the library made of `sources` (the last one is compiled, the others are included by it).

    Builds it if it does not exist. Its name has a hash of all that it depends on, and it is moved into place when it is
    complete, so that several processes may build at once. OSError or SubprocessError if it cannot be built.
    """
    source = "".join(path.read_text() for path in sources)
    choice = os.environ.get("SEGTRAIN_NATIVE") or "native"
    if choice not in INSTRUCTIONS:
        raise OSError(f"SEGTRAIN_NATIVE={choice} is not one of {', '.join(INSTRUCTIONS)}, off")
    command = [compiler(), *FLAGS, *INSTRUCTIONS[choice], *defines]
    version = subprocess.run([command[0], "--version"], capture_output=True, text=True, check=True).stdout
    key = repr((source, command, version, cpu_features(), platform.machine(), metadata.version("torch")))
    name = f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    library = folder_for("abn") / name
    if not library.exists() or refusal_of_file(library):
        with tempfile.TemporaryDirectory(dir=library.parent, prefix="build-") as work:
            build(command, sources[-1], what, Path(work)).replace(library)
    return library


def open_library(path: Path) -> ctypes.CDLL:
    """Load a library. OSError if another user can have written it."""
    reason = refusal_of_file(path) or refusal_of_folder(path.parent)
    if reason:
        raise OSError(f"{path} is not loaded: {reason}")
    return ctypes.CDLL(str(path))


def build(command: list[str], source: Path, what: str, work: Path) -> Path:
    """Compile and link in the folder `work`."""
    print(f"segtrain: compiling {what}, once", file=sys.stderr, flush=True)
    for arguments in (
        [*command, "-c", str(source), "-o", str(work / "built.o")],
        [command[0], "-shared", str(work / "built.o"), "-o", str(work / "built.so")],  # without -fopenmp: see above
    ):
        result = subprocess.run(arguments, capture_output=True, text=True, check=False)
        if result.returncode:
            first = next((line for line in result.stderr.splitlines() if "error" in line), result.stderr.strip())
            raise subprocess.SubprocessError(f"{' '.join(arguments[:4])} ...: {first}")
    return work / "built.so"
