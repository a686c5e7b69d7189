"""Counts of two imaginary networks on random images, whose true scores are known, for tests of the intervals."""

import numpy as np

from segtrain.scoring import bootstrap

# Fraction of the images that show a class, and the pixels of it that each network finds.
PRESENCE = np.array([1, 0.9, 0.6, 0.3, 0.1])
FOUND = np.array([0.95, 0.85, 0.8, 0.7, 0.6]), np.array([0.95, 0.87, 0.78, 0.7, 0.65])


def synthetic_pair(rng, images, found=FOUND):
    """Hits, labelled and predicted pixels (3, N, C) of two networks on the same images.

    The areas of objects are log-normal. Both networks find the same images difficult (correlation 0.64). The missed
    pixels of a class in an image go to another class.
    """
    classes = len(PRESENCE)
    area = np.where(rng.random((images, classes)) < PRESENCE, np.exp(rng.normal(6, 1, (images, classes))), 0).round()
    difficulty, answers = rng.normal(size=(images, classes)), []
    for share in found:
        own = 0.8 * difficulty + 0.6 * rng.normal(size=(images, classes))
        hits = (area / (1 + np.exp(-np.log(share / (1 - share)) - 1.2 * own))).round()
        predicted, other = hits.copy(), rng.integers(1, classes, (images, classes))
        np.add.at(predicted, (np.arange(images)[:, None], (np.arange(classes) + other) % classes), area - hits)
        answers.append(np.stack([hits, area, predicted]).astype(np.int64))
    return answers


def true_differences(found=FOUND, images=1_000_000):
    """Of mIoU and each class, (1 + C,), from as many images as make the rest of the error irrelevant."""
    first, second = synthetic_pair(np.random.default_rng(99), images, found)
    return bootstrap.scores_of(second.sum(1), "union") - bootstrap.scores_of(first.sum(1), "union")


def covered(pairs, images, truth, resamples=1000):
    """Fraction of the pairs whose interval holds the true difference, (1 + C,)."""
    held = []
    for number in range(pairs):
        first, second = synthetic_pair(np.random.default_rng([number, images]), images)
        found = bootstrap.paired_intervals(first, second, "union", resamples)
        held.append([
            np.nan if np.isnan(one.value) else one.low <= true <= one.high
            for one, true in zip([found.mean, *found.classes], truth, strict=True)
        ])  # fmt: skip
    return np.nanmean(np.array(held, float), 0)
