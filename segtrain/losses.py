"""The training loss. It is defined on the batch, not per picture, so that it does not depend on how pictures group.

It takes the logits at the network's own stride and never holds an upsampled picture: strips of rows are upsampled,
turned into losses and gradients and forgotten, and only the gradient at the network's stride is kept for backward.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from segtrain.data.labels import IGNORE

# Numbers in a strip of (rows, classes, columns): what fits a core's cache, and what keeps a GPU busy.
STRIP = {"cpu": 2**18, "cuda": 2**25}


def upsampled_cross_entropy(
    logits: Tensor, target: Tensor, hardest: float = 1.0, groups: Sequence[Sequence[int]] = ()
) -> Tensor:
    """Mean cross-entropy, over the hardest pixels of each picture, of logits upsampled to the target's size: a scalar.

    logits: float (N, C, h, w), at any stride. target: int64 (N, H, W), IGNORE where there is no label. hardest: share
    of a picture's labelled pixels that counts, rounded up; 1 is the ordinary loss. The upsampling is bilinear, corners
    not aligned. The sum over all chosen pixels of the batch is divided by their number; a batch without any label gives
    0 (with gradient 0). Half-precision logits are reckoned in float32, and so is the loss. Not differentiable twice.
    Source of the selection: In-Place ABN paper, section 4.2 (online bootstrapping, p = 1, m = 25 %); ignored pixels
    do not count towards the share. groups: target C + g says that the pixel is one of the classes groups[g]: its loss
    is that of the sum of their probabilities.
    """
    if logits.dim() != 4 or target.dim() != 3 or logits.shape[0] != target.shape[0]:
        raise ValueError(f"logits {tuple(logits.shape)} and target {tuple(target.shape)} are not (N,C,h,w) and (N,H,W)")
    loss: Tensor = UpsampledCrossEntropy.apply(logits, target, hardest, groups)
    return loss


class UpsampledCrossEntropy(torch.autograd.Function):
    """The gradient is taken while a strip is at hand, in forward: backward only multiplies."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, hardest: float, groups: Sequence[Sequence[int]]) -> Tensor:
        members = [torch.tensor(group, device=logits.device) for group in groups]
        with torch.autocast(logits.device.type, enabled=False):
            loss, gradient = loss_and_gradient(logits, target, hardest, members, ctx.needs_input_grad[0])
        ctx.dtype = logits.dtype
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors  # float32 for half types: a loss scale is applied before it is rounded
        return (gradient * factor).to(ctx.dtype), None, None, None


