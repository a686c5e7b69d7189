"""The layer in training over its own statistics, on CUDA: six launches for forward and backward, no torch operation.

The kernels of cupy.py also compute what the layer does with its vectors. A plan, made once for each shape, memory
layout, dtype, device and choice of options, has all that a call passes besides addresses.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from segtrain.abn.backends import cupy, cupy_kernels
from segtrain.abn.backends.aten import CODES, Activation, statistics_dtype
from segtrain.abn.backends.cupy_kernels import ACCESS, Kernel

if TYPE_CHECKING:
    import numpy as np

FORMS = {"abs": 1, "signed": 2}  # of scale, by their numbers in abn.cu


class ForwardPlan(NamedTuple):
    block: int  # threads
    part: tuple[int, ...]  # shape of the stripes' moments
    vectors: torch.dtype
    statistics: tuple[Kernel, tuple[int, int], "tuple[np.generic, ...]"]
    merge: tuple[Kernel, tuple[int, int], "tuple[np.generic, ...]"]
    form: "np.generic"
    normalise: tuple[Kernel, tuple[int, int], "tuple[np.generic, ...]"]


class BackwardPlan(NamedTuple):
    block: int
    part: tuple[int, ...]
    means: tuple[int, int]
    recover: "tuple[np.generic, ...]"  # param, its inverse, lowest z / alpha
    sums: tuple[Kernel, tuple[int, int], "tuple[np.generic, ...]"]
    merge: tuple[Kernel, tuple[int, int], "tuple[np.generic, ...]"]
    gradient: tuple[Kernel, tuple[int, int], "tuple[np.generic, ...]"]


plans: dict[Any, Any] = {}


def alignment(*tensors: Tensor | None) -> bool:
    return not any(t is not None and t.data_ptr() % ACCESS for t in tensors)


def kept_plan(key: Any, plan: Any) -> Any:
    if len(plans) >= cupy.MOST_PLANS:
        plans.clear()
    plans[key] = plan
    return plan


def forward_plan(
    x: Tensor, out: Tensor, shortcut: Tensor | None, momentum: float, eps: float, scale: str, activation: Activation
) -> ForwardPlan:
    aligned = x.data_ptr() % ACCESS == 0, alignment(out, shortcut)
    sizes = cupy_kernels.BLOCK, cupy.BLOCKS
    key = x.shape, x.stride(), x.dtype, x.device, aligned, sizes, momentum, eps, scale, activation
    found: ForwardPlan | None = plans.get(key)
    if found is not None:
        return found
    act, dtype, like = CODES.index(activation.name), x.dtype, x.new_empty(0, dtype=statistics_dtype(x))
    first, second = cupy.geometry(x), cupy.geometry(x, out, shortcut)
    numbers = *first.merge_shape, cupy.scalar(eps, like), cupy.scalar(momentum, like)
    plan = ForwardPlan(
        cupy_kernels.BLOCK, (x.shape[1], first.grid[1], 3), like.dtype,
        (first.kernel("statistics", dtype), first.grid, first.shape),
        (first.merge_kernel("merge_statistics", dtype), first.merge_grid, numbers),
        cupy.number("int32", FORMS[scale]),
        (second.kernel("normalise", dtype, act), second.grid, (cupy.scalar(activation.param, like), *second.shape)),
    )  # fmt: skip
    made: ForwardPlan = kept_plan(key, plan)
    return made


def layer_forward(
    x: Tensor, out: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None,
    running_var: Tensor | None, momentum: float, eps: float, scale: str, activation: Activation,
    shortcut: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    plan, launch = forward_plan(x, out, shortcut, momentum, eps, scale, activation), cupy.launch
    part = x.new_empty(plan.part, dtype=plan.vectors)
    mean = x.new_empty(plan.part[0], dtype=plan.vectors)
    inverse, factor = torch.empty_like(mean), torch.empty_like(mean)
    kernel, grid, numbers = plan.statistics
    launch(kernel, grid, plan.block, (x, part, *numbers))
    kernel, grid, numbers = plan.merge
    vectors = weight, mean, None, None, factor, running_mean, running_var, plan.form, inverse
    launch(kernel, grid, plan.block, (part, *numbers, *vectors))
    kernel, grid, numbers = plan.normalise
    launch(kernel, grid, plan.block, (x, out, shortcut, mean, factor, bias, *numbers))
    return inverse, factor


def backward_plan(
    kept: Tensor, dz: Tensor, shortcut: Tensor | None, dx: Tensor, dshortcut: Tensor | None, activation: Activation
) -> BackwardPlan:
    aligned = alignment(kept, dz, shortcut), alignment(dx, dshortcut)
    sizes = cupy_kernels.BLOCK, cupy.BLOCKS
    key = kept.shape, kept.stride(), kept.dtype, kept.device, aligned, sizes, activation
    found: BackwardPlan | None = plans.get(key)
    if found is not None:
        return found
    act, dtype, like = CODES.index(activation.name), kept.dtype, kept.new_empty(0, dtype=statistics_dtype(kept))
    channels = kept.shape[1]
    first, second = cupy.geometry(kept, dz, shortcut), cupy.geometry(kept, dz, shortcut, dx, dshortcut)
    plan = BackwardPlan(
        cupy_kernels.BLOCK, (channels, first.grid[1], 2), (2, channels), cupy.recovery(activation, kept.dtype, like),
        (first.kernel("sums", dtype, act, "false"), first.grid, first.shape),
        (first.merge_kernel("merge_sums", dtype), first.merge_grid, first.merge_shape),
        (second.kernel("gradient", dtype, act, "false"), second.grid, second.shape),
    )  # fmt: skip
    made: BackwardPlan = kept_plan(key, plan)
    return made


def layer_backward(
    kept: Tensor, dz: Tensor, weight: Tensor | None, bias: Tensor | None, inverse: Tensor, factor: Tensor, scale: str,
    activation: Activation, shortcut: Tensor | None, dshortcut: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dx, dweight, dbias = torch.empty_like(kept), torch.empty_like(factor), torch.empty_like(factor)
    plan, launch = backward_plan(kept, dz, shortcut, dx, dshortcut, activation), cupy.launch
    part, means = factor.new_empty(plan.part), factor.new_empty(plan.means)
    common = kept, dz, shortcut, bias, inverse, None, None, *plan.recover
    kernel, grid, numbers = plan.sums
    launch(kernel, grid, plan.block, (*common, part, *numbers))
    kernel, grid, numbers = plan.merge
    launch(kernel, grid, plan.block, (part, *numbers, dbias, dweight, means, weight if scale == "abs" else None))
    kernel, grid, numbers = plan.gradient
    launch(kernel, grid, plan.block, (*common, factor, means, dx, dshortcut, *numbers))
    return dx, dweight, dbias
