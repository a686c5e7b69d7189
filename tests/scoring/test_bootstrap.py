"""Intervals of differences: hand-worked cases, exact symmetries, coverage on simulated pairs, speed."""

import time
from itertools import product

import numpy as np
import pytest

from segtrain.scoring.bootstrap import (
    left_out_sums,
    paired_intervals,
    resampled_sums,
    score_intervals,
    scores_of,
    widened_interval,
)
from segtrain.scoring.scores import iou_of, mean
from tests.helpers.synthetic_pairs import FOUND, covered, synthetic_pair, true_differences


def some_counts(images=6, classes=3):
    rng = np.random.default_rng(1)
    matrices = rng.integers(0, 50, (images, classes, classes + 1)) * (rng.random((images, classes, classes + 1)) < 0.5)
    matrices[:, -1] = 0  # never labelled
    hits = np.diagonal(matrices[..., :-1], axis1=1, axis2=2)
    return matrices, np.stack([hits, matrices.sum(2), matrices[..., :-1].sum(1)])


@pytest.mark.parametrize("absent", ["union", "ground truth"])
def test_scores_are_those_of_the_confusion_matrix(absent):
    matrices, parts = some_counts()
    found, iou = scores_of(parts.sum(1), absent), iou_of(matrices.sum(0), absent)
    np.testing.assert_array_equal(found[1:], iou)
    assert found[0] == pytest.approx(mean(iou), rel=1e-15)
    assert np.isnan(scores_of(np.zeros((3, 2, 4)), absent)).all()


def test_resamples_are_sums_of_drawn_images():
    """Every resample of three images is one of the 27 possible sums, and all turn up about as often."""
    _, parts = some_counts(3)
    sums = resampled_sums(parts, 5400, 0)
    possible = [parts[:, list(drawn)].sum(1) for drawn in product(range(3), repeat=3)]
    number = [next(i for i, one in enumerate(possible) if (sums[:, r] == one).all()) for r in range(5400)]
    multiplicity = [sum((one == other).all() for other in possible) for one in possible]
    times = np.bincount(number, minlength=27)
    for first in set(number):
        assert times[first] == pytest.approx(200 * multiplicity[first], abs=5 * np.sqrt(200 * multiplicity[first]))
    np.testing.assert_array_equal(left_out_sums(parts)[:, 1], parts[:, 0] + parts[:, 2])


def test_an_interval_worked_by_hand():
    """A mean of N values: its jackknife error is their standard error, and the interval nearly Student's."""
    from scipy import stats

    values = 0.3 + stats.norm.ppf((np.arange(25) + 0.5) / 25)  # symmetric, as Student's interval is
    drawn = values[np.random.default_rng(0).integers(25, size=(20000, 25))].mean(1)
    low, high = widened_interval(values.mean(), drawn, (values.sum() - values) / 24)
    student = stats.t.interval(0.95, 24, values.mean(), stats.sem(values))
    assert (low, high) == pytest.approx(student, abs=0.02)
    assert np.isnan(widened_interval(1.0, np.ones(9), np.ones(1))).all()
    assert np.isnan(widened_interval(np.nan, np.ones(9), np.ones(5))).all()
    assert widened_interval(1.0, np.ones(9), np.ones(5)) == (1.0, 1.0)


def test_one_image_with_a_class_gives_no_interval():
    """Its resamples all have the same IoU, which says nothing about other images."""
    first, second = (one.copy() for one in synthetic_pair(np.random.default_rng(0), 50))
    for parts in (first, second):
        parts[:, 1:, 4] = 0
        parts[:, 0, 4] = 60, 100, 80
    second[0, 0, 4] = 70
    found = paired_intervals(first, second, "union").classes[4]
    assert found.value > 0 and np.isnan([found.low, found.high]).all() and not found.excludes_zero
    first[:, 1, 4], second[:, 1, 4] = (10, 100, 80), (12, 100, 80)
    wide = paired_intervals(first, second, "union").classes[4]
    assert wide.low < wide.value < wide.high


def test_symmetries_hold_exactly():
    first, second = synthetic_pair(np.random.default_rng(0), 50)
    forth, back = paired_intervals(first, second, "union"), paired_intervals(second, first, "union")
    for one, other in zip([forth.mean, *forth.classes], [back.mean, *back.classes], strict=True):
        assert one.value == -other.value
        assert (one.low, one.high) == pytest.approx((-other.high, -other.low), rel=1e-9)
    again = paired_intervals(first, second, "union")
    assert again == forth  # the seed is fixed
    assert paired_intervals(first, second, "union", seed=1) != forth
    same = paired_intervals(first, first, "union")
    assert all((one.value, one.low, one.high) == (0, 0, 0) for one in [same.mean, *same.classes])
    assert not same.mean.excludes_zero
    alone = score_intervals(second, "union")
    assert alone.mean.low < alone.mean.value < alone.mean.high


def test_pairing_narrows_the_interval():
    first, second = synthetic_pair(np.random.default_rng(0), 200)
    paired = paired_intervals(first, second, "union").mean
    alone = [score_intervals(one, "union").mean for one in (first, second)]
    apart = np.hypot(*(one.high - one.low for one in alone))
    assert paired.high - paired.low < 0.8 * apart


def test_a_class_in_no_image_has_no_interval():
    _, parts = some_counts()
    found = score_intervals(parts, "ground truth")
    assert np.isnan([found.classes[2].value, found.classes[2].low]).all() and not found.classes[2].excludes_zero
    assert not np.isnan(found.mean.low)


def test_a_large_difference_is_found_and_none_is_not():
    better = FOUND[0], np.array([0.98, 0.95, 0.9, 0.9, 0.8])
    assert paired_intervals(*synthetic_pair(np.random.default_rng(0), 100, better), "union").mean.low > 0
    equal = FOUND[0], FOUND[0]
    wrong = [
        paired_intervals(*synthetic_pair(np.random.default_rng(i), 60, equal), "union", 400).mean.excludes_zero
        for i in range(100)
    ]
    assert sum(wrong) <= 10  # 5 are expected


@pytest.mark.parametrize(
    "images", [pytest.param(30, marks=pytest.mark.slow), 100, pytest.param(500, marks=pytest.mark.slow)]
)
def test_coverage_of_1000_pairs(images):
    found = covered(1000, images, true_differences())
    print(f"{images} images: mIoU {100 * found[0]:.1f} %, classes {(100 * found[1:]).round(1)}")
    assert 0.925 <= found[0] <= 0.985 and found[1:].min() >= 0.905 and found.max() <= 0.985


def test_2000_resamples_of_500_images_and_19_classes_take_seconds():
    rng = np.random.default_rng(0)
    hits = rng.integers(0, 9000, (500, 19))
    parts = np.stack([hits, hits + 500, hits + 700])
    start = time.process_time()
    paired_intervals(parts, parts + np.array([[[9]], [[0]], [[0]]]), "union")
    assert time.process_time() - start < 5
