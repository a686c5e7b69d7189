"""The text of kernels/abn.cu, and the instances of its templates that are compiled together."""

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


class Kernel(NamedTuple):
    """An instance of a template of abn.cu."""

    function: str
    arguments: tuple[str | int, ...]  # of the template
    module: tuple[str, int | None]  # C++ type, activation code or None: what is compiled together

    @property
    def expression(self) -> str:
        return f"abn::{self.function}<{', '.join(map(str, self.arguments))}>"


@functools.cache
def source() -> str:
    """The text with abn_math.h in it, because CuPy's cache does not notice that an included file has changed."""
    header = (KERNELS / "abn_math.h").read_text()
    return (KERNELS / "abn.cu").read_text().replace('#include "abn_math.h"\n', header)


def widest(ctype: str) -> int:
    """Number of elements in the widest memory access."""
    return ACCESS // next(dtype.itemsize for dtype, name in TYPES.items() if name == ctype)


def computed_in(ctype: str) -> str:
    return "double" if ctype == "double" else "float"


def over_tensors(function: str, ctype: str, vec: int, last: bool, act: int | None = None, *kept: str) -> Kernel:
    activation = () if act is None else (act,)
    return Kernel(function, (ctype, vec, *activation, *kept, str(last).lower(), BLOCK), (ctype, act))


def over_channels(function: str, ctype: str) -> Kernel:
    return Kernel(function, (computed_in(ctype), BLOCK), (ctype, None))


def instances(ctype: str, act: int | None) -> list[Kernel]:
    """All kernels of one module: those for the statistics of a type, or those of a type with an activation."""
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
