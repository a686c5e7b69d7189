"""ResNet v1 (post-activation), layout of the official In-Place ABN repository."""

from collections import OrderedDict

from torch import nn

from segtrain.models.blocks import Norm, ResidualBlock, stage
from segtrain.models.pooling import MaxPool2d

# First block strides and dilations of mod2..mod5 by output stride: what no longer strides dilates instead.
STRIDES_DILATIONS = {
    32: ((1, 2, 2, 2), (1, 1, 1, 1)),
    16: ((1, 2, 2, 1), (1, 1, 1, 2)),
    8: ((1, 2, 1, 1), (1, 1, 2, 4)),
}


class ResNet(nn.Sequential):
    """(N, 3, H, W) -> (N, out_channels, H / output_stride, W / output_stride)."""

    def __init__(self, structure: tuple[int, ...], bottleneck: bool, norm: Norm, output_stride: int) -> None:
        super().__init__()
        self.mod1 = nn.Sequential(
            OrderedDict(conv1=nn.Conv2d(3, 64, 7, 2, 3, bias=False), bn1=norm(64), pool1=MaxPool2d(3, 2, 1))
        )
        channels = 64
        for i, (blocks, stride, dilation) in enumerate(zip(structure, *STRIDES_DILATIONS[output_stride], strict=True)):
            width = 64 * 2**i
            widths = (width, width, 4 * width) if bottleneck else (width, width)
            made = []
            for block in range(blocks):
                made.append(ResidualBlock(channels, widths, norm, stride if block == 0 else 1, dilation))
                channels = widths[-1]
            self.add_module(f"mod{i + 2}", stage(*made))
        self.out_channels = channels


def resnet18(norm: Norm, output_stride: int) -> nn.Module:
    return ResNet((2, 2, 2, 2), False, norm, output_stride)


def resnet34(norm: Norm, output_stride: int) -> nn.Module:
    return ResNet((3, 4, 6, 3), False, norm, output_stride)


def resnet50(norm: Norm, output_stride: int) -> nn.Module:
    return ResNet((3, 4, 6, 3), True, norm, output_stride)


def resnet101(norm: Norm, output_stride: int) -> nn.Module:
    return ResNet((3, 4, 23, 3), True, norm, output_stride)
