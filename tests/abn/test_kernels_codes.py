"""The CUDA kernels of coded maps, run on the CPU by the emulator of test_kernels.py."""

import itertools
import math

import numpy as np
import pytest
import torch

from segtrain import abn
from segtrain.abn import coded_selftest, operators
from segtrain.abn.backends import aten as aten_ops
from segtrain.abn.backends import cupy as cupy_ops
from segtrain.abn.backends import cupy_codes, cupy_kernels
from segtrain.abn.backends import native as native_ops
from segtrain.abn.backends.codes import Coded, Composed, empty_codes
from segtrain.abn.coded_selftest import CodedCase, encoded
from segtrain.abn.selftest import ELU, IDENTITY, LEAKY, Case
from tests.abn.cuda_emulator import emu, replay
from tests.abn.cuda_emulator.huge import check_codes_beyond_32_bits
from tests.abn.cuda_emulator.launcher import Launcher, installed
from tests.abn.cuda_emulator.launches import CODED_RACED, CODED_VARIED, record_codes, sanitized

pytestmark = pytest.mark.skipif(emu.COMPILER is None, reason="no C++ compiler")
# Each module takes seconds to build: these in the quick tests, all of them in the slow ones.
QUICK = {
    (torch.float32, LEAKY, 8), (torch.float32, LEAKY, 4), (torch.float16, ELU, 8), (torch.bfloat16, IDENTITY, 4),
}  # fmt: skip
native_works = pytest.mark.skipif(bool(native_ops.available()), reason="no C++ compiler")


@pytest.fixture(scope="session")
def launcher():
    return Launcher()


@pytest.fixture
def emulated(launcher):
    with installed(launcher):
        yield launcher
        launcher.orders, launcher.recorded = (0, 1, 7), None


@pytest.fixture
def as_cpu_backend(emulated, monkeypatch):
    """The operators run the CUDA kernels on CPU tensors."""
    monkeypatch.setattr(operators, "resolved", {"cpu": cupy_ops})
    return emulated


def all_cases():
    for what in coded_selftest.coded_cases():
        quick = (what.case.dtype, what.case.activation, what.bits) in QUICK
        yield pytest.param(what, id=str(what), marks=[] if quick else [pytest.mark.slow])
    for dtype, activation, bits in sorted(QUICK, key=str):  # every form of the modules that are there anyway
        for last, shortcut in ((False, False), (False, True), (True, False), (True, True)):
            for shape in ((2, 8, 9, 16), (2, 5, 9, 9)):
                what = CodedCase(Case(dtype, shape, last, activation, shortcut=shortcut), bits)
                yield pytest.param(what, id=str(what))


