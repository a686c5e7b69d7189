"""Losses that weight an image's hardest pixels: bootstrapping and loss max-pooling."""

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from segtrain.losses.base import Groups
from segtrain.losses.pixelwise import CrossEntropy
from segtrain.losses.tiles import RowTiles, labelled_pixels


class HardPixelLoss(CrossEntropy):
    """Weights an image's pixels by their losses; upsamples the image twice, for the losses and for the gradient.

    class_weights: factors of the pixels' losses, by which the hardest are chosen too. The divisor does not know them.
    """

    def sums(self, batch: list[RowTiles], wanted: bool) -> list[Tensor]:
        every = [[self.pixels(tiles, log_p, r) for r, log_p in tiles.log_probabilities()] for tiles in batch]
        losses = torch.stack([torch.cat(tiles) for tiles in every])
        labelled = sum(tiles.labelled for tiles in batch)
        weights = self.weights(losses, torch.stack([tiles.valid for tiles in batch]), labelled)
        if wanted:
            for tiles, weight in zip(batch, weights, strict=True):
                for r, log_p in tiles.log_probabilities():
                    tiles.add(self.gradient(tiles, log_p, weight[r], r), r)
        return list((losses * weights).flatten(1).sum(1))

    @contextmanager
    def counted(self, target: Tensor) -> Iterator[None]:
        self.host_counts = labelled_pixels(target)
        try:
            yield
        finally:
            self.host_counts = None

    @abstractmethod
    def weights(self, losses: Tensor, valid: Tensor, labelled: int) -> Tensor:
        """Weight of each pixel (N, H, W), 0 for ignored pixels, from losses (N, H, W) and valid, bool (N, H, W).

        labelled: how many pixels are valid.
        """


class Bootstrapped(HardPixelLoss):
    """Cross-entropy of the hardest pixels only: the fraction `hardest` of each image's pixels, rounded up.

    normalisation "chosen": the fraction is of the labelled pixels; the sum over all chosen pixels is divided by their
    number. Source: In-Place ABN paper, section 4.2 (p = 1, m = 25 %). "seamseg": the fraction is of all pixels, ignored
    ones with loss 0; the mean over an image's chosen pixels, then over all images. Source: SemanticSegLoss of
    mapillary/seamseg. per_batch: the fraction is of the whole batch, not of each image.
    """

    def __init__(
        self, hardest: float, normalisation: str = "chosen", per_batch: bool = False, groups: Groups = (),
        label_smoothing: float = 0.0, class_weights: Sequence[float] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(groups, class_weights, label_smoothing)
        self.hardest = hardest
        self.normalisation = normalisation
        self.per_batch = per_batch

    def count(self, target: Tensor) -> float:
        if self.normalisation == "seamseg":
            return len(target)
        batch = target.flatten()[None] if self.per_batch else target
        return sum(math.ceil(count * self.hardest) for count in labelled_pixels(batch))

    def weights(self, losses: Tensor, valid: Tensor, labelled: int) -> Tensor:
        if self.normalisation == "seamseg":
            share = math.ceil(losses.numel() * self.hardest)
            return hardest_of(losses, share) * valid / share
        return hardest_of(losses.masked_fill(~valid, -1), math.ceil(labelled * self.hardest))


def hardest_of(losses: Tensor, count: int) -> Tensor:
    """1 for the `count` highest losses, 0 elsewhere; shape and dtype of `losses`."""
    chosen = losses.flatten().topk(count, sorted=False).indices
    return torch.zeros_like(losses).flatten().index_fill_(0, chosen, 1).view_as(losses)


class MaxPooling(HardPixelLoss):
    """Loss max-pooling: each image's highest weighted sum of pixel losses, over weights w >= 0 with ||w||_p <= gamma
    and ||w||_inf <= tau; the mean over the images that have labels.

    gamma = n ** (-1 / q), tau = gamma * m ** (-1 / p), 1 / p + 1 / q = 1, for n labelled pixels and m = hardest * n,
    rounded up: so at least m pixels count, p = 1 is the mean over the hardest m, and p = inf that over all. The
    gradient is that of the sum with the best weights held fixed (which is that of the maximum, by Danskin's theorem).
    Source: Rota Bulo, Neuhold, Kontschieder, Loss Max-Pooling for Semantic Image Segmentation, CVPR 2017, section 3;
    the weights are exact, by sorting.
    """

    def __init__(
        self, hardest: float, p: float, groups: Groups = (), label_smoothing: float = 0.0,
        class_weights: Sequence[float] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(groups, class_weights, label_smoothing)
        self.hardest = hardest
        self.p = p

    def count(self, target: Tensor) -> float:
        return sum(count > 0 for count in labelled_pixels(target))

    def weights(self, losses: Tensor, valid: Tensor, labelled: int) -> Tensor:
        n = labelled
        m = math.ceil(n * self.hardest)
        if n == 0 or self.p == math.inf:
            return valid.to(losses.dtype) / max(n, 1)
        if self.p == 1:
            return hardest_of(losses.masked_fill(~valid, -1), m) / m
        order = losses.masked_fill(~valid, -1).flatten().argsort(descending=True, stable=True)[:n]
        best = highest_weights(losses.flatten()[order].double(), m, self.p).to(losses.dtype)
        return torch.zeros_like(losses).flatten().index_copy_(0, order, best).view_as(losses)


def at(values: Tensor, k: Tensor) -> Tensor:
    """values[k] for a k on the device, without waiting for it."""
    return values.index_select(0, k[None]).squeeze(0)


def highest_weights(losses: Tensor, m: int, p: float) -> Tensor:
    """The weights of MaxPooling for losses (n,), float64, in descending order, and 1 < p < inf.

    At the maximum the first k weights are tau and the others in proportion to loss ** (q - 1), scaled to the norm that
    is left. k is the least number for which none of those is above tau: (m - k) loss_k ** q <= the sum of loss ** q
    from k on. In logarithms: q is large where p is near 1.
    """
    n, q = len(losses), p / (p - 1)
    tau = n ** (-1 / q) * m ** (-1 / p)
    log = losses.log()
    rest = (q * log).flip(0).logcumsumexp(0).flip(0)  # of the sum from each pixel on
    left = torch.arange(m, 0, -1, dtype=losses.dtype, device=losses.device).log()  # log(m - k)
    above = left[:-1] + q * log[: m - 1] > rest[: m - 1]  # true, and from some k on false
    k = above.sum()
    share = ((at(left, k) - at(rest, k)) / p + (q - 1) * log).clamp(max=0).exp()
    share = torch.where(torch.arange(n, device=losses.device) < k, 1, share)
    return tau * share.nan_to_num(0)  # 0 / 0 where no loss is left: what it weighs is 0
