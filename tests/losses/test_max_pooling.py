"""The weights of loss max-pooling."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import LinearConstraint, NonlinearConstraint, minimize

from segtrain.losses.hard_pixels import highest_weights
from tests.helpers.max_pooling import bounds


@pytest.mark.parametrize(("n", "share"), [(1, 0.5), (3, 0.4), (6, 0.25), (6, 0.5), (8, 1.0)])
@pytest.mark.parametrize("p", [1.1, 1.7, 3.0])
def test_the_weights_are_the_best_there_are(n, share, p):
    """Against a general optimiser that does not sort."""
    values = np.sort(np.random.default_rng(n).exponential(size=n))[::-1].copy()
    m = math.ceil(share * n)
    gamma, tau = bounds(n, m, p)
    found = highest_weights(torch.from_numpy(values), m, p).numpy()
    assert (found >= 0).all()
    assert found.max() <= tau * (1 + 1e-12)
    assert (found**p).sum() ** (1 / p) <= gamma * (1 + 1e-12)
    norm = NonlinearConstraint(lambda w: (np.abs(w) ** p).sum(), -np.inf, gamma**p)
    box = LinearConstraint(np.eye(n), 0, tau)
    best = minimize(lambda w: -(w @ values), np.full(n, 0.9 / n), method="SLSQP", constraints=[norm, box], tol=1e-12)
    assert found @ values == pytest.approx(-best.fun, rel=1e-6)


def test_weights_worked_by_hand():
    """p = 2, n = 4, m = 1: gamma = tau = 1 / 2; the weights are the losses, scaled to that length: no bound is met.
    m = 2: tau = 1 / sqrt 8. Of (3, 1, 1, 1) the first is bound; the others share what is left, 1 / 4 - 1 / 8."""
    of = torch.tensor([3.0, 1, 1, 1], dtype=torch.float64)
    torch.testing.assert_close(highest_weights(of, 1, 2.0), of / 12**0.5 / 2)
    want = torch.tensor([1 / 8, 1 / 24, 1 / 24, 1 / 24], dtype=torch.float64).sqrt()
    torch.testing.assert_close(highest_weights(of, 2, 2.0), want)


@pytest.mark.parametrize("p", [1.001, 1.7, 50.0])
@pytest.mark.parametrize("values", [[2.0, 2, 2, 2], [2.0, 1, 0, 0], [1e30, 1e-30, 1e-30, 1e-30], [0.0, 0, 0, 0]])
def test_weights_stay_finite_at_extremes(values, p):
    for m in (1, 2, 4):
        found = highest_weights(torch.tensor(values, dtype=torch.float64), m, p)
        gamma, tau = bounds(4, m, p)
        assert found.isfinite().all()
        assert found.max() <= tau * (1 + 1e-12)
        assert found.pow(p).sum() <= gamma**p * (1 + 1e-9)
        least = torch.tensor([1 / m] * m + [0] * (4 - m), dtype=torch.float64)  # allowed, so never better
        of = torch.tensor(values, dtype=torch.float64)
        assert found @ of >= (tau / (1 / m)) * (least @ of) * (1 - 1e-9)
