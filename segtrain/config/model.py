"""Options of the network: model.*"""

from dataclasses import dataclass
from math import inf
from typing import Any, ClassVar

from segtrain.config.dataset import SIZE
from segtrain.config.options import LARGEST_SIZE, Group, option, require
from segtrain.errors import UsageError

BACKBONES = (
    "resnet18", "resnet34", "resnet50", "resnet101", "resnext50", "resnext101", "resnext152", "resnext50_32x4d",
    "resnext101_32x8d", "wider_resnet38", "wider_resnet38_pooled", "densenet264",
)  # fmt: skip
HEADS = ("deeplabv3", "deeplabv3_torchvision", "deeplabv3plus")
NORMS = ("inplace_abn", "inplace_abn_sync", "abn", "batch_norm", "batch_norm_sync")
ACTIVATIONS = ("leaky_relu", "relu", "elu", "identity")
SCALES = ("abs", "signed")
REBUILDING = ("grouped", "identity_input", "both")
TIMM = "timm:"  # with a name of that package behind it, a backbone


@dataclass
class ModelConfig(Group):
    PREFIX: ClassVar[str] = "model."

    backbone: str = option("resnet18", "backbone network", choices=BACKBONES, prefix=TIMM)
    backbone_options: dict[str, Any] = option(
        {}, "arguments of the backbone: first_dilation of resnets, drops of wider_resnet38"
    )
    head: str = option(
        "deeplabv3", "segmentation head, or classifier for image classification",
        choices=(*HEADS, "classifier"),
    )  # fmt: skip
    head_channels: int = option(256, "channels of each branch of the head", low=1, limit=65536)
    pooling_size: list[int] | None = option(
        None,
        "window of the head's pooling in eval mode [pixels]; null: the whole image",
        items=SIZE,
        low=32,
        limit=LARGEST_SIZE,
    )
    output_stride: int = option(8, "stride of the feature map [pixels]", choices=(8, 16, 32))
    norm: str = option("inplace_abn", "normalisation layer", choices=NORMS)
    norm_variant: str = option("one", "gradient of In-Place ABN (paper, sections 3.2 and 3.3)", choices=("one", "two"))
    scale: str = option(
        "abs", "scale of norm layers: |weight| + eps as published, or the weight itself", choices=SCALES
    )
    recompute: str = option(
        "none", "what backward recomputes to save memory; the last three rebuild maps exactly",
        choices=("none", "norm", "norm_proposed", "blocks", *REBUILDING),
    )  # fmt: skip
    keep: str = option(
        "exact", "form in which In-Place ABN keeps its outputs for backward", choices=("exact", "8bit", "4bit")
    )
    weights: str = option(
        "none",
        "initial weights: checkpoint of a run, or published file",
        choices=("none", "timm"),
        other="FILE | torchvision:NAME",
        path=True,
    )
    weights_match: float = option(1.0, "minimum fraction of tensors that must match", above=0, high=1)
    weights_taxonomy: str | None = option(
        None, "mapping from the file's classes to the dataset's (default: by name)",
        choices=("vistas_to_cityscapes",), other="YAML FILE", path=True,
    )  # fmt: skip
    backend: str = option(
        "auto", "implementation of In-Place ABN", choices=("auto", "cupy", "native", "aten"), resume=True
    )
    activation: str = option(
        "leaky_relu", "activation after normalisation; relu needs model.norm=abn or batch_norm", choices=ACTIVATIONS
    )
    negative_slope: float = option(0.01, "slope of leaky_relu below zero, or alpha of elu", below=inf, limit=1000)
    mean: list[float] = option(
        [0.485, 0.456, 0.406], "mean of each channel, red, green, blue [0 to 1]", below=inf, limit=1000
    )
    std: list[float] = option([0.229, 0.224, 0.225], "standard deviation of each channel [0 to 1]", above=0, limit=1000)
    in_channels: int = option(3, "channels of the images; those of dataset.channels", low=1, limit=1024)
    frozen: list[str] = option([], "parts whose parameters do not train, such as backbone, stem, layer1")
    frozen_norm: bool = option(False, "running statistics of model.frozen stay as they are too")

    def is_timm(self) -> bool:
        """Whether the backbone is an encoder of the package timm."""
        return self.backbone.startswith(TIMM)

    def check_timm(self) -> None:
        """Raise UsageError for what encoders of timm do not have, and for their weights without them."""
        require(
            self.weights != "timm" or self.is_timm(), "model.weights", "timm",
            f"they are those of a timm encoder; choose model.backbone={TIMM}NAME, or model=timm",
        )  # fmt: skip
        for key, value, wanted in (
            ("recompute", self.recompute, "none"), ("keep", self.keep, "exact"), ("scale", self.scale, "signed"),
        ):  # fmt: skip
            require(
                not self.is_timm() or value == wanted, f"model.{key}", value,
                f"an encoder of timm needs model.{key}={wanted}; model=timm sets what it needs",
            )  # fmt: skip
        require(
            not self.is_timm() or self.head != "classifier", "model.head", self.head,
            f"encoders of timm have segmentation heads here; choose one of {', '.join(HEADS)}",
        )  # fmt: skip

    def check_channels(self) -> None:
        """Raise UsageError unless there is a mean and a standard deviation for each channel."""
        shape, remedy = f"{self.in_channels} numbers, as model.in_channels", ": segtrain check measures them"
        if self.in_channels == 3:
            shape, remedy = "[red,green,blue]", ""
        for key, value in (("mean", self.mean), ("std", self.std)):
            if len(value) != self.in_channels:
                raise UsageError(f"model.{key} must be {shape}, got {value}{remedy}")

    def check(self) -> None:
        super().check()
        self.check_channels()
        self.check_timm()
        require(
            bool(self.frozen) or not self.frozen_norm, "model.frozen_norm", "true",
            "no part is frozen; name some: model.frozen=[backbone], or leave this out",
        )  # fmt: skip
        in_place = self.norm.startswith("inplace_abn")
        require(
            self.norm_variant == "one" or in_place, "model.norm_variant", self.norm_variant,
            f"model.norm={self.norm} has no variants; choose model.norm=inplace_abn",
        )  # fmt: skip
        require(
            self.recompute not in ("norm", "norm_proposed") or self.norm in ("abn", "batch_norm"),
            "model.recompute", self.recompute,
            f"it is the alternative to In-Place ABN, for model.norm=abn or batch_norm, not {self.norm}",
        )  # fmt: skip
        require(
            self.recompute not in REBUILDING or in_place, "model.recompute", self.recompute,
            f"it rebuilds what In-Place ABN keeps, not {self.norm}; choose model.norm=inplace_abn, or "
            "model.recompute=blocks",
        )  # fmt: skip
        require(
            self.recompute not in REBUILDING or self.keep == "exact", "model.recompute", self.recompute,
            f"it rebuilds maps from exact ones, and model.keep={self.keep} rounds them; choose model.keep=exact, or "
            "model.recompute=none",
        )  # fmt: skip
        require(
            self.keep == "exact" or in_place, "model.keep", self.keep,
            f"In-Place ABN alone rebuilds its outputs, not {self.norm}; choose model.norm=inplace_abn",
        )  # fmt: skip
        require(
            self.weights_taxonomy is None or self.weights != "none", "model.weights_taxonomy", self.weights_taxonomy,
            "without model.weights=FILE there is nothing to map; give it, or leave this out",
        )  # fmt: skip
        require(
            self.scale == "abs" or self.norm in ("abn", "inplace_abn", "inplace_abn_sync") or self.is_timm(),
            "model.scale", self.scale,
            f"model.norm={self.norm} multiplies with the weight itself anyway; leave it out",
        )  # fmt: skip
        require(
            not (in_place and self.activation == "relu"), "model.activation", "relu",
            "In-Place ABN cannot invert it; choose leaky_relu, elu or identity, or model.norm=abn",
        )  # fmt: skip
        require(
            self.negative_slope > 0 or not in_place or self.activation == "identity",
            "model.negative_slope", self.negative_slope, "In-Place ABN divides by it; give more than 0",
        )  # fmt: skip
        if self.head == "classifier":
            for key, value, default in (
                ("head_channels", self.head_channels, 256),
                ("pooling_size", self.pooling_size, None),
            ):
                require(value == default, f"model.{key}", value, "model.head=classifier does not read it; leave it out")
