"""The CUDA kernels, compiled by NVIDIA's compiler for every generation of GPUs, and the code that it emits.

Needs no device. The emulator runs the PTX and counts every access to memory.
"""

import platform
import re
import sys
from unittest import mock

import pytest
import torch

from segtrain.abn import selftest
from segtrain.abn.backends import cupy as cupy_ops
from segtrain.abn.backends import cupy_kernels
from segtrain.abn.selftest import ELU, LEAKY, Case
from tests.abn.cuda_emulator import nvrtc, replay
from tests.abn.cuda_emulator.accesses import check_accesses_are_wide
from tests.abn.cuda_emulator.counting import Counting, check_compiles, ptx_module
from tests.abn.cuda_emulator.launcher import SMALL_BLOCK, Launcher, installed
from tests.abn.cuda_emulator.launches import VARIED, record
from tests.abn.cuda_emulator.needs import needs_12, needs_13, needs_compiler

ARCHS = {13: (75, 80, 86, 89, 90, 100, 120), 12: (60, 70, 75, 80, 86, 89, 90)}
KEYS = [(ctype, act) for ctype in cupy_kernels.TYPES.values() for act in (None, 0, 1, 2)]
# Each architecture and each module in one quick test at least; all with all in the slow ones.
QUICK = {
    (13, 75, ("float", 0)), (13, 80, ("__half", 1)), (13, 86, ("__nv_bfloat16", 0)), (13, 89, ("float", None)),
    (13, 90, ("__half", 0)), (13, 100, ("__nv_bfloat16", 2)), (13, 120, ("float", 1)), (12, 60, ("__half", 0)),
    (12, 70, ("__nv_bfloat16", None)),
}  # fmt: skip
IS_ELU = re.compile(r"abn::(normalise|sums|gradient)<\w+, \d+, 1,")


def all_with_all():
    for major, archs in ARCHS.items():
        for arch in archs:
            for key in KEYS:
                name = f"{major}-sm_{arch}-{key[0].strip('_')}-{key[1]}"
                marks = [needs_13 if major == 13 else needs_12]
                if (major, arch, key) not in QUICK:
                    marks.append(pytest.mark.slow)
                yield pytest.param(major, arch, key, id=name, marks=marks)


@pytest.mark.skipif(sys.platform != "linux" or platform.machine() != "x86_64", reason="NVRTC 13 is not installed")
def test_the_compilers_are_there():
    """The development dependencies include the compilers' wheels where they exist, so that no test here is skipped."""
    assert nvrtc.wheels(12)
    assert nvrtc.wheels(13)


@pytest.mark.parametrize(("major", "arch", "key"), list(all_with_all()))
def test_compiles(major, arch, key):
    check_compiles(major, arch, key)


@needs_13
@pytest.mark.parametrize(("arch", "key"), [(75, ("__half", 0)), (90, ("float", 0)), (120, ("double", 2))], ids=str)
def test_accesses_are_wide(arch, key):
    """Kernels for wide accesses load and store tensors by 128 bits at once."""
    check_accesses_are_wide(arch, key)


@needs_13
@pytest.mark.parametrize("arch", [75, 120])
def test_as_cupy_compiles(arch):
    """With the options that CuPy adds, through its own compiler calls; only the query of the device is replaced."""
    pytest.importorskip("cupy", reason="cupy is not installed")
    from cupy._core import core
    from cupy.cuda import compiler

    names = tuple(kernel.expression for kernel in cupy_kernels.instances("__nv_bfloat16", None))
    options = (*core.assemble_cupy_compiler_options(("--std=c++17",)), "-ftz=true")
    answer = mock.patch.object(
        compiler, "_get_arch_for_options_for_nvrtc", lambda arch=None: (f"-arch=sm_{arch}", "cubin")
    )
    with answer:
        cubin, lowered = compiler.compile_using_nvrtc(
            cupy_kernels.source(), options=options, arch=str(arch), filename="abn.cu", name_expressions=names
        )
    assert cubin[:4] == b"\x7fELF"
    assert set(lowered) == set(names)


# ------------------------------------------------------------------------------------------- PTX on the emulator


@pytest.fixture(scope="session")
def recorded():
    """The most telling launches of each kernel, compiled by g++."""
    more = [case._replace(activation=ELU) for case in VARIED[:3]]
    return record(Launcher(), [*VARIED, *more], 4, 64)


@needs_13
@needs_compiler
def test_ptx_without_contraction_agrees_in_every_bit(recorded):
    """Two compilers and two paths through the emulator. Without ELU, because their maths libraries differ."""
    launches = [launch for launch in recorded if not IS_ELU.match(launch.kernel)]
    module = ptx_module(cupy_kernels.source(), replay.names(launches), 80, "-fmad=false", "-ftz=false")
    assert replay.replay(module, launches, exact=True) == []


@needs_13
@needs_compiler
@pytest.mark.parametrize("arch", [90, *(pytest.param(arch, marks=pytest.mark.slow) for arch in (75, 120))])
def test_ptx_agrees(arch, recorded):
    launches = [launch for launch in recorded if arch != 90 or IS_ELU.match(launch.kernel)]
    module = ptx_module(cupy_kernels.source(), replay.names(launches), arch)
    assert replay.replay(module, launches, exact=False, orders=(0, 7)) == []


@needs_13
@needs_compiler
@pytest.mark.parametrize("shape", [(2, 16, 16, 8), (3, 5, 7, 9)], ids=["wide", "narrow"])
def test_eight_passes(shape):
    """Forward and backward move every element 8 times, 12 times with a shortcut and its gradient. Counted, not timed.

    Statistics read x; normalise reads and writes it; sums read z and dz; gradient reads z and dz and writes dx.
    """
    size = torch.Size(shape).numel()
    wide = shape[1] % 8 == 0
    with installed(Launcher()):
        wanted = {
            kernel.expression
            for ctype in ("float", "__half")
            for key in ((ctype, 0), (ctype, None))
            for kernel in cupy_kernels.instances(*key)
            if kernel.arguments[1] in (SMALL_BLOCK, cupy_kernels.widest(ctype) if wide else 1)
            and "true" not in kernel.arguments[3:-2]
        }
    module = ptx_module(cupy_kernels.source(), sorted(wanted), 80)
    for dtype in (torch.float32, torch.float16):
        for channels_last in (False, True):
            for shortcut in (False, True):
                case = Case(dtype, shape, channels_last, LEAKY, "output", shortcut)
                x, dz, added, gamma, beta, *_ = selftest.inputs(case, torch.device("cpu"))
                counting = Counting(module, size)
                with installed(counting):
                    cupy_ops.forward(x, x, gamma, beta, None, None, 0.1, 1e-5, LEAKY, added)
                    dshortcut = torch.empty_like(x) if shortcut else None
                    cupy_ops.backward(x, dz, beta, gamma, LEAKY, added, None, gamma, dshortcut)
                once = size * x.element_size()
                more = int(shortcut)
                passes = {
                    "statistics": (1, 0), "merge_statistics": (0, 0), "normalise": (1 + more, 1),
                    "sums": (2 + more, 0), "merge_sums": (0, 0), "gradient": (2 + more, 1 + more),
                }  # fmt: skip
                for function, (loads, stores) in passes.items():
                    loaded, stored, accesses = counting.traffic[function]
                    assert (loaded, stored) == (loads * once, stores * once), (case, function)
                    width = 16 if wide else x.element_size()
                    assert accesses * width == loaded + stored, (case, function)
                total = sum(loaded + stored for loaded, stored, _ in counting.traffic.values())
                assert total == (8 + 4 * more) * once
