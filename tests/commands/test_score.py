"""`segtrain score` against the figures of the official evaluation scripts, and what it refuses."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from segtrain.data.labels import published_table
from tests.helpers.checkout import environment

OFFICIAL = Path(__file__).parents[1] / "fixtures" / "official_scores"
TREES = {
    "cityscapes": ("cityscapes/results", "cityscapes"), "kitti": ("kitti/results", "kitti"),
    "vistas": ("vistas/predictions", "vistas/root"), "cocostuff": ("cocostuff/predictions", "cocostuff"),
}  # fmt: skip


def expected(name):
    return json.loads((OFFICIAL / name / "expected.json").read_text())


def overrides(name, *more):
    predictions, root = TREES[name]
    return [
        "score",
        f"predictions={OFFICIAL / predictions}",
        f"dataset={name}",
        f"dataset.root={OFFICIAL / root}",
        *more,
    ]


@pytest.fixture
def result(segtrain, tmp_path):
    """result("kitti", overrides ...) -> evaluation.json of that official tree."""

    def run(name, *more):
        answer = segtrain(*overrides(name, f"output={tmp_path / 'out'}", *more))
        assert answer.status == 0, answer.err
        assert answer.out.splitlines()[-1] == str(tmp_path / "out" / "evaluation.json")
        return json.loads((tmp_path / "out" / "evaluation.json").read_text())

    return run


def assert_equal(found, wanted):
    """Assert equal dicts of fractions; the official script's NaN is None in ours, or missing."""
    for name, value in wanted.items():
        assert found.get(name) == (None if value is None else pytest.approx(value, abs=1e-9)), name
    assert {name for name, value in found.items() if value is not None} <= set(wanted)


@pytest.mark.parametrize("name", ["cityscapes", "kitti"])
def test_cityscapes_and_kitti_figures(result, name):
    found, wanted = result(name), expected(name)
    averages = {
        "miou": "Classes",
        "iiou": "InstClasses",
        "category_miou": "Categories",
        "category_iiou": "InstCategories",
    }
    for mine, theirs in averages.items():
        assert found[mine] == pytest.approx(wanted[f"averageScore{theirs}"], abs=1e-9)
    for mine, theirs in (("per_class", "classScores"), ("per_class_iiou", "classInstScores"),
                         ("per_category", "categoryScores"), ("per_category_iiou", "categoryInstScores")):  # fmt: skip
        assert_equal(found[mine], wanted[theirs])
    ids = published_table("cityscapes").ids
    official = np.array(wanted["confMatrix"])
    matrix = np.array(found["confusion_matrix"])
    assert (matrix[:, :-1] == official[np.ix_(ids, ids)]).all()
    assert (matrix.sum(1) == official[ids].sum(1)).all()


def test_vistas_figures_on_three_levels(result):
    found, wanted = result("vistas"), expected("vistas")["integer_division"]
    leaf, pairs, groups = (wanted[key] for key in ("leaf", "meta2", "meta1"))
    assert (found["miou"], found["iiou"]) == (pytest.approx(leaf["mean_iou"]), pytest.approx(leaf["mean_iiou"]))
    assert_equal(found["per_class"], leaf["iou"])
    assert_equal(found["per_class_iiou"], leaf["iiou"])
    assert (found["category_miou"], found["category_iiou"]) == (
        pytest.approx(groups["mean_iou"], abs=1e-9), pytest.approx(groups["mean_iiou"], abs=1e-9),
    )  # fmt: skip
    assert_equal(found["per_category"], groups["iou"])
    assert_equal(found["per_category_iiou"], groups["iiou"])
    middle = found["subcategories"]
    assert middle["miou"] == pytest.approx(pairs["mean_iou"], abs=1e-9)
    assert middle["iiou"] == pytest.approx(pairs["mean_iiou"], abs=1e-9)
    assert_equal(middle["per_class"], pairs["iou"])
    assert_equal(middle["per_class_iiou"], pairs["iiou"])


def test_cocostuff_figures(result):
    found, wanted = result("cocostuff"), expected("cocostuff")
    for mine, theirs in (("miou", "miou"), ("frequency_weighted_iou", "fwiou"), ("mean_accuracy", "macc"),
                         ("pixel_accuracy", "pacc")):  # fmt: skip
        assert found[mine] == pytest.approx(wanted["official"][theirs], abs=1e-9)
    assert found["classes_averaged"] == wanted["n_classes_gt"]
    other = found["protocol"]["miou_under_other_rules"]
    assert any(v == pytest.approx(wanted["miou_if_averaged_over_classes_in_gt_or_pred"]) for v in other.values())
    by_train_id = list(found["per_class"].values())
    for train_id, value in wanted["iou_by_train_id"].items():
        assert by_train_id[int(train_id)] == (None if value is None else pytest.approx(value, abs=1e-9))


def test_the_card_tells_whose_rules_and_which_pictures(result):
    found = result("kitti")
    card = found["protocol"]
    assert card["rules"].startswith("KITTI devkit_semantics")
    assert card["images"] == {"expected": 2, "seen": 2, "published": 200}
    assert "predictions_encoding" in card
    assert "2 images, but kitti trainval has 200 as published" in card["warnings"][0]
    assert (found["dataset"], found["split"]) == ("kitti", "trainval")
    assert len(found["confusion_matrix"]) == 19


def rewritten(tmp_path, name, change):
    """Change every prediction of an official tree."""
    folder = tmp_path / "changed"
    for path in sorted((OFFICIAL / TREES[name][0]).rglob("*.png")):
        to = folder / path.name
        to.parent.mkdir(exist_ok=True)
        with Image.open(path) as image:
            Image.fromarray(change(np.asarray(image).astype(np.uint8))).save(to)
    return folder


