"""A backbone: segtrain train model=plain model.backbone_options={width:48} plugins=[my_backbone.py]"""

from torch import nn

from segtrain.models import BACKBONES
from segtrain.models.blocks import Norm, conv


class Plain(nn.Sequential):
    def __init__(self, norm: Norm, output_stride: int, width: int = 32) -> None:
        super().__init__()
        for channels, stride in ((3, 2), (width, 2), (width, 2), (width, output_stride // 8)):
            self.extend([conv(channels, width, 3, stride), norm(width)])
        self.out_channels = width


BACKBONES["plain"] = Plain
