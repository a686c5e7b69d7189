"""An evaluation needs memory for one image at a time, for any size and number of images."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from segtrain.config import CityscapesConfig, InferenceConfig, ModelConfig
from segtrain.data.labels import published_table
from segtrain.data.loader import EvaluationItem
from segtrain.data.sample import Sample
from segtrain.tasks.segmentation import LabelledImage, SegmentationEvaluator
from tests.helpers.checkout import environment

needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc/self/status")


def resident():
    return int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


@needs_proc
def test_500_images_need_no_more_than_100():
    table = published_table("cityscapes", "cityscapes")
    rng = np.random.default_rng(0)
    seen = {}

    def answers():
        for number in range(500):
            target = rng.integers(0, 19, (256, 512)).astype(np.uint8)
            image = np.zeros((256, 512, 3), np.uint8)
            instances = (table.decode(target).astype(np.uint16)) * 1000
            item = EvaluationItem(Sample(str(number), Path("x"), None), image, target, table.decode(target), instances)
            yield LabelledImage(item, rng.integers(0, 19, (256, 512)).astype(np.uint8))
            seen[number] = resident()

    samples = [Sample(str(number), Path("x"), Path("y")) for number in range(500)]
    data, options = CityscapesConfig("cityscapes"), (ModelConfig(), InferenceConfig())
    evaluator = SegmentationEvaluator(data, "val", samples, table, *options, None)
    counts, panels = evaluator.count(answers(), 500, 6)
    assert counts.network.images == counts.network.images_with_instances == 500
    assert len(panels) == 6
    assert seen[499] - seen[99] < 40


PROGRAM = """
import re, torch, numpy as np
from segtrain.models import build_model
from segtrain.scoring.predictor import Predictor
from segtrain.config import InferenceConfig, ModelConfig
from segtrain.data.labels import published_table
from segtrain.data.rules import VISTAS
from segtrain.scoring.scores import Scores
table = published_table("vistas_v2.0")
network = build_model("resnet18", num_classes=116, output_stride=16, head_channels=32).eval()
predictor = Predictor(network.to(memory_format=torch.channels_last), table, ModelConfig(), torch.device("cpu"))
memory = lambda what: int(re.search(what + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
predictor.predict(np.zeros((64, 64, 3), np.uint8))
open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
before = memory("VmRSS")
image = np.random.default_rng(0).integers(0, 255, (4000, 5500, 3)).astype(np.uint8)
answer = predictor.predict(image, InferenceConfig(name="tiled", tile=[1024, 1024]))
scores = Scores(table, VISTAS)
scores.add(table.decode(answer), table.decode(answer), np.zeros(answer.shape, np.uint16))
print(answer.shape, memory("VmHWM") - before)
"""


@needs_proc
@pytest.mark.slow
def test_22_megapixels_of_116_classes_stay_below_2_gb():
    """Its logits at full resolution would be 10 GB."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shape, mebibytes = done.stdout.rsplit(" ", 1)
    assert shape == "(4000, 5500)"
    assert float(mebibytes) < 2000, mebibytes
