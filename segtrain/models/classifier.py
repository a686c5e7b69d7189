"""Backbone, global average pool and linear classifier: the layout of the published ImageNet weights."""

from collections import OrderedDict

from torch import Tensor, nn

from segtrain.models.blocks import interception
from segtrain.models.frozen import Freezable
from segtrain.models.rebuilding import rebuilding_of
from segtrain.models.segmenter import recompute_blocks


class GlobalAvgPool2d(nn.Module):
    """(N, C, h, w) -> (N, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


class Classifier(Freezable, nn.Sequential):
    """(N, in_channels, H, W) normalised images -> (N, num_classes) logits.

    The backbone's modules are direct children, next to `classifier.fc`: these are the keys of the published files,
    and with the prefix `body.` those of a Segmenter.
    """

    in_channels = 3

    def __init__(self, body: nn.Module, num_classes: int, recompute: str = "none", keep: str = "exact") -> None:
        super().__init__(OrderedDict(body.named_children()))
        self.recompute, self.keep = recompute, keep
        recompute_blocks(self, recompute)
        self.rebuilding = rebuilding_of(self, recompute)
        fc = nn.Linear(body.out_channels, num_classes)  # type: ignore[arg-type]
        self.classifier = nn.Sequential(OrderedDict(avg_pool=GlobalAvgPool2d(), fc=fc))
        self.num_classes = num_classes

    def forward(self, x: Tensor) -> Tensor:
        with interception(self.recompute, self.keep, self.rebuilding):
            logits: Tensor = super().forward(x)
        return logits
