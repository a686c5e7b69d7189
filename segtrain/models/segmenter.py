"""Backbone, head and classifier put together."""

import difflib
import inspect
import os
import shutil
import sysconfig
from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

from segtrain.abn import ABN, recomputed_outputs
from segtrain.abn.sync import group_or_none
from segtrain.config import ModelConfig
from segtrain.errors import UsageError
from segtrain.models.blocks import KEEP, NORMS, Backbone, Norm, Stage
from segtrain.models.deeplabv3 import DeepLabV3, DeepLabV3Plus, TorchvisionDeepLabV3
from segtrain.models.densenet import DenseModule, densenet264
from segtrain.models.resnet import resnet18, resnet34, resnet50, resnet101, resnext50_32x4d, resnext101_32x8d
from segtrain.models.resnext import resnext50, resnext101, resnext152
from segtrain.models.wider_resnet import wider_resnet38, wider_resnet38_pooled

# name -> builder(norm, output_stride, **model.backbone_options); the module has an `out_channels`
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
# name -> builder(in_channels, channels, norm, output_stride, pooling_size)
HEADS: dict[str, Callable[..., nn.Module]] = {
    "deeplabv3": DeepLabV3,
    "deeplabv3_torchvision": TorchvisionDeepLabV3,
    "deeplabv3plus": DeepLabV3Plus,
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
        self.num_classes = num_classes
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
    backbone_options: Mapping[str, Any] | None = None,
) -> Segmenter:
    """A freshly initialised segmentation network; under `torch.device("meta")` only its shapes.

    Raises UsageError (a ValueError) for a name or an output stride (8, 16, 32) that does not exist.
    """
    refuse_unknown("head", head, [*HEADS, "classifier"])
    refuse_unknown("norm", norm, NORMS)
    layers = Norm(norm, activation, negative_slope, norm_variant, scale, recompute)
    body = build_backbone(backbone, layers, output_stride, backbone_options or {})
    build = HEADS[head]
    more = {"low_channels": early_map(body, backbone, head)} if getattr(build, "takes_early_map", False) else {}
    in_channels = int(body.out_channels)  # type: ignore[arg-type]
    top = build(in_channels, head_channels, layers, output_stride, pooling_size, **more)
    model = Segmenter(body, top, head_channels, num_classes, recompute)
    with torch.no_grad():
        initialise(model, negative_slope)
    return model


def build_backbone(backbone: str, norm: Norm, output_stride: int, options: Mapping[str, Any]) -> nn.Module:
    """UsageError (a ValueError) for a name, an output stride or an option that the backbone does not have."""
    refuse_unknown("backbone", backbone, BACKBONES)
    refuse_unknown("output_stride", output_stride, (8, 16, 32))
    check_options(backbone, options)
    body = BACKBONES[backbone](norm, output_stride, **options)
    if not hasattr(body, "out_channels"):
        raise UsageError(f"model.backbone={backbone}: the module lacks out_channels, the number of its output channels")
    return body


def refuse_unknown(option: str, value: object, known: Collection[object]) -> None:
    if value not in known:
        own = " (parts of your own: plugins=[FILE])" if option in ("backbone", "head") else ""
        raise UsageError(f"model.{option}={value} does not exist: choose {', '.join(map(str, known))}{own}")


def early_map(body: nn.Module, backbone: str, head: str) -> int:
    """Makes the backbone give its early map too, without its last norm: the official code reads the bare sum.

    Returns the early map's channels; UsageError where there is none to be had.
    """
    if not isinstance(body, Backbone) or body.low_level is None:
        raise UsageError(
            f"model.head={head} is not possible with {backbone}, which has no early map for its decoder (densenet264: "
            "a later layer overwrites it): choose a resnet, resnext or wider_resnet38, or model.head=deeplabv3"
        )
    body.keeps = body.low_level
    if hasattr(body, "bn_out"):
        del body.bn_out
    return body.low_channels


def check_options(backbone: str, options: Mapping[str, Any]) -> None:
    """UsageError for an option that the backbone's builder does not take, and for one that it needs."""
    taken = list(inspect.signature(BACKBONES[backbone]).parameters.values())[2:]
    named = {one.name: one for one in taken if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)}
    for key in options:
        if key not in named and not any(one.kind == one.VAR_KEYWORD for one in taken):
            near = difflib.get_close_matches(key, named, 1)
            hint = f"did you mean {near[0]}? " if near else ""
            there = f"There is {', '.join(named)}" if named else "it takes none"
            raise UsageError(f"model.backbone_options.{key}: {backbone} has no such option: {hint}{there}")
    missing = [name for name, one in named.items() if one.default is one.empty and name not in options]
    if missing:
        raise UsageError(f"model.backbone={backbone} needs model.backbone_options={{{missing[0]}: ...}}")


# ------------------------------------------------------------------------------------------ other ways to run it


def not_compilable(options: ModelConfig, device: torch.device) -> str:
    """'' if `compiled` can be had here, else the reason and what to do instead."""
    if device.type != "cpu":
        return f"it is tested on the CPU only, not on {device.type}: choose device=cpu, or trainer.compile=false"
    if group_or_none(None) is not None:
        return "it works in one process, because a graph cannot hold what layers and DDP exchange: start one"
    if options.recompute != "none":
        return f"torch.compile plans what backward computes again: model.recompute={options.recompute} must be none"
    compiler = os.environ.get("CXX") or "g++"  # where torch looks
    if shutil.which(compiler) is None:
        return f"torch.compile found no C++ compiler {compiler!r} (Debian and Ubuntu: apt install g++; or set CXX)"
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.exists():
        return f"torch.compile needs {header} (Debian and Ubuntu: apt install python3-dev)"
    return ""


def compiled(model: nn.Module, options: ModelConfig, device: torch.device) -> Callable[..., Tensor]:
    """`model` as one graph by torch.compile: called as the model, which keeps its state and its keys.

    Numbers are the model's to rounding, dropout included, and In-Place ABN keeps as little for backward. The first
    call of every mode, precision and shape compiles for minutes and torch refuses the ninth: train by it, and
    validate, on pictures of any size, by the model. Raises UsageError where it cannot work, before anything is built.
    """
    reason = not_compilable(options, device)
    if reason:
        raise UsageError(f"trainer.compile=true is not possible: {reason}")
    # Random numbers of torch, so that a step draws what it draws without compilation.
    return torch.compile(model, fullgraph=True, dynamic=False, options={"fallback_random": True})


def sharded(model: nn.Module) -> None:
    """Spreads parameters, gradients and optimizer state over all processes, in place, by FSDP2; a block at a time.

    Before the optimizer is made. Running statistics stay whole. Calls and gradients are those of DDP: averages over
    the processes, which must run forward and backward together.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(next(model.parameters()).device.type, (dist.get_world_size(),))
    for stage in model.modules():
        if isinstance(stage, Stage):
            for block in stage:
                fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
