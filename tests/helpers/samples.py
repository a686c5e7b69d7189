"""Samples as training and evaluation read them."""

from segtrain.data.loader import EvaluationData
from segtrain.errors import DataError


def read_sample(sample, table):
    """Image uint8 (H, W, 3) and train ids uint8 (H, W)."""
    item = EvaluationData([sample], table)[0]
    if isinstance(item, DataError):
        raise item
    return item.image, item.target
