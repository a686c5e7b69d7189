"""WideResNet-38, layout of the official In-Place ABN repository, in two forms with the same weights: "A2", for
segmentation, and the form that the published ImageNet weights were trained in, which reduces by max-pooling only."""

from torch import nn

from segtrain.errors import UsageError
from segtrain.models.blocks import Backbone, IdentityResidualBlock, Norm, conv, stage
from segtrain.models.pooling import MaxPool2d

STRUCTURE = (3, 3, 6, 3, 1, 1)
CHANNELS = ((128, 128), (256, 256), (512, 512), (512, 1024), (512, 1024, 2048), (1024, 2048, 4096))
DROPOUT = (0.0, 0.0, 0.0, 0.0, 0.3, 0.5)
# Strides and dilations of mod2..mod7 by output stride; the pools before mod2 and mod3 halve twice more. The official
# code has 8 and 32 only.
STRIDES_DILATIONS = {
    32: ((1, 1, 2, 2, 2, 1), (1, 1, 1, 1, 1, 1)),
    16: ((1, 1, 2, 2, 1, 1), (1, 1, 1, 1, 2, 2)),
    8: ((1, 1, 2, 1, 1, 1), (1, 1, 1, 2, 4, 4)),
}


class WiderResNet38(Backbone):
    """Output (N, 4096, H / output_stride, W / output_stride). pooled: max-pools before mod2..mod6 and no dropout.

    drops: "channel" (official code) or "element": what the dropout of mod6 and mod7 zeroes.
    """

    def __init__(
        self, norm: Norm, output_stride: int, pooled: bool = False, drops: str = "channel", in_channels: int = 3
    ) -> None:
        super().__init__()
        if drops not in ("channel", "element"):
            raise UsageError(f"model.backbone_options.drops={drops}: choose channel or element")
        self.mod1 = nn.Sequential()
        self.mod1.add_module("conv1", conv(in_channels, 64, 3))
        strides, dilations = ((1,) * 6, (1,) * 6) if pooled else STRIDES_DILATIONS[output_stride]
        dropouts = (0.0,) * 6 if pooled else DROPOUT
        channels = 64
        rows = zip(STRUCTURE, CHANNELS, dropouts, strides, dilations, strict=True)
        for i, (blocks, widths, dropout, stride, dilation) in enumerate(rows, 2):
            if i <= (6 if pooled else 3):
                self.add_module(f"pool{i}", MaxPool2d(3, 2, 1))
            made = []
            for block in range(blocks):
                block_stride = stride if block == 0 else 1
                made.append(
                    IdentityResidualBlock(channels, widths, norm, block_stride, dilation, dropout=dropout, drops=drops)
                )
                channels = widths[-1]
            self.add_module(f"mod{i}", stage(*made))
        self.bn_out = norm(channels)
        self.out_channels, self.low_channels = channels, CHANNELS[0][-1]


def wider_resnet38(norm: Norm, output_stride: int, drops: str = "channel", in_channels: int = 3) -> Backbone:
    return WiderResNet38(norm, output_stride, drops=drops, in_channels=in_channels)


def wider_resnet38_pooled(norm: Norm, output_stride: int, in_channels: int = 3) -> Backbone:
    if output_stride != 32:
        raise UsageError(
            f"model.output_stride={output_stride} is not possible: wider_resnet38_pooled, the ImageNet form, halves "
            "by max-pools between its modules, which cannot dilate instead: choose 32, or model.backbone="
            "wider_resnet38, which takes the same weights"
        )
    return WiderResNet38(norm, output_stride, pooled=True, in_channels=in_channels)
