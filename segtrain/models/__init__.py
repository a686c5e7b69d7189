"""Networks: any backbone of BACKBONES under any head of HEADS."""

from segtrain.models.segmenter import BACKBONES, HEADS, Segmenter, build_model, from_config

__all__ = ["BACKBONES", "HEADS", "Segmenter", "build_model", "from_config"]
