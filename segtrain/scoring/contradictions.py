"""Regions of an image where a network contradicts the labels, and how suspicious that makes the label."""

from collections.abc import Iterator
from typing import NamedTuple

import cv2
import numpy as np

SMALLEST = 25  # pixels of a region
HALF_SURE = 400  # pixels at which the area counts two thirds; a larger region counts hardly more


class Contradiction(NamedTuple):
    """A connected region with one label and one prediction, train ids.

    x, y, w, h: its box [pixels]. confidence: mean probability of the prediction in it. area: pixels. covered: the
    larger one of the fractions that the region has of its labelled and of its predicted object.
    """

    x: int
    y: int
    w: int
    h: int
    label: int
    predicted: int
    confidence: float
    area: int
    covered: float

    @property
    def suspicion(self) -> float:
        """From 0 to 1. An error of the network is unsure, small, or a part of an object; an error of the label none of
        these."""
        return float(self.confidence * self.covered * -np.expm1(-self.area / HALF_SURE))


def contradictions(
    target: np.ndarray, prediction: np.ndarray, probability: np.ndarray, classes: int
) -> Iterator[Contradiction]:
    """The regions of at least SMALLEST pixels where label and prediction differ.

    target, prediction: train ids uint8 (H, W); without a label, or predicted as no class, nothing is contradicted.
    probability: of the predicted class, float32 (H, W).
    """
    wrong = (target != prediction) & (target < classes) & (prediction < classes)
    pairs = np.where(wrong, target.astype(np.int32) * classes + prediction, -1)
    objects = {}
    for code in np.unique(pairs[wrong]):
        label, predicted = divmod(int(code), classes)
        _, numbers, stats, _ = cv2.connectedComponentsWithStats((pairs == code).astype(np.uint8), connectivity=8)
        for number in np.flatnonzero(stats[:, cv2.CC_STAT_AREA] >= SMALLEST):
            x, y, w, h, area = map(int, stats[number])
            inside = numbers[y : y + h, x : x + w] == number
            if number == 0 or not area:
                continue
            covered = 0.0
            for name, plane, value in (("label", target, label), ("predicted", prediction, predicted)):
                if (name, value) not in objects:
                    mask = (plane == value).astype(np.uint8)
                    objects[name, value] = cv2.connectedComponentsWithStats(mask, connectivity=8)[1:3]
                of_class, sizes = objects[name, value]
                whole = of_class[y : y + h, x : x + w][inside][0]
                covered = max(covered, area / int(sizes[whole, cv2.CC_STAT_AREA]))
            confidence = float(probability[y : y + h, x : x + w][inside].mean())
            yield Contradiction(x, y, w, h, label, predicted, confidence, area, covered)
