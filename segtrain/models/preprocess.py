"""From image bytes to what a network takes."""

import torch
from torch import Tensor


def normalise_images(images: Tensor, mean: list[float], std: list[float]) -> Tensor:
    """uint8 (N, 3, H, W) RGB -> float32 (value / 255 - mean) / std, per channel, channels last in memory."""
    shift = torch.tensor(mean, device=images.device).view(3, 1, 1) * 255
    scale = torch.tensor(std, device=images.device).view(3, 1, 1) * 255
    return ((images.float() - shift) / scale).contiguous(memory_format=torch.channels_last)
