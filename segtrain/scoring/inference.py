"""Inference on images of any size: whole or tiled, at one or several scales, with or without flip.

Logits stay at the network's output stride until the arg-max, which enlarges them strip by strip: at full resolution,
116 classes of a 22 megapixel image take 10 GB.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from segtrain.config import IGNORE_INDEX, InferenceConfig
from segtrain.data.class_mapping import ClassMapping
from segtrain.errors import UsageError
from segtrain.losses.pixelwise import CrossEntropy
from segtrain.native.pixels import upsampled_argmax

Network = Callable[[Tensor], Tensor]  # (N, 3, h, w) -> (N, C, ceil(h / stride), ceil(w / stride)) logits
Place = tuple[tuple[int, int], tuple[int, int]]  # of a window: its rows and its columns, first and last + 1
STRIDES = (1, 2, 4, 8, 16, 32)
ALIGNED = 32  # windows start at multiples of this, so that their cells align with those of the whole image
STRIP = 1 << 24  # logits at full resolution that are in memory at a time


class Prediction(NamedTuple):
    """train_ids: uint8 (H, W). probability: of that class, float32 (H, W), 0 to 1; None unless asked for. loss: the sum
    of the cross-entropy over the labelled pixels; None unless a target is given. of_asked: the probabilities of the
    classes that were asked for, float32 (H, W), 0 where none was; None unless asked for."""

    train_ids: np.ndarray
    probability: np.ndarray | None
    loss: float | None = None
    of_asked: np.ndarray | None = None


def fitted(image: np.ndarray, longest: int) -> np.ndarray:
    """Resize uint8 (H, W, C) to `longest` pixels along its longest side, by PIL's bilinear filter.

    Sizes are floating-point products, truncated and not rounded, as in the official Vistas script: for 2048, 1242x375
    becomes 2048x618, and a few widths, such as 49, give a longest side of 2047.
    """
    height, width = image.shape[:2]
    scale = longest / max(height, width)
    size = max(1, int(width * scale)), max(1, int(height * scale))
    parts = [image] if image.shape[2] == 3 else np.moveaxis(image, 2, 0)
    resized = [np.array(Image.fromarray(part).resize(size, Image.Resampling.BILINEAR)) for part in parts]
    return resized[0] if image.shape[2] == 3 else np.stack(resized, axis=2)


def nearest(plane: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize uint8 or float32 (h, w) to size (H, W), by PIL's nearest neighbour."""
    return np.array(Image.fromarray(plane).resize((size[1], size[0]), Image.Resampling.NEAREST))


def segment(
    network: Network | Sequence[Network], image: Tensor, options: InferenceConfig, probability: bool = False,
    mapping: ClassMapping | None = None, target: Tensor | None = None, asked: Tensor | None = None,
) -> Prediction:  # fmt: skip
    """Predict the class of every pixel of `image` (1, 3, H, W), as `segment_batch` does."""
    targets, classes = (None if one is None else [one] for one in (target, asked))
    return segment_batch(network, image, options, probability, mapping, targets, classes)[0]


@torch.inference_mode()
def segment_batch(
    network: Network | Sequence[Network], images: Tensor, options: InferenceConfig, probability: bool = False,
    mapping: ClassMapping | None = None, targets: Sequence[Tensor] | None = None,
    asked: Sequence[Tensor] | None = None,
) -> list[Prediction]:  # fmt: skip
    """Predict the class of every pixel of `images` (N, 3, H, W), which go to the network as they are, N at a time.

    One view: the arg-max of its logits, enlarged bilinearly. Several views (scales, flip): the arg-max of the mean of
    their probabilities, each view's logits enlarged first. probability: return that class's probability too.
    mapping: the network's probabilities are added up to those of other classes before the arg-max. Of several networks
    the views are averaged like those of one. targets: of each image, train ids int64 (H', W') of the network's own
    classes, of any size, for the loss. asked: of each image, train ids int64 (H, W) of the classes whose probabilities
    to return.

    Views stay on the device. Only classes, probabilities that are asked for, and losses come back to the host.
    """
    size = (images.shape[2], images.shape[3])
    networks = network if isinstance(network, Sequence) else [network]
    views = [one for some in networks for one in all_views(some, images, options)]
    none = [None] * len(images)
    return [
        predicted([one[n] for one in views], size, probability, mapping, target, classes)
        for n, (target, classes) in enumerate(zip(targets or none, asked or none, strict=True))
    ]


