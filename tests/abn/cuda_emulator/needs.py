"""Marks of tests that need a compiler."""

import pytest

from tests.abn.cuda_emulator import emu, nvrtc

needs_13 = pytest.mark.skipif(nvrtc.wheels(13) is None, reason="NVRTC 13 is not installed")
needs_12 = pytest.mark.skipif(nvrtc.wheels(12) is None, reason="NVRTC 12 is not installed")
needs_compiler = pytest.mark.skipif(emu.COMPILER is None, reason="no C++ compiler")
