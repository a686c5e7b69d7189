"""What an evaluation needs: memory for one picture at a time, whatever their size and number."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from segtrain.data.labels import published_table
from segtrain.data.loader import EvaluationItem
from segtrain.data.rules import CITYSCAPES
from segtrain.data.sample import Sample
from segtrain.scoring.scores import Scores
from segtrain.tasks.evaluation import Prediction, score
from tests.helpers.checkout import environment

needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc/self/status")


def resident():
    return int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


@needs_proc
def test_500_pictures_need_no_more_than_100():
    table = published_table("cityscapes", "cityscapes")
    rng = np.random.default_rng(0)
    seen = {}

    def answers():
        for number in range(500):
            target = rng.integers(0, 19, (256, 512)).astype(np.uint8)
            image = np.zeros((256, 512, 3), np.uint8)
            instances = (table.decode(target).astype(np.uint16)) * 1000
            item = EvaluationItem(Sample(str(number), Path("x"), None), image, target, table.decode(target), instances)
            yield Prediction(item, rng.integers(0, 19, (256, 512)).astype(np.uint8))
            seen[number] = resident()

    counted = Scores(table, CITYSCAPES)
    score(answers(), 500, counted, None, 6)
    assert counted.images == 500
    assert seen[499] - seen[99] < 40


PROGRAM = """
import re, torch, numpy as np
from segtrain.models import build_model
from segtrain.tasks.evaluation import Trained
from segtrain.config import ModelConfig, InferenceConfig
from segtrain.data.labels import published_table
from segtrain.scoring.scores import VISTAS, Scores
table = published_table("vistas_v2.0")
network = build_model("resnet18", num_classes=116, output_stride=16, head_channels=32).eval()
trained = Trained(network.to(memory_format=torch.channels_last), table, ModelConfig(), torch.device("cpu"))
memory = lambda what: int(re.search(what + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
trained.predict(np.zeros((64, 64, 3), np.uint8))
open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
before = memory("VmRSS")
image = np.random.default_rng(0).integers(0, 255, (4000, 5500, 3)).astype(np.uint8)
answer = trained.predict(image, InferenceConfig(name="tiled", tile=[1024, 1024]))
scores = Scores(table, VISTAS)
scores.add(table.decode(answer), table.decode(answer), np.zeros(answer.shape, np.uint16))
print(answer.shape, memory("VmHWM") - before)
"""


@needs_proc
@pytest.mark.slow
def test_22_megapixels_of_116_classes_stay_below_2_gb():
    """Their class scores at full resolution would be 10 GB."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shape, mebibytes = done.stdout.rsplit(" ", 1)
    assert shape == "(4000, 5500)"
    assert float(mebibytes) < 2000, mebibytes
