"""scripts/bench_predict.py, a small run."""

import re
import runpy
import sys

from tests.helpers.checkout import ROOT


def test_a_small_run(monkeypatch, capsys):
    words = ["--images", "2", "--rounds", "1", "--threads", "1", "--size", "64", "96"]
    monkeypatch.setattr(sys, "argv", ["bench_predict.py", *words])
    runpy.run_path(str(ROOT / "scripts" / "bench_predict.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert printed.startswith("2 images of 64x96, fp32, cpu, 1 threads\n")
    assert sum(map(int, re.findall(r" (\d+)%", printed))) in range(98, 103)
    assert re.search(r"in several threads +\d+\.\d\d images/s\nratio +\d+\.\d\d ", printed)
