"""The CUDA kernels of coded maps, compiled by NVIDIA's compiler as in test_kernels_nvrtc.py."""

import re

import pytest
import torch

from segtrain.abn import selftest
from segtrain.abn.backends import cupy_codes, cupy_kernels
from segtrain.abn.backends.codes import KnownRanges
from segtrain.abn.coded_selftest import CodedCase, affine_of, coded_shortcut, encoded
from segtrain.abn.selftest import LEAKY, Case
from tests.abn.cuda_emulator import replay
from tests.abn.cuda_emulator.accesses import check_accesses_are_wide
from tests.abn.cuda_emulator.counting import Counting, check_compiles, ptx_module
from tests.abn.cuda_emulator.launcher import SMALL_BLOCK, Launcher, installed
from tests.abn.cuda_emulator.launches import CODED_VARIED, record_codes
from tests.abn.cuda_emulator.needs import needs_12, needs_13, needs_compiler

ARCHS = {13: (75, 80, 86, 89, 90, 100, 120), 12: (60, 70, 75, 80, 86, 89, 90)}
KEYS = [
    *((ctype, None, cupy_kernels.SEARCHES) for ctype in cupy_kernels.TYPES.values()),
    *((ctype, act, bits) for ctype in cupy_kernels.TYPES.values() for act in (0, 1, 2) for bits in (8, 4)),
]
QUICK = {
    (13, 75, ("float", 0, 8)), (13, 90, ("__half", None, 1)), (13, 100, ("double", 1, 8)),
    (13, 120, ("__nv_bfloat16", 1, 4)), (12, 60, ("__half", 0, 8)),
}  # fmt: skip
IS_ELU = re.compile(r"abn::\w+<\w+, \d+, \w+, 1,")


def all_with_all():
    for major, archs in ARCHS.items():
        for arch in archs:
            for key in KEYS:
                marks = [needs_13 if major == 13 else needs_12]
                if (major, arch, key) not in QUICK:
                    marks.append(pytest.mark.slow)
                name = f"{major}-sm_{arch}-{key[0].strip('_')}-{key[1]}-{key[2]}"
                yield pytest.param(major, arch, key, id=name, marks=marks)


@pytest.mark.parametrize(("major", "arch", "key"), list(all_with_all()))
def test_codes_compile(major, arch, key):
    check_compiles(major, arch, key)


@needs_13
@pytest.mark.parametrize(("arch", "key"), [(90, ("__half", 0, 4)), (120, ("float", 1, 8))], ids=str)
def test_accesses_to_coded_maps_are_wide(arch, key):
    check_accesses_are_wide(arch, key)


@pytest.fixture(scope="module")
def recorded():
    return record_codes(Launcher(), CODED_VARIED, 4, 64)


@needs_13
@needs_compiler
def test_ptx_of_codes_agrees(recorded):
    """In every bit where products are not contracted, as g++ leaves them."""
    module = ptx_module(cupy_kernels.text_of(8), replay.names(recorded), 80, "-fmad=false", "-ftz=false")
    assert replay.replay(module, recorded, exact=True) == []


@needs_13
@needs_compiler
@pytest.mark.parametrize("arch", [90, *(pytest.param(arch, marks=pytest.mark.slow) for arch in (75, 120))])
def test_contraction_changes_no_code(arch, recorded):
    """As it is compiled for devices: codes and ranges are the same in every bit, and the rest within rounding."""
    chosen = [launch for launch in recorded if arch != 90 or re.search("encode|map_ranges|search|merge", launch.kernel)]
    module = ptx_module(cupy_kernels.text_of(8), replay.names(chosen), arch)
    assert replay.replay(module, chosen, exact=False, orders=(0, 7)) == []
    deciding = [launch for launch in chosen if re.search("map_ranges|search|merge_ranges", launch.kernel)]
    assert deciding and replay.replay(module, deciding, exact=True) == []


