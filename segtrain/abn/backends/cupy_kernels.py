"""The text of kernels/abn.cu and abn_codes.cu, and the instances of their templates that are compiled together."""

import functools
from pathlib import Path
from typing import NamedTuple

import torch

KERNELS = Path(__file__).parent / "kernels"
# dtype -> C++ type
TYPES = {
    torch.float32: "float", torch.float16: "__half", torch.bfloat16: "__nv_bfloat16", torch.float64: "double",
}  # fmt: skip
BLOCK = 256  # threads of a block, a multiple of 32
ACCESS = 16  # bytes of the widest memory access


class Module(NamedTuple):
    """What is compiled together."""

    ctype: str  # C++ type
    act: int | None = None  # the code of the activation
    bits: int = 0  # of coded maps


class Kernel(NamedTuple):
    """An instance of a template of abn.cu or, in modules of coded maps, abn_codes.cu."""

    function: str
    arguments: tuple[str | int, ...]  # of the template
    module: Module

    @property
    def expression(self) -> str:
        return f"abn::{self.function}<{', '.join(map(str, self.arguments))}>"


@functools.cache
def source() -> str:
    """The text with abn_math.h in it, because CuPy's cache does not notice that an included file has changed."""
    header = (KERNELS / "abn_math.h").read_text()
    return (KERNELS / "abn.cu").read_text().replace('#include "abn_math.h"\n', header)


def text_of(bits: int) -> str:
    """The text of the modules of maps of that many bits; 0: of the six primitives."""
    return source() + (KERNELS / "abn_codes.cu").read_text() if bits else source()


def widest(ctype: str) -> int:
    """Number of elements in the widest memory access."""
    return ACCESS // next(dtype.itemsize for dtype, name in TYPES.items() if name == ctype)


def computed_in(ctype: str) -> str:
    return "double" if ctype == "double" else "float"


def over_tensors(function: str, ctype: str, vec: int, last: bool, act: int | None = None, *kept: str) -> Kernel:
    activation = () if act is None else (act,)
    return Kernel(function, (ctype, vec, *activation, *kept, str(last).lower(), BLOCK), Module(ctype, act))


def over_channels(function: str, ctype: str, bits: int = 0) -> Kernel:
    return Kernel(function, (computed_in(ctype), BLOCK), Module(ctype, None, bits))


# Of maps of either number of bits: their kernels are the same.
SEARCHES = 1


def over_ranges(function: str, ctype: str, vec: int, last: bool) -> Kernel:
    return Kernel(function, (ctype, vec, str(last).lower(), BLOCK), Module(ctype, None, SEARCHES))


def over_codes(function: str, ctype: str, vec: int, wide: bool, act: int, bits: int, last: bool) -> Kernel:
    flags = str(wide).lower(), act, bits, str(last).lower()
    return Kernel(function, (ctype, vec, *flags, BLOCK), Module(ctype, act, bits))


CODED = "encode", "decode", "coded_sums", "coded_gradient"


def instances(ctype: str, act: int | None = None, bits: int = 0) -> list[Kernel]:
    """All kernels of one module: those for the statistics of a type, or those of a type with an activation; the same
    for coded maps."""
    kernels = []
    for last in (False, True):
        for wide in (False, True):
            vec = widest(ctype) if wide else 1
            if bits and act is None:
                kernels += [over_ranges(function, ctype, vec, last) for function in ("summarise", "search")]
            elif bits and act is not None:
                pair = widest(ctype) if wide else 2
                kernels += [over_codes(function, ctype, pair, wide, act, bits, last) for function in CODED]
            elif act is None:
                kernels.append(over_tensors("statistics", ctype, vec, last))
            else:
                kernels.append(over_tensors("normalise", ctype, vec, last, act))
                for function in ("sums", "gradient"):
                    kernels += [over_tensors(function, ctype, vec, last, act, kept) for kept in ("false", "true")]
    if act is None:
        merges = ("merge_summaries", "merge_ranges", "map_ranges") if bits else ("merge_statistics", "merge_sums")
        kernels += [over_channels(function, ctype, bits) for function in merges]
    return kernels
