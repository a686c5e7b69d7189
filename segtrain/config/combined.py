"""What options of several groups allow together."""

from segtrain.config.augmentation import AugmentationConfig
from segtrain.config.dataset import DatasetConfig, channels_of, classifies
from segtrain.config.inference import InferenceConfig
from segtrain.config.model import ModelConfig
from segtrain.config.options import require
from segtrain.config.trainer import TrainerConfig


def check_untested(model: ModelConfig, trainer: TrainerConfig) -> None:
    """Raise UsageError for frozen parts and timm's encoders together with what they are not tested with."""
    for key, value, instead in (
        ("trainer.compile", trainer.compile, "false"), ("trainer.parallel", trainer.parallel == "fsdp", "ddp"),
    ):  # fmt: skip
        require(
            not (model.frozen and value), "model.frozen", model.frozen,
            f"parts are not frozen in graphs or shards; choose {key}={instead}, or leave it out",
        )  # fmt: skip
        require(
            not (model.is_timm() and value), "model.backbone", model.backbone,
            f"encoders of timm are not tested in graphs or shards; choose {key}={instead}",
        )  # fmt: skip


def check_channels(model: ModelConfig, dataset: DatasetConfig) -> None:
    """Raise UsageError where the network takes other channels than the images have."""
    channels = channels_of(dataset)
    require(
        channels is not None or model.in_channels == 3, "model.in_channels", model.in_channels,
        f"dataset={dataset.name} gives red, green and blue; name the bands of dataset=folder, as dataset.channels="
        f"{list(range(model.in_channels))[:8]}, or choose 3",
    )  # fmt: skip
    require(
        channels is None or model.in_channels == len(channels), "dataset.channels", channels,
        f"model.in_channels={model.in_channels} is the number of channels; name as many bands, or choose "
        f"model.in_channels={len(channels or ())}",
    )  # fmt: skip


def check_colours(augmentation: AugmentationConfig, dataset: DatasetConfig) -> None:
    """Raise UsageError for augmentations of colours where the images are not RGB."""
    channels = channels_of(dataset)
    for key, value, default in (("color", augmentation.color, 0), ("extra", augmentation.extra, [])):
        require(
            channels is None or len(channels) == 3 or value == default, f"augmentation.{key}", value,
            f"it is for RGB images, and dataset.channels={channels} has {len(channels or ())}; leave it at {default}",
        )  # fmt: skip


def check_views(inference: InferenceConfig, dataset: DatasetConfig) -> None:
    """Raise UsageError where inference=... is for the other task."""
    tasks = ("segmentation", "image classification")
    here, there = reversed(tasks) if classifies(dataset) else tasks
    known = "center224, tencrop or center320" if classifies(dataset) else "whole, tiled or multiscale"
    require(
        (inference.crop is not None) == classifies(dataset), "inference", inference.name,
        f"it is for {there}, as is a checkpoint that brings it along, and dataset={dataset.name} is for {here}: "
        f"choose inference={known}",
    )  # fmt: skip
