"""`inplace_abn`: BatchNorm and activation as one autograd function that keeps its output only."""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from segtrain.abn import aten_ops
from segtrain.abn.aten_ops import Activation

INVERTIBLE = ("leaky_relu", "elu", "identity")
ACTIVATIONS = (*INVERTIBLE, "relu")
BACKENDS: dict[str, ModuleType] = {"aten": aten_ops}


def backend_for(x: Tensor) -> ModuleType:
    """The kernels used for x: a module with `forward` and `backward` as in aten_ops."""
    return BACKENDS["aten"]


def invertible(activation: str, param: float) -> Activation:
    """The checked activation of an in-place layer; ValueError where its input cannot be computed from its output."""
    if activation not in INVERTIBLE:
        advice = "; use leaky_relu with a small slope, or ABN, which keeps its input" if activation == "relu" else ""
        raise ValueError(
            f"In-Place ABN needs an invertible activation ({', '.join(INVERTIBLE)}), not {activation!r}{advice}"
        )
    if activation != "identity" and not param > 0:
        name = "negative slope" if activation == "leaky_relu" else "alpha"
        raise ValueError(f"In-Place ABN inverts {activation}: its {name} must be greater than 0, not {param}")
    return Activation(activation, param)


def effective_scale(weight: Tensor, eps: float) -> Tensor:
    """|weight| + eps: the scale that the layer multiplies with, which is never 0 (official code, all versions)."""
    return weight.abs() + eps


def check_input(x: Tensor, training: bool) -> None:
    """ValueError for an input that has no statistics. x: (N, C) or (N, C, *spatial)."""
    if x.dim() < 2:
        raise ValueError(f"expected an input of shape (N, C) or (N, C, *spatial), found {tuple(x.shape)}")
    if x.numel() == 0:
        raise ValueError(f"the input of shape {tuple(x.shape)} is empty: nothing to normalise")
    if training and x.numel() == x.shape[1]:
        raise ValueError(
            f"expected more than one value per channel in training, found shape {tuple(x.shape)}: "
            "use a larger batch, or eval mode to freeze the statistics"
        )


class InPlaceABNFunction(torch.autograd.Function):
    """Saves z and per-channel vectors. x is overwritten (and marked so) unless `overwrite` is False."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        training: bool,
        momentum: float,
        eps: float,
        activation: Activation,
        overwrite: bool,
    ) -> Tensor:
        statistics_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        channels = x.shape[1]
        gamma = torch.ones(channels, dtype=statistics_dtype, device=x.device)
        beta = torch.zeros(channels, dtype=statistics_dtype, device=x.device)
        if weight is not None:
            gamma = effective_scale(weight.to(statistics_dtype), eps)
        if bias is not None:
            beta = bias.to(statistics_dtype)
        ops = backend_for(x)
        z, rstd = ops.forward(x, gamma, beta, running_mean, running_var, training, momentum, eps, activation, overwrite)
        if overwrite:
            ctx.mark_dirty(x)
            z = x
        ctx.save_for_backward(z, weight, bias, gamma, rstd)
        ctx.settings = ops, training, activation
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
        z, weight, bias, gamma, rstd = ctx.saved_tensors
        ops, training, activation = ctx.settings
        beta = torch.zeros_like(gamma) if bias is None else bias.to(gamma.dtype)
        dx, dgamma, dbeta = ops.backward(z, dz, gamma, beta, rstd, training, activation)
        dweight = None
        if weight is not None:
            # d|w|/dw, with the published convention that a weight of 0 counts as positive
            dweight = torch.where(weight < 0, -dgamma, dgamma).to(weight.dtype)
        dbias = None if bias is None else dbeta.to(bias.dtype)
        return dx, dweight, dbias, None, None, None, None, None, None, None


def inplace_abn(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str = "leaky_relu",
    activation_param: float = 0.01,
    overwrite: bool = True,
) -> Tensor:
    """act(gamma * (x - mean) / sqrt(var + eps) + bias) with gamma = |weight| + eps, written over x.

    x: (N, C) or (N, C, *spatial), float32, float64, float16 or bfloat16; the other tensors: (C,), float32 (float64 for
    float64 x). In training mean and var are the batch's, var biased, and running_mean and running_var (if given) move
    by `momentum` towards the batch's mean and unbiased variance; otherwise the running ones are used.
    `overwrite=False` leaves x alone and still keeps only the output: right for the first layer of a block, whose input
    belongs to somebody else. Once differentiable.
    """
    check_input(x, training)
    if not training and (running_mean is None or running_var is None):
        raise ValueError("eval mode needs running statistics")
    checked = invertible(activation, activation_param)
    result: Tensor = InPlaceABNFunction.apply(
        x, weight, bias, running_mean, running_var, training, momentum, eps, checked, overwrite
    )
    return result


def abn(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str = "leaky_relu",
    activation_param: float = 0.01,
) -> Tensor:
    """The same function by torch's ordinary differentiable operations: keeps input and output, saves no memory.

    The oracle of `inplace_abn`. Also takes activation="relu".
    """
    check_input(x, training)
    gamma = None if weight is None else effective_scale(weight, eps)
    y = nn.functional.batch_norm(x, running_mean, running_var, gamma, bias, training, momentum, eps)
    return activate(y, activation, activation_param)


def activate(y: Tensor, activation: str, param: float) -> Tensor:
    """leaky_relu (param = negative slope), elu (param = alpha), relu or identity, written over y."""
    if activation == "relu":
        return nn.functional.relu_(y)
    return aten_ops.activate_(y, Activation(activation, param))
