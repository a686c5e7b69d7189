"""Where plugins import the table of datasets from."""

from segtrain.data.registry import DATASETS

__all__ = ["DATASETS"]
