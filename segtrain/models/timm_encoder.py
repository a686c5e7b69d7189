"""Encoders of the package timm by name: model.backbone=timm:NAME.

timm is imported when such an encoder is built, and not before.
"""

import importlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from segtrain.abn import BatchNormAct, InPlaceABN
from segtrain.abn.convert import Conversion, to_inplace
from segtrain.errors import UsageError, meant
from segtrain.models.blocks import Norm

PREFIX = "timm:"
STRIDES = (8, 16, 32)
EARLY = 4  # stride of the map for a decoder, at most
PROBE = (96, 64)  # height and width of the image that an encoder is tried on
# What lets an encoder take images of any size, tried in this order.
ANY_SIZE: tuple[dict[str, Any], ...] = ({}, {"dynamic_img_size": True}, {"strict_img_size": False})

# How `to_inplace` and a command are told to replace ReLU.
IN_PYTHON, ON_COMMAND_LINE = "replace_relu=0.01", "'model.backbone_options={replace_relu:0.01}'"


class TimmEncoder(nn.Module):
    """The feature maps of a timm network: (N, in_channels, H, W) -> (N, out_channels, H / stride, W / stride).

    With `keeps`, (output, early map), as other backbones return it. certificate: what the conversion to In-Place ABN
    has changed, in words. about: what timm knows of the network's weights.
    """

    keeps: str | None = None
    initialised = True  # by timm

    def __init__(self, features: nn.Module, strides: Sequence[int], channels: Sequence[int], swapped: bool) -> None:
        super().__init__()
        self.features = features
        self.swapped = swapped  # (N, H, W, C)
        self.out_channels, self.low_channels = channels[-1], channels[0]
        self.low_level = "early" if len(strides) > 1 and strides[0] <= EARLY else None
        self.certificate = ""
        self.about: Mapping[str, Any] = getattr(features, "pretrained_cfg", None) or {}

    def forward(self, x: Tensor) -> Any:
        maps = self.features(x)
        low, out = (one.permute(0, 3, 1, 2).contiguous() if self.swapped else one for one in (maps[0], maps[-1]))
        return out if self.keeps is None else (out, low)

    def parts(self) -> dict[str, nn.Module]:
        """The network's own modules, for model.frozen."""
        return dict(self.features.named_children())


def import_timm() -> Any:
    """UsageError with the command that installs it, if timm is missing."""
    try:
        return importlib.import_module("timm")
    except ImportError as error:
        raise UsageError(
            f"model.backbone={PREFIX}NAME needs the package timm ({error}): pip install 'segtrain-iabn[timm]', or pip "
            "install timm"
        ) from error


def build_timm(
    backbone: str, norm: Norm, output_stride: int, options: Mapping[str, Any], pretrained: bool = False,
    overlay: Mapping[str, Any] | None = None, in_channels: int = 3,
) -> TimmEncoder:  # fmt: skip
    """The encoder of `timm:NAME`, its BatchNorm layers converted as the norm asks.

    options: replace_relu, the slope of the LeakyReLU that replaces each ReLU; others go to timm.create_model.
    pretrained: with timm's weights, for which whatever it raises is passed on. overlay: of timm's pretrained_cfg.
    Under torch.device("meta") only the shapes are left. UsageError for a name, a stride or an option that does not fit.
    """
    name, given = backbone.removeprefix(PREFIX), dict(options)
    slope = given.pop("replace_relu", None)
    refuse_unknown_encoder(name)
    if in_channels != 3:
        given["in_chans"] = in_channels
    target = torch.get_default_device()
    if overlay is not None:
        given["pretrained_cfg_overlay"] = dict(overlay)
    with torch.device("cpu"), torch.random.fork_rng(enabled=target.type == "meta"):
        encoder = created(name, output_stride, given, pretrained)
        encoder = converted_encoder(encoder, norm, slope, in_channels)
    return encoder.to(target) if target.type == "meta" else encoder


def refuse_unknown_encoder(name: str) -> None:
    timm = import_timm()
    plain, _, tag = name.partition(".")
    known = timm.list_models()
    if plain not in known:
        near = meant(plain, known, PREFIX) or "; timm.list_models() has all names"
        raise UsageError(f"model.backbone={PREFIX}{name}: timm has no {plain}{near}")
    tags = [one.partition(".")[2] for one in timm.list_pretrained(f"{plain}.*")]
    if tag and tag not in tags:
        raise UsageError(
            f"model.backbone={PREFIX}{name}: timm has no weights {tag!r} of {plain}; it has {', '.join(tags) or 'none'}"
        )


def created(name: str, stride: int, options: Mapping[str, Any], pretrained: bool) -> TimmEncoder:
    """The encoder as timm makes it, with its last map at the stride and, if there is one, an early map.

    UsageError that names the strides that it can have.
    """
    found = strides_of(name, stride, options)
    if found is None or found[0][-1] != stride:
        others = ((one, strides_of(name, one, options)) for one in STRIDES)
        possible = [str(one) for one, other in others if other is not None and other[0][-1] == one]
        text = f"it can {' or '.join(possible)}" if possible else "it has no maps of stride 8, 16 or 32"
        raise UsageError(f"model.output_stride={stride} is not possible with {PREFIX}{name}: {text}")
    strides, asked, places = found
    early = [i for i, reduction in enumerate(strides[:-1]) if reduction <= EARLY]
    chosen = (*early[-1:], len(strides) - 1)
    asked["out_indices"] = tuple(places[i] for i in chosen)
    return of_any_size(name, pretrained, {**asked, **options}, [strides[i] for i in chosen])


