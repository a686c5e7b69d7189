"""Regions of an image where a network contradicts the labels, and how suspicious that makes the labels.

How sure the network is says little where it has not learnt a class. So a region is suspicious where the network gives
the label hardly any probability, where it sees a whole object of another class, and where this class is no common
mistake of its own for that label (class-conditional noise, as in Northcutt et al., Confident Learning, 2021).
"""

import heapq
from collections.abc import Iterator
from typing import NamedTuple

import cv2
import numpy as np

from segtrain.native.pixels import joint_histogram

SMALLEST = 25  # pixels of a region
HALF_SURE = 400  # pixels at which the area counts two thirds; a larger region counts hardly more
LEAST = 1e-4  # a smaller probability counts as this one: no pixel decides alone


class Contradiction(NamedTuple):
    """A connected region with one label and one prediction, train ids.

    x, y, w, h: its box [pixels]. confidence: mean probability of the prediction in it. area: pixels. covered: the
    fraction that the region has of its predicted object. odds: the geometric mean over its pixels of the probability of
    the prediction, divided by that of the label.
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
    odds: float

    @property
    def strength(self) -> float:
        """The odds, less for a small region and for a part of a predicted object. At least 0."""
        return float(self.odds * self.covered * -np.expm1(-self.area / HALF_SURE))


class Suspicion(NamedTuple):
    """A contradiction, its image, by the number that `add` was given, and its `strength` times the `surprise`."""

    suspicion: float
    image: int
    found: Contradiction


def contradictions(
    target: np.ndarray, prediction: np.ndarray, probability: np.ndarray, of_label: np.ndarray, classes: int
) -> Iterator[Contradiction]:
    """The regions of at least SMALLEST pixels where label and prediction differ.

    target, prediction: train ids uint8 (H, W); without a label, or predicted as no class, nothing is contradicted.
    probability, of_label: of the predicted class and of the labelled one, float32 (H, W).
    """
    wrong = (target != prediction) & (target < classes) & (prediction < classes)
    pairs = np.where(wrong, target.astype(np.int32) * classes + prediction, -1)
    ratio = np.log(np.maximum(probability, LEAST)) - np.log(np.maximum(of_label, LEAST))
    objects: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # predicted class -> number of each pixel's object, sizes
    for code in np.unique(pairs[wrong]):
        label, predicted = divmod(int(code), classes)
        _, numbers, stats, _ = cv2.connectedComponentsWithStats((pairs == code).astype(np.uint8), connectivity=8)
        for number in np.flatnonzero(stats[:, cv2.CC_STAT_AREA] >= SMALLEST):
            x, y, w, h, area = map(int, stats[number])
            if number == 0:
                continue
            box = slice(y, y + h), slice(x, x + w)
            inside = numbers[box] == number
            if predicted not in objects:
                mask = (prediction == predicted).astype(np.uint8)
                _, of_class, sizes, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
                objects[predicted] = of_class, sizes[:, cv2.CC_STAT_AREA]
            of_class, areas = objects[predicted]
            covered = area / int(areas[of_class[box][inside][0]])
            confidence = float(probability[box][inside].mean())
            odds = float(np.exp(ratio[box][inside].mean(dtype=np.float64)))
            yield Contradiction(x, y, w, h, label, predicted, confidence, area, covered, odds)


def surprise(counts: np.ndarray) -> np.ndarray:
    """How little a prediction is a common mistake for a label: float64 (C, C), label x prediction, 0 or more.

    The square root of how much more often the network predicts a class where it is the label than where the other class
    is. 0 where there is nothing to compare. counts: pixels, int64 (C, C), label x prediction.
    """
    labelled = counts.sum(1, keepdims=True)
    often = np.divide(counts, labelled, out=np.zeros(counts.shape), where=labelled > 0)
    return np.sqrt(np.divide(np.diagonal(often), often, out=np.zeros(counts.shape), where=often > 0))


class Ranking:
    """The most suspicious contradictions of many images."""

    def __init__(self, classes: int, top: int) -> None:
        """top: how many to keep."""
        self.classes, self.top, self.regions = classes, top, 0
        self.counts = np.zeros((256, 256), np.int64)  # pixels, label x prediction
        # The strongest of each label and prediction, because the surprise of a pair is known at the end only. Heaps of
        # (strength, minus its number, image, contradiction), the weakest first.
        self.kept: dict[tuple[int, int], list[tuple[float, int, int, Contradiction]]] = {}

    def add(
        self, image: int, target: np.ndarray, prediction: np.ndarray, probability: np.ndarray, of_label: np.ndarray
    ) -> None:
        """Add an image by its number; the arrays as of `contradictions`."""
        joint_histogram(target, prediction, self.counts)
        for found in contradictions(target, prediction, probability, of_label, self.classes):
            self.regions += 1
            heap = self.kept.setdefault((found.label, found.predicted), [])
            entry = found.strength, -self.regions, image, found
            (heapq.heappushpop if len(heap) == self.top else heapq.heappush)(heap, entry)

    def best(self) -> list[Suspicion]:
        """The `top` most suspicious ones, the first added first where they are equal."""
        weight = surprise(self.counts[: self.classes, : self.classes])
        every = [(entry[0] * weight[pair], *entry[1:]) for pair, heap in self.kept.items() for entry in heap]
        every.sort(key=lambda entry: entry[:2], reverse=True)
        return [Suspicion(float(suspicion), image, found) for suspicion, _, image, found in every[: self.top]]
