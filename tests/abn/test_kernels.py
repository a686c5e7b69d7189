"""The CUDA kernels, run on the CPU by an emulator, with the launches that cupy_ops makes on a device."""

import os
import sys
import types

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from segtrain.abn import selftest
from segtrain.abn.backends import aten as aten_ops
from segtrain.abn.backends import cupy as cupy_ops
from segtrain.abn.backends import cupy_kernels, cupy_launch
from segtrain.abn.selftest import IDENTITY, LEAKY, Case
from tests.abn.cuda_emulator import emu, replay
from tests.abn.cuda_emulator.huge import check_beyond_32_bits
from tests.abn.cuda_emulator.launcher import Launcher, installed
from tests.abn.cuda_emulator.launches import RACED, VARIED, record, sanitized

pytestmark = pytest.mark.skipif(emu.COMPILER is None, reason="no C++ compiler")


@pytest.fixture(scope="session")
def launcher():
    return Launcher()


@pytest.fixture
def emulated(launcher):
    with installed(launcher):
        yield launcher
        launcher.orders, launcher.only_block, launcher.recorded = (0, 1, 7), -1, None


# ------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("case", list(selftest.cases()), ids=str)
def test_numbers(case, launcher):
    """Against float64. Every launch runs in three thread orders, which must agree in every bit."""
    with installed(launcher, 64 if case.shape[1] == 1 else 4):
        failed = [str(result) for result in selftest.check_backend(cupy_ops, "cpu", [case]) if not result.good]
    assert not failed, failed


def test_selftest_sees_wrong_numbers():
    class Wrong:
        def __getattr__(self, name):
            return getattr(aten_ops, name)

        def statistics(self, x):
            return aten_ops.statistics(x) * (1 + 1e-4)

    case = Case(torch.float32, (2, 3, 4, 4), False, LEAKY)
    failed = [r.what for r in selftest.check_backend(Wrong(), "cpu", [case]) if not r.good]
    assert failed == ["mean", "variance"]


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4), (0, 5)], ids=str)
def test_empty(shape, emulated):
    x = torch.empty(shape)
    vector = torch.ones(shape[1])
    emulated.seen.clear()
    assert cupy_ops.statistics(x).equal(torch.zeros(2, shape[1]))
    cupy_ops.normalise(x, x, vector, vector, LEAKY, None)
    assert cupy_ops.sums(x, x, vector, vector, LEAKY, None, None).equal(torch.zeros(2, shape[1]))
    means = torch.zeros(2, shape[1])
    assert cupy_ops.gradient(x, x, vector, vector, LEAKY, None, None, vector, means, None).shape == shape
    assert not emulated.seen


