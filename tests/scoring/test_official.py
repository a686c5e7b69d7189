"""Scores against the official Cityscapes evaluation itself, if a Python interpreter has it.

It breaks with numpy 2.4 and shadows a standard module, so it is no dependency:

CITYSCAPES_PYTHON=/path/to/python pytest tests/scoring/test_official.py"""

import json
import os
import subprocess

import numpy as np
import pytest
from PIL import Image

OFFICIAL = """
from cityscapesscripts.evaluation import evalPixelLevelSemanticLabeling as official
official.args.evalPixelAccuracy = False
official.args.quiet = True
official.main()
"""


@pytest.mark.skipif("CITYSCAPES_PYTHON" not in os.environ, reason="no CITYSCAPES_PYTHON with cityscapesscripts")
@pytest.mark.parametrize("seed", range(3))
def test_random_trees_score_what_the_official_script_says(segtrain, tmp_path, seed):
    rng = np.random.default_rng(seed)
    for index in range(3):
        folder, stem = tmp_path / "gtFine" / "val" / "ulm", f"ulm_{index:06d}_000019"
        folder.mkdir(parents=True, exist_ok=True)
        (tmp_path / "results").mkdir(exist_ok=True)
        labels = rng.integers(0, 34, (20, 40)).astype(np.uint8).repeat(5, 0).repeat(5, 1)
        numbers = rng.integers(0, 4, (20, 40)).astype(np.uint16).repeat(5, 0).repeat(5, 1)
        single = (labels >= 24) & (rng.random(labels.shape) < 0.9)
        instances = np.where(single, labels * np.uint16(1000) + numbers, labels).astype(np.uint16)
        wrong = rng.random(labels.shape) < 0.3
        predicted = np.where(wrong, rng.integers(0, 34, labels.shape), labels).astype(np.uint8)
        Image.fromarray(labels).save(folder / f"{stem}_gtFine_labelIds.png")
        Image.fromarray(instances).save(folder / f"{stem}_gtFine_instanceIds.png")
        Image.fromarray(predicted).save(tmp_path / "results" / f"{stem}_mine.png")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"CITYSCAPES_DATASET": str(tmp_path), "CITYSCAPES_RESULTS": str(tmp_path / "results"),
                    "CITYSCAPES_EXPORT_DIR": str(tmp_path)}  # fmt: skip
    call = [os.environ["CITYSCAPES_PYTHON"], "-c", OFFICIAL]
    subprocess.run(call, env=environment, check=True, capture_output=True)
    theirs = json.loads((tmp_path / "resultPixelLevelSemanticLabeling.json").read_text())
    answer = segtrain("score", f"predictions={tmp_path / 'results'}", "dataset=cityscapes", f"dataset.root={tmp_path}",
                      "output=out")  # fmt: skip
    assert answer.status == 0, answer.err
    ours = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    for mine, official in (("miou", "Classes"), ("iiou", "InstClasses"), ("category_miou", "Categories"),
                           ("category_iiou", "InstCategories")):  # fmt: skip
        assert ours[mine] == pytest.approx(theirs[f"averageScore{official}"], abs=1e-12)
    for mine, official in (("per_class", "class"), ("per_category", "category")):
        for suffix, kind in (("", "Scores"), ("_iiou", "InstScores")):
            for name, value in ours[f"{mine}{suffix}"].items():
                if value is not None:
                    assert value == pytest.approx(theirs[f"{official}{kind}"][name], abs=1e-12)
