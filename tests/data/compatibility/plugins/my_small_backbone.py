"""A backbone of a few thousand numbers: segtrain train model.backbone=small plugins=[my_small_backbone.py]"""

from torch import nn

from segtrain.models import BACKBONES
from segtrain.models.blocks import IdentityResidualBlock, Norm, conv


class Small(nn.Sequential):
    def __init__(self, norm: Norm, output_stride: int, dropout: float = 0.0) -> None:
        super().__init__(
            conv(3, 8, 3, output_stride // 2), norm(8), IdentityResidualBlock(8, (8, 8), norm, 2, dropout=dropout)
        )
        self.bn_out = norm(8)
        self.out_channels = 8


BACKBONES["small"] = Small
