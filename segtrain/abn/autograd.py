"""The autograd function of In-Place ABN, and the parts that the other functions of the layer share with it."""

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from segtrain.abn import sync
from segtrain.abn.backends import cupy, cupy_layer, native
from segtrain.abn.backends.aten import CODES, Activation, statistics_dtype
from segtrain.abn.operators import backend_for, primitives
from segtrain.abn.straight import is_straight


class Options(NamedTuple):
    """The options of one call of the layer."""

    training: bool  # normalise by the batch's statistics
    momentum: float
    eps: float
    activation: Activation
    overwrite: bool = True
    variant: str = "one"
    scale: str = "abs"
    group: Any = None  # the process group to synchronise over, or None
    backward_follows: bool = False
    keep: str = "exact"
    straight: bool = False  # the tensors are plain and need no conversion: the back end takes them as they are


# ----------------------------------------------------------------------------------------------- scale and shift


def effective_scale(weight: Tensor, eps: float, scale: str = "abs") -> Tensor:
    """The factor that the layer multiplies with, which is never 0.

    "abs": |weight| + eps, as published (official code, all versions). "signed": the weight itself, as in an ordinary
    BatchNorm, but with a magnitude of at least eps.
    """
    if scale == "abs":
        return weight.abs() + eps
    return torch.where(weight < 0, weight.clamp(max=-eps), weight.clamp(min=eps))


def as_type(t: Tensor, dtype: torch.dtype) -> Tensor:
    """t.to(dtype), but without the call if t has that dtype already, which saves microseconds."""
    return t if t.dtype == dtype else t.to(dtype)


def affine(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, scale: str) -> tuple[Tensor, Tensor]:
    """(gamma, beta) in x's statistics dtype."""
    dtype = statistics_dtype(x)
    channels = x.shape[1]
    if weight is None:
        gamma = torch.ones(channels, dtype=dtype, device=x.device)
    else:
        gamma = effective_scale(as_type(weight, dtype), eps, scale)
    beta = torch.zeros(channels, dtype=dtype, device=x.device) if bias is None else as_type(bias, dtype)
    return gamma, beta


def weight_gradient(dgamma: Tensor, weight: Tensor, scale: str) -> Tensor:
    """dL/dweight from dL/dgamma. By the published convention, |w| has slope 1 at 0."""
    if scale == "abs":
        dgamma = torch.where(weight < 0, -dgamma, dgamma)
    return as_type(dgamma, weight.dtype)


# ------------------------------------------------------------------------------------------------- the function


def batch_statistics(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, options: Options, own: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | float]:
    """(mean, rstd, values per channel) over the group; in eval mode from the running statistics, and count 1.

    own: mean and variance of x, if they are known.
    """
    dtype = statistics_dtype(x)
    if not options.training:
        assert running_mean is not None and running_var is not None
        return running_mean.to(dtype), torch.rsqrt(running_var.to(dtype) + options.eps), 1.0
    mean, var = primitives(x).statistics(x) if own is None else own
    here = x.numel() / x.shape[1]
    count: Tensor | float = here
    if options.group is not None:
        mean, var, count = sync.merge_statistics(mean, var, here, options.backward_follows, options.group, running_mean)
    if running_mean is not None and running_var is not None:
        running_mean.lerp_(mean.to(running_mean.dtype), options.momentum)
        running_var.lerp_((var * (count / (count - 1))).to(running_var.dtype), options.momentum)
    return mean, torch.rsqrt(var + options.eps), count


def normalise(
    x: Tensor, gamma: Tensor, beta: Tensor, running_mean: Tensor | None, running_var: Tensor | None,
    shortcut: Tensor | None, options: Options,
) -> tuple[Tensor, Tensor, Tensor, Tensor | float]:  # fmt: skip
    """(z, mean, rstd, values per channel); z is x itself if options.overwrite."""
    ops = primitives(x)
    activation = CODES.index(options.activation.name), options.activation.param
    tracked = [t for t in (running_mean, running_var) if t is not None]
    # The fused operator updates the running statistics itself, if they have its dtype.
    if options.training and options.group is None and all(t.dtype == gamma.dtype for t in tracked):
        arguments = x, gamma, beta, running_mean, running_var, options.momentum, options.eps, *activation, shortcut
        z, (mean, rstd) = x, (gamma, gamma)
        if options.overwrite:
            mean, rstd = ops.forward_(*arguments)
        else:
            z, mean, rstd = ops.forward(*arguments)
        return z, mean, rstd, x.numel() / x.shape[1]
    mean, rstd, count = batch_statistics(x, running_mean, running_var, options)
    scale = gamma * rstd
    shift = beta - mean * scale
    if options.overwrite:
        ops.normalise_(x, scale, shift, *activation, shortcut)
        return x, mean, rstd, count
    return ops.normalise(x, scale, shift, *activation, shortcut), mean, rstd, count


