"""Networks: any backbone of BACKBONES under any head of HEADS."""

from segtrain.models.segmenter import BACKBONES, HEADS, Segmenter, build_model, compiled, from_config, sharded

__all__ = ["BACKBONES", "HEADS", "Segmenter", "build_model", "compiled", "from_config", "sharded"]
