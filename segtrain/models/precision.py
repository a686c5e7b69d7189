"""The precision that a network computes in: float32, or half of that by torch's autocast."""

import warnings
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from segtrain.errors import SegtrainError, UsageError

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def dtype_name(precision: str) -> str:
    """'bfloat16' for bf16."""
    return str(PRECISIONS[precision]).removeprefix("torch.")


def require_precision(precision: str, device: torch.device) -> None:
    """UsageError if torch cannot compute in inference.precision on that device; it would choose another in silence."""
    reason = why_not(precision, device.type)
    if reason:
        raise UsageError(
            f"inference.precision={precision} is not possible on this {device.type.upper()}: {reason}; choose fp32"
        )


@cache
def why_not(precision: str, device: str) -> str:
    """Why torch computes no convolution in that precision; "" if it does."""
    dtype = PRECISIONS[precision]
    if dtype == torch.float32:
        return ""
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # where autocast turns itself off, the dtype shows it
            with torch.autocast(device, dtype):
                ones = torch.ones(1, 8, 3, 3, device=device)
                found = F.conv2d(ones, ones)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    if found.dtype != dtype:
        return f"torch {torch.__version__} computes in {str(found.dtype).removeprefix('torch.')} instead"
    return ""


def answer_in(precision: str, network: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """network(images), computed by autocast in "bf16" or "fp16" and returned in float32; in "fp32" as it is.

    UsageError if torch cannot. SegtrainError for answers in fp16 that are not finite: half precision ends at 65504.
    """
    if precision == "fp32":
        return network(images)
    require_precision(precision, images.device)
    with torch.autocast(images.device.type, PRECISIONS[precision]):
        found = network(images).float()
    if precision == "fp16" and not bool(found.isfinite().all()):
        raise SegtrainError(
            "inference.precision=fp16: the network's answer is not finite, as its maps leave the range of float16 "
            "(65504); choose bf16 or fp32"
        )
    return found
