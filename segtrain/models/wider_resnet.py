"""WideResNet-38 in its segmentation form ("A2"), layout of the official In-Place ABN repository."""

from torch import nn

from segtrain.models.blocks import IdentityResidualBlock, Norm, conv, stage
from segtrain.models.pooling import MaxPool2d

STRUCTURE = (3, 3, 6, 3, 1, 1)
CHANNELS = ((128, 128), (256, 256), (512, 512), (512, 1024), (512, 1024, 2048), (1024, 2048, 4096))
DROPOUT = (0.0, 0.0, 0.0, 0.0, 0.3, 0.5)
# Strides and dilations of mod2..mod7; the pools before mod2 and mod3 halve twice more. 16 is ours: the official code
# has 8 and 32 only.
STRIDES_DILATIONS = {
    32: ((1, 1, 2, 2, 2, 1), (1, 1, 1, 1, 1, 1)),
    16: ((1, 1, 2, 2, 1, 1), (1, 1, 1, 1, 2, 2)),
    8: ((1, 1, 2, 1, 1, 1), (1, 1, 1, 2, 4, 4)),
}


class WiderResNet38(nn.Sequential):
    """(N, 3, H, W) -> (N, 4096, H / output_stride, W / output_stride)."""

    def __init__(self, norm: Norm, output_stride: int) -> None:
        super().__init__()
        self.mod1 = nn.Sequential()
        self.mod1.add_module("conv1", conv(3, 64, 3))
        channels = 64
        rows = zip(STRUCTURE, CHANNELS, DROPOUT, *STRIDES_DILATIONS[output_stride], strict=True)
        for i, (blocks, widths, dropout, stride, dilation) in enumerate(rows, 2):
            if i <= 3:
                self.add_module(f"pool{i}", MaxPool2d(3, 2, 1))
            made = []
            for block in range(blocks):
                block_stride = stride if block == 0 else 1
                made.append(IdentityResidualBlock(channels, widths, norm, block_stride, dilation, dropout=dropout))
                channels = widths[-1]
            self.add_module(f"mod{i}", stage(*made))
        self.bn_out = norm(channels)
        self.out_channels = channels


def wider_resnet38(norm: Norm, output_stride: int) -> nn.Module:
    return WiderResNet38(norm, output_stride)
