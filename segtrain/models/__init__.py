"""Networks: any backbone of BACKBONES under any head of HEADS, or under a classifier of whole pictures."""

from typing import Any

import torch

from segtrain.abn import use_backend
from segtrain.config import ModelConfig
from segtrain.errors import UsageError
from segtrain.models.classifier import Classifier, build_classifier
from segtrain.models.segmenter import BACKBONES, HEADS, Segmenter, build_model, compiled, sharded

__all__ = [
    "BACKBONES",
    "HEADS",
    "Classifier",
    "Segmenter",
    "build_classifier",
    "build_model",
    "compiled",
    "from_config",
    "sharded",
]


def from_config(config: ModelConfig, num_classes: int) -> Segmenter | Classifier:
    """The network that the model options describe, in channels-last memory, which convolutions prefer.

    A Classifier of whole pictures for model.head=classifier, else a Segmenter.

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
        "backbone_options": config.backbone_options,
    }
    model: Segmenter | Classifier
    if config.head == "classifier":
        model = build_classifier(**both)
    else:
        model = build_model(head=config.head, head_channels=config.head_channels, pooling_size=cells, **both)
    return model.to(memory_format=torch.channels_last)
