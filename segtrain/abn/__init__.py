"""In-Place Activated BatchNorm (Rota Bulo, Porzi, Kontschieder, CVPR 2018), usable alone: needs torch only.

Classes and functions have the interface of the official package `inplace_abn` 1.1, and load its weights and pickled
layers. Differences: any number of spatial dimensions, channels-last memory, bfloat16 and float16 with float32
parameters, and float64; incoming gradients are never overwritten; what would give wrong gradients (an input that is
still needed, relu or slope 0 in place) is an error, and an unknown activation is one at construction; a process without
images takes part in synchronisation; inplace_abn_sync without torch.distributed is inplace_abn without a warning; no
layer can be scripted by torch.jit (the official ABN can): torch.export and torch.compile take them. The keyword-only
arguments (overwrite, variant, scale), the shortcut and ScaledABN are additions.
"""

import sys

from segtrain.abn import functional as functions
from segtrain.abn import modules, sync
from segtrain.abn.functional import abn, inplace_abn, inplace_abn_sync
from segtrain.abn.modules import ABN, BatchNormAct, InPlaceABN, InPlaceABNSync, RecomputedABN, ScaledABN
from segtrain.abn.official import official_package
from segtrain.abn.operators import describe_backend, use_backend
from segtrain.abn.recipes import recomputed_outputs
from segtrain.abn.sync import active_group, set_active_group

__all__ = [
    "ABN", "BatchNormAct", "InPlaceABN", "InPlaceABNSync", "RecomputedABN", "ScaledABN", "abn", "active_group",
    "describe_backend", "functions", "inplace_abn", "inplace_abn_sync", "install_as_inplace_abn", "recomputed_outputs",
    "set_active_group", "use_backend",
]  # fmt: skip
__version__ = "1.1.0"  # of the interface: that of the official package


def install_as_inplace_abn() -> None:
    """Let `import inplace_abn`, the name of the official package, import this package, for code written for that one.

    Its modules are the official ones: inplace_abn.abn, inplace_abn.functions and inplace_abn.group. Call it before such
    code is imported. Raises RuntimeError if the official package has been imported already.
    """
    other = sys.modules.get("inplace_abn")
    if other is None:
        names = {name: globals()[name] for name in (*__all__, "__version__")}
        sys.modules["inplace_abn"] = official_package(names, modules, sync)
    elif getattr(other, "ABN", None) is not ABN:
        raise RuntimeError(f"inplace_abn is imported already, from {getattr(other, '__file__', '?')}: call this before")
