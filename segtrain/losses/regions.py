"""Losses that compare whole regions, class by class: Dice and Lovasz-Softmax."""

import torch
from torch import Tensor

from segtrain.losses.tiles import RowTiles, TiledLoss, labelled_pixels


class Dice(TiledLoss):
    """1 - the mean of 2 sum(p g) / (sum(p) + sum(g)) over the classes that the image's labels have.

    p: probability, g: 1 where the class is the label; sums over the image's labelled pixels. The mean over the
    images that have labels. Source: the soft F1 of Milletari et al., V-Net, 2016, with sums, not sums of squares.
    """

    def count(self, target: Tensor) -> float:
        return sum(count > 0 for count in labelled_pixels(target))

    def sums(self, batch: list[RowTiles], wanted: bool) -> list[Tensor]:
        return [self.sum_of(tiles, wanted) for tiles in batch]

    def sum_of(self, tiles: RowTiles, wanted: bool) -> Tensor:
        both, either, labels = torch.zeros(3, tiles.classes, dtype=tiles.wide.dtype, device=tiles.wide.device)
        for r, log_p in tiles.log_probabilities():
            p, here = log_p.exp_(), is_label(tiles, r)
            both += p.where(here, 0).sum((0, 2))
            either += (p * tiles.valid[r][:, None]).sum((0, 2))
            labels += here.sum((0, 2))
        either += labels
        present = (labels > 0).to(both.dtype)
        share = present / present.sum().clamp(min=1)
        if wanted:
            hit = 2 * share / either.clamp(min=1)  # of p where the class is the label
            everywhere = hit * both / either.clamp(min=1)
            for r, log_p in tiles.log_probabilities():
                slope = everywhere[:, None] - hit[:, None] * is_label(tiles, r)
                tiles.add(through_softmax(log_p.exp_(), slope, tiles.valid[r]), r)
        return (share * (1 - 2 * both / either.clamp(min=1))).sum()


class Lovasz(TiledLoss):
    """Lovasz-Softmax: the Lovasz extension of each class's Jaccard loss (1 - IoU) at the errors |g - p|, the mean over
    the classes that the image's labels have; the mean over the images that have labels.

    Holds the probabilities of one image at a time at full resolution. Source: Berman, Rannen Triki,
    Blaschko, The Lovasz-Softmax loss, CVPR 2018 (per image, classes present).
    """

    def count(self, target: Tensor) -> float:
        return sum(count > 0 for count in labelled_pixels(target))

    def sums(self, batch: list[RowTiles], wanted: bool) -> list[Tensor]:
        return [self.sum_of(tiles, wanted) for tiles in batch]

    def sum_of(self, tiles: RowTiles, wanted: bool) -> Tensor:
        present = tiles.index.squeeze(1)[tiles.valid].unique().tolist()
        p = torch.cat([log_p.exp_()[:, present] for _, log_p in tiles.log_probabilities()])  # (H, present, W)
        sums = [torch.zeros((), dtype=p.dtype, device=p.device)]
        for k, c in enumerate(present):
            here = (tiles.index.squeeze(1) == c) & tiles.valid
            errors = (here.to(p.dtype) - p[:, k]).abs_().masked_fill_(~tiles.valid, -1).flatten()
            ordered, order = errors.sort(descending=True, stable=True)
            slope = (jaccard_slopes(here.flatten()[order]) / len(present)).to(p.dtype)
            sums.append((ordered.clamp_(min=0) * slope).sum())
            slope = torch.empty_like(errors).index_copy_(0, order, slope).view_as(here)
            p[:, k] = torch.where(here, -slope, slope)  # in p's place
        if wanted:
            for r, log_p in tiles.log_probabilities():
                slope = torch.zeros_like(log_p)
                slope[:, present] = p[r]
                tiles.add(through_softmax(log_p.exp_(), slope, tiles.valid[r]), r)
        return torch.stack(sums).sum()


def jaccard_slopes(here: Tensor) -> Tensor:
    """What each pixel, in this order, adds to the Jaccard loss when it and all pixels before it are wrong: (n,).

    here: bool (n,), whether the class is the pixel's label. A wrong pixel of the class shrinks the intersection by 1
    and leaves the union; any other pixel enlarges the union by 1. In closed form, because differences of losses would
    cancel.
    """
    total = here.sum()
    missed = here.cumsum(0)
    inside = total - missed
    union = (total + torch.arange(1, len(here) + 1, device=here.device) - missed).double()
    return torch.where(here, 1 / union, inside / (union * (union - 1)))


def is_label(tiles: RowTiles, r: slice) -> Tensor:
    """Whether each class is the pixel's label, bool (rows, C, W)."""
    classes = torch.arange(tiles.classes, device=tiles.index.device)
    return (tiles.index[r] == classes[:, None]) & tiles.valid[r][:, None]


def through_softmax(p: Tensor, slope: Tensor, valid: Tensor) -> Tensor:
    """Gradient with respect to the logits from that with respect to the probabilities p; both (rows, C, W).

    valid: bool (rows, W); the gradient is 0 elsewhere.
    """
    return (slope - (slope * p).sum(1, keepdim=True)).mul_(p).mul_(valid[:, None])
