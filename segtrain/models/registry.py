"""The backbones and heads by name. Plugins add their own."""

from collections.abc import Callable

from torch import nn

from segtrain.models.deeplabv3 import DeepLabV3, DeepLabV3Plus, TorchvisionDeepLabV3
from segtrain.models.densenet import densenet264
from segtrain.models.resnet import resnet18, resnet34, resnet50, resnet101, resnext50_32x4d, resnext101_32x8d
from segtrain.models.resnext import resnext50, resnext101, resnext152
from segtrain.models.wider_resnet import wider_resnet38, wider_resnet38_pooled

# Name -> builder(norm, output_stride, **model.backbone_options) of a module with the attribute `out_channels`.
BACKBONES: dict[str, Callable[..., nn.Module]] = {
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
# Name -> builder(in_channels, channels, norm, output_stride, pooling_size).
HEADS: dict[str, Callable[..., nn.Module]] = {
    "deeplabv3": DeepLabV3,
    "deeplabv3_torchvision": TorchvisionDeepLabV3,
    "deeplabv3plus": DeepLabV3Plus,
}
