"""scripts/bench_windows.py, a small image, in the process that measures."""

import re
import runpy
import sys
from pathlib import Path

import pytest

from segtrain.commands import predict
from tests.helpers.checkout import ROOT


@pytest.mark.parametrize("way", ["windows", "memory"])
def test_a_small_run(monkeypatch, capsys, way):
    script = str(ROOT / "scripts" / "bench_windows.py")
    monkeypatch.setattr(predict, "networks_of", predict.networks_of)  # which the script replaces
    runpy.run_path(script)["write_image"](Path("image.tif"), 1100)
    monkeypatch.setattr(sys, "argv", ["bench_windows.py", "--one", "image.tif", "--way", way])
    runpy.run_path(script, run_name="__main__")
    printed = capsys.readouterr().out
    assert ("windows     image.tif" in printed) == (way == "windows")
    assert re.search(r"\nmeasured \d+ \d+ \d+\.\d\n$", printed)
