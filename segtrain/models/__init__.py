"""Networks: any backbone of BACKBONES under any head of HEADS, or under a classifier of whole images."""

from segtrain.models.build import build_classifier, build_model, from_config
from segtrain.models.classifier import Classifier
from segtrain.models.execution import compiled, not_compilable, sharded
from segtrain.models.registry import BACKBONES, HEADS
from segtrain.models.segmenter import Segmenter

__all__ = [
    "BACKBONES", "HEADS", "Classifier", "Segmenter", "build_classifier", "build_model", "compiled", "from_config",
    "not_compilable", "sharded",
]  # fmt: skip
