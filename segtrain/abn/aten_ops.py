"""In-Place ABN by the fused kernels that ship inside torch: any device, no compiler.

A back end is this pair of functions. `forward` may write its result over `x`; `backward` sees nothing of the forward
input, only the stored output. Every quantity is per channel unless said otherwise:

    xhat = (x - mean) * rstd          normalised input, rstd = (biased variance + eps) ** -0.5
    y    = gamma * xhat + beta        gamma is the effective scale, never zero
    z    = act(y)                     the output, the only full-size tensor that is kept

Source of the equations: In-Place ABN paper, section 3.2 (variant I).
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}  # channels-last memory by number of dimensions


class Activation(NamedTuple):
    """An invertible activation: `leaky_relu` (param = negative slope), `elu` (param = alpha) or `identity`."""

    name: str
    param: float


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
        tiny = torch.finfo(z.dtype).eps
        y = torch.where(z > 0, z, torch.log1p((z / alpha).clamp(min=tiny - 1)))
        return y, torch.where(z > 0, dz, dz * (z + alpha))
    return z, dz


def forward(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    activation: Activation,
    overwrite: bool,
) -> tuple[Tensor, Tensor]:
    """(z, rstd). With `overwrite` z lives in x's memory. In training the running statistics move, in place."""
    source = dense(x)  # torch's kernel misreads other memory layouts
    out = source if overwrite or source is not x else torch.empty_like(x)
    small = torch.empty(0, dtype=gamma.dtype, device=x.device)
    mean, rstd = small, small.clone()
    torch.native_batch_norm(
        source, gamma, beta, running_mean, running_var, training, momentum, eps, out=(out, mean, rstd)
    )
    if not training:
        assert running_var is not None
        rstd = torch.rsqrt(running_var + eps)
    z = activate_(out, activation)
    return x.copy_(z) if overwrite and source is not x else z, rstd


def dense(x: Tensor) -> Tensor:
    """x itself if its memory is NC... or channels last without gaps, else a copy that is."""
    if x.dim() in LAYOUTS and x.is_contiguous(memory_format=LAYOUTS[x.dim()]):
        return x
    return x.contiguous()


def backward(
    z: Tensor, dz: Tensor, gamma: Tensor, beta: Tensor, rstd: Tensor, training: bool, activation: Activation
) -> tuple[Tensor, Tensor, Tensor]:
    """(dL/dx, dL/dgamma, dL/dbeta) from the stored output alone.

    xhat = (y - beta) / gamma has the form of a normalisation of y with mean beta and inverse deviation 1 / gamma, so
    torch's own batch-norm backward applied to y gives exactly the sums wanted; its dx differs from ours by the factor
    gamma / rstd only, which goes in as the weight.
    """
    y, dy = invert(z, dz, activation)
    y = dense(y)
    dy = dy.contiguous() if y.is_contiguous() else dy.contiguous(memory_format=LAYOUTS[y.dim()])
    weight = gamma * gamma * rstd
    # Saved mean and inverse deviation in training; in eval mode the kernel wants a running mean and variance instead.
    running = (None, None) if training else (beta, gamma * gamma)
    saved = (beta, 1 / gamma) if training else (None, None)
    dx, dgamma, dbeta = torch.ops.aten.native_batch_norm_backward(
        dy, y, weight, *running, *saved, training, 0.0, [True] * 3
    )
    return dx, dgamma, dbeta
