"""Residual blocks and the norm layers inside them, with the key names of the published checkpoints."""

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn

from segtrain.abn import ABN, BatchNormAct, InPlaceABN
from segtrain.abn.functions import activate

NORMS: dict[str, type[ABN]] = {"inplace_abn": InPlaceABN, "abn": ABN, "batch_norm": BatchNormAct}


class Norm:
    """Builds the normalise-and-activate layers of one network.

    `norm(channels)` may overwrite its input; `norm.first(channels)` leaves it alone, because it is the first operation
    of a block and the block's input belongs to the caller; `norm.linear(channels)` has no activation.
    """

    def __init__(self, norm: str = "inplace_abn", activation: str = "leaky_relu", negative_slope: float = 0.01) -> None:
        self.layer = NORMS[norm]
        self.activation = activation
        self.negative_slope = negative_slope

    def __call__(self, channels: int, activation: str | None = None, **options: bool) -> ABN:
        return self.layer(
            channels, activation=activation or self.activation, activation_param=self.negative_slope, **options
        )

    def first(self, channels: int) -> ABN:
        return self(channels, overwrite=False) if self.layer is InPlaceABN else self(channels)

    def linear(self, channels: int) -> ABN:
        return self(channels, activation="identity")

    def activate_(self, x: Tensor) -> Tensor:
        """The network's activation alone, written over x."""
        return activate(x, self.activation, self.negative_slope)


def conv(in_channels: int, channels: int, size: int, stride: int = 1, dilation: int = 1, groups: int = 1) -> nn.Conv2d:
    """Convolution without bias that keeps the extent at stride 1."""
    padding = (size // 2) * dilation
    return nn.Conv2d(in_channels, channels, size, stride, padding, dilation, groups, bias=False)


class IdentityResidualBlock(nn.Module):
    """Pre-activation block of WideResNet-38 and ResNeXt: x + convs(act(norm(x))), nothing after the sum.

    channels: two entries make a basic block (3x3, 3x3), three a bottleneck (1x1, 3x3, 1x1, grouped in the middle).
    The stride is on the first convolution. Where the extent or the channels change, the shortcut is a 1x1 projection
    of the activated input. Input (N, in_channels, H, W), output (N, channels[-1], H / stride, W / stride).
    """

    def __init__(
        self,
        in_channels: int,
        channels: Sequence[int],
        norm: Norm,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.bn1 = norm.first(in_channels)
        layers: list[tuple[str, nn.Module]]
        if len(channels) == 2:
            layers = [
                ("conv1", conv(in_channels, channels[0], 3, stride, dilation)),
                ("bn2", norm(channels[0])),
                ("conv2", conv(channels[0], channels[1], 3, 1, dilation)),
            ]
        else:
            layers = [
                ("conv1", conv(in_channels, channels[0], 1, stride)),
                ("bn2", norm(channels[0])),
                ("conv2", conv(channels[0], channels[1], 3, 1, dilation, groups)),
                ("bn3", norm(channels[1])),
                ("conv3", conv(channels[1], channels[2], 1)),
            ]
        if dropout:
            layers.insert(-1, ("dropout", nn.Dropout2d(dropout)))
        self.convs = nn.Sequential(OrderedDict(layers))
        changes = stride != 1 or in_channels != channels[-1]
        self.proj_conv = conv(in_channels, channels[-1], 1, stride) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        activated = self.bn1(x)
        shortcut = x if self.proj_conv is None else self.proj_conv(activated)
        out: Tensor = self.convs(activated)
        return out.add_(shortcut)


class ResidualBlock(nn.Module):
    """Post-activation block of ResNet v1: act(norm(convs(x)) + x), stride on the (first) 3x3 convolution.

    channels, input and output as in IdentityResidualBlock.
    """

    def __init__(
        self, in_channels: int, channels: Sequence[int], norm: Norm, stride: int = 1, dilation: int = 1
    ) -> None:
        super().__init__()
        layers: list[tuple[str, nn.Module]]
        if len(channels) == 2:
            layers = [
                ("conv1", conv(in_channels, channels[0], 3, stride, dilation)),
                ("bn1", norm(channels[0])),
                ("conv2", conv(channels[0], channels[1], 3, 1, dilation)),
                ("bn2", norm.linear(channels[1])),
            ]
        else:
            layers = [
                ("conv1", conv(in_channels, channels[0], 1)),
                ("bn1", norm(channels[0])),
                ("conv2", conv(channels[0], channels[1], 3, stride, dilation)),
                ("bn2", norm(channels[1])),
                ("conv3", conv(channels[1], channels[2], 1)),
                ("bn3", norm.linear(channels[2])),
            ]
        self.convs = nn.Sequential(OrderedDict(layers))
        changes = stride != 1 or in_channels != channels[-1]
        self.proj_conv = conv(in_channels, channels[-1], 1, stride) if changes else None
        self.proj_bn = norm.linear(channels[-1]) if changes else None
        self.activate_ = norm.activate_

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        if self.proj_conv is not None and self.proj_bn is not None:
            shortcut = self.proj_bn(self.proj_conv(x))
        # A new tensor for the sum: the last norm still needs its own output in backward.
        return self.activate_(self.convs(x) + shortcut)


def stage(*blocks: nn.Module) -> nn.Sequential:
    """Blocks in a row under the published names block1, block2, ..."""
    return nn.Sequential(OrderedDict((f"block{i}", block) for i, block in enumerate(blocks, 1)))
