"""Build networks from names and options."""

import inspect
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from segtrain.abn import ABN, use_backend
from segtrain.config import ModelConfig
from segtrain.errors import UsageError, with_available
from segtrain.models.blocks import NORMS, Backbone, Norm
from segtrain.models.classifier import Classifier
from segtrain.models.frozen import freeze
from segtrain.models.registry import BACKBONES, HEADS
from segtrain.models.segmenter import Segmenter
from segtrain.models.timm_encoder import PREFIX, TimmEncoder, build_timm

CHANNELS = "in_channels"  # argument of a backbone's builder


def from_config(config: ModelConfig, num_classes: int) -> Segmenter | Classifier:
    """Build the network that the model options describe, in channels-last memory, which convolutions prefer.

    A Classifier of whole images for model.head=classifier, else a Segmenter. Also selects the back end of the In-Place
    ABN layers. Raises UsageError for a name or value that does not exist, and for a back end that cannot run here.
    """
    try:
        use_backend(config.backend)
    except RuntimeError as error:
        raise UsageError(f"model.backend={config.backend}: {error}") from error
    stride = config.output_stride
    cells = (
        None if config.pooling_size is None else (config.pooling_size[0] // stride, config.pooling_size[1] // stride)
    )
    both: dict[str, Any] = {
        "backbone": config.backbone,
        "num_classes": num_classes,
        "output_stride": stride,
        "norm": config.norm,
        "activation": config.activation,
        "negative_slope": config.negative_slope,
        "norm_variant": config.norm_variant,
        "scale": config.scale,
        "recompute": config.recompute,
        "keep": config.keep,
        "backbone_options": config.backbone_options,
        "in_channels": config.in_channels,
    }
    model: Segmenter | Classifier
    if config.head == "classifier":
        model = build_classifier(**both)
    else:
        model = build_model(head=config.head, head_channels=config.head_channels, pooling_size=cells, **both)
    if config.frozen:
        freeze(model, config.frozen, config.frozen_norm)
    return model.to(memory_format=torch.channels_last)


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
    keep: str = "exact",
    backbone_options: Mapping[str, Any] | None = None,
    in_channels: int = 3,
) -> Segmenter:
    """Build a freshly initialised segmentation network; under `torch.device("meta")` only its shapes.

    The options are those of the same name in ModelConfig, except pooling_size: height and width in cells of the feature
    map. Raises UsageError (a ValueError) for an unknown name, or an output stride other than 8, 16 or 32.
    """
    refuse_unknown("head", head, [*HEADS, "classifier"])
    refuse_unknown("norm", norm, NORMS)
    layers = Norm(norm, activation, negative_slope, norm_variant, scale, recompute, keep)
    body = build_backbone(backbone, layers, output_stride, backbone_options or {}, in_channels)
    build = HEADS[head]
    more = {"low_channels": early_map(body, backbone, head)} if getattr(build, "takes_early_map", False) else {}
    features = int(body.out_channels)  # type: ignore[arg-type]
    top = build(features, head_channels, layers, output_stride, pooling_size, **more)
    model = Segmenter(body, top, head_channels, num_classes, recompute, keep)
    model.in_channels = in_channels
    with torch.no_grad():
        initialise(model, negative_slope)
    return model


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
    keep: str = "exact",
    backbone_options: Mapping[str, Any] | None = None,
    in_channels: int = 3,
) -> Classifier:
    """Build a freshly initialised classification network; under `torch.device("meta")` only its shapes.

    The published WideResNet-38 is wider_resnet38_pooled; wider_resnet38 is the segmentation form under a classifier.
    Raises UsageError (a ValueError) for an unknown name, or an output stride other than 8, 16 or 32.
    """
    refuse_unknown("norm", norm, NORMS)
    layers = Norm(norm, activation, negative_slope, norm_variant, scale, recompute, keep)
    body = build_backbone(backbone, layers, output_stride, backbone_options or {}, in_channels)
    model = Classifier(body, num_classes, recompute, keep)
    model.in_channels = in_channels
    with torch.no_grad():
        initialise(model, negative_slope)
    return model