def as_train_ids(ids):
    lut = np.full(256, 255, np.uint8)
    table = published_table("cityscapes")
    lut[table.ids] = np.arange(19)
    return lut[ids]


def test_train_ids_are_read_when_stated_and_noticed_when_not(segtrain, tmp_path, result):
    folder = rewritten(tmp_path, "cityscapes", as_train_ids)
    found = result("cityscapes", f"predictions={folder}", "predictions_encoding=train_ids")
    assert found["miou"] == pytest.approx(expected("cityscapes")["averageScoreClasses"], abs=1e-9)
    assert found["iiou"] == pytest.approx(expected("cityscapes")["averageScoreInstClasses"], abs=1e-9)
    for stated in ([], ["predictions_encoding=ids"]):
        answer = segtrain(*overrides("cityscapes", f"predictions={folder}", *stated))
        assert answer.status == 1
        assert "look like train_ids, not ids" in answer.err
        assert "Set predictions_encoding=train_ids" in answer.err


def test_coco_ids_and_pixelmaps(segtrain, tmp_path, result):
    folder = rewritten(tmp_path, "cocostuff", lambda values: values + 1)
    found = result("cocostuff", f"predictions={folder}", "predictions_encoding=ids")
    assert found["miou"] == pytest.approx(expected("cocostuff")["official"]["miou"], abs=1e-9)
    answer = segtrain(*overrides("cocostuff", f"predictions={folder}"))
    assert answer.status == 1
    assert "look like ids, not pixelmap" in answer.err


def test_other_values_are_misses_and_said(result, tmp_path):
    def change(ids):
        ids = ids.copy()
        ids[:1] = 200
        return ids

    found = result("cityscapes", f"predictions={rewritten(tmp_path, 'cityscapes', change)}")
    assert any(
        "were predicted as [200], which are no ids of cityscapes" in text for text in found["protocol"]["warnings"]
    )
    assert found["miou"] < expected("cityscapes")["averageScoreClasses"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder, first: first.unlink(), "1 of 2 predictions are missing"),
        (lambda folder, first: shutil.copy(first, first.with_name(f"{first.stem}_color.png")), "2 files answer for"),
        (lambda folder, first: Image.new("RGB", (4, 4)).save(first), "RGB colour image"),
        (lambda folder, first: Image.new("L", (4, 5)).save(first), "is 4x5, its label .* scored at the label's size"),
        (lambda folder, first: first.write_bytes(b"no picture"), "cannot be read"),
        (lambda folder, first: shutil.rmtree(folder), "no such folder"),
    ],
)
def test_what_cannot_be_scored_is_named(segtrain, tmp_path, change, words):
    folder = rewritten(tmp_path, "cityscapes", lambda ids: ids)
    change(folder, min(folder.iterdir()))
    answer = segtrain(*overrides("cityscapes", f"predictions={folder}"))
    assert answer.status in (1, 2)
    assert re.search(words, answer.err), answer.err


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (
            ["predictions_encoding=trainids"],
            "predictions_encoding=trainids: kitti has no such encoding; choose ids or train_ids",
        ),
        (
            ["predictions_encoding=pixelmap"],
            "predictions_encoding=pixelmap: kitti has no such encoding; choose ids or train_ids",
        ),
        (["split=nowhere"], "no split 'nowhere'"),
        (["dataset.root=/nowhere"], "no KITTI data at /nowhere"),
        (["split=test"], "has no labels to score against"),
    ],
)
def test_wrong_options(segtrain, more, words):
    answer = segtrain(*overrides("kitti", *more))
    assert answer.status in (1, 2)
    assert words in answer.err


def test_a_data_set_must_be_chosen(segtrain, tmp_path):
    answer = segtrain("score", f"predictions={tmp_path}")
    assert answer.status == 2
    assert "dataset" in answer.err


@pytest.mark.parametrize("damage", ["one missing", "8 bits", "the other divisor"])
def test_bad_instance_maps_give_no_iiou(segtrain, tmp_path, damage):
    root = shutil.copytree(OFFICIAL / "cityscapes", tmp_path / "c")
    for path in sorted(root.rglob("*_instanceIds.png")):
        with Image.open(path) as picture:
            values = np.asarray(picture).astype(np.int64)
        if damage == "one missing":
            path.unlink()
            break
        other = np.where(values > 999, values // 1000 * 256 + values % 1000 + 1, values)
        Image.fromarray((values % 256).astype(np.uint8) if damage == "8 bits" else other.astype(np.uint16)).save(path)
    answer = segtrain(
        "score", f"predictions={root / 'results'}", "dataset=cityscapes", f"dataset.root={root}", "output=o"
    )
    if damage == "8 bits":
        assert answer.status == 1
        assert "instance maps have 16 bits" in answer.err
        return
    assert answer.status == 0, answer.err
    result = json.loads((tmp_path / "o" / "evaluation.json").read_text())
    assert result["miou"] == pytest.approx(expected("cityscapes")["averageScoreClasses"], abs=1e-9)
    assert result["iiou"] is None
    assert result["category_iiou"] is None
    assert any("no iIoU" in text for text in result["protocol"]["warnings"])


def test_boundary_scores_are_an_option(result):
    found = result("cityscapes", "boundary=true")
    assert 0 < found["boundary_miou"] < 1
    assert set(found["per_class_boundary_iou"]) == set(found["per_class"])


def test_scores_and_checks_do_not_wait_for_torch():
    program = "import sys, segtrain.commands.score, segtrain.commands.check; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(), capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"
