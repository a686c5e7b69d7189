"""The memory accesses of the kernels, as NVRTC compiles them to PTX."""

import re

from segtrain.abn.backends import cupy_kernels
from tests.abn.cuda_emulator import nvrtc

WIDE = re.compile(r"\b(ld|st)\.global(?:\.nc)?\.(?:v4\.[bfu]32|v2\.[bf]64)\b")


def entries(ptx: str) -> dict[str, str]:
    """The text of every kernel, by mangled name."""
    return {part.partition("(")[0].strip(): part for part in re.split(r"\.entry\s+", ptx)[1:]}


def check_accesses_are_wide(arch: int, key: tuple) -> None:
    """Kernels for wide accesses load and store tensors by 128 bits at once."""
    bits = cupy_kernels.instances(*key)[0].module.bits
    kernels = [*cupy_kernels.instances(*key), *cupy_kernels.instances(key[0], None, bits)]
    made = nvrtc.compile_text(cupy_kernels.text_of(bits), [kernel.expression for kernel in kernels], arch, "ptx")
    texts = entries(made.code.decode())
    tensors = {
        "statistics": (1, 0), "normalise": (1, 1), "sums": (2, 0), "gradient": (2, 1), "summarise": (1, 0),
        "search": (1, 0), "encode": (1, 1), "decode": (0, 1), "coded_sums": (1, 0), "coded_gradient": (1, 1),
    }  # fmt: skip
    for kernel in kernels:
        found = [wide[1] for wide in WIDE.finditer(texts[made.lowered[kernel.expression]])]
        narrow_pair = kernel.function in cupy_kernels.CODED and kernel.arguments[2] == "false"
        is_wide = kernel.arguments[1] != 1 and not narrow_pair
        loads, stores = tensors.get(kernel.function, (0, 0)) if is_wide else (0, 0)
        assert found.count("ld") >= loads and found.count("st") >= stores, (kernel.expression, found)
        assert bool(loads or stores) == bool(found), (kernel.expression, found)
