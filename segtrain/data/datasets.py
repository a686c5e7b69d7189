"""Where plugins import the table of datasets from."""

from segtrain.data.dataset import DATASETS

__all__ = ["DATASETS"]
