"""How far the scores of a recipe's seeds spread, and how many seeds a difference needs to be seen."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

LEVEL, POWER = 0.95, 0.8
MOST = 10_000  # seeds; nobody trains more


class SeedSpread(NamedTuple):
    """Scores of several seeds, fractions: their mean with a 95 % interval (Student's t), and standard deviation."""

    seeds: int
    mean: float
    deviation: float
    low: float
    high: float


def seed_spread(scores: Sequence[float]) -> SeedSpread:
    """scores: of two or more seeds of one recipe on the same images."""
    from scipy.special import stdtrit

    values = np.array(scores)
    deviation, count = float(values.std(ddof=1)), len(values)
    reach = float(stdtrit(count - 1, (1 + LEVEL) / 2)) * deviation / np.sqrt(count)
    mean = float(values.mean())
    return SeedSpread(count, mean, deviation, mean - reach, mean + reach)


def difference_of_means(first: Sequence[float], second: Sequence[float]) -> tuple[float, float, float]:
    """The second mean minus the first, with its 95 % interval by Welch's t; two or more scores each."""
    from scipy.special import stdtrit

    variances = [float(np.var(scores, ddof=1)) / len(scores) for scores in (first, second)]
    difference, total = float(np.mean(second) - np.mean(first)), sum(variances)
    if total == 0:
        return difference, difference, difference
    freedom = total**2 / sum(v**2 / (len(s) - 1) for v, s in zip(variances, (first, second), strict=True))
    reach = float(stdtrit(freedom, (1 + LEVEL) / 2)) * np.sqrt(total)
    return difference, difference - reach, difference + reach


def seeds_needed(deviation: float, difference: float) -> int | None:
    """Seeds of each of two recipes so that a t-test at 5 % sees a true difference in 80 % of the cases; None: > 10,000.

    deviation: of the scores of seeds, assumed the same for both recipes. difference: more than 0, in the same unit.
    """
    low, high = 1, MOST
    if not sees_difference(high, deviation, difference):
        return None
    while high - low > 1:  # low is too few, high is enough
        middle = (low + high) // 2
        low, high = (low, middle) if sees_difference(middle, deviation, difference) else (middle, high)
    return high


def sees_difference(count: int, deviation: float, difference: float) -> bool:
    """Whether two-sided t-tests of two times `count` seeds have the power."""
    from scipy.special import nctdtr, stdtrit

    if deviation == 0:
        return True
    freedom = 2 * count - 2
    limit, shift = stdtrit(freedom, (1 + LEVEL) / 2), difference / (deviation * np.sqrt(2 / count))
    return bool(shift > 30 or 1 - nctdtr(freedom, shift, limit) >= POWER)
