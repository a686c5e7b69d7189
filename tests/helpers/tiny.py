"""A plugin for the tests of the engine: a backbone of a few thousand parameters, which trains in a second."""

from torch import nn

from segtrain.models import BACKBONES
from segtrain.models.blocks import IdentityResidualBlock, Norm, conv


class Tiny(nn.Sequential):
    """(N, in_channels, H, W) -> (N, 8, H / output_stride, W / output_stride)."""

    def __init__(self, norm: Norm, output_stride: int, dropout: float = 0.0, in_channels: int = 3) -> None:
        super().__init__(
            conv(in_channels, 8, 3, output_stride // 2),
            norm(8),
            IdentityResidualBlock(8, (8, 8), norm, 2, dropout=dropout),
        )
        self.bn_out = norm(8)
        self.out_channels = 8


BACKBONES["tiny"] = Tiny
