"""In-Place Activated BatchNorm (Rota Bulo, Porzi, Kontschieder, CVPR 2018), usable alone: needs torch only.

Classes and functions have the interface of the official package `inplace_abn` 1.1, and load its weights. Differences:
any number of spatial dimensions, channels-last memory, bfloat16 and float16 with float32 parameters, and float64;
momentum=None, and num_batches_tracked in the state; incoming gradients are never overwritten; what would give wrong
gradients (an input that is still needed, relu or slope 0 in place) is an error; a process without images takes part in
synchronisation. The keyword-only arguments (overwrite, variant, scale, shortcut) are additions.
"""

import sys

from segtrain.abn import functional as functions
from segtrain.abn import modules, sync
from segtrain.abn.functional import abn, inplace_abn, inplace_abn_sync
from segtrain.abn.modules import ABN, BatchNormAct, InPlaceABN, InPlaceABNSync, RecomputedABN
from segtrain.abn.operators import describe_backend, use_backend
from segtrain.abn.recipes import recomputed_outputs
from segtrain.abn.sync import active_group, set_active_group

__all__ = [
    "ABN", "BatchNormAct", "InPlaceABN", "InPlaceABNSync", "RecomputedABN", "abn", "active_group", "describe_backend",
    "inplace_abn", "inplace_abn_sync", "install_as_inplace_abn", "recomputed_outputs", "set_active_group",
    "use_backend",
]  # fmt: skip
__version__ = "1.1.0"  # of the interface: that of the official package


def install_as_inplace_abn() -> None:
    """Let `import inplace_abn`, the name of the official package, import this package, for code written for that one.

    Call it before such code is imported. Raises RuntimeError if the official package has been imported already.
    """
    here = sys.modules[__name__]
    other = sys.modules.get("inplace_abn", here)
    if other is not here:
        raise RuntimeError(f"inplace_abn is imported already, from {getattr(other, '__file__', '?')}: call this before")
    sys.modules["inplace_abn"] = here
    for name, module in {"abn": modules, "functions": functions, "group": sync}.items():
        sys.modules[f"inplace_abn.{name}"] = module
