"""The primitives of In-Place ABN by torch's own fused kernels: they run on any device and need no compiler.

A back end is a module with the six functions below (`statistics`, `normalise`, `sums`, `gradient`, and the fused
`forward` and `backward`, which normalise over the tensor at hand and may keep it in cache between the two passes).

Full-size tensors (x, out, kept, dz, shortcut, dshortcut) have one shape (N, C, *spatial) and one dtype, and are dense
in one memory layout: `layout(x)`. Per-channel tensors are contiguous (C,) in the statistics dtype: float64 for float64
tensors, else float32. Backward works from `kept`, from which it recovers, element by element,

    t   with xhat = (t - center) * inverse, the normalised input
    dy  the gradient at y = gamma * xhat + beta (+ shortcut), where z = act(y)

`kept` is the output z, so that t = act^-1(z) - shortcut and dy = act'(y) dz, with center = beta, inverse = 1 / gamma;
or, where affine = (scale, shift) is given, kept = t is an input of z = act(scale * t + shift).

Source of the equations: In-Place ABN paper, sections 3.1 to 3.3.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}  # channels-last memory by number of dimensions
CODES = ("leaky_relu", "elu", "identity")  # an activation's index is its number in kernels and operators


class Activation(NamedTuple):
    """An invertible activation: `leaky_relu` (param = negative slope), `elu` (param = alpha) or `identity`."""

    name: str
    param: float


class Layout(NamedTuple):
    """A dense tensor seen as (outer, channels, inner): (N, C, spatial), or channels last (N * spatial, C, 1)."""

    outer: int
    channels: int
    inner: int


def statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def is_dense(x: Tensor) -> bool:
    return x.is_contiguous() or (x.dim() in LAYOUTS and x.is_contiguous(memory_format=LAYOUTS[x.dim()]))


def layout(x: Tensor) -> Layout:
    """The memory layout of x, which must be dense."""
    count, channels = x.shape[:2]
    spatial = x.numel() // max(count * channels, 1)
    if x.is_contiguous():
        return Layout(count, channels, spatial)
    assert is_dense(x), f"strides {x.stride()} of shape {tuple(x.shape)}"
    return Layout(count * spatial, channels, 1)


def per_channel(v: Tensor, x: Tensor) -> Tensor:
    """View (C,) in the shape that broadcasts against x."""
    return v.view(-1, *(1,) * (x.dim() - 2))


def activate_(y: Tensor, activation: Activation) -> Tensor:
    """z = act(y), written over y."""
    if activation.name == "leaky_relu":
        return F.leaky_relu_(y, activation.param)
    if activation.name == "elu":
        return F.elu_(y, activation.param)
    return y


def invert(z: Tensor, dz: Tensor, activation: Activation) -> tuple[Tensor, Tensor]:
    """(y, dL/dy) from z = act(y) and dL/dz. Neither input is changed."""
    if activation.name == "leaky_relu":
        slope = activation.param
        return F.leaky_relu(z, 1 / slope), torch.ops.aten.leaky_relu_backward(dz, z, slope, True)
    if activation.name == "elu":
        alpha = activation.param
        # In half types 1 + z / alpha can round to 0 far below zero; the clamp keeps the logarithm finite there.
        least = torch.finfo(z.dtype).eps - 1
        y = torch.where(z > 0, z, torch.log1p((z / alpha).clamp(min=least)))
        return y, torch.where(z > 0, dz, dz * (z + alpha))
    return z, dz


def recover(
    kept: Tensor, dz: Tensor, activation: Activation, shortcut: Tensor | None, affine: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """(t, dy), see the docstring of the module. Neither input is changed."""
    if affine is None:
        y, dy = invert(kept, dz, activation)
        return (y if shortcut is None else y - shortcut), dy
    scale, shift = affine
    z = torch.empty_like(kept)
    normalise(kept, z, scale, shift, activation, None)
    if activation.name == "leaky_relu":
        return kept, torch.ops.aten.leaky_relu_backward(dz, z, activation.param, True)
    if activation.name == "elu":
        return kept, torch.where(z > 0, dz, dz * (z + activation.param))
    return kept, dz


# ----------------------------------------------------------------------------------------------------- the primitives


def statistics(x: Tensor) -> Tensor:
    """(2, C): mean and biased variance of x; zeros where x has no element."""
    dtype = statistics_dtype(x)
    if x.numel() == 0:
        return torch.zeros(2, x.shape[1], dtype=dtype, device=x.device)
    axes = [axis for axis in range(x.dim()) if axis != 1]
    var, mean = torch.var_mean(x.to(dtype), axes, correction=0)
    return torch.stack([mean, var])


def normalise(
    x: Tensor, out: Tensor, scale: Tensor, shift: Tensor, activation: Activation, shortcut: Tensor | None
) -> None:
    """out = act(scale * x + shift (+ shortcut)); out may be x."""
    zero, one = torch.zeros_like(scale), torch.ones_like(scale)
    small = scale.new_empty(0)
    if x.numel():
        torch.native_batch_norm(x, scale, shift, zero, one, False, 0.0, 0.0, out=(out, small, small.clone()))
    if shortcut is not None:
        out += shortcut
    activate_(out, activation)


def sums(
    kept: Tensor, dz: Tensor, center: Tensor, inverse: Tensor, activation: Activation,
    shortcut: Tensor | None, affine: tuple[Tensor, Tensor] | None,
) -> Tensor:  # fmt: skip
    """(2, C): the sums of dy and of dy * xhat."""
    if kept.numel() == 0:
        return torch.zeros(2, kept.shape[1], dtype=center.dtype, device=kept.device)
    t, dy = recover(kept, dz, activation, shortcut, affine)
    # torch's backward in training mode computes exactly these sums; its input gradient is not requested.
    _, dgamma, dbeta = torch.ops.aten.native_batch_norm_backward(
        dy, t, torch.ones_like(center), None, None, center, inverse, True, 0.0, [False, True, True]
    )
    return torch.stack([dbeta, dgamma])


def gradient(
    kept: Tensor, dz: Tensor, center: Tensor, inverse: Tensor, activation: Activation,
    shortcut: Tensor | None, affine: tuple[Tensor, Tensor] | None,
    factor: Tensor, means: Tensor, dshortcut: Tensor | None,
) -> Tensor:  # fmt: skip
    """dx = factor * (dy - means[0] - xhat * means[1]), a new tensor; dy goes into dshortcut where that is given."""
    t, dy = recover(kept, dz, activation, shortcut, affine)
    if dshortcut is not None:
        dshortcut.copy_(dy)
    slope = -factor * means[1] * inverse
    offset = -factor * means[0] - slope * center
    wide = t.to(factor.dtype)
    dx = torch.addcmul(per_channel(offset, t), wide, per_channel(slope, t)).addcmul_(
        dy.to(factor.dtype), per_channel(factor, t)
    )
    return torch.empty_like(kept).copy_(dx)


# --------------------------------------------------------------------------- fused, over the tensor's own statistics


def forward(
    x: Tensor, out: Tensor, gamma: Tensor, beta: Tensor, running_mean: Tensor | None, running_var: Tensor | None,
    momentum: float, eps: float, activation: Activation, shortcut: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Write z, by the batch's own statistics, to out, which may be x, and update the running statistics in place.

    Returns (mean, rstd).
    """
    mean, rstd = gamma.new_empty(0), gamma.new_empty(0)
    torch.native_batch_norm(x, gamma, beta, running_mean, running_var, True, momentum, eps, out=(out, mean, rstd))
    if shortcut is not None:
        out += shortcut
    activate_(out, activation)
    return mean, rstd


def backward(
    kept: Tensor, dz: Tensor, center: Tensor, inverse: Tensor, activation: Activation,
    shortcut: Tensor | None, affine: tuple[Tensor, Tensor] | None, factor: Tensor, dshortcut: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(dx, sums): `sums`, then `gradient` with their means over the tensor itself.

    xhat = (t - center) * inverse has the form of a normalisation of t with that mean and inverse deviation, so torch's
    own batch-norm backward applied to t gives exactly these sums; its input gradient differs only by a factor, which is
    passed as the weight.
    """
    t, dy = recover(kept, dz, activation, shortcut, affine)
    if dshortcut is not None:
        dshortcut.copy_(dy)
    dx, dgamma, dbeta = torch.ops.aten.native_batch_norm_backward(
        dy, t, factor / inverse, None, None, center, inverse, True, 0.0, [True] * 3
    )
    return dx, torch.stack([dbeta, dgamma])
