"""Loss max-pooling by its definition."""

import math

import numpy as np


def bounds(n, m, p):
    """gamma and tau of loss max-pooling."""
    gamma = n ** (1 / p - 1)
    return gamma, gamma * m ** (-1 / p)


def bisected_weights(losses, m, p):
    """Weights of loss max-pooling: w = min(tau, (l / a) ** (1 / (p - 1))), with a such that ||w||_p = gamma."""
    gamma, tau = bounds(len(losses), m, p)
    low, high = 1e-30, 1e30
    for _ in range(400):
        a = math.sqrt(low * high)
        w = np.minimum(tau, (losses / a) ** (1 / (p - 1)))
        low, high = (a, high) if (w**p).sum() > gamma**p else (low, a)
    return w
