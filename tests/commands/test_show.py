"""`segtrain show` draws the crops that a training of the same options is given."""

import numpy as np
import pytest
from PIL import Image

import segtrain as package
from segtrain.scoring import figures
from segtrain.tasks.segmentation import Segmentation
from tests.helpers.runs import refused


def test_the_samples_are_those_of_a_training(segtrain, folder_data, monkeypatch):
    words = [word for word in folder_data[1] if word.startswith(("dataset", "augmentation"))]
    seen = []
    beside = figures.beside
    monkeypatch.setattr(figures, "beside", lambda *parts: seen.append(parts[0]) or beside(*parts))
    answer = segtrain("show", *words, "count=6", "seed=3", "output=seen")
    assert (answer.status, answer.out.splitlines()[-1]) == (0, "seen/samples.png"), answer
    task = Segmentation(package.compose(*folder_data[1], "trainer.seed=3"))
    expected = [task.data()[position] for position in range(6)]
    assert len(seen) == 6
    assert all((ours == item[0]).all() for ours, item in zip(seen, expected, strict=True))
    targets = np.stack([item[1] for item in expected])
    for train_id, name in enumerate(task.table.names):
        assert f"{100 * (targets == train_id).mean():.1f} % {name}" in answer.out
    assert f"{100 * (targets == 255).mean():.1f} % ignored" in answer.out
    assert Image.open("seen/samples.png").mode == "RGB"


def test_another_split_and_a_class_that_does_not_occur(segtrain, scenes):
    answer = segtrain("show", "dataset=streets", f"dataset.root={scenes}", "split=val", "count=1",
                      "augmentation.crop_size=[32,32]", "augmentation.scale=[2,2]")  # fmt: skip
    assert answer.status == 0 and "streets val, 3 images" in answer.out and "classes are in none" in answer.out


@pytest.mark.parametrize("words", [["dataset=imagenet"], ["dataset=streets", "count=0"], []])
def test_what_cannot_be_shown_is_refused(segtrain, words):
    refused(segtrain("show", *words), "dataset" if words != ["dataset=streets", "count=0"] else "count")
