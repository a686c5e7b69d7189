"""Scores against an independent definition, hand-worked figures, the official scripts and torchmetrics."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from segtrain.config import IGNORE_INDEX, CocoStuffConfig, VistasConfig
from segtrain.data.label_files import read_label
from segtrain.data.labels import LabelTable, published_table, read_json_table
from segtrain.data.registry import label_table
from segtrain.data.rules import CITYSCAPES, COCOSTUFF, KITTI, PLAIN, VISTAS
from segtrain.native import compile as compiling
from segtrain.native import pixels
from segtrain.scoring.boundary import boundary_counts
from segtrain.scoring.position_prior import PositionPrior
from segtrain.scoring.scores import Scores

OFFICIAL = Path(__file__).parents[1] / "fixtures" / "official_scores"
NAMES = ["a", "b", "c", "d"]


def small_table(classes=4):
    """Ids 10, 11, ...; 0 and 1 are ignored."""
    rows = [{"id": 10 + k, "name": chr(97 + k), "color": [k, 0, 0], "train_id": k} for k in range(classes)]
    rows += [{"id": i, "name": f"void {i}", "color": [0, 0, 0], "train_id": IGNORE_INDEX} for i in (0, 1)]
    return LabelTable(rows, "a small table")


def scored(target, prediction, rules=PLAIN, classes=4):
    scores = Scores(small_table(classes), rules)
    scores.add(np.array([target], np.uint8), np.array([prediction], np.uint8))
    return scores


def slow_iou(target, prediction, rules):
    """The definition by sets, written independently. None if the rule leaves the class out."""
    result = []
    classes = range(10, 14)
    evaluated = [i for i, t in enumerate(target) if t in classes]
    if rules.ignored_prediction == "dropped":
        evaluated = [i for i in evaluated if prediction[i] in classes]
    for k in classes:
        truth = {i for i in evaluated if target[i] == k}
        answer = {i for i in evaluated if prediction[i] == k}
        there = truth if rules.absent == "ground truth" else truth | answer
        result.append(len(truth & answer) / len(truth | answer) if there else None)
    return result


labels = st.lists(st.sampled_from([0, 1, 10, 11, 12, 13]), min_size=1, max_size=60)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(labels, st.randoms(use_true_random=False), st.sampled_from([PLAIN, VISTAS._replace(categories=PLAIN.categories),
       COCOSTUFF._replace(categories=PLAIN.categories)]))  # fmt: skip
def test_iou_equals_the_definition(target, random, rules):
    prediction = [random.choice([1, 10, 11, 12, 13, 200]) for _ in target]
    scores = scored(target, prediction, rules).result()
    expected = slow_iou(target, prediction, rules)
    assert list(scores["per_class"].values()) == [None if v is None else pytest.approx(v) for v in expected]
    known = [v for v in expected if v is not None]
    assert scores["miou"] == (pytest.approx(sum(known) / len(known)) if known else None)
    assert scores["classes_averaged"] == len(known)
    valid = [(t, p) for t, p in zip(target, prediction, strict=True) if t >= 10]
    if rules.ignored_prediction == "dropped":
        valid = [(t, p) for t, p in valid if 10 <= p < 14]
    assert scores["pixel_accuracy"] == (pytest.approx(np.mean([t == p for t, p in valid])) if valid else None)


def test_hand_worked_example():
    scores = scored([10, 10, 10, 11, 11, 0], [10, 10, 11, 11, 12, 13]).result()
    # a: 2 of 3; b: 1 hit, 1 false alarm, 1 miss; c: false alarm only -> 0; d: on void only -> left out
    assert scores["per_class"] == {"a": pytest.approx(2 / 3), "b": pytest.approx(1 / 3), "c": 0.0, "d": None}
    assert scores["miou"] == pytest.approx(1 / 3)
    assert scores["pixel_accuracy"] == pytest.approx(3 / 5)
    assert scores["mean_accuracy"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert scores["frequency_weighted_iou"] == pytest.approx(3 / 5 * 2 / 3 + 2 / 5 * 1 / 3)
    assert scores["classes_in_ground_truth"] == 2
    assert scores["iiou"] is None
    assert scores["category_miou"] is None


def test_other_tools_rules_on_the_published_cases():
    """Figures of torchmetrics, mmsegmentation and the official scripts for three small cases."""
    cases = {
        "A: class 2 absent from GT and prediction": ([10, 10, 10, 11, 11, 11, 11, 0], [10, 10, 10, 10, 11, 11, 11, 10]),
        "B: class 2 predicted only on valid pixels": ([10, 10, 10, 10, 11, 11], [10, 10, 10, 12, 11, 11]),
        "C: class 2 predicted only on ignored pixels": (
            [10, 10, 10, 11, 11, 11, 11, 0],
            [10, 10, 10, 10, 11, 11, 11, 12],
        ),
    }
    recorded = json.loads((OFFICIAL / "metric_semantics.json").read_text())
    for name, (target, prediction) in cases.items():
        scores = scored(target, prediction, classes=3)
        iou = list(scores.result()["per_class"].values())
        if name.startswith("B"):
            assert iou == recorded[name]["iou"]
        else:  # the same situation with IoUs of the file: 3 of 4 and 4 of 5
            target, prediction = [10] * 3 + [11] * 5 + [0], [10] * 3 + [10] + [11] * 4 + [12 if name[0] == "C" else 0]
            scores = scored(target, prediction, classes=3)
            assert list(scores.result()["per_class"].values()) == recorded[name]["iou"]
        other = scores.under_other_rules()
        found = {key.split(" ")[0]: value for key, value in other.items() if not key.startswith("absent")}
        zero, one = (next(v for k, v in other.items() if k.startswith(f"absent counts {n}")) for n in (0, 1))
        expected = recorded[name]
        assert found["cityscapesScripts,"] == pytest.approx(
            expected["cityscapes_kitti_vistas_mmseg (NaN iff TP+FP+FN==0)"]
        )
        assert found["COCO-Stuff,"] == pytest.approx(expected["coco_stuff_official (classes with GT pixels only)"])
        assert found["torchmetrics"] == pytest.approx(expected["torchmetrics MulticlassJaccardIndex macro"], abs=1e-6)
        assert zero == pytest.approx(expected["absent counts 0 (mmseg nan_to_num=0)"])
        assert zero == pytest.approx(expected["torchmetrics none().mean()"], abs=1e-6)
        assert one == pytest.approx(expected["smp iou_score macro (zero_division=1.0 default)"], abs=1e-6)


def test_a_prediction_outside_the_classes_under_other_rules():
    """a: 2 of 4 right, 2 predicted as void; b: only predicted as void; c: 1 right; d: a false alarm on c."""
    other = scored([10, 10, 10, 10, 11, 12, 12], [10, 10, 1, 1, 0, 12, 13]).under_other_rules()
    found = {key.split(" ")[0].rstrip(","): value for key, value in other.items()}
    assert found["cityscapesScripts"] == pytest.approx((2 / 4 + 0 + 1 / 2 + 0) / 4)
    assert found["COCO-Stuff"] == pytest.approx((2 / 4 + 0 + 1 / 2) / 3)  # its script counts a miss
    assert found["mapillary_vistas"] == pytest.approx((2 / 2 + 1 / 2 + 0) / 3)
    assert found["detectron2"] == pytest.approx((2 / 2 + 1 / 2) / 2)  # drops the pixels, and b with them
    assert found["torchmetrics"] is None
    alike = scored([10, 10, 11, 12], [10, 11, 11, 13]).under_other_rules()  # nothing outside: one figure for both
    shared = next(value for key, value in alike.items() if key.startswith("COCO-Stuff, detectron2 (left out: "))
    assert shared == pytest.approx((1 / 2 + 1 / 2 + 0) / 3)


# ------------------------------------------------------------------------------------------------ categories


def of_several_ids():
    """Class a is of two ids, whose rows have categories of their own; id 1 is ignored, but an object of `thing`."""
    rows = [(10, "a", 0, "rest"), (11, "b", 1, "thing"), (12, "c", 2, "thing"), (13, "a, too", 0, "thing"),
            (1, "void", IGNORE_INDEX, "thing")]  # fmt: skip
    return LabelTable(
        [{"id": i, "name": n, "color": [i, 0, 0], "train_id": t, "category": c, "has_instances": c == "thing"}
         for i, n, t, c in rows], "a table",
    )  # fmt: skip


def test_a_class_of_several_ids_is_in_one_category():
    scores = Scores(of_several_ids(), CITYSCAPES)
    scores.add(np.array([[10, 13, 11, 12, 12, 13]], np.uint8), np.array([[13, 10, 12, 11, 10, 11]], np.uint8))
    assert scores.levels() == [{"rest": [0], "thing": [1, 2]}]
    assert scores.result()["per_category"] == {"rest": 2 / 4, "thing": 2 / 4}


def test_a_taken_for_thing_finds_no_object_of_it():
    """An ignored object of the category does, as cityscapesScripts counts."""
    scores = Scores(of_several_ids(), CITYSCAPES)
    ids, instances = np.full((1, 4), 11, np.uint8), np.full((1, 4), 11000, np.uint16)
    scores.add(ids, np.array([[12, 1, 13, 10]], np.uint8), instances)
    assert scores.result()["per_category_iiou"] == {"thing": 2 / 4}


def test_supercategories_of_the_stuff_challenge():
    """As its evaluator has them: every leaf in one of 15, all things in `other`, means over those in the labels."""
    config = CocoStuffConfig(name="cocostuff", root=str(OFFICIAL / "cocostuff"), classes="stuff91", other="class")
    table = label_table(config)
    scores = Scores(table, COCOSTUFF)
    category = np.full(256, -1)
    rows = [row for row in read_json_table("cocostuff") if row["kind"] != "void"]
    names = sorted({row["category"] for row in rows if row["kind"] == "stuff"})
    assert len(names) == 15
    for row in rows:
        category[row["pixelmap_value"]] = names.index(row["category"]) if row["kind"] == "stuff" else 15
    pairs = np.zeros((16, 16), np.int64)
    for path in sorted((OFFICIAL / "cocostuff/annotations/val2017").glob("*.png")):
        labels, answer = read_label(path), read_label(OFFICIAL / "cocostuff/predictions/val2017" / path.name)
        scores.add(labels, answer)
        counted = labels != 255
        np.add.at(pairs, (category[labels[counted]], category[answer[counted]]), 1)
    there = pairs.sum(1) > 0
    iou = np.diagonal(pairs)[there] / (pairs.sum(0) + pairs.sum(1) - np.diagonal(pairs))[there]
    result = scores.result()
    assert sorted(result["per_category"]) == sorted([*names, "other"])
    assert result["category_miou"] == pytest.approx(iou.mean(), abs=1e-12)


# ------------------------------------------------------------------------------------------------ objects


def test_vistas_v2_weighs_the_objects_of_the_names_that_it_keeps(tmp_path):
    """The official script looks average sizes up by name, whichever version the labels are of; others weigh 1."""
    rows = read_json_table("vistas_v2.0")
    labels = [{"name": r["name"], "evaluate": r["train_id"] != 255, "instances": r["has_instances"],
               "color": r["color"]} for r in rows]  # fmt: skip
    (tmp_path / "config_v2.0.json").write_text(json.dumps({"labels": labels}))
    table = label_table(VistasConfig(name="vistas", root=str(tmp_path), version="v2.0"))
    sizes = {row["name"]: row["avg_instance_size"] for row in table.rows if row["avg_instance_size"]}
    assert len(sizes) == 33 and sizes["object--vehicle--car"] == 40828.5850107
    number = {row["name"]: row["id"] for row in table.rows}
    car, person = number["object--vehicle--car"], number["human--person--individual"]
    ids = np.array([[car] * 4 + [person] * 4 + [car] * 2], np.uint8)
    objects = ids * np.uint16(256) + np.array([0] * 8 + [1] * 2, np.uint16)
    scores = Scores(table, VISTAS)
    scores.add(ids, np.array([[car] * 3 + [person] * 3 + [car] * 4], np.uint8), objects)
    found, missed = 40828.5850107 * (3 / 4 + 2 / 2), 40828.5850107 / 4
    per_class = scores.result()["per_class_iiou"]
    assert per_class["object--vehicle--car"] == pytest.approx(found / (found + missed + 2), rel=1e-12)
    assert per_class["human--person--individual"] == pytest.approx(2 / (4 + 1))


def test_an_object_weighs_as_much_as_an_average_one():
    """Two cars of 2 and 4 pixels, weights 12794.02... / size each; half of the large one is missed; one false alarm."""
    car, road = 26, 7
    ids = np.array([[car] * 2 + [car] * 4 + [road] * 3], np.uint8)
    predicted = np.array([[car] * 2 + [car] * 2 + [road] * 2 + [car, road, road]], np.uint8)
    instances = np.array([[26000] * 2 + [26001] * 4 + [7] * 3], np.uint16)
    scores = Scores(published_table("cityscapes", "cityscapes"), CITYSCAPES)
    scores.add(ids, predicted, instances)
    average = 12794.0202738185
    found, missed = average + average / 2, average / 2
    assert scores.result()["per_class_iiou"]["car"] == pytest.approx(found / (found + missed + 1), rel=1e-12)
    group = Scores(published_table("cityscapes", "cityscapes"), CITYSCAPES)
    group.add(ids, predicted, np.where(instances > 1000, car, instances).astype(np.uint16))  # a group has no objects
    assert group.result()["per_class_iiou"]["car"] == 0
    kitti = Scores(published_table("cityscapes", "kitti"), KITTI)
    kitti.add(ids, predicted, np.where(instances > 1000, car * 256, 0).astype(np.uint16))  # k = 0: no object
    assert not kitti.weighted.any()


def test_a_caravan_where_a_car_is_finds_a_vehicle():
    ids, instances = np.full((1, 4), 26, np.uint8), np.full((1, 4), 26000, np.uint16)
    scores = Scores(published_table("cityscapes", "cityscapes"), CITYSCAPES)
    scores.add(ids, np.full((1, 4), 29, np.uint8), instances)
    result = scores.result()
    assert result["per_class_iiou"]["car"] == 0
    assert result["per_category_iiou"]["vehicle"] == 1
    assert result["per_category"]["vehicle"] == 0  # without instances a caravan is a miss


def test_a_car_taken_for_a_truck_is_right_by_category_but_not_by_the_objects_of_vistas():
    table = published_table("vistas_v1.2")
    car, truck = table.names.index("object--vehicle--car"), table.names.index("object--vehicle--truck")
    scores = Scores(table, VISTAS)
    ids = np.full((1, 4), car, np.uint8)
    scores.add(ids, np.full((1, 4), truck, np.uint8), ids.astype(np.uint16) * 256)
    result = scores.result()
    assert result["per_category"]["object"] == 1
    assert result["subcategories"]["per_class"]["object--vehicle"] == 1
    assert result["per_class_iiou"]["object--vehicle--car"] == 0


def boundary_by_distance(mask, width):
    """The pixels of a mask at most `width` steps, also diagonal ones, from a pixel outside it or outside the image."""
    height, length = mask.shape
    padded = np.pad(mask, width + 1)
    band = np.zeros_like(mask)
    for y in range(height):
        for x in range(length):
            window = padded[y + 1 : y + 2 * width + 2, x + 1 : x + 2 * width + 2]
            band[y, x] = mask[y, x] and not window.all()
    return band


def test_boundary_iou_equals_its_definition():
    rng = np.random.default_rng(0)
    target = rng.integers(0, 3, (6, 9)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
    prediction = np.roll(target, 2, 1)
    target[:5] = IGNORE_INDEX
    width = round(0.02 * np.hypot(*target.shape))
    found = boundary_counts(target, prediction, 3)
    for k in range(3):
        truth, answer = (boundary_by_distance(t == k, width) & (target != IGNORE_INDEX) for t in (target, prediction))
        assert found[:, k].tolist() == [(truth & answer).sum(), (truth | answer).sum()]
    scores = Scores(small_table(3), boundary=True)
    ids = np.where(target == IGNORE_INDEX, 0, target + 10).astype(np.uint8)
    scores.add(ids, (prediction + 10).clip(max=13).astype(np.uint8))
    assert scores.result()["boundary_miou"] == pytest.approx(np.mean(found[0] / found[1]))


# ------------------------------------------------------------------------------------------------------- counting


def counted_by_numpy(first, second):
    joint = first.astype(np.int64) * 256 + second
    return np.bincount(joint.ravel(), minlength=1 << 16).reshape(256, 256)


@pytest.fixture(params=["compiled", "OpenCV"])
def loops(request, monkeypatch):
    if request.param == "OpenCV":
        monkeypatch.setattr(pixels, "library", lambda loop: None)
    elif compiling.unavailable():
        pytest.skip("no C++ compiler")


@pytest.mark.usefixtures("loops")
@pytest.mark.parametrize("size", [1, 7, 8, 9, 1000, 40_003])
@pytest.mark.parametrize("kind", ["noise", "runs", "one"])
def test_pairs_are_counted(size, kind):
    rng = np.random.default_rng(size)
    pair = [rng.integers(0, 256, size).astype(np.uint8) for _ in range(2)]
    if kind == "runs":
        pair = [np.repeat(a, rng.integers(1, 40, size))[:size] for a in pair]
    if kind == "one":
        pair = [np.full(size, 255, np.uint8), np.zeros(size, np.uint8)]
    counts = np.full((256, 256), 5, np.int64)
    pixels.joint_histogram(*pair, counts)
    assert (counts - 5 == counted_by_numpy(*pair)).all()


@pytest.mark.usefixtures("loops")
def test_counting_is_exact_beyond_float32():
    size = (1 << 24) + 77
    counts = np.zeros((256, 256), np.int64)
    one = np.ones((1, size), np.uint8)
    for _ in range(3):
        pixels.joint_histogram(one, one, counts)
    assert counts[1, 1] == counts.sum() == 3 * size


def test_different_shapes_are_refused():
    with pytest.raises(ValueError, match="differ"):
        Scores(small_table()).add(np.zeros((2, 2), np.uint8), np.zeros((2, 3), np.uint8))


def test_columns_are_translated():
    scores = scored([10, 11, 11], [0, 1, 7])
    lut = np.zeros(256, np.uint8)
    lut[[0, 1]] = 10, 11
    scores.translate(lut)
    assert scores.pixels[10, 10] == scores.pixels[11, 11] == scores.pixels[11, 0] == 1
    assert scores.pixels.sum() == 3


def test_position_prior_predicts_the_commonest_class_of_a_place():
    prior = PositionPrior(3, grid=(2, 2))
    prior.add(np.array([[0, 1], [2, IGNORE_INDEX]], np.uint8))
    prior.add(np.array([[0, 1], [2, 1]], np.uint8).repeat(2, 0).repeat(2, 1))  # another size, the same places
    prior.add(np.array([[1, 1], [0, 1]], np.uint8))
    assert prior.predict((4, 4)).tolist() == [[0, 0, 1, 1]] * 2 + [[2, 2, 1, 1]] * 2
    assert prior.predict((2, 2)).dtype == np.uint8
