"""DeepLabV3 head as used by the In-Place ABN paper (section 4.2), key names of the released Vistas model."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segtrain.models.blocks import Norm, conv

# Dilations of the three 3x3 branches, in cells of the feature map: the same reach in pixels at either stride.
ATROUS_RATES = {8: (12, 24, 36), 16: (6, 12, 18), 32: (3, 6, 9)}


class DeepLabV3(nn.Module):
    """Four parallel convolutions and a pooled branch, concatenated and reduced: (N, C, h, w) -> (N, channels, h, w).

    pooling_size: None pools the whole map; (height, width) in cells pools, in eval mode, over a sliding window of that
    extent with replicated borders, so that a large test picture is pooled over what a training crop showed.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        norm: Norm,
        output_stride: int,
        pooling_size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.pooling_size = pooling_size
        rates = ATROUS_RATES[output_stride]
        self.map_convs = nn.ModuleList(
            [conv(in_channels, channels, 1), *(conv(in_channels, channels, 3, dilation=rate) for rate in rates)]
        )
        self.map_bn = norm(4 * channels)
        self.global_pooling_conv = conv(in_channels, channels, 1)
        self.global_pooling_bn = norm(channels)
        self.red_conv = conv(4 * channels, channels, 1)
        self.pool_red_conv = conv(channels, channels, 1)
        self.red_bn = norm(channels)

    def forward(self, x: Tensor) -> Tensor:
        branches = self.map_bn(torch.cat([branch(x) for branch in self.map_convs], dim=1))
        pooled = self.pool_red_conv(self.global_pooling_bn(self.global_pooling_conv(self.pool(x))))
        # A whole-map mean is one cell, which the addition spreads over the map.
        return self.red_bn(self.red_conv(branches) + pooled)

    def pool(self, x: Tensor) -> Tensor:
        """(N, C, 1, 1), or (N, C, h, w) where eval mode pools over a window."""
        if self.training or self.pooling_size is None:
            return x.mean((2, 3), keepdim=True)
        height, width = (min(size, extent) for size, extent in zip(self.pooling_size, x.shape[2:], strict=True))
        pooled = F.avg_pool2d(x, (height, width), stride=1)
        left, top = (width - 1) // 2, (height - 1) // 2
        return F.pad(pooled, (left, width - 1 - left, top, height - 1 - top), mode="replicate")
