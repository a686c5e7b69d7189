"""loss.class_weights=auto: counted by hand, printed, stored, and not counted again by a resume."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from segtrain.config import DATASET_CONFIGS
from segtrain.config.compose import compose_training
from segtrain.data import class_weights
from segtrain.data.class_weights import describe_weights, inverse_frequency, pixels_of_classes
from segtrain.data.labels import LabelTable
from segtrain.data.registry import label_table, training_mixture
from segtrain.data.verify import file_facts
from segtrain.engine.planning.trace import loss_of
from segtrain.errors import DataError, UsageError
from tests.helpers.checkout import TINY
from tests.helpers.runs import refused, state

# 45 labelled rows of 4 images; water is left of column 20, 24, 28, 32 of 64.
WATER, LAND = 45 * (20 + 24 + 28 + 32), 45 * (44 + 40 + 36 + 32)
EXPECTED = [(WATER + LAND) / (2 * WATER), (WATER + LAND) / (2 * LAND)]  # 1.23077, 0.842105


def test_the_formula_by_hand():
    """10 pixels of two classes that occur: 10 / (2 * 8), 10 / (2 * 2); the third has no pixel."""
    assert inverse_frequency(np.array([8.0, 2.0, 0.0])) == [0.625, 2.5, 0.0]
    assert inverse_frequency(np.array([7.0, 7.0])) == [1.0, 1.0]


def test_the_mean_weight_of_the_pixels_is_1():
    pixels = np.array([1e9, 3e7, 12.0, 0.0, 5e5])
    assert np.dot(inverse_frequency(pixels), pixels) / pixels.sum() == pytest.approx(1, rel=1e-5)


def folder_options(root, **more):
    splits = {name: {"images": f"{name}/images/*.png", "labels": f"{name}/labels/*.png"} for name in ("train", "val")}
    return DATASET_CONFIGS["folder"](name="folder", root=str(root), classes="classes.csv", splits=splits, **more)


def test_parts_of_a_mixture_count_as_often_as_they_are_sampled(folder_data, tmp_path):
    """Twice the same images, once with the weight 3 and half of them: 3 / 2 of these and 1 / 4 of all."""
    config = folder_options(folder_data[0])
    once = training_mixture(config)
    twice = once._replace(samples=[*once.samples[:2], *once.samples], weights=[(2, 3.0), (4, 1.0)])
    found = pixels_of_classes(twice, label_table(config), tmp_path)
    assert found.tolist() == [45 * 44 * 3 / 2 + WATER / 4, 45 * 84 * 3 / 2 + LAND / 4]


def test_a_part_is_counted_by_its_own_table(folder_data, tmp_path):
    config = folder_options(folder_data[0])
    table, mixture = label_table(config), training_mixture(config)
    swapped = LabelTable([row | {"train_id": {0: 1, 1: 0}.get(row["train_id"], 255)} for row in table.rows], "swapped")
    mixture = mixture._replace(samples=[sample._replace(table=swapped) for sample in mixture.samples])
    assert pixels_of_classes(mixture, table, tmp_path).tolist() == [LAND, WATER]


def test_counts_are_kept_for_the_next_start(folder_data, tmp_path, monkeypatch):
    config = folder_options(folder_data[0])
    first = pixels_of_classes(training_mixture(config), label_table(config), tmp_path)
    monkeypatch.setattr(file_facts, "read_label", None)
    assert pixels_of_classes(training_mixture(config), label_table(config), tmp_path).tolist() == first.tolist()


def test_labels_that_hold_nothing_but_ignored_ids_give_no_weights(folder_data, tmp_path):
    config = folder_options(folder_data[0])
    mixture = training_mixture(config)
    mixture = mixture._replace(samples=[sample._replace(replaced={0: 9, 7: 9}) for sample in mixture.samples])
    with pytest.raises(DataError, match="not one labelled pixel in the training images"):
        pixels_of_classes(mixture, label_table(config), tmp_path)


def test_open_labels_are_refused(folder_data, tmp_path):
    config = folder_options(folder_data[0])
    mixture = training_mixture(config)._replace(groups=[(0, 1)])
    with pytest.raises(UsageError, match="loss.class_weights=auto is not possible: a label that leaves several"):
        class_weights.automatic_weights(mixture, label_table(config), tmp_path)


def test_many_classes_are_named_by_the_lightest_and_the_heaviest():
    assert describe_weights([2.0, 0.5], ["a", "b"]) == "a 2, b 0.5"
    weights = list(range(30, 0, -1))
    assert describe_weights(weights, [f"c{w}" for w in weights]).startswith("c1 1, c2 2, c3 3, c4 4, c5 5, ..., c26 26")


@pytest.fixture
def words(folder_data):
    return [*folder_data[1], f"plugins=[{TINY}]", "model.backbone=tiny", "loss=cross_entropy", "logging.every=1"]


def test_a_run_counts_once_prints_and_stores(words, segtrain, monkeypatch):
    auto = [*words, "loss.class_weights=auto", "run=r", "schedule=constant"]
    answer = segtrain("train", *auto)
    assert answer.status == 0, answer
    assert "weights    of the classes, inverse to their pixels in 4 labels: water 1.23, land 0.842\n" in answer.out
    stored = yaml.safe_load(Path("r/config.yaml").read_text())["loss"]["class_weights"]
    assert stored == state("r/last.pt")["config"]["loss"]["class_weights"] == pytest.approx(EXPECTED, rel=1e-5)
    answer = segtrain(
        "train", *words, f"loss.class_weights={stored}".replace(" ", ""), "run=typed", "schedule=constant"
    )
    assert answer.status == 0, answer
    typed, counted = state("typed/last.pt")["model"], state("r/last.pt")["model"]
    assert all((typed[key] == counted[key]).all() for key in typed)

    def never(*_):
        raise AssertionError("counted again")

    monkeypatch.setattr(class_weights, "pixels_of_classes", never)
    answer = segtrain("train", *auto, "trainer.max_steps=4")
    assert answer.status == 0, answer
    assert "inverse to their pixels" not in answer.out
    assert state("r/last.pt")["config"]["loss"]["class_weights"] == stored
    refused(segtrain("train", *words, "run=r"), "loss.class_weights: [", "None asked for", status=1)


@pytest.mark.parametrize(("weights", "drawn"), [("auto", 0.5), ("auto", 0), ("[1,2]", 0.5)])
def test_two_corrections_for_rare_classes_are_worth_a_warning(words, segtrain, weights, drawn):
    given = [f"loss.class_weights={weights}", f"sampling.class_uniform={drawn}", "trainer.max_steps=1"]
    answer = segtrain("train", *words, *given, "run=r")
    assert answer.status == 0, answer
    text = "WARNING    loss.class_weights=auto and sampling.class_uniform=0.5 both favour rare classes"
    assert (text in answer.out) == (weights == "auto" and drawn > 0)


def test_a_run_without_weights_does_not_get_some_by_resuming(words, segtrain):
    assert segtrain("train", *words, "run=r").status == 0
    refused(segtrain("train", *words, "loss.class_weights=auto", "run=r"), "None in the run, auto asked", status=1)


def test_planning_needs_no_labels(words):
    config = compose_training(*words, "loss.class_weights=auto")
    assert loss_of(config, 2).count(torch.zeros(1, 2, 3, dtype=torch.uint8)) == 6
    assert config.loss.class_weights == "auto"