@needs_13
@needs_compiler
@pytest.mark.parametrize(
    "shape", [pytest.param((2, 16, 16, 8), id="wide"), pytest.param((3, 5, 7, 11), id="narrow", marks=pytest.mark.slow)]
)
def test_passes_of_coded_maps(shape):
    """Forward, rebuilding and backward move a map 8 times in float32 with 8 bits, or in half precision with 4; 9 times
    in half precision with 8 bits. A shortcut and its gradient: 2 more, and 2 to find the ranges and 2 to read the
    shortcut in backward, or 2 for its codes, whose ranges are known. So layers with a coded one move 10.5, 12 and 10.5.
    Counted, not timed.

    A row of 4-bit codes ends with a byte of its own, which is not counted as more here.
    """
    size = torch.Size(shape).numel()
    wide = shape[1] % 8 == 0
    keys = [(ctype, act, bits) for ctype, bits in (("float", 8), ("__half", 8), ("__half", 4)) for act in (0, None)]
    with installed(Launcher()):
        wanted = {
            kernel.expression
            for key in keys
            for kernel in cupy_kernels.instances(*key)
            if kernel.arguments[1] in (SMALL_BLOCK, cupy_kernels.widest(key[0]) if wide else 1)
            or (not wide and kernel.arguments[2] == "false")
        }
        wanted |= {kernel.expression for kernel in cupy_kernels.instances("float", None) if "sums" in kernel.function}
    module = ptx_module(cupy_kernels.text_of(8), sorted(wanted), 80)
    most = {(torch.float32, 8): 8, (torch.float16, 8): 9, (torch.float16, 4): 8}
    for (dtype, bits), bar in most.items():
        for channels_last in (False, True):
            for shortcut in (None, "map", "codes"):
                case = Case(dtype, shape, channels_last, LEAKY, "output", shortcut is not None)
                given = selftest.inputs(case, torch.device("cpu"))
                x, dz, added, gamma, beta, *_ = given
                scale, shift = affine_of(given)
                with installed(Counting(module, size)):
                    kept = coded_shortcut(cupy_codes, CodedCase(case, bits), given) if shortcut == "codes" else added
                counting = Counting(module, size)
                with installed(counting):
                    _, extremes = cupy_codes.statistics_extremes(x, bits)
                    ends = None if shortcut == "map" else extremes
                    known = KnownRanges(*kept[1:]) if shortcut == "codes" else None
                    coded = encoded(cupy_codes, x, x, scale, shift, LEAKY, added, bits, ends, known)
                    cupy_codes.decode(coded, dtype, LEAKY)
                    dshortcut = torch.empty_like(x) if shortcut else None
                    cupy_codes.coded_backward(coded, dz, beta, gamma, LEAKY, kept, gamma, dshortcut)
                once, codes, more = size * x.element_size(), coded.codes.numel(), int(shortcut is not None)
                full, both = int(shortcut == "map"), 1 + (shortcut == "codes")
                passes = {
                    "summarise": (1, 0, 0), "encode": (1 + more, 1, 1), "decode": (0, 1, 1),
                    "coded_sums": (1 + full, 0, both), "coded_gradient": (1 + full, 1 + more, both),
                    **({"search": (2, 0, 0)} if shortcut == "map" else {}),
                }  # fmt: skip
                for function, (loads, stores, coded_too) in passes.items():
                    loaded, stored, accesses = counting.traffic[function]
                    assert loaded + stored == (loads + stores) * once + coded_too * codes, (case, bits, function)
                    if wide:
                        values = 16 // x.element_size()
                        assert accesses * values == (loads + stores + coded_too) * size, (case, bits, function)
                total = sum(loaded + stored for loaded, stored, _ in counting.traffic.values())
                assert set(counting.traffic) - set(passes) <= {
                    "merge_summaries",
                    "map_ranges",
                    "merge_ranges",
                    "merge_sums",
                }
                assert total == (7 + 2 * more + 4 * full) * once + (2 + 2 * both) * codes
                if wide:
                    assert total == {None: bar, "map": bar + 6, "codes": bar + 2 + 2 * (bar - 7) / 4}[shortcut] * once
