"""Tiled inference on an image that is larger than memory: from top to bottom, a row of tiles at a time.

The tiles, their order and the mean where they overlap are those of `inference.windows`. So the answer is the same to
the last bit at scale 1, as long as the network computes the same for a tile whichever others are in its batch. At
another scale the image is resized in rows, which is the same within the rounding of float32. In memory at a time: the
pixels of one row of tiles, its logits, and those of the rows that overlap with it.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from segtrain.config import InferenceConfig
from segtrain.data.class_mapping import ClassMapping
from segtrain.scoring.inference import (
    ALIGNED,
    Cells,
    Network,
    Prediction,
    best_classes,
    enlarged,
    in_batches,
    spans,
    stride_of,
)


class Source(Protocol):
    """An image of which rows can be read."""

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)"""

    def band(self, top: int, bottom: int) -> np.ndarray:
        """The rows top to bottom - 1: uint8 (bottom - top, W, C)."""


class Windows(NamedTuple):
    """How an image is divided into tiles: (first, last + 1) pixels of the rows and columns of tiles."""

    rows: list[tuple[int, int]]
    columns: list[tuple[int, int]]


class GrowingLogits:
    """The logits of one view: sums over the tiles so far. Rows that no further tile meets are their mean."""

    def __init__(self, mirrored: bool) -> None:
        self.mirrored = mirrored
        self.total, self.covered = torch.zeros(()), torch.zeros(())
        self.first = 0  # row of logits that the tensors begin with
        self.final = 0  # rows above this one are complete
        self.height: int | None = None  # rows of logits of the whole image; None before the first tile

    def add(
        self, network: Network, image: Tensor, number: int, size: tuple[int, int], windows: Windows, together: int
    ) -> None:
        """The row of tiles of that number, whose pixels (1, C, h, W) are `image`. size: of the whole image. together:
        tiles that go through the network at a time."""
        top, bottom = windows.rows[number]
        seen = image.flip(3) if self.mirrored else image
        if len(windows.rows) == len(windows.columns) == 1:  # of any stride, as the whole image at once
            self.total = network(seen)[0]
            self.final = self.height = self.total.shape[1]
            return
        places = [((0, bottom - top), columns) for columns in windows.columns]
        for (_, (left, right)), batch in in_batches(network, seen, places, together):
            logits = batch[0]
            stride = stride_of((bottom - top, right - left), (logits.shape[1], logits.shape[2]))
            self.grow_to(logits, stride, top, bottom, size)
            y, x = top // stride - self.first, left // stride
            place = (..., slice(y, y + logits.shape[1]), slice(x, x + logits.shape[2]))
            self.total[place] += logits
            self.covered[place] += 1
        assert self.height is not None
        final = windows.rows[number + 1][0] // stride if number + 1 < len(windows.rows) else self.height
        rows = slice(max(self.final, self.first) - self.first, final - self.first)
        self.total[:, rows].div_(self.covered[rows])
        self.final = final

    def grow_to(self, logits: Tensor, stride: int, top: int, bottom: int, size: tuple[int, int]) -> None:
        """Make room for the logits of the rows `top` to `bottom` of pixels."""
        width, end = -(-size[1] // stride), -(-bottom // stride)
        if self.height is None:
            self.height, self.first = -(-size[0] // stride), top // stride
            self.total = logits.new_zeros(len(logits), 0, width)
            self.covered = logits.new_zeros(0, width)
        missing = end - self.first - self.total.shape[1]
        if missing > 0:
            self.total = torch.cat([self.total, logits.new_zeros(len(logits), missing, width)], 1)
            self.covered = torch.cat([self.covered, logits.new_zeros(missing, width)])

    def needed(self, rows: tuple[int, int], height: int) -> tuple[int, int]:
        """(first, last + 1) rows of logits that the rows of an image of that height lie between, and one more each."""
        assert self.height is not None
        ratio = self.height / height
        first, last = (int(max(0.0, (row + 0.5) * ratio - 0.5)) for row in (rows[0], rows[1] - 1))
        return max(0, first - 1), min(self.height, last + 3)

    def cells(self, rows: tuple[int, int], height: int) -> Cells:
        """Those logits. What is above them is forgotten."""
        first, last = self.needed(rows, height)
        assert self.first <= first and last <= self.final and self.height is not None
        if first > self.first:
            self.total, self.first = self.total[:, first - self.first :].clone(), first
            self.covered = self.covered[-self.total.shape[1] :].clone() if self.covered.dim() else self.covered
        found = self.total[:, : last - first]
        return Cells(found.flip(2) if self.mirrored else found, first, self.height)


class ScaledRows:
    """The views of an image at one scale, those of each network, computed as far down as is asked for."""

    def __init__(
        self, networks: Sequence[Network], source: Source, scale: float, options: InferenceConfig, device: torch.device,
        start: int,
    ) -> None:  # fmt: skip
        """start: the first row of the image that will be asked for."""
        assert options.tile is not None
        self.together = options.together()
        self.networks, self.source, self.device, self.is_scaled = networks, source, device, scale != 1
        height, width = source.size
        self.size = (max(1, round(height * scale)), max(1, round(width * scale))) if self.is_scaled else (height, width)
        rows, columns = (
            spans(extent, tile, options.overlap) for extent, tile in zip(self.size, options.tile, strict=True)
        )
        self.windows = Windows(rows, columns)
        flips = (False, True) if options.flip else (False,)
        self.views = [[GrowingLogits(mirrored) for mirrored in flips] for _ in networks]
        above = start * self.size[0] // height - 3 * ALIGNED  # no logit of a row further up is needed, at any stride
        self.number = next(n for n, (_, bottom) in enumerate(rows) if bottom > above)

    def advance(self) -> None:
        """Compute the next row of tiles."""
        top, bottom = self.windows.rows[self.number]
        image = self.pixels(top, bottom)
        for network, views in zip(self.networks, self.views, strict=True):
            for one in views:
                one.add(network, image, self.number, self.size, self.windows, self.together)
        self.number += 1

    def pixels(self, top: int, bottom: int) -> Tensor:
        """These rows at this scale: (1, C, bottom - top, W), uint8 at scale 1, else float32."""
        first, last = top, bottom
        if self.is_scaled:
            ratio = self.source.size[0] / self.size[0]
            first, last = (int(max(0.0, (row + 0.5) * ratio - 0.5)) for row in (top, bottom - 1))
            first, last = max(0, first - 1), min(self.source.size[0], last + 3)
        image = torch.from_numpy(self.source.band(first, last)).to(self.device).permute(2, 0, 1)
        if self.is_scaled:
            image = enlarged(image, self.size, top, bottom, first, self.source.size[0])
        return image[None]

    def cells(self, network: int, rows: tuple[int, int]) -> list[Cells]:
        """Logits of the views of that network, for these rows of the image."""
        height = self.source.size[0]
        views = self.views[network]
        while any(one.height is None or one.final < one.needed(rows, height)[1] for one in views):
            self.advance()
        return [one.cells(rows, height) for one in views]


def predict_rows(
    networks: Sequence[Network], source: Source, options: InferenceConfig, device: torch.device, step: int,
    start: int = 0, probability: bool = False, mapping: ClassMapping | None = None,
) -> Iterator[tuple[tuple[int, int], Prediction]]:  # fmt: skip
    """The predictions of an image, `step` rows at a time from the row `start` on: (first, last + 1), and their answer.

    options: with a tile, and without longest_side. probability, mapping: as of `inference.segment`.
    """
    height, width = source.size
    scaled = [ScaledRows(networks, source, scale, options, device, start) for scale in options.scales]
    for top in range(start, height, step):
        rows = top, min(top + step, height)
        with torch.inference_mode():
            views = [cells for number in range(len(networks)) for one in scaled for cells in one.cells(number, rows)]
            found = best_classes(views, (height, width), rows, probability, mapping)
        yield rows, found
