"""The specification of each dataset, and datasets of plugins: with their own options, and for classification."""

import json
import sys

import numpy as np
import pytest
from PIL import Image

from segtrain.config import DATASET_CONFIGS
from segtrain.data.classify.samples import ClassificationSpec
from segtrain.data.labels import published_table
from segtrain.data.registry import DATASETS, dataset_with_classes, published_tables
from segtrain.data.sample import DatasetSpec, label_encodings
from tests.helpers.checkout import TINY

PONDS = """
from dataclasses import dataclass
from segtrain.config import DatasetConfig
from segtrain.data.datasets import DATASETS
from segtrain.data.labels import LabelTable
from segtrain.data.sample import DatasetSpec, SplitFiles, by_stem
from segtrain.metrics import PLAIN

@dataclass
class PondsConfig(DatasetConfig):
    season: str = "summer"

def table(config):
    colors = {"land": [90, 60, 20], "water": [0, 60, 200]}
    return LabelTable([{"id": i, "name": n, "color": colors[n], "train_id": i} for i, n in enumerate(colors)], "ponds")

def files(config, split):
    folder = config.folder() / config.season / split
    return SplitFiles(by_stem(folder, "*.jpg"), by_stem(folder, "*.png"))

DATASETS["seasons"] = DatasetSpec(table, files, PLAIN, options=PondsConfig)
"""
BIRDS = """
from segtrain.data.classify.samples import ClassificationSpec, class_folders
from segtrain.data.datasets import DATASETS

def images(config, split):
    return class_folders(config.folder() / f"{split}-images")

DATASETS["birds"] = ClassificationSpec(images, {"val": 5})
"""


@pytest.fixture
def plugin(tmp_path):
    """plugin(text) -> plugins=[FILE]; what it adds is removed after the test."""
    names = set(DATASETS)

    def write(text):
        path = tmp_path / f"my_{len(text)}.py"
        path.write_text(text)
        return f"plugins=[{path}]"

    yield write
    for name in set(DATASETS) - names:
        del DATASETS[name]
        DATASET_CONFIGS.pop(name, None)
    for name in [name for name in sys.modules if name.startswith("my_")]:
        del sys.modules[name]


# ------------------------------------------------------------------------------------------------ built-in datasets


@pytest.mark.parametrize("name", DATASETS)
def test_every_dataset_says_everything_about_itself(name):
    spec = DATASETS[name]
    assert spec.options is DATASET_CONFIGS[name]
    assert spec.licence or name in ("streets", "folder")
    if isinstance(spec, ClassificationSpec):
        return
    tables = [published_table(table) for table in spec.tables]
    for table in tables:
        encodings = spec.encodings(table)
        assert spec.encoding in encodings
        assert set(label_encodings(table)) <= set(encodings)
        ids = {int(row["id"]) for row in table.rows}
        assert all(set(to_id.values()) <= ids for to_id in encodings.values())
        assert any(set(spec.expected.common) <= {row["name"] for row in table.rows} for table in tables)
    if spec.submission is not None:
        assert spec.submission.page
        assert "{}" in spec.submission.place
        assert (spec.submission.contents is None) == (spec.submission.verify is None)


def test_datasets_are_found_by_their_classes():
    assert published_tables() == ["cityscapes", "vistas_v1.2", "vistas_v2.0", "cocostuff"]
    found = {table: dataset_with_classes(published_table(table).names) for table in published_tables()}
    # vistas_v2.0 needs dataset.version=v2.0
    assert found == {"cityscapes": "cityscapes", "vistas_v1.2": "vistas", "vistas_v2.0": None, "cocostuff": "cocostuff"}
    assert dataset_with_classes(["land", "water"]) is None


def test_three_facts_are_enough_for_a_dataset():
    spec = DatasetSpec(DATASETS["kitti"].table, DATASETS["kitti"].files, DATASETS["kitti"].rules)
    assert spec.options is None
    assert spec.submission is None
    assert spec.encoding in spec.encodings(published_table("cityscapes"))


# ------------------------------------------------------------------------------------------------ plugins


def test_a_plugin_brings_options_of_its_own(ponds, plugin, segtrain, tmp_path):
    (tmp_path / "seasons").mkdir()
    (tmp_path / "ponds").rename(tmp_path / "seasons" / "winter")
    words = [plugin(PONDS), "dataset=seasons", *ponds, f"dataset.root={tmp_path / 'seasons'}", "dataset.season=winter"]
    answer = segtrain("train", *words)
    assert answer.status == 0, answer.err
    composed = segtrain("train", *words, "--cfg", "job")
    assert "season: winter" in composed.out
    wrong = segtrain("train", *words, "dataset.saison=winter")
    assert wrong.status == 2
    assert "saison" in wrong.err


def test_a_plugin_brings_a_dataset_for_image_classification(plugin, segtrain, tmp_path):
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2)):
        for number, name in enumerate(("finch", "owl", "tit")):
            folder = tmp_path / "birds" / f"{split}-images" / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(80 * number + rng.integers(0, 40, (40, 44, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    text = plugin(BIRDS)
    data = ["dataset=birds", f"dataset.root={tmp_path / 'birds'}"]
    answer = segtrain(
        "train", f"{text[:-1]},{TINY}]", *data, "model.backbone=tiny", "model.head=classifier",
        "model.output_stride=16", "loss=cross_entropy", "augmentation=imagenet", "augmentation.crop_size=[32,32]",
        "inference=center224", "inference.resize=36", "inference.crop=32", "trainer.batch_size=6",
        "trainer.epochs=null", "trainer.max_steps=2", "loader.workers=0", "device=cpu",
    )  # fmt: skip
    assert answer.status == 0, answer.err
    result = json.loads(next((tmp_path / "runs").glob("*/evaluation.json")).read_text())
    assert result["images"] == 6
    assert result["protocol"]["images"] == {"expected": 6, "seen": 6, "published": 5}
    checked = segtrain("check", text, *data)
    assert checked.status == 1
    assert "val: 6 images, published are 5" in checked.err
    assert json.loads((tmp_path / "segtrain-out/check/report.json").read_text())["classes"] == ["finch", "owl", "tit"]
