"""Small networks in float64 and batches for single training steps."""

import numpy as np
import torch
from torch import nn

from segtrain.config import IGNORE_INDEX
from segtrain.data.loader import Batch
from segtrain.models.blocks import IdentityResidualBlock, Norm, conv


class Plain(nn.Module):
    """A network without statistics, so that accumulation must equal the larger batch."""

    def __init__(self):
        super().__init__()
        self.body = nn.Conv2d(3, 4, 3, 2, 1)
        self.cls = nn.Conv2d(4, 3, 1)

    def forward(self, x, upsample=True):
        return self.cls(torch.tanh(self.body(x)))


class Normed(nn.Module):
    """Successive norms, a residual block, dropout, and a pooled branch with one value per image."""

    def __init__(self, norm):
        super().__init__()
        self.body = nn.Sequential(conv(3, 6, 3, 2), norm(6), IdentityResidualBlock(6, (8, 8), norm, 2, dropout=0.3))
        self.pooled, self.pooled_norm = conv(8, 8, 1), norm(8)
        self.cls = nn.Conv2d(8, 3, 1)

    def forward(self, x, upsample=True):
        x = self.body(x)
        return self.cls(x + self.pooled_norm(self.pooled(x.mean((2, 3), keepdim=True))))


def small_network(norm):
    torch.manual_seed(0)
    network = Plain() if norm is None else Normed(Norm(norm))
    network.register_forward_pre_hook(lambda module, arguments: (arguments[0].double(),))
    return network.double()


def batch(positions):
    """Images that depend on their positions only, with unequal numbers of labelled pixels."""
    images, targets = [], []
    for position in positions:
        rng = np.random.default_rng(position)
        images.append(rng.integers(0, 255, (3, 33, 47)))
        target = rng.integers(0, 3, (33, 47))
        target[: 3 * (position % 7)] = IGNORE_INDEX
        targets.append(target)
    tensors = (torch.tensor(np.stack(arrays).astype(np.uint8)) for arrays in (images, targets))
    return Batch(
        *tensors, [f"p{position}" for position in positions], list(positions), [[0, 0, 33, 47, 0]] * len(positions)
    )
