"""Bugs seeded in the CUDA kernels: each must be found by the check for its kind."""

import multiprocessing

import pytest

from segtrain.abn.backends import cupy_kernels
from tests.abn.cuda_emulator import emu
from tests.abn.cuda_emulator.accesses import check_accesses_are_wide
from tests.abn.cuda_emulator.bugs import ASAN, FAULT, TSAN, UBSAN, WRONG, Bug, found_by
from tests.abn.cuda_emulator.huge import check_beyond_32_bits
from tests.abn.cuda_emulator.launcher import Launcher, installed
from tests.abn.cuda_emulator.launches import RACED, VARIED, record
from tests.abn.cuda_emulator.needs import needs_13

pytestmark = [pytest.mark.slow, pytest.mark.skipif(emu.COMPILER is None, reason="no C++ compiler")]
BUGS = [
    # ---- barriers and shuffles
    Bug("no barrier between warps and block", "  __syncthreads();\n", "", WRONG, "statistics"),
    Bug("no barrier between warps and block, as a race", "  __syncthreads();\n", "", TSAN, "statistics|sums"),
    Bug("no barrier between rows and column", "    __syncthreads();\n    if (y", "    if (y", TSAN, "statistics|sums"),
    Bug("one buffer instead of two", "shared[k & 1]", "shared[0]", TSAN, "statistics", -1),
    Bug("barrier for one warp only", "__syncthreads();\n  if (warp", "if (warp) __syncthreads();\n  if (warp", FAULT,
        "statistics"),
    Bug("threads without work leave before the barrier", "  typedef Moments<Wide<T>> W;\n",
        "  if (threadIdx.x == 5) return;\n  typedef Moments<Wide<T>> W;\n", FAULT, "statistics"),
    Bug("half of each warp leaves before the shuffle", "if (channel >= channels) return;",
        "if (channel >= channels || (threadIdx.x & 16)) return;", FAULT, "merge_statistics"),
    Bug("shuffle in a branch of half a warp", "  W w = warp_merge(mine[0]);",
        "  W w = mine[0];\n  if (lane < 16) w = warp_merge(w);", FAULT, "statistics"),
    Bug("shuffles start at 8", "distance = 16", "distance = 8", WRONG, "statistics"),
    Bug("all lanes write the stripe", "    if (lane == 0) part[", "    part[", TSAN, "statistics|sums"),
    Bug("all rows add up the column", "if (y == (k & (high - 1)) && channel", "if (channel", TSAN, "statistics|sums"),
    # ---- shared and global memory
    Bug("shared memory one warp short", "shared[WARPS];", "shared[WARPS - 1];", UBSAN, "statistics"),
    Bug("lanes without a warp read shared memory", "if (lane < WARPS) w =", "w =", UBSAN, "statistics"),
    Bug("the first warp's slot is never written", "if (lane == 0) shared[", "if (lane == 0 && warp) shared[",
        WRONG, "statistics"),
    Bug("one plane too many", "return plane < outer;", "return plane <= outer;", ASAN, "statistics"),
    Bug("one row too many", "&& row < outer", "&& row <= outer", ASAN, "statistics"),
    Bug("threads beyond the last channel work", "return channel < channels && ", "return ", ASAN, "statistics"),
    Bug("channels beyond the last one are written", "(k & (high - 1)) && channel + k < channels", "(k & (high - 1))",
        ASAN, "statistics"),
    Bug("stores miss their alignment", "store<T, VEC>(out + at, p)", "store<T, VEC>(out + at + (VEC > 1), p)", UBSAN,
        "normalise"),
    Bug("stripes overlap", "first = (i64)blockIdx.y * BLOCK", "first = (i64)blockIdx.y * (BLOCK - 1)", WRONG, "sums"),
    Bug("stripes overlap, as a race", "first = (i64)blockIdx.y * BLOCK", "first = (i64)blockIdx.y * (BLOCK - 1)", TSAN,
        "normalise|gradient"),
    # ---- the walk
    Bug("no carry from pack to plane", "if (pack >= packs) pack -= packs, ++plane;", "", ASAN, "normalise"),
    Bug("steps of another dimension of the grid", "step = (i64)gridDim.y * BLOCK", "step = (i64)gridDim.x * BLOCK",
        WRONG, "normalise"),
    Bug("rows by the wrong width of the block", "(threadIdx.x >> shift_x);", "(threadIdx.x >> 5);", WRONG, "normalise"),
    Bug("merge reads every stripe twice", "stripe += 32", "stripe += 16", WRONG, "merge"),
    # ---- arithmetic
    Bug("moments of a pack around its sum", "sum * (S(1) / VEC)", "sum", WRONG, "statistics"),
    Bug("division by one too few", "n = w[0].n + S(1)", "n = w[0].n + S(0.999)", WRONG, "statistics"),
    Bug("deviation from the unbiased variance", "w.m2 / S(count);", "w.m2 / S(count - 1.0);", WRONG,
        "merge_statistics"),
    Bug("running variance from the biased one", "S(count - 1.0) - running", "S(count) - running", WRONG,
        "merge_statistics"),
    Bug("the mean is not subtracted", "(Stored<T>::up(p.v[k]) - c[k]) * a[k]", "Stored<T>::up(p.v[k]) * a[k]", WRONG,
        "normalise"),
    Bug("shortcut not taken off", "added ? Stored<T>::up(shortcut.v[k]) : S(0)", "S(0)", WRONG, "sums|gradient"),
    Bug("derivative at the scale alone", "from_input<ACT>(v, g, scale[k], shift[k]",
        "from_input<ACT>(v, g, scale[k], S(0)", WRONG, "sums|gradient"),
    Bug("xhat without its center", "r.dy * (r.t - c[k])", "r.dy * r.t", WRONG, "sums"),
    Bug("xhat without its factor", "w[k].b *= i[k];", "w[k].b *= S(1);", WRONG, "sums"),
    Bug("the wrong mean", "means[channels + walk.channel + k]", "means[walk.channel + k]", WRONG, "gradient"),
    Bug("the shortcut gets dz", "through.v[k] = Stored<T>::down(r.dy)", "through.v[k] = g.v[k]", WRONG, "gradient"),
    Bug("half types cut off instead of rounded", "__half down(float v) { return __float2half_rn(v)",
        "__half down(float v) { return __float2half_rn(v * 0.9995f)", WRONG, "normalise"),
]  # fmt: skip