def maps(shape, dtype=torch.float32):
    """Random numbers in every memory layout of the shape."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3 + 0.5
    yield x.to(dtype)
    if len(shape) == 4:
        yield x.to(dtype).contiguous(memory_format=torch.channels_last)


# ------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("what", list(all_cases()))
def test_coded_numbers(what, launcher):
    """Against float64. Every launch runs in three thread orders, which must agree in every bit."""
    with installed(launcher, 16 if what.case.shape[1] < 3 else 4):
        failed = [str(result) for result in coded_selftest.check_coder(cupy_codes, "cpu", [what]) if not result.good]
    assert not failed, failed


def test_coded_selftest_sees_wrong_numbers():
    """A decoder that is off by a cell, and one that loses signs."""

    class Wrong(Composed):
        def decode(self, coded, dtype, activation):
            return super().decode(coded._replace(codes=coded.codes ^ 1), dtype, activation)

    what = CodedCase(Case(torch.float32, (2, 3, 4, 4), False, LEAKY), 8)
    failed = [r.what for r in coded_selftest.check_coder(Wrong(aten_ops), "cpu", [what]) if not r.good]
    assert "distance of y in 8 bits, in half cells" in failed


@pytest.mark.parametrize("coder", ["cupy", "native", "aten"])
def test_degenerate_maps(coder, emulated):
    if coder == "native" and native_ops.available():
        pytest.skip("no C++ compiler")
    found = abn.coded_operators.coder_of(operators.BACKENDS[coder])
    failed = [str(result) for result in coded_selftest.check_degenerate(found, "cpu") if not result.good]
    assert not failed, failed


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4), (0, 5)], ids=str)
@pytest.mark.parametrize("bits", [8, 4])
def test_empty_maps(shape, bits, emulated):
    emulated.seen.clear()
    x, one = torch.empty(shape), torch.ones(shape[1])
    statistics, extremes = cupy_codes.statistics_extremes(x, bits)
    assert not statistics.any() and not extremes.any()
    coded = encoded(cupy_codes, x, x, one, one, LEAKY, None, bits, extremes)
    assert not coded.ranges.any()
    assert cupy_codes.decode(coded, x.dtype, LEAKY).shape == shape
    dx, sums = cupy_codes.coded_backward(coded, x, one, one, LEAKY, None, one, None)
    assert dx.shape == shape and sums.equal(torch.zeros(2, shape[1]))
    assert not emulated.seen


@native_works
@pytest.mark.parametrize("shape", [(2, 5, 17, 9), (2, 4, 8, 12), (3, 7, 5, 5), (6, 10)], ids=str)
@pytest.mark.parametrize("bits", [8, 4])
def test_all_back_ends_write_the_same_codes(shape, bits, emulated):
    """Where y = x, so that how its products are rounded does not matter. Zeros, signs and cell borders included."""
    one = torch.ones(shape[1])
    for x in maps(shape):
        x[0, 0].view(-1)[:2] = torch.tensor([0.0, -0.0])[: x[0, 0].numel()]
        x[:, 1] = x[:, 1].round()
        found = [
            encoded(coder, x, torch.empty_like(x), one, one * 0, IDENTITY, None, bits)
            for coder in (cupy_codes, native_ops, Composed(aten_ops))
        ]
        for other in found[1:]:
            assert other.codes.equal(found[0].codes)
            torch.testing.assert_close(other.ranges, found[0].ranges, rtol=2e-7, atol=0)
        for dtype in (torch.float32, torch.bfloat16):
            decoded = [coder.decode(found[0], dtype, LEAKY) for coder in (cupy_codes, native_ops)]
            torch.testing.assert_close(*decoded, rtol=1e-6 if dtype == torch.float32 else 0.008, atol=1e-6)


def every_grid(x, run):
    """What `run` gives for x as it is and misaligned, for few and for many blocks."""
    found = []
    for blocks, offset in ((1, 0), (5, 1), (300, 0)):
        memory = torch.empty(x.numel() + 8, dtype=x.dtype)[offset:][: x.numel()]
        with installed(shared_launcher, blocks):
            found.append(run(memory.as_strided(x.shape, x.stride()).copy_(x)))
    return found


shared_launcher = Launcher()
shared_launcher.orders = (0,)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", [(3, 8, 16, 12), (3, 5, 9, 11)], ids=["wide", "narrow"])
def test_no_grid_changes_a_bit(shape, bits):
    """Ranges, codes, z, rebuilt z and dx depend on neither grid, nor width of accesses, nor layout."""
    scale, shift = torch.linspace(-1.5, 2, shape[1]), torch.linspace(-1, 1, shape[1])
    means = torch.linspace(-1, 1, 2 * shape[1]).view(2, -1)
    results = []
    for x in maps(shape):
        for with_shortcut in (False, True):

            def run(x, with_shortcut=with_shortcut):
                shortcut = x.flip(0).contiguous(memory_format=memory_format(x)) if with_shortcut else None
                z = torch.empty_like(x)
                coded = encoded(cupy_codes, x, z, scale, shift, LEAKY, shortcut, bits)
                back = cupy_codes.decode(coded, x.dtype, LEAKY)
                dshortcut = torch.empty_like(x)
                arguments = coded, x, shift, scale, LEAKY, shortcut, scale, means, dshortcut
                dx = cupy_codes.coded_gradient(*arguments)
                return with_shortcut, [coded.ranges, z, back, dx, dshortcut], coded.codes

            found = every_grid(x, run)
            assert all(other[2].equal(found[0][2]) for other in found)
            results += found
    for with_shortcut, tensors, _ in results:
        first = next(other for added, other, _ in results if added == with_shortcut)
        assert all(one.equal(other) for one, other in zip(tensors, first, strict=True))


def memory_format(x):
    return torch.contiguous_format if x.is_contiguous() else torch.channels_last


@pytest.mark.parametrize("shape", [(3, 8, 16, 12), (3, 5, 9, 11), (6, 10)], ids=str)
def test_extremes_leave_the_moments_alone(shape, emulated):
    """In 8 bits mean and variance are those of `statistics` in every bit. In 4 bits no stripe crosses samples."""
    for x in maps(shape, torch.float16):
        want = cupy_ops.statistics(x)
        assert cupy_codes.statistics_extremes(x, 8)[0].equal(want)
        torch.testing.assert_close(cupy_codes.statistics_extremes(x, 4)[0], want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
def test_no_nan_is_lost(bad, emulated):
    """A minimum of numbers and nan may be either: both signs of nan, alone in its plane and first or last in it."""
    x = torch.randn(2, 4, 8, 8)
    value = torch.tensor(bad)
    if math.isnan(bad):
        value = torch.tensor([0x7FC00000 if math.copysign(1, bad) > 0 else -0x400000], dtype=torch.int32)
        value = value.view(torch.float32)[0]
    x[0, 0, 0, 0], x[0, 1, 7, 7], x[0, 2] = value, value, value
    one = torch.ones(4)
    for y, bits in itertools.product((x, x.contiguous(memory_format=torch.channels_last)), (8, 4)):
        _, extremes = cupy_codes.statistics_extremes(y, bits)
        for ends in (None, extremes):
            coded = encoded(cupy_codes, y, torch.empty_like(y), one, one * 0, LEAKY, None, bits, ends)
            back = cupy_codes.decode(coded, torch.float32, LEAKY)
            assert back[0, :3].isnan().all() and back[0, 3].isfinite().all()
            assert back[1].isfinite().all() if bits == 4 else back[1, :3].isnan().all()


def test_what_a_half_type_rounds_away_is_in_the_codes(emulated):
    """y beyond float16 comes back infinite, not nan; where ELU's z is -alpha, its derivative is still that at y."""
    x = torch.linspace(-4, 4, 64).view(1, 1, 8, 8).half().repeat(2, 2, 1, 1)
    scale = torch.tensor([1e5, 4.0])
    z = torch.empty_like(x)
    coded = encoded(cupy_codes, x, z, scale, scale * 0, LEAKY, None, 8)
    back = cupy_codes.decode(coded, torch.float16, LEAKY)
    assert z[:, 0].isinf().any() and back.isinf().equal(z.isinf()) and not back.isnan().any()
    coded = encoded(cupy_codes, x, z, scale, scale * 0, ELU, None, 8)
    assert (z[:, 1] == -1).any()
    dshortcut = torch.empty_like(x)
    one = torch.ones(2)
    arguments = coded, torch.full_like(x, 1000.0), one * 0, one, ELU, x * 0, one, torch.zeros(2, 2), dshortcut
    cupy_codes.coded_gradient(*arguments)
    y = cupy_codes.decode(coded, torch.float32, IDENTITY).double()[:, 1]
    want = torch.where(y > 0, 1000.0, 1000 * y.exp())
    torch.testing.assert_close(dshortcut[:, 1].double(), want, rtol=1e-3, atol=1e-4)
    assert dshortcut[:, 1].min() > 0


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    ("layout", "stripes"),
    [((3, (1 << 20) + 1, 1024), 1), ((3, 1, (1 << 30) + 64), 65535), (((1 << 23) + 3, 512, 1), 65535)],
    ids=["many planes", "large planes", "many rows"],
)
def test_codes_beyond_32_bits(layout, stripes, bits, launcher):
    check_codes_beyond_32_bits(layout, stripes, bits, launcher)


