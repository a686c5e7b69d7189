"""The report about a GPU runs whole, with toy sizes on the CPU, so that it is never found broken on the day."""

import importlib
import json
import subprocess
import sys

import pytest

from tests.helpers.checkout import ROOT, environment

SCRIPT = ROOT / "scripts" / "gpu_report.py"


def loaded(name="gpu_report"):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPT.parent))
        return importlib.import_module(name)


@pytest.mark.slow
def test_every_part_gives_figures(tmp_path):
    command = [sys.executable, str(SCRIPT), "--tiny", "--minutes", "9", "--output", str(tmp_path)]
    answer = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=600)
    assert answer.returncode == 0, answer.stderr
    content = json.loads((tmp_path / "gpu.json").read_text())
    wrong = [row for name in loaded().PARTS for row in content[name] if row.get("failed") or "left out" in row]
    assert not wrong, wrong
    assert all(len(content[name]) >= 3 for name in loaded().PARTS), content
    assert content["job"][-1]["status"] == 0 and "equal" in content["job"][-1]["verdict"]
    assert len(answer.stdout.partition("=" * 40)[2].splitlines()) <= 80


def test_a_part_that_fails_is_named_and_the_others_run(tmp_path, capsys):
    """The job needs the folder of the report, which is not given here."""
    report = loaded()
    (tmp_path / "profile.jsonl").write_text(json.dumps({"profile": "standard", "ms": 1.5}) + "\n")
    report.add_row(tmp_path / "job.jsonl", "job", {"failed": "exit status 1: no reason"})
    content = report.gather(tmp_path, ["job", "profile"], {"device": "cpu"})
    report.summary(content, ["job", "profile"])
    out = capsys.readouterr().out
    assert "2 rows, 1 failed" in out and "FAILED job: failed exit status 1: no reason" in out
    assert "profile standard | ms 1.5" in out
    assert json.loads((tmp_path / "gpu.json").read_text())["job"] == [{"failed": "exit status 1: no reason"}]


def test_shares_of_a_profile_by_hand():
    """Two convolutions that overlap, a gap of a fifth, and a kernel of the layer."""
    spans = [(0.0, 40.0, "cudnn_conv"), (20.0, 50.0, "implicit_gemm"), (70.0, 100.0, "abn_sums")]
    found = loaded("gpu_steps").shares(spans)
    assert found["convolution %"] == pytest.approx(70) and found["in-place ABN %"] == pytest.approx(30)
    assert found["idle %"] == pytest.approx(20) and found["ms"] == pytest.approx(0.1) and found["kernels"] == 3
    assert loaded("gpu_steps").shares([]) == {"failed": "no kernels were recorded"}


def test_the_plan_stands_beside_what_was_measured(tmp_path, monkeypatch):
    report, budget = loaded("gpu_steps"), loaded("gpu_layer").Budget("cuda", tiny=False, long=False, ends=0)
    monkeypatch.setenv("GPU_REPORT", str(tmp_path))
    (tmp_path / "plan-resnext101").mkdir()
    (tmp_path / "plan-resnext101" / "plan.json").write_text('{"max_batch": {"batch_norm": 4, "inplace_abn+8bit": 22}}')
    monkeypatch.setattr(report, "command", lambda words, budget: (1.0, 1, "segtrain: nothing fits"))
    assert report.planned("resnext101", budget) == {
        "planned": "resnext101", "seconds": 1.0, "batch_norm": 4, "inplace_abn+8bit": 22,
    }  # fmt: skip
    assert report.planned("wider_resnet38", budget)["failed"] == "segtrain: nothing fits"


def test_the_largest_batch_is_found(monkeypatch):
    report = loaded("gpu_steps")
    for limit in (0, 1, 2, 3, 7, 8, 13, 80):
        tried = []
        monkeypatch.setattr(report, "fits", lambda _, __, batch, ___, n=limit, t=tried: t.append(batch) or batch <= n)
        budget = loaded("gpu_layer").Budget("cuda", tiny=False, long=False, ends=0)
        assert report.largest("resnet50", report.FORMS[0], budget) == limit, limit
        assert len(tried) == len(set(tried)) < 16