@pytest.fixture(scope="module")
def launches():
    launcher = Launcher()
    return {
        True: record(launcher, RACED, 8),
        False: record(launcher, VARIED, 4, 64),
    }


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.what)
def test_bug_is_found(bug, launches, tmp_path):
    assert found_by(bug, cupy_kernels.source(), launches[bug.found == TSAN], tmp_path) == bug.found


@pytest.mark.parametrize(
    ("old", "new", "layout"),
    [
        ("return (plane * channels + channel) * inner", "return (int)(plane * channels + channel) * (int)inner",
         (3, (1 << 20) + 1, 1024)),
        ("return row * channels + channel", "return (int)row * (int)channels + channel", (3, (1 << 30) + 4, 1)),
    ],
    ids=["planes", "rows"],
)  # fmt: skip
def test_narrow_index_is_found(old, new, layout, monkeypatch):
    """In a child process, because a narrow index leads to memory that does not exist."""
    text = cupy_kernels.source()
    assert old in text
    monkeypatch.setattr(cupy_kernels, "source", lambda: text.replace(old, new))
    launcher = Launcher()
    with installed(launcher):
        launcher.module(("float", 2))
    check = multiprocessing.get_context("fork").Process(target=check_beyond_32_bits, args=(layout, 1, launcher))
    check.start()
    check.join(60)
    assert check.exitcode not in (0, None)


@needs_13
def test_narrow_access_is_found(monkeypatch):
    text = cupy_kernels.source().replace("struct alignas(sizeof(T) * VEC) Pack", "struct Pack")
    monkeypatch.setattr(cupy_kernels, "source", lambda: text)
    with pytest.raises(AssertionError):
        check_accesses_are_wide(90, ("float", 0))