def predicted(
    views: list[Tensor], size: tuple[int, int], probability: bool, mapping: ClassMapping | None, target: Tensor | None,
    asked: Tensor | None,
) -> Prediction:  # fmt: skip
    """The prediction that the views (C, h, w) of one image make."""
    loss = None if target is None else cross_entropy_sum(views, target)
    plain = len(views) == 1 and mapping is None  # the arg-max of logits is that of probabilities
    train_ids = upsampled_argmax(views[0].float(), size) if plain and views[0].device.type == "cpu" else None
    if train_ids is not None and not probability and asked is None:
        return Prediction(train_ids, None, loss)
    best, certain, of_asked = fused(views, size, probability, mapping, asked)
    return Prediction(
        best.cpu().numpy() if train_ids is None else train_ids,
        None if certain is None else certain.cpu().numpy(),
        loss,
        None if of_asked is None else of_asked.cpu().numpy(),
    )


def all_views(network: Network, images: Tensor, options: InferenceConfig) -> list[Tensor]:
    """Logits (N, C, h, w) at every scale, each followed by those of the mirrored images if options.flip."""
    flips = (False, True) if options.flip else (False,)
    return [view(network, images, scale, mirrored, options) for scale in options.scales for mirrored in flips]


def fused(
    views: list[Tensor], size: tuple[int, int], probability: bool = False, mapping: ClassMapping | None = None,
    asked: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Enlarge the logits (C, h, w) of all views to `size`, strip by strip, and take the best class of their mean.

    Returns the class, uint8 (H, W), and what was asked for of its probability and that of the classes `asked`, float32
    (H, W), where the views are. mapping, asked: as of `segment`.
    """
    plain = len(views) == 1 and mapping is None
    best = torch.empty(size, dtype=torch.uint8, device=views[0].device)
    certain = torch.empty(size, device=views[0].device) if probability else None
    of_asked = None if asked is None else torch.empty(size, device=views[0].device)
    rows = strip_rows(views[0], size[1])
    for top in range(0, size[0], rows):
        bottom = min(top + rows, size[0])
        scores = enlarged(views[0], size, top, bottom)
        if not plain:
            scores = scores.softmax(0)
            for more in views[1:]:
                scores += enlarged(more, size, top, bottom).softmax(0)
        if mapping is not None:
            scores = added_up(scores, mapping)
        best[top:bottom] = scores.argmax(0)
        if plain and (probability or asked is not None):
            scores = scores.softmax(0)
        if certain is not None:
            certain[top:bottom] = scores.amax(0) / len(views)
        if asked is not None and of_asked is not None:
            classes = asked[top:bottom]
            chosen = scores.gather(0, classes.clamp(max=len(scores) - 1)[None])[0] / len(views)
            of_asked[top:bottom] = torch.where(classes < len(scores), chosen, 0.0)
    if mapping is not None and mapping.has_void:
        best[best == len(mapping.sources)] = IGNORE_INDEX
    return best, certain, of_asked


def cross_entropy_sum(views: list[Tensor], target: Tensor) -> float:
    """-log of the mean probability of each labelled pixel's class, summed up. views: logits (C, h, w)."""
    if len(views) == 1:
        return float(CrossEntropy()(views[0][None], target[None]))
    size, total = (target.shape[0], target.shape[1]), 0.0
    rows = strip_rows(views[0], size[1])
    for top in range(0, size[0], rows):
        bottom = min(top + rows, size[0])
        logs = [enlarged(one, size, top, bottom).log_softmax(0) for one in views]
        mean = torch.stack(logs).logsumexp(0) - math.log(len(views))
        part = F.nll_loss(mean[None], target[None, top:bottom], ignore_index=IGNORE_INDEX, reduction="sum")
        total += float(part)
    return total


def strip_rows(logits: Tensor, width: int) -> int:
    """Rows of an image of that width whose enlarged logits (C, ...) are in memory at a time."""
    return max(1, STRIP // (len(logits) * width))


def added_up(probabilities: Tensor, mapping: ClassMapping) -> Tensor:
    """Probabilities (C, h, w) of a network's classes -> those of the mapping's target, and last that of void, if pixels
    can be void. A class without sources has -1: it is never the greatest."""
    groups = [*mapping.sources, mapping.rest] if mapping.has_void else mapping.sources
    result = probabilities.new_full((len(groups), *probabilities.shape[1:]), -1.0)
    for row, train_ids in zip(result, groups, strict=True):
        if train_ids:
            torch.sum(probabilities[list(train_ids)], 0, out=row)
    return result


def enlarged(logits: Tensor, size: tuple[int, int], top: int, bottom: int) -> Tensor:
    """Enlarge logits (C, h, w) bilinearly to `size`, rows top to bottom - 1 only: float32 (C, bottom - top, W)."""
    height = logits.shape[1]
    at = (torch.arange(top, bottom, device=logits.device) + 0.5) * (height / size[0]) - 0.5
    at = at.clamp(min=0)
    first = at.long().clamp(max=height - 1)
    second = (first + 1).clamp(max=height - 1)
    rows = torch.lerp(logits[:, first].float(), logits[:, second].float(), (at - first).view(-1, 1))
    return F.interpolate(rows[None], size=(bottom - top, size[1]), mode="bilinear", align_corners=False)[0]


def view(network: Network, images: Tensor, scale: float, mirrored: bool, options: InferenceConfig) -> Tensor:
    """Logits (N, C, h, w) of the images resized by `scale`; if mirrored, they are mirrored back."""
    seen = images
    if scale != 1:
        size = [max(1, round(extent * scale)) for extent in images.shape[-2:]]
        seen = F.interpolate(images.float(), size=size, mode="bilinear", align_corners=False)
    logits = windows(network, seen.flip(3) if mirrored else seen, options)
    return logits.flip(3) if mirrored else logits


def windows(network: Network, images: Tensor, options: InferenceConfig) -> Tensor:
    """Logits (N, C, h, w) of the whole images, or in each cell the mean over the windows that cover it."""
    height, width = images.shape[-2:]
    if options.tile is None or (options.tile[0] >= height and options.tile[1] >= width):
        return network(images)
    total, covered = torch.zeros(()), torch.zeros(())
    columns = spans(width, options.tile[1], options.overlap)
    places = [(rows, some) for rows in spans(height, options.tile[0], options.overlap) for some in columns]
    for ((top, bottom), (left, right)), logits in in_batches(network, images, places, options.together()):
        stride = stride_of((bottom - top, right - left), (logits.shape[2], logits.shape[3]))
        if total.dim() == 0:
            cells = -(-height // stride), -(-width // stride)
            total, covered = logits.new_zeros(*logits.shape[:2], *cells), logits.new_zeros(cells)
        y, x = top // stride, left // stride
        place = (..., slice(y, y + logits.shape[2]), slice(x, x + logits.shape[3]))
        total[place] += logits
        covered[place] += 1
    return total.div_(covered)


def in_batches(network: Network, images: Tensor, places: Sequence[Place], most: int) -> Iterator[tuple[Place, Tensor]]:
    """Every place in turn with the logits (N, C, h, w) of that window of each image.

    Windows of one size go through the network together, at most `most` at a time, wherever they are. The order of the
    places stays, and with it the order in which logits are added up.
    """
    left, ready = list(places), dict[Place, Tensor]()
    for place in places:
        if place not in ready:
            fitting = (one for one in left if size_of(one) == size_of(place))
            alike = list(islice(fitting, max(1, most // len(images))))
            cuts = [images[..., slice(*rows), slice(*columns)] for rows, columns in alike]
            logits = network(cuts[0] if len(cuts) == 1 else torch.cat(cuts))
            ready.update(zip(alike, logits.split(len(images)), strict=True))
            left = [one for one in left if one not in ready]
        yield place, ready.pop(place)


def size_of(place: Place) -> tuple[int, int]:
    """Height and width of a window."""
    (top, bottom), (left, right) = place
    return bottom - top, right - left


def stride_of(size: tuple[int, int], cells: tuple[int, int]) -> int:
    """The network's stride, from the height and width of a window and of its logits: a last cell may be cut off.

    UsageError for a network whose cells do not meet those of the whole image.
    """
    fitting = [s for s in STRIDES if all(-(-extent // s) == count for extent, count in zip(size, cells, strict=True))]
    if not fitting:
        raise UsageError(
            f"inference.tile does not work with this network, whose logits are {cells[0]}x{cells[1]} for {size[0]}x"
            f"{size[1]} pixels: strides of {', '.join(map(str, STRIDES))} do, rounded up; leave out inference.tile"
        )
    return fitting[-1]


def spans(extent: int, tile: int, overlap: float) -> list[tuple[int, int]]:
    """(first, last + 1) pixels of windows that cover 0 to extent - 1 and start at multiples of ALIGNED.

    They overlap by at least the fraction `overlap` of a tile, as far as ALIGNED allows. The last one may be slightly
    longer than the tile.
    """
    if tile >= extent:
        return [(0, extent)]
    stride = max(ALIGNED, int(tile * (1 - overlap)) // ALIGNED * ALIGNED)
    last = (extent - tile) // ALIGNED * ALIGNED
    first = [*range(0, last, stride), last]
    return [(start, extent if start == last else start + tile) for start in first]