@settings(max_examples=40, deadline=None)
@given(
    outer=st.integers(1, 5), channels=st.integers(1, 40), inner=st.integers(1, 70), last=st.booleans(),
    blocks=st.integers(1, 200), dtype=st.sampled_from([torch.float32, torch.float16]),
)  # fmt: skip
def test_every_element_once(outer, channels, inner, last, blocks, dtype):
    """A kernel that doubles in place: an element visited twice is quadrupled, one that is missed is unchanged."""
    x = torch.arange(outer * channels * inner).view(outer, channels, inner, 1).remainder(500).to(dtype)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    want = x * 2
    mean, count = x.double().mean((0, 2, 3)), outer * inner
    vector = torch.full((channels,), 2.0)
    shared_launcher.orders = (7,)
    with installed(shared_launcher, blocks):
        cupy_ops.normalise(x, x, vector, vector * 0, IDENTITY, None)
        found = cupy_ops.statistics(x)
        sums = cupy_ops.sums(x, x, vector * 0, vector, IDENTITY, None, None)
    assert x.equal(want)
    torch.testing.assert_close(found[0].double(), mean * 2, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(sums[0].double(), mean * 2 * count, rtol=1e-5, atol=1e-3)


shared_launcher = Launcher()  # hypothesis allows no fixture of a function's scope


def test_running_statistics_in_strided_memory(emulated):
    x, gamma = torch.randn(4, 3, 5, 5), torch.ones(3)
    strided = torch.zeros(2, 6)[:, ::2]
    dense = torch.zeros(2, 3)
    for running in (strided, dense):
        cupy_ops.forward(x, torch.empty_like(x), gamma, gamma, running[0], running[1], 0.1, 1e-5, LEAKY, None)
    assert strided.equal(dense)
    assert dense.abs().min() > 0


def test_halves_round_as_torch_does():
    """All bit patterns from half to float; all halfway cases and 200,000 others from float to half."""
    text = """
#include <cuda_fp16.h>
#include <cuda_bf16.h>
__global__ void up(const __half* h, const __nv_bfloat16* b, float* fh, float* fb) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  fh[i] = __half2float(h[i]), fb[i] = __bfloat162float(b[i]);
}
__global__ void down(const float* f, __half* h, __nv_bfloat16* b, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) h[i] = __float2half_rn(f[i]), b[i] = __float2bfloat16_rn(f[i]);
}
"""
    module = emu.from_text(text, ["up", "down"])
    patterns = torch.arange(65536).to(torch.uint16)
    h, b = patterns.view(torch.float16), patterns.view(torch.bfloat16)
    fh, fb = torch.empty(65536), torch.empty(65536)
    module.launch("up", (256, 1), 256, (h.data_ptr(), b.data_ptr(), fh.data_ptr(), fb.data_ptr()))
    torch.testing.assert_close(fh, h.float(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(fb, b.float(), rtol=0, atol=0, equal_nan=True)
    random = torch.randint(-(2**31), 2**31 - 1, (200_000,), generator=torch.Generator().manual_seed(0))
    halfway = [(v[:-1].double() / 2 + v[1:].double() / 2).float() for v in (fh, fb)]
    f = torch.cat([random.to(torch.int32).view(torch.float32), fh, *halfway, torch.tensor([65519.996, 65520.0, 6e-8])])
    h, b = torch.empty(len(f), dtype=torch.float16), torch.empty(len(f), dtype=torch.bfloat16)
    module.launch("down", (-(-len(f) // 256), 1), 256, (f.data_ptr(), h.data_ptr(), b.data_ptr(), np.int32(len(f))))
    torch.testing.assert_close(h, f.half(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(b, f.bfloat16(), rtol=0, atol=0, equal_nan=True)


# ----------------------------------------------------------------------------------------------------- geometry


def test_geometry():
    """Wide accesses if the layout and all addresses allow them, and stripes for tensors of few channels."""
    aligned, shifted = torch.empty(2, 16, 8, 8), torch.empty(2 * 16 * 64 + 1)[1:].view(2, 16, 8, 8)
    assert aligned.data_ptr() % 16 == 0
    assert cupy_ops.geometry(aligned).vec == 4
    assert cupy_ops.geometry(aligned, None, shifted).vec == 1
    assert cupy_ops.geometry(aligned.half()).vec == 8
    assert cupy_ops.geometry(torch.empty(2, 16, 7, 9)).vec == 1
    last = torch.empty(2, 16, 7, 9).contiguous(memory_format=torch.channels_last)
    assert cupy_ops.geometry(last)[:3] == (4, True, (1, 2))  # 4 threads wide, 64 high, 126 rows
    assert cupy_ops.geometry(torch.empty(2, 4096, 8, 8)).grid == (4096, 1)
    assert cupy_ops.geometry(torch.empty(8, 3, 512, 512)).grid == (3, 32)  # chains of 64 at most
    huge = torch.empty(4, 3, 2**33, dtype=torch.float16, device="meta")
    assert cupy_ops.geometry(huge).grid == (3, 65535)


@pytest.mark.parametrize(
    ("layout", "stripes"),
    [
        ((3, (1 << 20) + 1, 1024), 1), ((3, 1, (1 << 30) + 64), 65535), (((1 << 23) + 3, 512, 1), 65535),
        ((3, (1 << 30) + 4, 1), 1),
    ],
    ids=["many planes", "large planes", "many rows", "long rows"],
)  # fmt: skip
def test_beyond_32_bits(layout, stripes, launcher):
    """Tensors of 3 * 2^30 elements and more; only the last block of the grid runs."""
    check_beyond_32_bits(layout, stripes, launcher)


# -------------------------------------------------------------------------------------------------- the launches


def test_arguments_are_checked(emulated):
    x, part = torch.zeros(2, 3, 4, 4), torch.zeros(3, 1, 3)
    kernel = cupy_kernels.over_tensors("statistics", "float", 4, False)
    shape = np.int64(2), np.int64(3), np.int64(16), np.int32(0)
    cupy_ops.launch(kernel, (3, 1), 64, (x, part, *shape))
    for bad in (
        (x, part, *shape[:3]),
        (x, part, np.int32(2), *shape[1:]),
        (x, part, np.float64(2), *shape[1:]),
        (x, np.int64(2), *shape),
        (x, part, *shape[:3], 2.0),
    ):
        with pytest.raises(TypeError):
            cupy_ops.launch(kernel, (3, 1), 64, bad)
    for grid in ((3, 65536), (0, 1)):
        with pytest.raises(emu.Fault, match="no device takes"):
            cupy_ops.launch(kernel, grid, 64, (x, part, *shape))


@pytest.mark.parametrize("name", ["leaky_relu", "elu"])
def test_warm_up_runs_every_kernel(name, emulated):
    emulated.seen.clear()
    emulated.orders = (0,)
    cupy_ops.warm_up((torch.float16,), (name,), "cpu")
    ran = {kernel for kernel, _ in emulated.seen}
    act = aten_ops.CODES.index(name)
    assert ran == {*cupy_kernels.instances("__half", act), *cupy_kernels.instances("__half", None)}


@pytest.mark.parametrize("current", [True, False])
def test_device_launch(current, launcher, monkeypatch):
    """The launch for devices, with the calls of CuPy 14 and the emulator behind them."""
    log: list[object] = []

    class Stream:
        def __init__(self, pointer):
            self.pointer = pointer

        @classmethod
        def from_external(cls, other):
            return cls(other.__cuda_stream__()[1])

        def __enter__(self):
            log.append(self.pointer)

        def __exit__(self, *_):
            log.append("left")

    class RawModule:
        def __init__(self, code, options, name_expressions):
            assert options == ("--std=c++17",)
            self.module = emu.from_text(code, list(name_expressions))

        def get_function(self, name):
            def kernel(grid, block, args):
                assert log[-1] == 7  # inside of the stream
                self.module.launch(name, grid, *block, args)

            return kernel

    def set_device(index):
        log.append(f"device {index}")

    runtime = types.SimpleNamespace(setDevice=set_device)
    fake = types.SimpleNamespace(
        cuda=types.SimpleNamespace(runtime=runtime, Stream=Stream), RawModule=RawModule, __name__="cupy"
    )
    monkeypatch.setitem(sys.modules, "cupy", fake)
    monkeypatch.setattr(cupy_kernels, "BLOCK", 64)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None if current else 1)
    monkeypatch.setattr(torch.cuda, "device", lambda index: log.append(f"changed to {index}") or torch.no_grad())
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 7, raising=False)
    for cached in (cupy_launch.raw_module, cupy_launch.loaded_kernel, cupy_launch.stream):
        cached.cache_clear()
    try:
        x = torch.randn(2, 3, 8, 8)
        torch.testing.assert_close(cupy_ops.statistics(x), aten_ops.statistics(x))
    finally:
        for cached in (cupy_launch.raw_module, cupy_launch.loaded_kernel, cupy_launch.stream):
            cached.cache_clear()
    assert log == [*([] if current else ["changed to None"]), "device None", 7, "left"] * 2


def test_available(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cupy_launch.available() == "torch finds no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cupy_launch.available() == "CuPy is not installed: pip install cupy-cuda12x"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: "found")
    assert cupy_launch.available().startswith("CuPy does not work here (ModuleNotFoundError")
    fake = types.SimpleNamespace(runtimeGetVersion=lambda: 13020)
    cuda = types.SimpleNamespace(runtime=fake, nvrtc=types.SimpleNamespace(getVersion=lambda: (13, 0)))
    monkeypatch.setitem(sys.modules, "cupy", types.SimpleNamespace(cuda=cuda))
    assert cupy_launch.available() == "CuPy is built for CUDA 13 and torch for CUDA 12: pip install cupy-cuda12x"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert cupy_launch.available() == ""


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    monkeypatch.setattr("importlib.import_module", lambda name: name)
    monkeypatch.setenv("SEGTRAIN_CACHE", str(tmp_path))
    monkeypatch.setenv("CUPY_CACHE_DIR", "mine")
    cupy_launch.import_cupy()
    assert os.environ["CUPY_CACHE_DIR"] == "mine"
    monkeypatch.delenv("CUPY_CACHE_DIR")
    cupy_launch.import_cupy()
    assert os.environ["CUPY_CACHE_DIR"] == str(tmp_path / "cupy")


def test_source_is_one_text():
    assert '#include "' not in cupy_kernels.source()
    assert "from_output" in cupy_kernels.source()


# --------------------------------------------------------------------------------------------------- sanitizers


@pytest.mark.parametrize("sanitizer", ["ubsan", "asan", "tsan"])
def test_sanitizers(sanitizer, launcher, tmp_path):
    text, launches = tmp_path / "text", tmp_path / "launches"
    text.write_text(cupy_kernels.source())
    replay.save(record(launcher, RACED, 8) if sanitizer == "tsan" else record(launcher, VARIED, 4, 64), launches)
    done = sanitized(sanitizer, text, launches)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout == "OK\n"
