"""DenseNet-264, layout of the official In-Place ABN repository."""

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from segtrain.models.blocks import Backbone, Norm, conv
from segtrain.models.resnet import STRIDES_DILATIONS
from segtrain.models.resnext import stem

BOTTLENECK = 4  # output channels of a layer's 1x1 convolution, in units of the growth


class DenseModule(nn.Module):
    """Layers that each take all previous outputs: (N, C, h, w) -> (N, C + layers * growth, h, w).

    The norms of a layer may overwrite their inputs, concatenations that nothing else uses; except the first layer's
    first norm, whose input is the module's own, which later layers use too. With `recompute`, backward runs each layer
    again.
    """

    recompute = False

    def __init__(self, in_channels: int, growth: int, layers: int, norm: Norm, dilation: int) -> None:
        super().__init__()
        self.convs1, self.convs3 = nn.ModuleList(), nn.ModuleList()
        inner = BOTTLENECK * growth
        for i in range(layers):
            channels = in_channels + i * growth
            bn = norm.first(channels) if i == 0 else norm(channels)
            self.convs1.append(nn.Sequential(OrderedDict(bn=bn, conv=conv(channels, inner, 1))))
            self.convs3.append(
                nn.Sequential(OrderedDict(bn=norm(inner), conv=conv(inner, growth, 3, dilation=dilation)))
            )
        self.out_channels = in_channels + layers * growth

    def forward(self, x: Tensor) -> Tensor:
        outputs = [x]
        again = self.recompute and torch.is_grad_enabled()
        for i in range(len(self.convs1)):
            outputs.append(
                checkpoint(self.layer, i, *outputs, use_reentrant=False) if again else self.layer(i, *outputs)
            )
        return torch.cat(outputs, dim=1)

    def layer(self, i: int, *inputs: Tensor) -> Tensor:
        x = inputs[0] if len(inputs) == 1 else torch.cat(inputs, dim=1)
        out: Tensor = self.convs3[i](self.convs1[i](x))
        return out


class DenseNet(Backbone):
    """Transitions tra2..tra4 halve the channels and, unless the next module dilates, height and width."""

    low_level = None  # the transition after mod2 overwrites its output

    def __init__(
        self, structure: tuple[int, ...], norm: Norm, output_stride: int, in_channels: int = 3, growth: int = 32
    ) -> None:
        super().__init__()
        channels = 2 * growth
        self.mod1 = stem(channels, norm, in_channels)
        for i, (layers, stride, dilation) in enumerate(zip(structure, *STRIDES_DILATIONS[output_stride], strict=True)):
            if i > 0:
                transition = OrderedDict[str, nn.Module](bn=norm(channels), conv=conv(channels, channels // 2, 1))
                if stride == 2:
                    transition["pool"] = nn.AvgPool2d(2, 2)
                self.add_module(f"tra{i + 1}", nn.Sequential(transition))
                channels //= 2
            module = DenseModule(channels, growth, layers, norm, dilation)
            self.add_module(f"mod{i + 2}", module)
            channels = module.out_channels
        self.bn_out = norm(channels)
        self.out_channels = channels


def densenet264(norm: Norm, output_stride: int, in_channels: int = 3) -> Backbone:
    return DenseNet((6, 12, 64, 48), norm, output_stride, in_channels)