def of_any_size(name: str, pretrained: bool, options: Mapping[str, Any], strides: list[int]) -> TimmEncoder:
    """The encoder with what lets it take images of any size. UsageError if nothing does."""
    error: Exception | None = None
    grid = [size // strides[-1] for size in PROBE]
    for sizes in ANY_SIZE:
        try:
            features = create(name, pretrained, {**options, **sizes})
            with torch.no_grad(), torch.random.fork_rng():
                last = features.eval()(torch.zeros(1, options.get("in_chans", 3), *PROBE))[-1]
        except (AssertionError, TypeError, ValueError, RuntimeError) as failure:
            if pretrained and not sizes and not isinstance(failure, AssertionError | TypeError):
                raise  # the weights cannot be had
            error = error or failure
            continue
        channels, shape = list(features.feature_info.channels()), list(last.shape[1:])
        if shape in ([channels[-1], *grid], [*grid, channels[-1]]):
            return TimmEncoder(features.train(), strides, channels, shape != [channels[-1], *grid])
        error = error or ValueError(f"its map of {PROBE[0]}x{PROBE[1]} pixels is {tuple(last.shape)}")
    reason = str(error).partition("\n")[0]
    raise UsageError(f"{PREFIX}{name} takes no images of any size ({reason}): choose another encoder")


def create(name: str, pretrained: bool, options: Mapping[str, Any]) -> Any:
    """timm's network of feature maps, with feature_info."""
    return import_timm().create_model(name, pretrained=pretrained, features_only=True, **options)


def strides_of(
    name: str, stride: int, options: Mapping[str, Any]
) -> tuple[list[int], dict[str, Any], list[int]] | None:
    """The strides of the feature maps when `stride` is asked for, the argument that asks for it, and timm's indices.

    The argument is empty where the network does not take it. None for a network without feature maps; UsageError for
    options that it does not take.
    """
    given = {key: value for key, value in options.items() if key != "pretrained_cfg_overlay"}
    error: Exception | None = None
    for asked in ({"output_stride": stride}, {}) if stride != 32 else ({},):
        try:
            with torch.device("meta"):
                info = create(name, False, {**asked, **given}).feature_info
                return list(info.reduction()), dict(asked), list(info.out_indices)
        except (AssertionError, TypeError, ValueError, NotImplementedError, RuntimeError, KeyError) as failure:
            error = failure
    if given:
        raise UsageError(f"model.backbone_options={given}: {PREFIX}{name} does not take them ({error})") from error
    return None


def converted_encoder(encoder: TimmEncoder, norm: Norm, slope: float | None, in_channels: int) -> TimmEncoder:
    """Convert BatchNorm to In-Place ABN for model.norm=inplace_abn; the certificate says what became what."""
    layers = sum(isinstance(module, _BatchNorm) for module in encoder.modules())
    if not layers or norm.layer is BatchNormAct:
        if slope is not None:
            raise UsageError(
                "model.backbone_options.replace_relu has no effect: "
                + ("the encoder has no BatchNorm" if not layers else "it is for model.norm=inplace_abn")
            )
        encoder.certificate = f"{layers} BatchNorm layers stay" if layers else "no BatchNorm: it trains as it is"
        return encoder
    if norm.layer is not InPlaceABN:
        raise UsageError(
            f"model.norm is not possible with a timm encoder of {layers} BatchNorm layers: choose inplace_abn, which "
            "converts them where that is exact, or batch_norm"
        )
    probe = torch.randn(2, in_channels, *PROBE, generator=torch.Generator().manual_seed(0))
    try:
        conversion = to_inplace(encoder, probe, replace_relu=slope)
    except ValueError as error:
        raise UsageError(f"model.backbone_options.replace_relu={slope}: {error}") from error
    result = conversion.model
    assert isinstance(result, TimmEncoder)
    result.certificate = describe_conversion(conversion)
    return result


def describe_conversion(conversion: Conversion) -> str:
    """What a conversion changed, layers of one kind together."""
    every = len(conversion.converted) + len(conversion.left)
    lines = [
        f"{len(conversion.converted)} of {every} BatchNorm layers became In-Place ABN; largest difference on a probe "
        f"{conversion.max_difference:.2g} ({conversion.relative_difference:.2g} relative)"
    ]
    lines += [f"  {count} became: {kind}" for kind, count in Counter(conversion.converted.values()).most_common()]
    left = Counter(why.replace(IN_PYTHON, ON_COMMAND_LINE) for why in conversion.left.values())
    lines += [f"  {count} left: {why}" for why, count in left.most_common()]
    if conversion.replaced_relu:
        lines.append(
            f"  ReLU became LeakyReLU behind {len(conversion.replaced_relu)} layers, which changes the outputs on the "
            f"probe by up to {conversion.relu_difference:.2g}"
        )
    if conversion.near_zero:
        lines.append(
            f"  {sum(conversion.near_zero.values())} channels in {len(conversion.near_zero)} layers have a scale below "
            "0.001, whose input half precision cannot recover: train in trainer.precision=fp32"
        )
    return "\n".join(lines)
