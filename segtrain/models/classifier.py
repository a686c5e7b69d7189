"""Backbone, global average pool and linear classifier: what the published ImageNet weights are of."""

from collections import OrderedDict
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from segtrain.abn import recomputed_outputs
from segtrain.models.blocks import KEEP, NORMS, Norm
from segtrain.models.segmenter import build_backbone, initialise, recompute_blocks, refuse_unknown


class GlobalAvgPool2d(nn.Module):
    """(N, C, h, w) -> (N, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


class Classifier(nn.Sequential):
    """(N, 3, H, W) normalised RGB -> (N, num_classes) logits.

    The backbone's modules are its own, under their own names, beside `classifier.fc`: the keys of the published
    files, and with `body.` before them those of a Segmenter.
    """

    def __init__(self, body: nn.Module, num_classes: int, recompute: str = "none") -> None:
        super().__init__(OrderedDict(body.named_children()))
        self.recompute = recompute
        recompute_blocks(self, recompute)
        fc = nn.Linear(body.out_channels, num_classes)  # type: ignore[arg-type]
        self.classifier = nn.Sequential(OrderedDict(avg_pool=GlobalAvgPool2d(), fc=fc))
        self.num_classes = num_classes

    def forward(self, x: Tensor) -> Tensor:
        with recomputed_outputs() if self.recompute in KEEP else nullcontext():
            logits: Tensor = super().forward(x)
        return logits


def build_classifier(
    backbone: str,
    num_classes: int = 1000,
    output_stride: int = 32,
    norm: str = "inplace_abn",
    activation: str = "leaky_relu",
    negative_slope: float = 0.01,
    norm_variant: str = "one",
    scale: str = "abs",
    recompute: str = "none",
    backbone_options: Mapping[str, Any] | None = None,
) -> Classifier:
    """A freshly initialised classification network; under `torch.device("meta")` only its shapes.

    The published WideResNet-38 is wider_resnet38_pooled; wider_resnet38 is the segmentation form under a classifier.
    Raises UsageError (a ValueError) for a name or an output stride that does not exist.
    """
    refuse_unknown("norm", norm, NORMS)
    layers = Norm(norm, activation, negative_slope, norm_variant, scale, recompute)
    body = build_backbone(backbone, layers, output_stride, backbone_options or {})
    model = Classifier(body, num_classes, recompute)
    with torch.no_grad():
        initialise(model, negative_slope)
    return model
