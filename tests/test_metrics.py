import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from segtrain.data.labels import IGNORE
from segtrain.metrics import ConfusionMatrix, PositionPrior

NAMES = ["a", "b", "c", "d"]


def slow_iou(target, prediction, classes):
    """Set by set: the definition, written independently. None where the union is empty."""
    result = []
    for k in range(classes):
        truth = {i for i, t in enumerate(target) if t == k}
        answer = {i for i, (t, p) in enumerate(zip(target, prediction, strict=True)) if p == k and t != IGNORE}
        union = truth | answer
        result.append(len(truth & answer) / len(union) if union else None)
    return result


labels = st.lists(st.sampled_from([0, 1, 2, 3, IGNORE]), min_size=1, max_size=60)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(labels, st.randoms(use_true_random=False))
def test_iou_equals_the_definition(target, random):
    prediction = [random.choice([0, 1, 2, 3, 200]) for _ in target]
    matrix = ConfusionMatrix(4)
    matrix.add(np.array([target], np.uint8), np.array([prediction], np.uint8))
    scores = matrix.scores(NAMES)
    expected = slow_iou(target, prediction, 4)
    assert list(scores["per_class"].values()) == [None if v is None else pytest.approx(v) for v in expected]
    known = [v for v in expected if v is not None]
    assert scores["miou"] == (pytest.approx(sum(known) / len(known)) if known else None)
    assert scores["classes_averaged"] == len(known)
    valid = [(t, p) for t, p in zip(target, prediction, strict=True) if t != IGNORE]
    assert scores["pixel_accuracy"] == (pytest.approx(np.mean([t == p for t, p in valid])) if valid else None)


def test_hand_worked_example():
    target = np.array([[0, 0, 0, 1, 1, IGNORE]], np.uint8)
    prediction = np.array([[0, 0, 1, 1, 2, 3]], np.uint8)
    matrix = ConfusionMatrix(4)
    matrix.add(target, prediction)
    scores = matrix.scores(NAMES)
    # a: 2 of 3; b: 1 hit, 1 false alarm, 1 miss; c: false alarm only -> 0; d: on void only -> left out
    assert scores["per_class"] == {"a": pytest.approx(2 / 3), "b": pytest.approx(1 / 3), "c": 0.0, "d": None}
    assert scores["miou"] == pytest.approx(1 / 3)
    assert scores["pixel_accuracy"] == pytest.approx(3 / 5)
    assert scores["classes_in_ground_truth"] == 2


def test_matrices_add_up_and_stay_exact_beyond_float32():
    matrix = ConfusionMatrix(2)
    matrix.counts[0, 0] = 2**24
    for _ in range(3):
        matrix.add(np.zeros((1, 1), np.uint8), np.zeros((1, 1), np.uint8))
    assert matrix.counts[0, 0] == 2**24 + 3


@pytest.mark.parametrize(
    ("target", "prediction", "words"),
    [(np.zeros((2, 2)), np.zeros((2, 3)), "differ in shape"), (np.full((2, 2), 7), np.zeros((2, 2)), "neither class")],
)
def test_wrong_input_is_refused(target, prediction, words):
    with pytest.raises(ValueError, match=words):
        ConfusionMatrix(4).add(target.astype(np.uint8), prediction.astype(np.uint8))


def test_position_prior_predicts_the_commonest_class_of_a_place():
    prior = PositionPrior(3, grid=(2, 2))
    prior.add(np.array([[0, 1], [2, IGNORE]], np.uint8))
    prior.add(np.array([[0, 1], [2, 1]], np.uint8).repeat(2, 0).repeat(2, 1))  # another size, the same places
    prior.add(np.array([[1, 1], [0, 1]], np.uint8))
    assert prior.predict((4, 4)).tolist() == [[0, 0, 1, 1]] * 2 + [[2, 2, 1, 1]] * 2
    assert prior.predict((2, 2)).dtype == np.uint8
