"""NVRTC, NVIDIA's run-time compiler, called directly: it needs no device. Version 13 comes with torch's wheels."""

import ctypes
import functools
import importlib.util
import os
import re
from pathlib import Path
from typing import NamedTuple

# major version -> folders of its library and headers in the wheels
FOLDERS = {13: ("cu13/lib", "cu13/include"), 12: ("cuda_nvrtc/lib", "cuda_runtime/include")}
PLAIN = ("--std=c++17", "-ftz=true", "--device-as-default-execution-space")  # as CuPy has them


class Usage(NamedTuple):
    """What ptxas reports of a kernel, in bytes."""

    registers: int
    stack: int
    spilled: int
    shared: int


class Compiled(NamedTuple):
    code: bytes
    lowered: dict[str, str]  # name expression -> mangled name
    log: str

    def usage(self) -> dict[str, Usage]:
        """Usage by name expression. Needs the option --ptxas-options=-v."""
        found = {}
        for block in re.split(r"Compiling entry function '", self.log)[1:]:
            number = {
                key: [int(n) for n in re.findall(pattern, block)]
                for key, pattern in (
                    ("registers", r"Used (\d+) registers"), ("stack", r"(\d+) bytes stack frame"),
                    ("spilled", r"(\d+) bytes spill"), ("shared", r"(\d+) bytes smem"),
                )
            }  # fmt: skip
            found[block.partition("'")[0]] = Usage(*(sum(values) for values in number.values()))
        return {name: found[mangled] for name, mangled in self.lowered.items()}


class CompileError(RuntimeError):
    """NVRTC's log."""


@functools.cache
def wheels(major: int) -> tuple[Path, Path] | None:
    """(library, headers), from NVRTC_WHEELS (a folder that pip installed into) or the installed wheels."""
    spec = importlib.util.find_spec("nvidia")
    roots = [Path(p) for p in (spec.submodule_search_locations or [])] if spec else []
    if os.environ.get("NVRTC_WHEELS"):
        roots.insert(0, Path(os.environ["NVRTC_WHEELS"]) / "nvidia")
    libraries, headers = FOLDERS[major]
    for root in roots:
        library, include = root / libraries / f"libnvrtc.so.{major}", root / headers
        if library.exists() and (include / "cuda_fp16.h").exists():
            return library, include
    return None


@functools.cache
def load(major: int) -> ctypes.CDLL:
    found = wheels(major)
    assert found
    return ctypes.CDLL(str(found[0]))


def compile_text(
    text: str, names: list[str], arch: int, kind: str = "cubin", options: tuple[str, ...] = PLAIN, major: int = 13
) -> Compiled:
    """Compile a text. kind: cubin | ptx. CompileError with the log if it does not compile."""
    library, found = load(major), wheels(major)
    assert found

    def call(function: str, *args: object) -> None:
        status = getattr(library, f"nvrtc{function}")(*args)
        if status:
            raise RuntimeError(f"nvrtc{function} returned {status}")

    def fetch(what: str) -> bytes:
        size = ctypes.c_size_t()
        call(f"Get{what}Size", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        call(f"Get{what}", program, buffer)
        return buffer.raw

    program = ctypes.c_void_p()
    call("CreateProgram", ctypes.byref(program), text.encode(), b"abn.cu", 0, None, None)
    try:
        for name in names:
            call("AddNameExpression", program, name.encode())
        target = f"-arch={'sm' if kind == 'cubin' else 'compute'}_{arch}"
        flags = [flag.encode() for flag in (f"-I{found[1]}", target, *options)]
        status = library.nvrtcCompileProgram(program, len(flags), (ctypes.c_char_p * len(flags))(*flags))
        log = fetch("ProgramLog").rstrip(b"\0").decode(errors="replace")
        if status:
            raise CompileError(log)
        lowered = {}
        for name in names:
            mangled = ctypes.c_char_p()
            call("GetLoweredName", program, name.encode(), ctypes.byref(mangled))
            assert mangled.value
            lowered[name] = mangled.value.decode()
        return Compiled(fetch("CUBIN" if kind == "cubin" else "PTX").rstrip(b"\0"), lowered, log)
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))