class InPlaceABNFunction(torch.autograd.Function):
    """Saves z and per-channel vectors. Overwrites x, and marks it as dirty, unless `overwrite` is False."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, shortcut: Tensor | None,
        running_mean: Tensor | None, running_var: Tensor | None, options: Options,
    ) -> Tensor:  # fmt: skip
        z = x
        count: Tensor | float = 0.0
        if options.straight:
            z = x if options.overwrite else torch.empty_like(x)
            vectors = layer_forward(x, z, weight, bias, running_mean, running_var, shortcut, options)
            count = x.numel() / x.shape[1]
        else:
            gamma, beta = affine(x, weight, bias, options.eps, options.scale)
            z, _, rstd, count = normalise(x, gamma, beta, running_mean, running_var, shortcut, options)
            vectors = gamma, rstd
        if options.overwrite:
            ctx.mark_dirty(x)
        total = count if isinstance(count, Tensor) else None
        ctx.save_for_backward(z, weight, bias, shortcut, *vectors, total)
        ctx.count = 0.0 if isinstance(count, Tensor) else count
        ctx.options = options
        return z

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
        # `once_differentiable` changes nothing where no second derivative is asked for, and takes time.
        return second_refused(ctx, dz) if torch.is_grad_enabled() else inplace_backward(ctx, dz)


def inplace_backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
    z, weight, bias, shortcut, *vectors, total = ctx.saved_tensors
    options, needed = ctx.options, ctx.needs_input_grad
    count = ctx.count if total is None else total
    if options.straight:
        inverse, factor = vectors
        if is_straight(z, dz, weight, bias, inverse, factor, shortcut):
            return layer_backward(z, dz, weight, bias, inverse, factor, shortcut, options, needed)
        gamma = rstd = center = beta = torch.zeros_like(factor) if bias is None else as_type(bias, factor.dtype)
    else:
        gamma, rstd = vectors
        beta = torch.zeros_like(gamma) if bias is None else as_type(bias, gamma.dtype)
        center, inverse = normalised_by(gamma, beta, options.variant)
        factor = gamma * rstd
    passes = kept_passes(z, dz, center, inverse, options.activation, shortcut, None)
    dx, dgamma, dbeta, dshortcut = gradients(passes, dz, shortcut, gamma, beta, factor, count, options, needed)
    dweight = None if weight is None else weight_gradient(dgamma, weight, options.scale)
    dbias = None if bias is None else as_type(dbeta, bias.dtype)
    return dx, dweight, dbias, dshortcut, None, None, None


# Where a back end's functions of the whole layer are, if it has any: `layer_forward` and `layer_backward`.
LAYERS: dict[ModuleType, Any] = {cupy: cupy_layer, native: native}
second_refused = once_differentiable(inplace_backward)


def layer_forward(
    x: Tensor, out: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None,
    running_var: Tensor | None, shortcut: Tensor | None, options: Options,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(1 / gamma, gamma * rstd); z is written to out, which may be x. For tensors that need no conversion."""
    backend, activation = backend_for(x), options.activation
    own = LAYERS.get(backend)
    if own is not None:
        found: tuple[Tensor, Tensor] = own.layer_forward(
            x, out, weight, bias, running_mean, running_var, options.momentum, options.eps, options.scale, activation,
            shortcut,
        )  # fmt: skip
        return found
    gamma, beta = affine(x, weight, bias, options.eps, options.scale)
    running = running_mean, running_var, options.momentum, options.eps
    return gamma.reciprocal(), gamma * backend.forward(x, out, gamma, beta, *running, activation, shortcut)[1]


