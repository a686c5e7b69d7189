"""Bugs seeded in the CUDA kernels of coded maps, as in test_kernels_mutants.py."""

import pytest

from segtrain.abn.backends import cupy_kernels
from tests.abn.cuda_emulator import emu
from tests.abn.cuda_emulator.bugs import ASAN, TSAN, UBSAN, WRONG, Bug, found_by
from tests.abn.cuda_emulator.launcher import Launcher
from tests.abn.cuda_emulator.launches import CODED_RACED, CODED_VARIED, record_codes

pytestmark = [pytest.mark.slow, pytest.mark.skipif(emu.COMPILER is None, reason="no C++ compiler")]

BUGS = [
    # ---- smallest and largest
    Bug("negative numbers in the order of positive ones", "return b >> 31 ? ~b : b | 0x80000000u;",
        "return b | 0x80000000u;", WRONG, "summarise|search"),
    Bug("the larger of two smallest", "a.low > b.low ? a.low : b.low", "a.low < b.low ? a.low : b.low", WRONG,
        "summarise|search"),
    Bug("each value in the place of the first", "take(w[LAST ? k : 0].ends,", "take(w[0].ends,", WRONG, "summarise"),
    Bug("all samples read the first", "const i64 start = share.sample *", "const i64 start = 0 *", WRONG, "search"),
    Bug("groups of samples mixed up", "sample = blockIdx.x / groups", "sample = blockIdx.x % groups", ASAN,
        "summarise|search"),
    Bug("all samples write one stripe", "part + share.sample * channels * gridDim.y", "part", TSAN, "summarise"),
    Bug("extremes of one range in another's place", "extremes[samples * channels + range]",
        "extremes[samples * range + channels]", ASAN, "merge_summaries"),
    Bug("moments of the last sample alone", "all = merge(all, w.moments)", "all = w.moments", WRONG, "merge_summaries"),
    Bug("all lanes write the extremes", "    if ((threadIdx.x & 31) != 0) continue;\n", "", TSAN, "merge_summaries"),
    # ---- ranges
    Bug("no cell borders at zero", "const bool both = low < S(0)", "const bool both = low > S(0)", WRONG,
        "map_ranges|merge_ranges"),
    Bug("the range of negative values as they are", "low *= low < S(0) ? below : S(1);", "", WRONG,
        "map_ranges|merge_ranges"),
    Bug("ranges without the shortcut's", "low += least, high += most;", "", WRONG, "map_ranges|merge_ranges"),
    Bug("a shortcut before its activation", "known.ranges[2 * count + i], top + S(1),",
        "known.ranges[2 * count + i], S(0) * top,", WRONG, "map_ranges|merge_ranges"),
    Bug("zero rounded down", "round_up(-low / step)", "round_down(-low / step)", WRONG, "map_ranges|merge_ranges"),
    Bug("another channel's scale", "range % channels", "range / channels", WRONG, "map_ranges"),
    Bug("more threads than ranges write", "  if (range >= count) return;\n", "", ASAN, "map_ranges", 0),
    # ---- codes
    Bug("a cell to the left", "u8((int)(cell < top ? cell : top))", "u8((int)(cell < top ? cell : top - S(1)))", WRONG,
        "encode"),
    Bug("rounded instead of cut off", "- origin[k]) * inverse[k])", "- origin[k]) * inverse[k] + S(0.5))", WRONG,
        "encode"),
    Bug("halves of a byte swapped", "k % 2 ? b.v[k / 2] >> 4 : b.v[k / 2] & 15",
        "k % 2 ? b.v[k / 2] & 15 : b.v[k / 2] >> 4", WRONG, "decode|coded"),
    Bug("the byte after a row's last", "(has(k + 1) ? cells.v[k + 1] << 4 : 0)", "(cells.v[k + 1] << 4)", WRONG,
        "encode"),
    Bug("rows of codes one byte short", "((u.length + 1) / 2)", "(u.length / 2)", WRONG, "encode|decode"),
    Bug("rows of codes overlap, as a race", "((u.length + 1) / 2)", "(u.length / 2)", TSAN, "encode"),
    Bug("values beyond the row's end are read", "has(k) ? p[at + k] :", "true ? p[at + k] :", ASAN,
        "encode|coded_gradient"),
    Bug("values beyond the row's end are written", "        if (has(k)) p[at + k] = v.v[k];",
        "        p[at + k] = v.v[k];", TSAN, "decode"),
    Bug("coefficients beyond the last channel", "p[channel + (k < count ? k : 0)]", "p[channel + k]", ASAN,
        "encode|coded_gradient"),
    Bug("sums beyond the last channel", "&& channel + k < channels", "&& channel < channels", ASAN, "coded_sums"),
    Bug("codes miss their alignment", "load<u8, VEC / 2>(codes + code)", "load<u8, VEC / 2>(codes + code + (VEC > 2))",
        UBSAN, "decode"),
    # ---- the walk
    Bug("ranges of the first sample for all", "return apart ? Base::plane : 0;", "return 0;", WRONG, "encode|decode"),
    Bug("the first sample's ranges are kept", "    if (next == sample) return;", "    if (sample >= 0) return;", WRONG,
        "decode|coded"),
    Bug("no carry from row to sample", "if (rest >= rows) rest -= rows, ++image;", "", WRONG, "decode|encode"),
    Bug("planes by the rounded length", "at = u.row() * u.length + first;",
        "at = u.row() * ((u.length + VEC - 1) / VEC * VEC) + first;", ASAN, "encode|decode"),
    # ---- arithmetic
    Bug("negative values coded as they are", "squeeze<ACT>(y, act)", "y", WRONG, "encode"),
    Bug("negative values rebuilt as coded", "w * S(2)", "w", WRONG, "decode|coded"),
    Bug("wide cells at every slope", "&& a.param <= S(0.5) && a.param >= S(-0.5)", "", WRONG, "encode|decode|coded"),
    Bug("the lower border of a cell", "S(0.5) - zero.v[k]", "S(0) - zero.v[k]", WRONG, "decode|coded"),
    Bug("the shortcut is not added", "if (shortcut) y += Stored<T>::up(s.v[k]);", "", WRONG, "search|encode", -1),
    Bug("a coded shortcut before its activation", "from.number == LEAKY_RELU ?", "from.number == -1 ?", WRONG, "coded"),
    Bug("a coded shortcut by the first sample's ranges", "y.enter(unit.sample(), from.ranges,",
        "y.enter(0, from.ranges,", WRONG, "coded"),
    Bug("the shortcut stays in xhat", "from ? t - Stored<T>::up(s.v[k]) : t", "t", WRONG, "coded", -1),
    Bug("the derivative at 0", "derivative_at_input<ACT>(t, act)", "derivative_at_input<ACT>(S(0), act)", WRONG,
        "coded", -1),
    Bug("the wrong mean of two", "per_value<N>(means + channels,", "per_value<N>(means,", WRONG, "coded_gradient"),
]  # fmt: skip


@pytest.fixture(scope="module")
def launches():
    launcher = Launcher()
    return {True: record_codes(launcher, CODED_RACED, 8), False: record_codes(launcher, CODED_VARIED, 4, 64)}


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.what)
def test_bug_in_codes_is_found(bug, launches, tmp_path):
    assert found_by(bug, cupy_kernels.text_of(8), launches[bug.found == TSAN], tmp_path) == bug.found
