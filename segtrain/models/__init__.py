"""Networks: any backbone of BACKBONES under any head of HEADS, or under a classifier of whole pictures."""

from segtrain.models.classifier import Classifier, build_classifier
from segtrain.models.segmenter import BACKBONES, HEADS, Segmenter, build_model, compiled, from_config, sharded

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
