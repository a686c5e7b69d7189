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
    classes that were asked for, float32 (H, W), 0 where none was; None unless asked for. probabilities: of every class,
    and last that of void if pixels can be void, float16 (C, H, W); None unless asked for."""

    train_ids: np.ndarray
    probability: np.ndarray | None
    loss: float | None = None
    of_asked: np.ndarray | None = None
    probabilities: np.ndarray | None = None


class Cells(NamedTuple):
    """Logits (C, n, w): the rows from `first` on of the `height` rows of logits that an image has."""

    logits: Tensor
    first: int
    height: int


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


def nearest_planes(planes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """float16 (C, h, w) to (C, H, W), each plane by `nearest`."""
    return np.stack([nearest(plane.astype(np.float32), size).astype(np.float16) for plane in planes])


def segment(
    network: Network | Sequence[Network], image: Tensor, options: InferenceConfig, probability: bool = False,
    mapping: ClassMapping | None = None, target: Tensor | None = None, asked: Tensor | None = None, every: bool = False,
) -> Prediction:  # fmt: skip
    """Predict the class of every pixel of `image` (1, 3, H, W), as `segment_batch` does."""
    targets, classes = (None if one is None else [one] for one in (target, asked))
    return segment_batch(network, image, options, probability, mapping, targets, classes, every)[0]


@torch.inference_mode()
def segment_batch(
    network: Network | Sequence[Network], images: Tensor, options: InferenceConfig, probability: bool = False,
    mapping: ClassMapping | None = None, targets: Sequence[Tensor] | None = None,
    asked: Sequence[Tensor] | None = None, every: bool = False,
) -> list[Prediction]:  # fmt: skip
    """Predict the class of every pixel of `images` (N, 3, H, W), which go to the network as they are, N at a time.

    One view: the arg-max of its logits, enlarged bilinearly. Several views (scales, flip): the arg-max of the mean of
    their probabilities, each view's logits enlarged first. probability: return that class's probability too.
    mapping: the network's probabilities are added up to those of other classes before the arg-max. Of several networks
    the views are averaged like those of one. targets: of each image, train ids int64 (H', W') of the network's own
    classes, of any size, for the loss. asked: of each image, train ids int64 (H, W) of the classes whose probabilities
    to return. every: return the probabilities of all classes too.

    Views stay on the device. Only classes, probabilities that are asked for, and losses come back to the host.
    """
    size = (images.shape[2], images.shape[3])
    networks = network if isinstance(network, Sequence) else [network]
    views = [one for some in networks for one in all_views(some, images, options)]
    none = [None] * len(images)
    found = []
    for n, (target, classes) in enumerate(zip(targets or none, asked or none, strict=True)):
        one = [some[n] for some in views]
        loss = None if target is None else cross_entropy_sum(one, target)
        cells = [Cells(some, 0, some.shape[1]) for some in one]
        found.append(best_classes(cells, size, (0, size[0]), probability, mapping, classes, every)._replace(loss=loss))
    return found


def best_classes(
    views: Sequence[Cells], size: tuple[int, int], rows: tuple[int, int], probability: bool = False,
    mapping: ClassMapping | None = None, asked: Tensor | None = None, every: bool = False,
) -> Prediction:  # fmt: skip
    """The prediction of the rows (first, last + 1) of an image (H, W), from the logits that they lie between.

    The same to the last bit whichever other rows of logits the views hold. asked: of these rows. The other arguments
    are those of `segment`.
    """
    cells, plain = views[0], len(views) == 1 and mapping is None  # the arg-max of logits is that of probabilities
    train_ids = None
    if plain and cells.logits.device.type == "cpu":
        train_ids = upsampled_argmax(cells.logits.float(), size, rows, (cells.first, cells.height))
        if not probability and asked is None and not every:
            return Prediction(train_ids, None)
    best, certain, of_asked, full = fused(views, size, rows, probability, mapping, asked, every)
    return Prediction(
        best.cpu().numpy() if train_ids is None else train_ids,
        None if certain is None else certain.cpu().numpy(),
        of_asked=None if of_asked is None else of_asked.cpu().numpy(),
        probabilities=None if full is None else full.numpy(),
    )


def all_views(network: Network, images: Tensor, options: InferenceConfig) -> list[Tensor]:
    """Logits (N, C, h, w) at every scale, each followed by those of the mirrored images if options.flip."""
    flips = (False, True) if options.flip else (False,)
    return [view(network, images, scale, mirrored, options) for scale in options.scales for mirrored in flips]


def fused(
    views: Sequence[Cells], size: tuple[int, int], rows: tuple[int, int], probability: bool = False,
    mapping: ClassMapping | None = None, asked: Tensor | None = None, every: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Enlarge the logits of all views to `size`, strip by strip, and take the best class of their mean.

    Returns the class, uint8 (h, W), and what was asked for: its probability and that of the classes `asked`, float32
    (h, W), where the views are, and those of all classes, float16 (C, h, W) on the CPU, which holds what no GPU does.
    The arguments are those of `best_classes`.
    """
    first, plain = views[0].logits, len(views) == 1 and mapping is None
    best = torch.empty(rows[1] - rows[0], size[1], dtype=torch.uint8, device=first.device)
    certain = torch.empty(best.shape, device=first.device) if probability else None
    of_asked = None if asked is None else torch.empty(best.shape, device=first.device)
    full: Tensor | None = None
    step = strip_rows(first, size[1])
    for top in range(*rows, step):
        bottom = min(top + step, rows[1])
        part = slice(top - rows[0], bottom - rows[0])
        scores = enlarged(views[0].logits, size, top, bottom, *views[0][1:])
        if not plain:
            scores = scores.softmax(0)
            for more in views[1:]:
                scores += enlarged(more.logits, size, top, bottom, *more[1:]).softmax(0)
        if mapping is not None:
            scores = added_up(scores, mapping)
        best[part] = scores.argmax(0)
        if probability or every or asked is not None:
            scores = scores.softmax(0) if plain else scores / len(views)
        if certain is not None:
            certain[part] = scores.amax(0)
        if asked is not None and of_asked is not None:
            classes = asked[part]
            chosen = scores.gather(0, classes.clamp(max=len(scores) - 1)[None])[0]
            of_asked[part] = torch.where(classes < len(scores), chosen, 0.0)
        if every:
            if full is None:
                full = torch.empty(len(scores), *best.shape, dtype=torch.float16)
            full[:, part] = scores.clamp_(min=0).half().cpu()
    if mapping is not None and mapping.has_void:
        best[best == len(mapping.sources)] = IGNORE_INDEX
    return best, certain, of_asked, full


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


def enlarged(
    logits: Tensor, size: tuple[int, int], top: int, bottom: int, first: int = 0, height: int | None = None
) -> Tensor:
    """Enlarge logits (C, h, w) bilinearly to `size`, rows top to bottom - 1 only: float32 (C, bottom - top, W).

    first, height: the logits are the rows from `first` on of so many; None: they are all.
    """
    height = height or logits.shape[1]
    at = (torch.arange(top, bottom, device=logits.device) + 0.5) * (height / size[0]) - 0.5
    at = at.clamp(min=0)
    upper = at.long().clamp(max=height - 1)
    lower = (upper + 1).clamp(max=height - 1)
    weight = (at - upper).view(-1, 1)
    rows = torch.lerp(logits[:, upper - first].float(), logits[:, lower - first].float(), weight)
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
