"""ResNet v1 (post-activation), layout of the official In-Place ABN repository, and torchvision's ResNeXts in it."""

from collections import OrderedDict

from torch import nn

from segtrain.errors import UsageError
from segtrain.models.blocks import Backbone, Norm, ResidualBlock, stage
from segtrain.models.pooling import MaxPool2d

# First block strides and dilations of mod2..mod5 by output stride: a module without stride dilates instead.
STRIDES_DILATIONS = {
    32: ((1, 2, 2, 2), (1, 1, 1, 1)),
    16: ((1, 2, 2, 1), (1, 1, 1, 2)),
    8: ((1, 2, 1, 1), (1, 1, 2, 4)),
}


class ResNet(Backbone):
    """Output (N, 512, ...) of basic blocks or (N, 2048, ...) of bottlenecks, H / output_stride by W / output_stride.

    groups, width: of the 3x3 convolutions of the first bottlenecks; the width doubles with every module.
    first_dilation: dilation of the first block of a dilated module: "own", that of its other blocks (official code), or
    "previous", that of the module before (torchvision, timm).
    """

    def __init__(
        self,
        structure: tuple[int, ...],
        bottleneck: bool,
        norm: Norm,
        output_stride: int,
        groups: int = 1,
        width: int = 64,
        first_dilation: str = "own",
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        if first_dilation not in ("own", "previous"):
            raise UsageError(f"model.backbone_options.first_dilation={first_dilation}: choose own or previous")
        self.mod1 = nn.Sequential(
            OrderedDict(conv1=nn.Conv2d(in_channels, 64, 7, 2, 3, bias=False), bn1=norm(64), pool1=MaxPool2d(3, 2, 1))
        )
        channels, previous = 64, 1
        for i, (blocks, stride, dilation) in enumerate(zip(structure, *STRIDES_DILATIONS[output_stride], strict=True)):
            inner, outer = width * 2**i, 64 * 2**i
            widths = (inner, inner, 4 * outer) if bottleneck else (outer, outer)
            made = []
            for block in range(blocks):
                first = previous if block == 0 and first_dilation == "previous" else dilation
                block_stride = stride if block == 0 else 1
                made.append(ResidualBlock(channels, widths, norm, block_stride, dilation, groups, first))
                channels = widths[-1]
            self.add_module(f"mod{i + 2}", stage(*made))
            previous = dilation
            if i == 0:
                self.low_channels = channels
        self.out_channels = channels


def resnet18(norm: Norm, output_stride: int, first_dilation: str = "own", in_channels: int = 3) -> Backbone:
    return ResNet((2, 2, 2, 2), False, norm, output_stride, first_dilation=first_dilation, in_channels=in_channels)


def resnet34(norm: Norm, output_stride: int, first_dilation: str = "own", in_channels: int = 3) -> Backbone:
    return ResNet((3, 4, 6, 3), False, norm, output_stride, first_dilation=first_dilation, in_channels=in_channels)


def resnet50(norm: Norm, output_stride: int, first_dilation: str = "own", in_channels: int = 3) -> Backbone:
    return ResNet((3, 4, 6, 3), True, norm, output_stride, first_dilation=first_dilation, in_channels=in_channels)


def resnet101(norm: Norm, output_stride: int, first_dilation: str = "own", in_channels: int = 3) -> Backbone:
    return ResNet((3, 4, 23, 3), True, norm, output_stride, first_dilation=first_dilation, in_channels=in_channels)


def resnext50_32x4d(norm: Norm, output_stride: int, first_dilation: str = "own", in_channels: int = 3) -> Backbone:
    return ResNet(
        (3, 4, 6, 3),
        True,
        norm,
        output_stride,
        groups=32,
        width=128,
        first_dilation=first_dilation,
        in_channels=in_channels,
    )


def resnext101_32x8d(norm: Norm, output_stride: int, first_dilation: str = "own", in_channels: int = 3) -> Backbone:
    return ResNet(
        (3, 4, 23, 3),
        True,
        norm,
        output_stride,
        groups=32,
        width=256,
        first_dilation=first_dilation,
        in_channels=in_channels,
    )
