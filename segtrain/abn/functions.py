"""Where users import the functional forms from."""

from segtrain.abn.functional import abn, inplace_abn, inplace_abn_sync

__all__ = ["abn", "inplace_abn", "inplace_abn_sync"]
