"""Launches of the kernels for sanitizers, PTX and seeded bugs: their cases, their recording, their replay."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from segtrain.abn import selftest
from segtrain.abn.backends import cupy as cupy_ops
from segtrain.abn.backends import cupy_codes
from segtrain.abn.coded_selftest import CodedCase, check_coder
from segtrain.abn.selftest import LEAKY, Case
from tests.abn.cuda_emulator import emu, replay
from tests.abn.cuda_emulator.launcher import Launcher, installed
from tests.helpers.checkout import ROOT

# Both layouts, wide and narrow accesses, several stripes, every type and form: the launches that sanitizers, PTX and
# seeded bugs are tried on.
VARIED = [
    Case(torch.float32, (2, 16, 8, 8), False, LEAKY, "output", True),
    Case(torch.float32, (2, 16, 8, 8), True, LEAKY, "output", True),
    Case(torch.float32, (3, 5, 7, 9), False, LEAKY, "input"),
    Case(torch.float32, (3, 5, 7, 9), True, LEAKY),
    Case(torch.float32, (1, 1, 41, 81), False, LEAKY, "output", True),  # 52 stripes
    Case(torch.float16, (2, 16, 8, 8), False, LEAKY, "output", True),
    Case(torch.bfloat16, (2, 40, 5, 5), True, LEAKY, "input"),
]
# The same for ThreadSanitizer, to which every thread of every block is a new one: few blocks, yet several of a channel.
RACED = [
    Case(torch.float32, (1, 2, 16, 32), False, LEAKY, "output", True),
    Case(torch.float32, (1, 2, 9, 15), False, LEAKY),
    Case(torch.float32, (1, 8, 16, 8), True, LEAKY, "output", True),
    Case(torch.float32, (1, 5, 5, 8), True, LEAKY),
    Case(torch.float32, (1, 8, 16, 8), True, LEAKY, "input"),
    Case(torch.float16, (1, 8, 12, 8), True, LEAKY),
]

# The same of coded maps. Odd rows and few channels; ranges of each sample where planes have 64 values.
CODED_VARIED = [
    CodedCase(Case(torch.float32, (2, 8, 8, 8), False, LEAKY, shortcut=True), 4),
    CodedCase(Case(torch.float32, (2, 8, 8, 8), True, LEAKY, shortcut=True), 4),
    CodedCase(Case(torch.float32, (3, 5, 9, 9), False, LEAKY), 4),
    CodedCase(Case(torch.float32, (3, 5, 9, 9), True, LEAKY), 4),
    CodedCase(Case(torch.float32, (2, 8, 8, 8), False, LEAKY), 8),
    CodedCase(Case(torch.float32, (3, 5, 7, 9), True, LEAKY, shortcut=True), 8),
    CodedCase(Case(torch.float16, (2, 8, 8, 8), True, LEAKY, shortcut=True), 8),
]
CODED_RACED = [
    CodedCase(Case(torch.float32, (2, 2, 8, 16), False, LEAKY, shortcut=True), 4),
    CodedCase(Case(torch.float32, (2, 3, 8, 9), True, LEAKY), 4),
    CodedCase(Case(torch.float32, (1, 2, 9, 15), False, LEAKY), 8),
    CodedCase(Case(torch.float32, (1, 8, 8, 8), True, LEAKY), 8),
]


def record(launcher: Launcher, cases: list[Case], *blocks: int) -> list[replay.Launch]:
    """Record the most telling launches, with at most that many blocks."""
    launcher.recorded = []
    for count in blocks:
        with installed(launcher, count):
            failed = [str(result) for result in selftest.check_backend(cupy_ops, "cpu", cases) if not result.good]
        assert not failed, failed
    launches, launcher.recorded = launcher.recorded, None
    return replay.telling(launches)


def record_codes(launcher: Launcher, cases: list[CodedCase], *blocks: int) -> list[replay.Launch]:
    """As `record`, of the kernels of coded maps."""
    launcher.recorded = []
    for count in blocks:
        with installed(launcher, count):
            failed = [str(result) for result in check_coder(cupy_codes, "cpu", cases) if not result.good]
        assert not failed, failed
    launches, launcher.recorded = launcher.recorded, None
    return replay.telling([launch for launch in launches if "merge_sums" not in launch.kernel])


def sanitized(sanitizer: str, text: Path, launches: Path, orders: str = "0") -> subprocess.CompletedProcess[str]:
    """Run replay.py in a child process, because a sanitizer's library has to be loaded before all others."""
    environment = {
        **os.environ, "ASAN_OPTIONS": "detect_leaks=0", "OPENBLAS_NUM_THREADS": "1",
        "TSAN_OPTIONS": "report_thread_leaks=0:history_size=0:exitcode=66:halt_on_error=1",
    }  # fmt: skip
    command = [sys.executable, "-m", "tests.abn.cuda_emulator.replay", sanitizer, str(text), str(launches), orders]
    if sanitizer in ("asan", "tsan"):
        assert emu.COMPILER
        library = subprocess.check_output([emu.COMPILER, f"-print-file-name=lib{sanitizer}.so"], text=True).strip()
        environment["LD_PRELOAD"] = library
    return subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment, cwd=ROOT)
