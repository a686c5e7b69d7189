"""A network as it is exported: images in, labels or logits out, by plain torch operations only."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Deployed(nn.Module):
    """A network between its two optional ends.

    normalise: takes uint8 (N, C, H, W), RGB for C = 3, and computes (x / 255 - mean) / std itself; else float32.
    argmax: returns train ids, uint8 (N, H, W), the arg-max of the logits enlarged bilinearly to the image; else float32
    logits (N, C, h, w) at the network's output stride. network: in eval mode; `network(images, upsample=...)`, as of
    `Segmenter`.
    """

    shift: Tensor
    factor: Tensor

    def __init__(
        self, network: nn.Module, mean: Sequence[float], std: Sequence[float], normalise: bool, argmax: bool
    ) -> None:
        super().__init__()
        self.network = network
        self.normalise, self.argmax = normalise, argmax
        if normalise:
            self.register_buffer("shift", torch.tensor(mean).view(-1, 1, 1) * 255)
            self.register_buffer("factor", torch.tensor(std).view(-1, 1, 1) * 255)

    def forward(self, images: Tensor) -> Tensor:
        x = (images.float() - self.shift) / self.factor if self.normalise else images
        logits: Tensor = self.network(x, upsample=False)
        if not self.argmax:
            return logits
        enlarged = F.interpolate(logits, size=images.shape[-2:], mode="bilinear", align_corners=False)
        return enlarged.argmax(1).to(torch.uint8)


def trace(network: Deployed, channels: int, size: Sequence[int] | None, stride: int) -> Any:
    """The network as a torch.export.ExportedProgram, for any number of images.

    size: height and width of all images; None: any from `stride + 1` pixels on. Whatever else the network is asked
    with raises AssertionError.
    """
    height, width = size or (4 * stride + 1, 6 * stride + 1)
    example = torch.zeros(2, channels, height, width, dtype=torch.uint8 if network.normalise else torch.float32)
    any_size = torch.export.Dim.DYNAMIC
    free = {0: any_size} if size else {0: any_size, 2: any_size, 3: any_size}
    network.eval().requires_grad_(False)
    with torch.no_grad():
        return torch.export.export(network, (example,), dynamic_shapes={"images": free}, strict=False)
