"""Which calls of the layer need no conversion of any tensor, remembered by all that the checks look at.

Such a call goes straight to the back end. A call that differs in a shape, stride, dtype, device or option is examined.
"""

from typing import Any, TypeVar

import torch
from torch import Tensor

from segtrain.abn.backends.aten import is_dense, statistics_dtype
from segtrain.abn.operators import PLAIN, as_laid_out

MOST_SIGNATURES = 4096  # that are remembered; a network in training has two for each of its layers
straight_backward: dict[Any, bool] = {}
Found = TypeVar("Found")


def signature(*tensors: Tensor | None) -> tuple[Any, ...]:
    """All that the checks of tensors look at, but for which of them share memory."""
    return tuple(
        [None if t is None else (type(t), t.dtype, t.device, t.shape, t.stride(), t.is_neg()) for t in tensors]
    )


def noted(known: dict[Any, Found], key: Any, value: Found) -> Found:
    if len(known) >= MOST_SIGNATURES:
        known.clear()
    known[key] = value
    return value


def needs_no_conversion(x: Tensor, vectors: tuple[Tensor | None, ...], maps: tuple[Tensor | None, ...]) -> bool:
    """Whether the back end for x takes all tensors as they are: dense maps of one layout, contiguous vectors."""
    dtype, device = statistics_dtype(x), x.device
    for t in (x, *vectors, *maps):
        if t is not None and (type(t) not in PLAIN or t.is_neg() or t.device != device):
            return False
    if not x.numel() or not is_dense(x):
        return False
    if any(v is not None and (v.dtype != dtype or v.shape != x.shape[1:2] or not v.is_contiguous()) for v in vectors):
        return False
    return all(t is None or (t.shape == x.shape and t.dtype == x.dtype and as_laid_out(t, x) is t) for t in maps)


def is_straight(z: Tensor, dz: Tensor, *others: Tensor | None) -> bool:
    """Whether backward's tensors need no conversion. others: weight, bias, inverse, factor and shortcut.

    Saved tensors are looked at again, because hooks may have replaced them.
    """
    if torch._C._len_torch_dispatch_stack():  # something watches: `primitives` says what else there is in forward
        return False
    key = signature(z, dz, *others)
    found = straight_backward.get(key)
    if found is None:
        *vectors, shortcut = others
        found = noted(straight_backward, key, needs_no_conversion(z, tuple(vectors), (dz, shortcut)))
    return found