# ------------------------------------------------------------------------------------------------- in the layer


@pytest.mark.parametrize("shape", [(2, 4, 8, 8), (2, 5, 9, 9)], ids=str)
@pytest.mark.parametrize("with_shortcut", [False, True])
@pytest.mark.parametrize("keep", ["8bit", "4bit"])
def test_layer_by_the_kernels(keep, with_shortcut, shape, as_cpu_backend, monkeypatch):
    """The layer gives what it gives on the CPU, and launches no search of ranges where the statistics find them."""
    gradients = []
    for backend in ("cupy", "aten"):
        monkeypatch.setitem(operators.resolved, "cpu", operators.BACKENDS[backend])
        torch.manual_seed(0)
        layer = abn.InPlaceABN(shape[1], keep=keep)
        torch.nn.init.uniform_(layer.weight, 0.5, 1.5)
        x, shortcut, dz = (torch.randn(shape, requires_grad=True) for _ in range(3))
        as_cpu_backend.seen.clear()
        with abn.recomputed_outputs():
            z = layer(x * 1, shortcut if with_shortcut else None)
            again = torch.nn.functional.conv2d(z, torch.ones(2, shape[1], 1, 1, requires_grad=True))
        again.backward(dz[:, :2].detach())
        gradients.append([z.detach(), x.grad, layer.weight.grad, layer.bias.grad, layer.running_var])
        if backend == "cupy":
            names = [kernel.function for kernel, _ in as_cpu_backend.seen]
            search = ["statistics", "merge_statistics", "search", "merge_ranges"]
            start = search if with_shortcut else ["summarise", "merge_summaries", "map_ranges"]
            assert names == [*start, "encode", "decode", "coded_sums", "merge_sums", "coded_gradient"]
    for one, other in zip(*gradients, strict=True):
        # A value on the border of two cells may be in either, by the rounding of y.
        torch.testing.assert_close(one, other, rtol=1e-2 if keep == "8bit" else 0.15, atol=1e-2)
    assert gradients[0][0].sub(gradients[1][0]).abs().max() < 1e-5


