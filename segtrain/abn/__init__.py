"""In-Place Activated BatchNorm (Rota Bulo, Porzi, Kontschieder, CVPR 2018), usable alone: needs torch only."""

from segtrain.abn.functions import abn, inplace_abn
from segtrain.abn.modules import ABN, BatchNormAct, InPlaceABN

__all__ = ["ABN", "BatchNormAct", "InPlaceABN", "abn", "inplace_abn"]