def loss_and_gradient(
    logits: Tensor, target: Tensor, hardest: float, groups: list[Tensor], wanted: bool
) -> tuple[Tensor, Tensor | None]:
    """The loss, and its gradient in at least float32 if it is wanted."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    valid = target != IGNORE
    if hardest == 1:
        total = valid.sum().clamp(min=1)
        shares = [0] * len(target)
    else:
        shares = [math.ceil(count * hardest) for count in valid.flatten(1).sum(1).tolist()]
        total = torch.tensor(max(sum(shares), 1), device=logits.device)
    gradient = torch.zeros(logits.shape, dtype=logits.dtype, device=logits.device) if wanted else None
    sums = [torch.zeros((), dtype=logits.dtype, device=logits.device)]
    rows = bilinear(target.shape[1], logits)
    for n, share in enumerate(shares):
        picture = Strips(logits[n], target[n], valid[n], rows, groups)
        counts = valid[n]
        if hardest != 1:
            losses = torch.cat([picture.losses(log_p, r) for r, log_p in picture.log_probabilities()])
            chosen = losses.masked_fill(~counts, -1).flatten().topk(share)
            sums.append(chosen.values.sum())
            counts = torch.zeros_like(counts).flatten().index_fill_(0, chosen.indices, True).view_as(counts)
            if gradient is None:
                continue
        weight = counts.to(logits.dtype)
        for r, log_p in picture.log_probabilities():
            if hardest == 1:
                sums.append((picture.losses(log_p, r) * weight[r]).sum())
            if gradient is not None:
                picture.add_gradient(log_p, weight[r], r)
        if gradient is not None:
            gradient[n] = picture.gradient()
    if gradient is not None:
        gradient /= total
    return torch.stack(sums).sum() / total, gradient


class Strips:
    """One picture, enlarged strip by strip. Rows come first in memory: a strip is then one product of matrices."""

    def __init__(self, logits: Tensor, target: Tensor, valid: Tensor, rows: Tensor, groups: list[Tensor]) -> None:
        self.rows = rows  # (H, h)
        self.columns = bilinear(target.shape[1], logits)  # (W, w)
        self.classes = logits.shape[0]
        self.wide = logits.permute(1, 0, 2) @ self.columns.T  # (h, C, W)
        self.wide_gradient: Tensor | None = None
        plain = valid & (target < self.classes) if groups else valid
        self.index = target.where(plain, 0)[:, None]  # (H, 1, W)
        self.grouped = [(members, target == self.classes + g) for g, members in enumerate(groups)]

    def log_probabilities(self) -> Iterator[tuple[slice, Tensor]]:
        """Rows of the target, and (rows, C, W) of theirs."""
        height, width = self.index.shape[0], self.index.shape[2]
        device = self.wide.device.type
        step = max(STRIP.get(device, STRIP["cpu"]) // (self.classes * width), 1)
        for first in range(0, height, step):
            r = slice(first, min(first + step, height))
            used = self.window(r)
            enlarged = self.rows[r, used] @ self.wide[used].flatten(1)
            yield r, enlarged.view(-1, self.classes, width).log_softmax(1)

    def window(self, r: slice) -> slice:
        """Those rows of the logits from which rows r of the target are interpolated, and perhaps one more."""
        height, own = self.rows.shape
        first, last = (math.floor((row + 0.5) * own / height - 0.5) for row in (r.start, r.stop - 1))
        return slice(min(max(first, 0), own - 1), min(last + 2, own))

    def losses(self, log_p: Tensor, r: slice) -> Tensor:
        """(rows, W); wrong for ignored pixels."""
        found = -log_p.gather(1, self.index[r]).squeeze(1)
        for members, here in self.grouped:
            found = torch.where(here[r], -log_p[:, members].logsumexp(1), found)
        return found

    def add_gradient(self, log_p: Tensor, weight: Tensor, r: slice) -> None:
        """Of the sum of losses times weight. log_p is overwritten."""
        if self.wide_gradient is None:
            self.wide_gradient = torch.zeros_like(self.wide)
        index, used = self.index[r], self.window(r)
        # Of a group's members, each takes its share of the group's probability.
        shares = [(members, here[r][:, None] * log_p[:, members].softmax(1)) for members, here in self.grouped]
        p, hit = log_p.exp_(), torch.ones_like(index, dtype=log_p.dtype)
        for _, here in self.grouped:
            hit.masked_fill_(here[r][:, None], 0)
        p.scatter_(1, index, p.gather(1, index) - hit)
        for members, share in shares:
            p[:, members] -= share
        p.mul_(weight[:, None])
        self.wide_gradient[used].flatten(1).addmm_(self.rows[r, used].T, p.flatten(1))

    def gradient(self) -> Tensor:
        """(C, h, w), of all that was added."""
        assert self.wide_gradient is not None
        return (self.wide_gradient @ self.columns).permute(1, 0, 2)


def bilinear(size: int, like: Tensor) -> Tensor:
    """(size, own) weights that interpolate `own` values, the last or last but one dimension of `like`, to `size`.

    `own` is the height for a batch (N, C, h, w) and the width for a picture (C, h, w). Corners are not aligned.
    """
    own = like.shape[2]
    position = (torch.arange(size, dtype=torch.float64) + 0.5) * (own / size) - 0.5
    distance = position.clamp(0, own - 1)[:, None] - torch.arange(own)
    return (1 - distance.abs()).clamp(min=0).to(like)


class Loss:
    per_batch = False

    def __init__(self, hardest, groups):
        self.hardest, self.groups = hardest, groups

    def count(self, target):
        valid = target != IGNORE
        return float(sum(math.ceil(c * self.hardest) for c in valid.flatten(1).sum(1).tolist()))

    def __call__(self, logits, target):
        own = max(self.count(target.cpu()), 1)
        total = upsampled_cross_entropy(logits, target, self.hardest, self.groups) * own
        return total[None] * torch.ones(len(target)).to(total) / len(target)


def build_loss(config, num_classes, groups=()):
    return Loss(config.hardest, groups)
