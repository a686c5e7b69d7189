"""ResNeXt with 64 groups and pre-activation blocks, layout of the official In-Place ABN repository."""

from collections import OrderedDict

from torch import nn

from segtrain.models.blocks import Backbone, IdentityResidualBlock, Norm, conv, stage
from segtrain.models.pooling import MaxPool2d
from segtrain.models.resnet import STRIDES_DILATIONS


def stem(channels: int, norm: Norm, in_channels: int = 3) -> nn.Sequential:
    """Three 3x3 convolutions, (N, in_channels, H, W) -> (N, channels, H / 4, W / 4): `input_3x3` of the official code.

    No norm after conv3: the first norm of the first block normalises its output.
    """
    return nn.Sequential(
        OrderedDict(
            conv1=conv(in_channels, channels, 3, stride=2), bn1=norm(channels), conv2=conv(channels, channels, 3),
            bn2=norm(channels), conv3=conv(channels, channels, 3), pool=MaxPool2d(3, 2, 1),
        )
    )  # fmt: skip


class ResNeXt(Backbone):
    """Output (N, 2048, H / output_stride, W / output_stride). Three 3x3 convolutions in the stem."""

    def __init__(self, structure: tuple[int, ...], norm: Norm, output_stride: int, in_channels: int) -> None:
        super().__init__()
        self.mod1 = stem(64, norm, in_channels)
        channels = 64
        for i, (blocks, stride, dilation) in enumerate(zip(structure, *STRIDES_DILATIONS[output_stride], strict=True)):
            widths = (128 * 2**i, 128 * 2**i, 256 * 2**i)
            made = []
            for block in range(blocks):
                block_stride = stride if block == 0 else 1
                made.append(IdentityResidualBlock(channels, widths, norm, block_stride, dilation, groups=64))
                channels = widths[-1]
            self.add_module(f"mod{i + 2}", stage(*made))
        self.bn_out = norm(channels)
        self.out_channels, self.low_channels = channels, 256


def resnext50(norm: Norm, output_stride: int, in_channels: int = 3) -> Backbone:
    return ResNeXt((3, 4, 6, 3), norm, output_stride, in_channels)


def resnext101(norm: Norm, output_stride: int, in_channels: int = 3) -> Backbone:
    return ResNeXt((3, 4, 23, 3), norm, output_stride, in_channels)


def resnext152(norm: Norm, output_stride: int, in_channels: int = 3) -> Backbone:
    return ResNeXt((3, 8, 36, 3), norm, output_stride, in_channels)
