"""Backbone, head and classifier put together."""

from collections.abc import Callable, Collection
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segtrain.abn import ABN, recomputed_outputs, use_backend
from segtrain.config import ModelConfig
from segtrain.errors import UsageError
from segtrain.models.blocks import KEEP, NORMS, Backbone, Norm, Stage
from segtrain.models.deeplabv3 import deeplabv3, deeplabv3_torchvision, deeplabv3plus
from segtrain.models.densenet import DenseModule, densenet264
from segtrain.models.resnet import resnet18, resnet34, resnet50, resnet101, resnext50_32x4d, resnext101_32x8d
from segtrain.models.resnext import resnext50, resnext101, resnext152
from segtrain.models.wider_resnet import wider_resnet38, wider_resnet38_pooled

# name -> builder(norm, output_stride)
BACKBONES: dict[str, Callable[..., Backbone]] = {
    "resnet18": resnet18,
    "resnet34": resnet34,
    "resnet50": resnet50,
    "resnet101": resnet101,
    "resnext50": resnext50,
    "resnext101": resnext101,
    "resnext152": resnext152,
    "resnext50_32x4d": resnext50_32x4d,
    "resnext101_32x8d": resnext101_32x8d,
    "wider_resnet38": wider_resnet38,
    "wider_resnet38_pooled": wider_resnet38_pooled,
    "densenet264": densenet264,
}
# those that take first_dilation
POST_ACTIVATION = ("resnet18", "resnet34", "resnet50", "resnet101", "resnext50_32x4d", "resnext101_32x8d")
# name -> builder(backbone, channels, norm, output_stride, pooling_size)
HEADS: dict[str, Callable[..., nn.Module]] = {
    "deeplabv3": deeplabv3,
    "deeplabv3_torchvision": deeplabv3_torchvision,
    "deeplabv3plus": deeplabv3plus,
}


class Segmenter(nn.Module):
    """(N, 3, H, W) normalised RGB -> (N, num_classes, H, W) logits, bilinear from the network's own stride.

    `upsample=False` gives the logits at that stride instead. Parts are called body, head and cls as in the released
    checkpoints.
    """

    def __init__(
        self, body: nn.Module, head: nn.Module, head_channels: int, num_classes: int, recompute: str = "none"
    ) -> None:
        super().__init__()
        self.recompute = recompute
        recompute_blocks(body, recompute)
        self.body = body
        self.head = head
        self.cls = nn.Conv2d(head_channels, num_classes, 1, bias=getattr(head, "classifier_bias", True))

    def forward(self, x: Tensor, upsample: bool = True) -> Tensor:
        with recomputed_outputs() if self.recompute in KEEP else nullcontext():
            logits: Tensor = self.cls(self.head(self.body(x)))
        if not upsample:
            return logits
        return F.interpolate(logits, size=x.shape[-2:], mode="bilinear", align_corners=False)


def recompute_blocks(body: nn.Module, recompute: str) -> None:
    for part in body.modules():
        if isinstance(part, Stage | DenseModule):
            part.recompute = recompute == "blocks"


def initialise(model: nn.Module, negative_slope: float) -> None:
    """The published initialisation: convolutions Xavier normal with the activation's gain, linear layers Xavier uniform
    with gain 0.1; norm layers 1 and 0; bias 0."""
    gain = nn.init.calculate_gain("leaky_relu", negative_slope)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.xavier_normal_(module.weight, gain)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight, 0.1)
            nn.init.zeros_(module.bias)
        elif isinstance(module, ABN):
            module.reset_parameters()


def build_backbone(
    backbone: str, norm: Norm, output_stride: int, first_dilation: str = "own", dropout: str = "channel"
) -> Backbone:
    """UsageError (a ValueError) for a name, an output stride or an option that the backbone does not have."""
    for option, value, known in (
        ("backbone", backbone, BACKBONES), ("output_stride", output_stride, (8, 16, 32)),
        ("first_dilation", first_dilation, ("own", "previous")), ("dropout", dropout, ("channel", "element")),
    ):  # fmt: skip
        refuse_unknown(option, value, known)
    options = {} if first_dilation == "own" else {"first_dilation": first_dilation}
    if options and backbone not in POST_ACTIVATION:
        raise UsageError(
            f"model.first_dilation={first_dilation} is torchvision's way and not possible with {backbone}: "
            f"choose own, or one of {', '.join(POST_ACTIVATION)}"
        )
    body = BACKBONES[backbone](norm, output_stride, **options)
    if dropout == "element":
        holders = [part for part in body.modules() if isinstance(getattr(part, "dropout", None), nn.Dropout2d)]
        if not holders:
            raise UsageError(f"model.dropout={dropout}: {backbone} has no dropout; choose channel")
        for part in holders:
            part.dropout = nn.Dropout(part.dropout.p)  # type: ignore[union-attr, arg-type]
    return body


def refuse_unknown(option: str, value: object, known: Collection[object]) -> None:
    if value not in known:
        raise UsageError(f"model.{option}={value} does not exist: choose {', '.join(map(str, known))}")


def build_model(
    backbone: str,
    head: str = "deeplabv3",
    num_classes: int = 19,
    output_stride: int = 8,
    norm: str = "inplace_abn",
    activation: str = "leaky_relu",
    negative_slope: float = 0.01,
    head_channels: int = 256,
    pooling_size: tuple[int, int] | None = None,
    norm_variant: str = "one",
    scale: str = "abs",
    recompute: str = "none",
    first_dilation: str = "own",
    dropout: str = "channel",
) -> Segmenter:
    """A freshly initialised segmentation network; under `torch.device("meta")` only its shapes.

    Raises UsageError (a ValueError) for a name or an output stride (8, 16, 32) that does not exist.
    """
    refuse_unknown("head", head, HEADS)
    refuse_unknown("norm", norm, NORMS)
    layers = Norm(norm, activation, negative_slope, norm_variant, scale, recompute)
    body = build_backbone(backbone, layers, output_stride, first_dilation, dropout)
    top = HEADS[head](body, head_channels, layers, output_stride, pooling_size)
    model = Segmenter(body, top, head_channels, num_classes, recompute)
    with torch.no_grad():
        initialise(model, negative_slope)
    return model


def from_config(config: ModelConfig, num_classes: int) -> Segmenter:
    """The network that the model options describe, in channels-last memory, which convolutions prefer.

    Also chooses the back end of the In-Place ABN layers; UsageError where that cannot run here.
    """
    try:
        use_backend(config.backend)
    except RuntimeError as error:
        raise UsageError(f"model.backend={config.backend}: {error}") from error
    stride = config.output_stride
    cells = (
        None if config.pooling_size is None else (config.pooling_size[0] // stride, config.pooling_size[1] // stride)
    )
    model = build_model(
        backbone=config.backbone,
        head=config.head,
        num_classes=num_classes,
        output_stride=stride,
        norm=config.norm,
        activation=config.activation,
        negative_slope=config.negative_slope,
        head_channels=config.head_channels,
        pooling_size=cells,
        norm_variant=config.norm_variant,
        scale=config.scale,
        recompute=config.recompute,
        first_dilation=config.first_dilation,
        dropout=config.dropout,
    )
    return model.to(memory_format=torch.channels_last)
