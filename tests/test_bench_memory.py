"""scripts/bench_memory.py: its table and picture by hand-made figures, and a small run."""

import importlib
import json
import subprocess
import sys

import numpy as np
import pytest

from tests.helpers.checkout import ROOT, environment

SCRIPT = ROOT / "scripts" / "bench_memory.py"


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPT.parent))
        yield importlib.import_module("bench_memory")


MIB = 2**20
ROWS = {
    "standard": {"kept": 100 * MIB, "peak": 200 * MIB, "flops": 90},
    "standard + own loss": {
        "kept": 95 * MIB,
        "peak": 180 * MIB,
        "flops": 100,
        "measured": 190 * MIB,
        "time": 2.0,
        "cpu": 4.0,
    },
    "compiled 0.3": {"kept": 27.4 * MIB, "peak": 100 * MIB, "plan": 80 * MIB, "flops": 104},
    "8bit": {"kept": 12.5 * MIB, "peak": 60 * MIB, "flops": 100, "measured": 70 * MIB, "time": 2.1, "cpu": 4.1},
}


def test_the_table_has_bytes_over_standard_and_the_rest_over_the_same_loss(script):
    lines = [line.split() for line in script.table("resnet50", ROWS)]
    assert lines[0] == ["resnet50"]
    assert lines[2] == ["standard", "100", "1.000", "200", "1.000", "-10.0%"]
    assert lines[3] == ["standard", "+", "own", "loss", "95", "0.950", "180", "0.900", "+0.0%", "190", "1.000", "1.000"]
    assert lines[4] == ["compiled", "0.3", "27", "0.274", "100", "0.500", "80", "+4.0%"]
    assert lines[5] == ["8bit", "12", "0.125", "60", "0.300", "+0.0%", "70", "1.050", "1.025"]


def test_bars_are_as_long_as_the_figures(script):
    pixels = script.picture({"a": ROWS, "b": {key: ROWS[key] for key in ("standard", "8bit")}})
    assert pixels.shape == (script.TOP + 4 * script.ROW + 8, script.LEFT + 2 * script.PANEL, 3)
    kept = (pixels == np.array(script.BARS["kept"], np.uint8)).all(-1)
    peak = (pixels == np.array(script.BARS["peak"], np.uint8)).all(-1)
    middle = [script.TOP + script.ROW * line + 4 for line in range(4)]
    panel = slice(script.LEFT, script.LEFT + script.PANEL)
    assert [int(kept[y, panel].sum()) - 1 for y in middle] == [140, 133, 38, 18]
    assert [int(peak[y + 11, panel].sum()) - 1 for y in middle] == [140, 126, 56, 42]  # compiled: by its plan
    assert not kept[middle[1], script.LEFT + script.PANEL :].any()  # b has no such form


def test_forms_are_chosen_by_the_beginnings_of_their_names(script):
    first = ["standard", "standard + own loss"]
    assert [form.name for form in script.chosen_forms("compiled 0.3, 8bit,")] == [*first, "compiled 0.3", "8bit"]
    assert script.chosen_forms(None) == list(script.FORMS)
    assert len(script.chosen_forms("compiled")) == 2 + len(script.BUDGETS)
    with pytest.raises(SystemExit, match="no form begins with '9bit': standard, "):
        script.chosen_forms("9bit")


@pytest.mark.slow
def test_a_small_run_whose_figures_are_not_counted_again(tmp_path):
    command = [sys.executable, str(SCRIPT), "--tiny", "--output", str(tmp_path)]
    answer = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert answer.returncode == 0, answer.stderr
    rows = json.loads((tmp_path / "memory.json").read_text())["2 x 64^2"]["resnet18"]
    assert rows["8bit"]["kept"] < rows["compiled 0.3"]["kept"] < rows["standard"]["kept"]
    assert rows["compiled 0.3"]["flops"] > rows["8bit"]["flops"]
    rows["8bit"]["kept"] = 12345 * 2**20
    (tmp_path / "memory.json").write_text(json.dumps({"2 x 64^2": {"resnet18": rows}}))
    answer = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert "12345" in answer.stdout and (tmp_path / "memory.png").stat().st_size > 1000
