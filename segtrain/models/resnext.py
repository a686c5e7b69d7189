"""ResNeXt with 64 groups and pre-activation blocks, layout of the official In-Place ABN repository."""

from collections import OrderedDict

from torch import nn

from segtrain.models.blocks import IdentityResidualBlock, Norm, conv, stage
from segtrain.models.pooling import MaxPool2d
from segtrain.models.resnet import STRIDES_DILATIONS


class ResNeXt(nn.Sequential):
    """(N, 3, H, W) -> (N, 2048, H / output_stride, W / output_stride). Three 3x3 convolutions in the stem."""

    def __init__(self, structure: tuple[int, ...], norm: Norm, output_stride: int) -> None:
        super().__init__()
        # No norm behind conv3: the first one of the first block does it.
        self.mod1 = nn.Sequential(
            OrderedDict(
                conv1=conv(3, 64, 3, stride=2), bn1=norm(64), conv2=conv(64, 64, 3), bn2=norm(64),
                conv3=conv(64, 64, 3), pool=MaxPool2d(3, 2, 1),
            )
        )  # fmt: skip
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
        self.out_channels = channels


def resnext50(norm: Norm, output_stride: int) -> nn.Module:
    return ResNeXt((3, 4, 6, 3), norm, output_stride)


def resnext101(norm: Norm, output_stride: int) -> nn.Module:
    return ResNeXt((3, 4, 23, 3), norm, output_stride)
