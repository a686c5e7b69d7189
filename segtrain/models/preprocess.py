"""From image bytes to what a network takes."""

from functools import partial

import torch
from torch import Tensor

from segtrain.device import kept_constant


def in_bytes(values: list[float]) -> Tensor:
    """(C, 1, 1): one value per channel, times 255."""
    return torch.tensor(values).view(-1, 1, 1) * 255


def normalise_images(images: Tensor, mean: list[float], std: list[float]) -> Tensor:
    """uint8 (N, C, H, W) -> float32 (value / 255 - mean) / std, per channel, channels last in memory."""
    shift, scale = (
        kept_constant(images.device, partial(in_bytes, values), "in bytes", tuple(values)) for values in (mean, std)
    )
    return ((images.float() - shift) / scale).contiguous(memory_format=torch.channels_last)
