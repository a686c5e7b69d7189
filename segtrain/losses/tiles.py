"""Losses from logits at the network's stride, a tile of rows at a time, without an upsampled batch in memory."""

import math
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from segtrain.config import IGNORE_INDEX
from segtrain.device import kept_constant
from segtrain.losses.base import Groups, Loss

# Elements of a tile (rows, classes, columns), by device: what fits a core's cache, and what keeps a GPU busy.
TILE_ELEMENTS = {"cpu": 2**18, "cuda": 2**25}


@contextmanager
def tiles_of(device: str) -> Iterator[None]:
    """Inside, tensors on the CPU are cut as on this kind of device: to plan a GPU's memory without one."""
    before = TILE_ELEMENTS["cpu"]
    TILE_ELEMENTS["cpu"] = TILE_ELEMENTS[device]
    try:
        yield
    finally:
        TILE_ELEMENTS["cpu"] = before


class TiledLoss(Loss):
    """A loss that upsamples the logits to the target's size, bilinearly without aligned corners, tile by tile.

    Half-precision logits and the loss are computed in float32. Not twice differentiable. Raises ValueError if the
    shapes of logits and target do not match.
    """

    groups: Groups = ()

    def __call__(self, logits: Tensor, target: Tensor) -> Tensor:
        if logits.dim() != 4 or target.dim() != 3 or logits.shape[0] != target.shape[0]:
            shapes = f"logits {tuple(logits.shape)} and target {tuple(target.shape)}"
            raise ValueError(f"{shapes} are not (N,C,h,w) and (N,H,W)")
        sums: Tensor = GradientInForward.apply(logits, target, self)
        return sums

    @abstractmethod
    def sums(self, batch: list["RowTiles"], wanted: bool) -> list[Tensor]:
        """Sum of the loss over each image, a scalar each; if wanted, also add the gradient to the image's tiles.

        batch: one image, or all images of the batch if the loss is per_batch.
        """


class GradientInForward(torch.autograd.Function):
    """Computes the gradient in forward, while a tile is in memory; backward only multiplies."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, loss: TiledLoss) -> Tensor:
        ctx.dtype = logits.dtype
        wanted = ctx.needs_input_grad[0]
        with torch.autocast(logits.device.type, enabled=False):
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            gradient = torch.zeros(logits.shape, dtype=logits.dtype, device=logits.device) if wanted else None
            rows = bilinear(target.shape[1], logits)
            members = [
                kept_constant(logits.device, partial(torch.tensor, group), "classes", tuple(group))
                for group in loss.groups
            ]
            counts = loss.host_counts
            every = list(range(len(target)))
            sums: list[Tensor] = []
            for part in [every] if loss.per_batch else [[n] for n in every]:
                batch = [
                    RowTiles(logits[n], target[n], rows, members, None if counts is None else counts[n]) for n in part
                ]
                sums += loss.sums(batch, wanted)
                for n in reversed(part):  # free each image before the next one is upsampled
                    tiles = batch.pop()
                    if gradient is not None:
                        gradient[n] = tiles.gradient()
                del tiles
        ctx.save_for_backward(gradient)
        return torch.stack(sums)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors  # float32 for half types: rounded after the loss scale is applied
        return (gradient * factor[:, None, None, None]).to(ctx.dtype), None, None


class RowTiles:
    """One image, upsampled a tile of rows at a time.

    Rows come first in memory, so that a tile is one matrix product. logits: float32 or float64 (C, h, w). target:
    int64 (H, W). rows: (H, h) from `bilinear`. groups: class indices of each group, see Loss.marginal. count: number of
    labelled pixels, if the host knows it.
    """

    def __init__(
        self, logits: Tensor, target: Tensor, rows: Tensor, groups: list[Tensor], count: int | None = None
    ) -> None:
        self.count = count
        self.rows = rows  # (H, h)
        self.columns = bilinear(target.shape[1], logits)  # (W, w)
        self.classes = logits.shape[0]
        # In one layout whatever that of the logits, channels last as networks give them: a product's bits depend on it.
        wide = logits.permute(1, 2, 0).contiguous().transpose(1, 2)
        self.wide = wide @ self.columns.T  # (h, C, W)
        self.wide_gradient: Tensor | None = None
        self.valid = target != IGNORE_INDEX  # (H, W)
        plain = self.valid & (target < self.classes) if groups else self.valid
        self.index = target.where(plain, 0)[:, None]  # (H, 1, W)
        self.grouped = [(members, target == self.classes + g) for g, members in enumerate(groups)]

    def log_probabilities(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield each tile: a slice of the target's rows, and their log-probabilities (rows, C, W)."""
        height, width = self.index.shape[0], self.index.shape[2]
        device = self.wide.device.type
        step = max(TILE_ELEMENTS.get(device, TILE_ELEMENTS["cpu"]) // (self.classes * width), 1)
        for first in range(0, height, step):
            r = slice(first, min(first + step, height))
            used = self.window(r)
            enlarged = self.rows[r, used] @ self.wide[used].flatten(1)
            yield r, enlarged.view(-1, self.classes, width).log_softmax(1)

    @property
    def labelled(self) -> int:
        """Number of labelled pixels. The host waits for the device where it does not know it."""
        return int(self.valid.sum()) if self.count is None else self.count

    def window(self, r: slice) -> slice:
        """The rows of the logits that rows r of the target are interpolated from, and perhaps one more."""
        height, own = self.rows.shape
        first, last = (math.floor((row + 0.5) * own / height - 0.5) for row in (r.start, r.stop - 1))
        return slice(min(max(first, 0), own - 1), min(last + 2, own))

    def add(self, gradient: Tensor, r: slice) -> None:
        """Add the gradient (rows, C, W) with respect to the upsampled logits of rows r."""
        if self.wide_gradient is None:
            self.wide_gradient = torch.zeros_like(self.wide)
        used = self.window(r)
        self.wide_gradient[used].flatten(1).addmm_(self.rows[r, used].T, gradient.flatten(1))

    def gradient(self) -> Tensor:
        """The gradient with respect to the logits, (C, h, w), from all that was added."""
        assert self.wide_gradient is not None
        return (self.wide_gradient @ self.columns).permute(1, 0, 2)


def bilinear(size: int, like: Tensor) -> Tensor:
    """Weights (size, own) that interpolate `own` values linearly to `size`, without aligned corners.

    own: the height of a batch `like` (N, C, h, w), or the width of an image `like` (C, h, w). The weights have its
    dtype and device.
    """
    own = like.shape[2]
    return kept_constant(
        like.device, partial(weights_between, size, own, like.dtype), "bilinear", size, own, like.dtype
    )


def weights_between(size: int, own: int, dtype: torch.dtype) -> Tensor:
    position = (torch.arange(size, dtype=torch.float64) + 0.5) * (own / size) - 0.5
    distance = position.clamp(0, own - 1)[:, None] - torch.arange(own)
    return (1 - distance.abs()).clamp(min=0).to(dtype)


def labelled_pixels(target: Tensor) -> list[int]:
    """Number of labelled pixels of each image of target (N, H, W)."""
    counts: list[int] = (target != IGNORE_INDEX).flatten(1).sum(1).tolist()
    return counts
