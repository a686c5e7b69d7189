"""Options of the network: model.*"""

from dataclasses import dataclass
from typing import Any

from segtrain.config.options import option, require, require_size


@dataclass
class ModelConfig:
    backbone: str = option(
        "resnet18",
        "resnet18 | 34 | 50 | 101, resnext50 | 101 | 152, wider_resnet38, densenet264; torchvision's resnext50_32x4d | "
        "101_32x8d; wider_resnet38_pooled (ImageNet form)",
    )
    backbone_options: dict[str, Any] = option(
        {},
        "further arguments of the backbone's builder, {key: value}: of resnets first_dilation, own | previous (as "
        "torchvision), of wider_resnet38 drops, channel | element",
    )
    head: str = option("deeplabv3", "deeplabv3 | deeplabv3_torchvision | deeplabv3plus; classifier, of whole pictures")
    head_channels: int = option(256, "channels of every branch of the head")
    pooling_size: list[int] | None = option(
        None, "[height,width] in pixels that the head pools in eval mode; null: the whole picture"
    )
    output_stride: int = option(8, "pixels per cell of the feature map: 8 | 16 | 32")
    norm: str = option("inplace_abn", "inplace_abn | inplace_abn_sync | abn | batch_norm | batch_norm_sync")
    norm_variant: str = option("one", "one | two: how In-Place ABN finds its gradients (paper, sections 3.2 and 3.3)")
    scale: str = option(
        "abs", "abs | signed: norm layers multiply with |weight| + eps, as published, or with the weight"
    )
    recompute: str = option(
        "none", "what backward computes again: none | norm | norm_proposed (the paper's checkpointing) | blocks"
    )
    weights: str = option(
        "none", "file to start from: checkpoint of a run, published weights, torchvision's, timm's | none: random"
    )
    weights_match: float = option(1.0, "least share of tensors that must match, of those that such a file has")
    weights_taxonomy: str | None = option(
        None, "how the file's classes are told in the data's: vistas_to_cityscapes or a YAML file; default: by name"
    )
    backend: str = option("auto", "In-Place ABN kernels: auto | cupy (CUDA) | native (compiled, CPU) | aten (anywhere)")
    activation: str = option("leaky_relu", "leaky_relu | elu | identity (in place), and relu with abn or batch_norm")
    negative_slope: float = option(0.01, "slope of leaky_relu below zero, or alpha of elu")
    mean: list[float] = option([0.485, 0.456, 0.406], "RGB mean taken off the input, on a scale of 0 to 1")
    std: list[float] = option([0.229, 0.224, 0.225], "RGB deviation the input is divided by")

    def check(self) -> None:
        # Names of parts are checked where the parts are known, by models.build_model, on which training begins.
        activations = ("leaky_relu", "elu", "identity", "relu")
        require(self.activation in activations, "model.activation", self.activation, f"choose {', '.join(activations)}")
        in_place = self.norm.startswith("inplace_abn")
        for key, known in (
            ("norm_variant", ("one", "two")), ("scale", ("abs", "signed")),
            ("recompute", ("none", "norm", "norm_proposed", "blocks")), ("backend", ("auto", "cupy", "native", "aten")),
        ):  # fmt: skip
            require(getattr(self, key) in known, f"model.{key}", getattr(self, key), f"choose {', '.join(known)}")
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
            self.scale == "abs" or self.norm in ("abn", "inplace_abn", "inplace_abn_sync"), "model.scale", self.scale,
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
        share = 0 < self.weights_match <= 1
        require(share, "model.weights_match", self.weights_match, "give a share above 0 and at most 1")
        require(self.head_channels >= 1, "model.head_channels", self.head_channels, "give 1 or more")
        require(len(self.mean) == 3, "model.mean", self.mean, "give three numbers, [red,green,blue]")
        require(len(self.std) == 3 and min(self.std) > 0, "model.std", self.std, "give three positive numbers")
        if self.pooling_size is not None:
            require_size("model.pooling_size", self.pooling_size, 32)
        if self.head == "classifier":
            for key, value, default in (
                ("head_channels", self.head_channels, 256),
                ("pooling_size", self.pooling_size, None),
            ):
                require(value == default, f"model.{key}", value, "model.head=classifier does not read it; leave it out")
