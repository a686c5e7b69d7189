"""The DeepLabV3 head of the In-Place ABN paper (section 4.2), with the key names of the released Vistas model, and two
heads for other published weights: torchvision's, and the DeepLabV3+ of Zhu et al. (arXiv 1812.01593)."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segtrain.abn import InPlaceABN
from segtrain.abn.rebuilding import Convolved, as_ran
from segtrain.abn.recipes import intercepting
from segtrain.models.blocks import Norm, conv, unlike_a_convolution
from segtrain.models.dropout import ElementDropout

# Dilations of the three 3x3 branches in cells of the feature map: the same extent in pixels at each output stride.
ATROUS_RATES = {8: (12, 24, 36), 16: (6, 12, 18), 32: (3, 6, 9)}
FINE_CHANNELS = 48  # of the early map in DeepLabV3+


class DeepLabV3(nn.Module):
    """Four parallel convolutions and a pooled branch, concatenated and reduced: (N, C, h, w) -> (N, channels, h, w).

    pooling_size: None pools the whole map. (height, width) in cells pools, in eval mode, over a sliding window of that
    size with replicated borders, so that a large test image is pooled over the extent of a training crop.
    """

    classifier_bias = True  # whether the classifier behind the head has one

    def __init__(
        self,
        in_channels: int,
        channels: int,
        norm: Norm,
        output_stride: int,
        pooling_size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.pooling_size = pooling_size
        rates = ATROUS_RATES[output_stride]
        self.map_convs = nn.ModuleList(
            [conv(in_channels, channels, 1), *(conv(in_channels, channels, 3, dilation=rate) for rate in rates)]
        )
        self.map_bn = norm(4 * channels)
        self.global_pooling_conv = conv(in_channels, channels, 1)
        self.global_pooling_bn = norm(channels)
        self.red_conv = conv(4 * channels, channels, 1)
        self.pool_red_conv = conv(channels, channels, 1)
        self.red_bn = norm(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.red_bn(self.reduced(x))

    def reduced(self, x: Tensor) -> Tensor:
        """All branches, reduced to (N, channels, h, w), before the last norm."""
        branches = self.map_bn(torch.cat([branch(x) for branch in self.map_convs], dim=1))
        pooled = self.pool_red_conv(self.global_pooling_bn(self.global_pooling_conv(self.pool(x))))
        # A whole-map mean is one cell, which the addition spreads over the map.
        out: Tensor = self.red_conv(branches) + pooled
        return out

    def pool(self, x: Tensor) -> Tensor:
        """(N, C, 1, 1), or (N, C, h, w) where eval mode pools over a window."""
        if self.training or self.pooling_size is None:
            return x.mean((2, 3), keepdim=True)
        if torch.compiler.is_exporting():
            return window_means(x, self.pooling_size)
        height, width = (min(size, extent) for size, extent in zip(self.pooling_size, x.shape[2:], strict=True))
        pooled = F.avg_pool2d(x, (height, width), stride=1)
        left, top = (width - 1) // 2, (height - 1) // 2
        return F.pad(pooled, (left, width - 1 - left, top, height - 1 - top), mode="replicate")


def window_means(x: Tensor, size: tuple[int, int]) -> Tensor:
    """What `DeepLabV3.pool` computes in eval mode, to rounding, as two matrix products that fit maps of any size.

    An average over a window has a fixed size in an exported graph, but here a window never exceeds the map.
    """
    rows, columns = (weights_of(extent, count, x) for extent, count in zip(x.shape[2:], size, strict=True))
    return rows @ x @ columns.t()


def weights_of(extent: int, size: int, like: Tensor) -> Tensor:
    """(extent, extent): each row averages the window of at most `size` cells around its own, inside the map."""
    cells = torch.arange(extent, device=like.device)
    count = cells[-1:] + 1  # a tensor, so that an exported graph computes it anew for every map
    length = count.clamp(max=size)
    before = torch.div(length - 1, 2, rounding_mode="floor")
    first = torch.minimum((cells - before).clamp(min=0), count - length)[:, None]
    return ((cells >= first) & (cells < first + length)).to(like.dtype) / length


class TorchvisionDeepLabV3(DeepLabV3):
    """The head of torchvision's deeplabv3_resnet50 and 101, with dropout and another 3x3 convolution at its end.

    torchvision reduces one concatenation of all five branches; the sum of two reductions is the same.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        norm: Norm,
        output_stride: int,
        pooling_size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__(in_channels, channels, norm, output_stride, pooling_size)
        self.dropout = ElementDropout(0.5)
        self.refine_conv = conv(channels, channels, 3)
        self.refine_bn = norm(channels)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.refine_bn(self.refine_conv(self.dropout(super().forward(x))))
        return out


class DeepLabV3Plus(DeepLabV3):
    """Concatenates the reduced branches, without norm, with a backbone's early map.

    Input: the backbone's output (N, C, h, w) and early map (N, low_channels, H, W); output (N, channels, H, W). As in
    the official code, the upsampling to (H, W) aligns corners, and the classifier has no bias.
    """

    classifier_bias = False
    takes_early_map = True

    def __init__(
        self,
        in_channels: int,
        channels: int,
        norm: Norm,
        output_stride: int,
        pooling_size: tuple[int, int] | None = None,
        *,
        low_channels: int,
    ) -> None:
        super().__init__(in_channels, channels, norm, output_stride, pooling_size)
        del self.red_bn
        self.fine_conv = conv(low_channels, FINE_CHANNELS, 1)
        self.conv1 = conv(FINE_CHANNELS + channels, channels, 3)
        self.bn1 = norm(channels)
        self.conv2 = conv(channels, channels, 3)
        self.bn2 = norm(channels)

    def forward(self, maps: tuple[Tensor, Tensor]) -> Tensor:  # type: ignore[override]
        x, low = maps
        reduced, fine = self.reduced(x), self.fine_conv(low)
        joined = concatenated(fine, reduced)
        coded = isinstance(self.bn1, InPlaceABN) and self.bn1.keep != "exact"
        recipes = intercepting() if coded and not unlike_a_convolution(self.fine_conv) else None
        if recipes is not None:  # what fine_conv keeps of its input anyway, and a small map
            convolved = Convolved(recipes.pack(low.detach()), as_ran(self.fine_conv, fine))
            recipes.add(joined, Joined(convolved, reduced.detach(), joined.stride()))
        out: Tensor = self.conv2(self.bn1(self.conv1(joined)))
        return self.bn2(out)


def concatenated(fine: Tensor, reduced: Tensor) -> Tensor:
    """Concatenate a fine map with a coarse one, which is enlarged to its size."""
    return torch.cat([fine, F.interpolate(reduced, fine.shape[2:], mode="bilinear", align_corners=True)], dim=1)


class Joined(NamedTuple):
    """The recipe of what `join` made."""

    fine: Convolved
    reduced: Tensor
    stride: tuple[int, ...]

    def output(self) -> Tensor:
        made = concatenated(self.fine.output(), self.reduced)
        return made if made.stride() == self.stride else made.new_empty_strided(made.shape, self.stride).copy_(made)