def layer_backward(
    z: Tensor, dz: Tensor, weight: Tensor | None, bias: Tensor | None, inverse: Tensor, factor: Tensor,
    shortcut: Tensor | None, options: Options, needed: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """As `inplace_backward`, for tensors that `is_straight` found fit."""
    backend, activation = backend_for(z), options.activation
    wanted = shortcut is not None and needed[3]
    # Without an activation after the sum, the shortcut's gradient is dz itself.
    dshortcut = dz if wanted else None
    through = torch.empty_like(z) if wanted and activation.name != "identity" else None
    own = LAYERS.get(backend)
    if own is not None:
        dx, dweight, dbias = own.layer_backward(
            z, dz, weight, bias, inverse, factor, options.scale, activation, shortcut, through
        )
    else:
        beta = torch.zeros_like(factor) if bias is None else bias
        arguments = beta, inverse, activation, shortcut, None, factor, through
        dx, sums = backend.backward(z, dz, *arguments)
        dbias, dgamma = sums.unbind()
        dweight = None if weight is None else weight_gradient(dgamma, weight, options.scale)
    return (
        dx if needed[0] else None, None if weight is None else dweight, None if bias is None else dbias,
        dshortcut if through is None else through, None, None, None,
    )  # fmt: skip


def normalised_by(gamma: Tensor, beta: Tensor, variant: str) -> tuple[Tensor, Tensor]:
    """(center, inverse) with xhat = (y - center) * inverse; for variant two of the paper, y itself stands for xhat."""
    if variant == "two":
        return torch.zeros_like(beta), torch.ones_like(gamma)
    return beta, gamma.reciprocal()


class Passes(NamedTuple):
    """The primitives of a backward pass over a kept map, their first arguments filled in; see aten.py."""

    backward: Callable[..., Any]
    sums: Callable[..., Any]
    gradient: Callable[..., Any]
    numel: int


def passes_of(
    numel: int, backward: Callable[..., Any], sums: Callable[..., Any], gradient: Callable[..., Any], *arguments: Any
) -> Passes:
    """The operators with their first arguments filled in; numel: of the map."""
    one = functools.partial
    return Passes(one(backward, *arguments), one(sums, *arguments), one(gradient, *arguments), numel)


def kept_passes(
    kept: Tensor, dz: Tensor, center: Tensor, inverse: Tensor, activation: Activation, shortcut: Tensor | None,
    affine: tuple[Tensor, Tensor] | None,
) -> Passes:  # fmt: skip
    """The passes over a kept output or, with affine = (scale, shift), over a kept input of act(scale * t + shift)."""
    ops = primitives(kept)
    scale, shift = (None, None) if affine is None else affine
    arguments = kept, dz, center, inverse, CODES.index(activation.name), activation.param, shortcut, scale, shift
    return passes_of(kept.numel(), ops.backward, ops.sums, ops.gradient, *arguments)


def gradients(
    passes: Passes, dz: Tensor, shortcut: Tensor | None, gamma: Tensor, beta: Tensor, factor: Tensor,
    count: Tensor | float, options: Options, needed: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """(dx, dgamma, dbeta, dshortcut) from the kept map.

    factor: gamma * rstd. needed: whether x, weight, bias, shortcut need a gradient. gamma and beta are read for variant
    two only.

    Variant two of the paper (section 3.3) takes center = 0, inverse = 1, so that the sums are those of dy and dy * y,
    and the normalised input is never formed:
        dgamma = (sum(dy y) - beta dbeta) / gamma
        dx = (dy - dgamma y / (gamma m) - (dbeta - (beta / gamma) dgamma) / m) gamma rstd
    The paper prints a plus in the last bracket; variant one implies the minus.
    """
    # Without an activation after the sum, the shortcut's gradient is dz itself.
    through = shortcut is not None and needed[3] and options.activation.name != "identity"
    dx = None
    if options.training and options.group is None and options.variant == "one" and passes.numel:
        dx, sums, dshortcut = passes.backward(factor, through)
        dbeta, dgamma = sums[0], sums[1]
    else:
        sums = passes.sums()
        everywhere = sums
        if options.training and options.group is not None:
            everywhere = sync.all_reduce(sums, options.group)
        dbeta, dgamma = sums[0], sums[1]
        if options.variant == "two":
            dgamma = (dgamma - beta * dbeta) / gamma
            total_dgamma = (everywhere[1] - beta * everywhere[0]) / gamma
            everywhere = torch.stack([everywhere[0] - beta / gamma * total_dgamma, total_dgamma / gamma])
        means = everywhere / count if options.training else torch.zeros_like(everywhere)
        dshortcut = None
        if needed[0] or through:
            dx, dshortcut = passes.gradient(factor, means.to(factor.dtype), through)
    if shortcut is None or not needed[3]:
        dshortcut = None
    elif not through:
        dshortcut = dz
    return dx if needed[0] else None, dgamma, dbeta, dshortcut