@pytest.mark.parametrize("keep", ["8bit", "4bit"])
def test_residual_block_by_the_kernels(keep, as_cpu_backend, monkeypatch):
    """Its shortcut is read from its codes: two maps are rebuilt, for the two convolutions that read them. Their ranges
    bound it."""
    found = []
    for backend in ("cupy", "aten"):
        monkeypatch.setitem(operators.resolved, "cpu", operators.BACKENDS[backend])
        torch.manual_seed(0)
        layers = [torch.nn.Conv2d(3, 4, 1), torch.nn.Conv2d(4, 4, 1), torch.nn.Conv2d(4, 2, 1)]
        norms = [abn.InPlaceABN(4, keep=keep) for _ in range(2)]
        as_cpu_backend.seen.clear()
        with abn.recomputed_outputs():
            z = norms[0](layers[0](torch.randn(2, 3, 8, 8)))
            out = layers[2](norms[1](layers[1](z), z))
            del z
        out.pow(2).sum().backward()
        found.append(torch.cat([p.grad.flatten() for layer in (*layers, *norms) for p in layer.parameters()]))
        if backend == "cupy":
            names = [kernel.function for kernel, _ in as_cpu_backend.seen]
            assert names.count("decode") == names.count("coded_gradient") == 2
            assert "search" not in names, "the ranges of the sum come from those of what is added"
    assert (found[0] - found[1]).norm() <= (0.005 if keep == "8bit" else 0.05) * found[1].norm()


def test_what_codes_is_printed(monkeypatch):
    monkeypatch.setattr(operators, "resolved", {"cuda": cupy_ops, "cpu": native_ops, "mps": aten_ops})
    said = [abn.coded_operators.describe_coder(device) for device in ("cuda", "cpu", "mps")]
    assert said == ["cupy kernels", "native kernels", "torch's operations"]


@pytest.mark.parametrize("bits", [8, 4])
def test_warm_up_runs_every_kernel_of_codes(bits, emulated):
    emulated.seen.clear()
    emulated.orders = (0,)
    cupy_codes.warm_up_codes(bits, (torch.float32,), ("leaky_relu",), "cpu")
    ran = {kernel for kernel, _ in emulated.seen if kernel.function != "merge_sums"}
    assert ran == {
        *cupy_kernels.instances("float", 0, bits), *cupy_kernels.instances("float", None, cupy_kernels.SEARCHES),
    }  # fmt: skip


def test_rows_of_4_bit_codes_end_with_their_byte(emulated):
    """Planes of an odd number of values: the upper half of a row's last byte is 0, whatever was there."""
    x = torch.full((1, 2, 1, 3), 5.0)
    x[..., 0] = -5
    codes, ranges = empty_codes(x, 4)
    codes.fill_(255)
    one = torch.ones(2)
    cupy_codes.encode(x, x, codes, ranges, one, one * 0, IDENTITY, None, 4)
    assert codes.tolist() == [[0xF0, 0x0F]] * 2
    coded = Coded(codes, ranges, 4, [1, 2, 1, 3], [6, 3, 3, 1])
    assert np.allclose(cupy_codes.decode(coded, torch.float32, IDENTITY)[0, 0, 0], [-5, 5, 5], atol=0.4)


# --------------------------------------------------------------------------------------------------- sanitizers


@pytest.mark.parametrize("sanitizer", ["ubsan", "asan", "tsan"])
def test_sanitizers_on_codes(sanitizer, launcher, tmp_path):
    text, launches = tmp_path / "text", tmp_path / "launches"
    text.write_text(cupy_kernels.text_of(8))
    chosen = (CODED_RACED, 8) if sanitizer == "tsan" else (CODED_VARIED, 4, 64)
    replay.save(record_codes(launcher, *chosen), launches)
    done = sanitized(sanitizer, text, launches)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout == "OK\n"