def build_backbone(
    backbone: str, norm: Norm, output_stride: int, options: Mapping[str, Any], in_channels: int = 3
) -> nn.Module:
    """in_channels: of the images. Raises UsageError (a ValueError) for a name, an output stride or an option that does
    not exist, and for a backbone of a plugin that takes RGB only."""
    if backbone.startswith(PREFIX):
        return build_timm(backbone, norm, output_stride, options, in_channels=in_channels)
    refuse_unknown("backbone", backbone, BACKBONES)
    refuse_unknown("output_stride", output_stride, (8, 16, 32))
    check_options(backbone, options)
    body = BACKBONES[backbone](norm, output_stride, **with_channels(backbone, options, in_channels))
    if not hasattr(body, "out_channels"):
        raise UsageError(f"model.backbone={backbone}: the module lacks out_channels, the number of its output channels")
    return body


def with_channels(backbone: str, options: Mapping[str, Any], in_channels: int) -> dict[str, Any]:
    """The options with the channels of the images, if the backbone's builder takes them; UsageError if it has to."""
    if options.get(CHANNELS, in_channels) != in_channels:
        raise UsageError(
            f"model.backbone_options.{CHANNELS}={options[CHANNELS]} is not possible: the images have {in_channels} "
            f"channels; give model.{CHANNELS} instead"
        )
    taken = inspect.signature(BACKBONES[backbone]).parameters
    if CHANNELS in taken:
        return {**options, CHANNELS: in_channels}
    if in_channels != 3:
        raise UsageError(
            f"model.{CHANNELS}={in_channels} is not possible with {backbone}, which takes 3: its builder needs the "
            f"argument {CHANNELS}, the number of channels of its input"
        )
    return dict(options)


def refuse_unknown(option: str, value: object, known: Collection[object]) -> None:
    if value not in known:
        own = " (plugins=[FILE] adds your own)" if option in ("backbone", "head") else ""
        raise UsageError(f"model.{option}={value} does not exist: choose {', '.join(map(str, known))}{own}")


def check_options(backbone: str, options: Mapping[str, Any]) -> None:
    """Raises UsageError for an option that the backbone's builder does not take, and for a missing required one."""
    taken = list(inspect.signature(BACKBONES[backbone]).parameters.values())[2:]
    named = {one.name: one for one in taken if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)}
    for key in options:
        if key not in named and not any(one.kind == one.VAR_KEYWORD for one in taken):
            known = [name for name in named if name != CHANNELS]
            raise UsageError(f"model.backbone_options.{key}: {backbone} has no such option{with_available(key, known)}")
    missing = [name for name, one in named.items() if one.default is one.empty and name not in {*options, CHANNELS}]
    if missing:
        raise UsageError(f"model.backbone={backbone} needs model.backbone_options={{{missing[0]}: ...}}")


def early_map(body: nn.Module, backbone: str, head: str) -> int:
    """Have the backbone return its early map too, and drop its last norm: the official code uses the plain sum.

    Returns the number of channels of the early map. Raises UsageError if the backbone has none.
    """
    if not isinstance(body, Backbone | TimmEncoder) or body.low_level is None:
        raise UsageError(
            f"model.head={head} is not possible with {backbone}, which has no early map for its decoder (densenet264: "
            "a later layer overwrites it): choose a resnet, resnext or wider_resnet38, or model.head=deeplabv3"
        )
    body.keeps = body.low_level
    if hasattr(body, "bn_out"):
        del body.bn_out
    return body.low_channels


def initialise(model: nn.Module, negative_slope: float) -> None:
    """Initialise as published: convolutions Xavier normal with the activation's gain, linear layers Xavier uniform with
    gain 0.1, norm layers 1 and 0, biases 0. A body with `initialised = True` keeps its weights."""
    gain = nn.init.calculate_gain("leaky_relu", negative_slope)
    body = getattr(model, "body", None)
    foreign = set(body.modules()) if body is not None and getattr(body, "initialised", False) else set()
    for module in model.modules():
        if module in foreign:
            continue
        if isinstance(module, nn.Conv2d):
            nn.init.xavier_normal_(module.weight, gain)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight, 0.1)
            nn.init.zeros_(module.bias)
        elif isinstance(module, ABN):
            module.reset_parameters()
