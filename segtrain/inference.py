"""From one picture of any size to one class per pixel: whole or in windows, one or several scales, mirrored or not."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from segtrain.config import InferenceConfig

Network = Callable[[Tensor], Tensor]  # (1, 3, h, w) normalised -> (1, C, h, w) logits


def normalise(images: Tensor, mean: list[float], std: list[float]) -> Tensor:
    """uint8 (N, 3, H, W) RGB -> float32, (value / 255 - mean) / std per channel, channels last in memory."""
    shift = torch.tensor(mean, device=images.device).view(3, 1, 1) * 255
    scale = torch.tensor(std, device=images.device).view(3, 1, 1) * 255
    return ((images.float() - shift) / scale).contiguous(memory_format=torch.channels_last)


@torch.inference_mode()
def predict(network: Network, image: Tensor, options: InferenceConfig) -> np.ndarray:
    """Class uint8 (H, W) with the highest score at every pixel of `image`, float (1, 3, H, W) normalised.

    One view: arg-max of its logits. Several (scales, mirrored): of the mean of their probabilities.
    """
    views = [
        (scale, mirrored) for scale in options.scales for mirrored in ((False, True) if options.flip else (False,))
    ]
    if len(views) == 1:
        scores = view(network, image, *views[0], options)
    else:
        scores = torch.zeros(())
        for scale, mirrored in views:
            scores = view(network, image, scale, mirrored, options).softmax(1) + scores.to(image.device)
    return scores.argmax(1)[0].to(torch.uint8).cpu().numpy()


def view(network: Network, image: Tensor, scale: float, mirrored: bool, options: InferenceConfig) -> Tensor:
    """Logits (1, C, H, W) of the picture enlarged by `scale` and perhaps mirrored, brought back to its own size."""
    size = image.shape[-2:]
    seen = image
    if scale != 1:
        enlarged = [max(1, round(extent * scale)) for extent in size]
        seen = F.interpolate(image, size=enlarged, mode="bilinear", align_corners=False)
    logits = windows(network, seen.flip(3) if mirrored else seen, options)
    logits = logits.flip(3) if mirrored else logits
    return logits if scale == 1 else F.interpolate(logits, size=size, mode="bilinear", align_corners=False)


def windows(network: Network, image: Tensor, options: InferenceConfig) -> Tensor:
    """Logits (1, C, H, W) of the whole picture, or the mean over the windows that cover each pixel."""
    if options.tile is None:
        return network(image)
    tile = [min(extent, size) for extent, size in zip(options.tile, image.shape[-2:], strict=True)]
    total, covered = torch.zeros(()), torch.zeros(image.shape[-2:], device=image.device)
    for top in starts(image.shape[-2], tile[0], options.overlap):
        for left in starts(image.shape[-1], tile[1], options.overlap):
            place = (..., slice(top, top + tile[0]), slice(left, left + tile[1]))
            logits = network(image[place])
            if total.dim() == 0:
                total = logits.new_zeros(1, logits.shape[1], *image.shape[-2:])
            total[place] += logits
            covered[place] += 1
    return total / covered


def starts(extent: int, tile: int, overlap: float) -> Iterator[int]:
    """First pixels of windows of length `tile`, evenly spread, that cover 0 .. extent - 1 and overlap enough."""
    stride = max(1, int(tile * (1 - overlap)))
    count = 1 + -(-(extent - tile) // stride)
    return (round(i * (extent - tile) / max(count - 1, 1)) for i in range(count))
