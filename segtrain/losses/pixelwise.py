"""Losses that are a sum over pixels: cross-entropy and focal."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from segtrain.config import IGNORE_INDEX
from segtrain.device import kept_constant
from segtrain.losses.base import Groups
from segtrain.losses.tiles import RowTiles, TiledLoss


class CrossEntropy(TiledLoss):
    """-log p of each labelled pixel's class; the mean over pixels, weighted by class if class_weights are given.

    class_weights, label_smoothing: as in torch.nn.functional.cross_entropy; the divisor is the sum of the weights of
    the labelled pixels' classes. groups: a pixel that is one of several classes gets -log of the sum of their
    probabilities.
    """

    marginal = True

    def __init__(
        self, groups: Groups = (), class_weights: Sequence[float] | None = None, label_smoothing: float = 0.0
    ) -> None:
        self.groups = groups
        self.class_weights = class_weights
        self.label_smoothing = label_smoothing

    def count(self, target: Tensor) -> float:
        if self.class_weights is None:
            return super().count(target)
        weights = torch.tensor(self.class_weights, dtype=torch.float64)
        pixels = torch.bincount(target[target != IGNORE_INDEX].long(), minlength=len(weights))
        return float(pixels.cpu().double() @ weights)

    def sums(self, batch: list[RowTiles], wanted: bool) -> list[Tensor]:
        result = []
        for tiles in batch:
            weight = tiles.valid.to(tiles.wide.dtype)
            parts = []
            for r, log_p in tiles.log_probabilities():
                parts.append(self.pixels(tiles, log_p, r).sum())
                if wanted:
                    tiles.add(self.gradient(tiles, log_p, weight[r], r), r)
            result.append(torch.stack(parts).sum())
        return result

    def pixels(self, tiles: RowTiles, log_p: Tensor, r: slice) -> Tensor:
        """Each pixel's loss (rows, W), 0 for ignored pixels. log_p: (rows, C, W)."""
        found = cross_entropies(tiles, log_p, r)
        if self.class_weights is not None or self.label_smoothing:
            weights, own = self.weights_of(tiles, log_p, r)
            found = (1 - self.label_smoothing) * own * found
            if self.label_smoothing:
                found -= self.label_smoothing / tiles.classes * torch.einsum("rcw,c->rw", log_p, weights)
        return found.masked_fill(~tiles.valid[r], 0)

    def gradient(self, tiles: RowTiles, log_p: Tensor, weight: Tensor, r: slice) -> Tensor:
        """Gradient (rows, C, W) of the sum of the pixels' losses times weight (rows, W). Overwrites log_p."""
        index = tiles.index[r]
        # Each member of a group gets its share of the group's probability.
        shares = [(members, here[r][:, None] * log_p[:, members].softmax(1)) for members, here in tiles.grouped]
        hit = torch.ones_like(index, dtype=log_p.dtype)
        for _, here in tiles.grouped:
            hit.masked_fill_(here[r][:, None], 0)
        p = log_p.exp_()
        if self.class_weights is not None or self.label_smoothing:
            weights, own = self.weights_of(tiles, log_p, r)
            hit = (1 - self.label_smoothing) * own[:, None]
            spread = self.label_smoothing / tiles.classes * weights
            p.mul_(hit + spread.sum()).sub_(spread[:, None])
        p.scatter_(1, index, p.gather(1, index) - hit)
        for members, share in shares:
            p[:, members] -= share
        return p.mul_(weight[:, None])

    def weights_of(self, tiles: RowTiles, like: Tensor, r: slice) -> tuple[Tensor, Tensor]:
        """The weights of the classes (C,), and of each pixel's class (rows, W)."""
        values = tuple(self.class_weights or [1.0] * tiles.classes)
        weights = kept_constant(
            like.device, partial(torch.tensor, values, dtype=like.dtype), "weights", values, like.dtype
        )
        return weights, weights[tiles.index[r].squeeze(1)]


def cross_entropies(tiles: RowTiles, log_p: Tensor, r: slice) -> Tensor:
    """-log p of each pixel's class or group, (rows, W), at least 0; meaningless for ignored pixels."""
    found = -log_p.gather(1, tiles.index[r]).squeeze(1)
    for members, here in tiles.grouped:
        found = torch.where(here[r], -log_p[:, members].logsumexp(1).clamp(max=0), found)
    return found


class Focal(CrossEntropy):
    """-(1 - p) ** gamma log p of each labelled pixel's class; the mean over pixels, weighted by class if given.

    class_weights are the paper's alpha, but the divisor is the sum of the labelled pixels' weights. Source: Lin et al.,
    Focal Loss for Dense Object Detection, ICCV 2017, with softmax instead of the sigmoid.
    """

    def __init__(self, gamma: float, groups: Groups = (), class_weights: Sequence[float] | None = None) -> None:
        super().__init__(groups, class_weights)
        self.gamma = gamma

    def pixels(self, tiles: RowTiles, log_p: Tensor, r: slice) -> Tensor:
        missing = -torch.expm1(-cross_entropies(tiles, log_p, r))  # 1 - p
        return super().pixels(tiles, log_p, r) * missing**self.gamma

    def gradient(self, tiles: RowTiles, log_p: Tensor, weight: Tensor, r: slice) -> Tensor:
        found = cross_entropies(tiles, log_p, r)
        missing = -torch.expm1(-found)
        slope = torch.where(missing > 0, found / missing, 1)  # -log p / (1 - p)
        factor = missing**self.gamma * (1 + self.gamma * (1 - missing) * slope)  # d focal / d cross-entropy
        return super().gradient(tiles, log_p, weight * factor, r)
