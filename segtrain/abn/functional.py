"""`inplace_abn`: BatchNorm and activation as one autograd function that keeps only its output for backward."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from segtrain.abn import operators, sync
from segtrain.abn.backends import aten as aten_ops
from segtrain.abn.backends.aten import CODES, Activation, statistics_dtype
from segtrain.abn.checks import (
    OVERWRITES,
    SCALES,
    VARIANTS,
    check_input,
    check_overwritten,
    check_reference_dtypes,
    check_tensors,
    invertible,
    one_of,
)

ops = torch.ops.segtrain_abn
assert operators.library.ns == "segtrain_abn"  # the import above defines them


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
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, options: Options
) -> tuple[Tensor, Tensor, Tensor | float]:
    """(mean, rstd, values per channel) over the group; in eval mode from the running statistics, and count 1."""
    dtype = statistics_dtype(x)
    if not options.training:
        assert running_mean is not None and running_var is not None
        return running_mean.to(dtype), torch.rsqrt(running_var.to(dtype) + options.eps), 1.0
    mean, var = ops.statistics(x)
    own = x.numel() / x.shape[1]
    count: Tensor | float = own
    if options.group is not None:
        mean, var, count = sync.merge_statistics(mean, var, own, options.backward_follows, options.group)
    if running_mean is not None and running_var is not None:
        running_mean.lerp_(mean.to(running_mean.dtype), options.momentum)
        running_var.lerp_((var * (count / (count - 1))).to(running_var.dtype), options.momentum)
    return mean, torch.rsqrt(var + options.eps), count


def normalise(
    x: Tensor, gamma: Tensor, beta: Tensor, running_mean: Tensor | None, running_var: Tensor | None,
    shortcut: Tensor | None, options: Options,
) -> tuple[Tensor, Tensor, Tensor, Tensor | float]:  # fmt: skip
    """(z, mean, rstd, values per channel); z is x itself if options.overwrite."""
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
        gamma, beta = affine(x, weight, bias, options.eps, options.scale)
        z, _, rstd, count = normalise(x, gamma, beta, running_mean, running_var, shortcut, options)
        if options.overwrite:
            ctx.mark_dirty(x)
        total = count if isinstance(count, Tensor) else None
        ctx.save_for_backward(z, weight, bias, shortcut, gamma, rstd, total)
        ctx.count = 0.0 if isinstance(count, Tensor) else count
        ctx.options = options
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
        z, weight, bias, shortcut, gamma, rstd, total = ctx.saved_tensors
        beta = torch.zeros_like(gamma) if bias is None else as_type(bias, gamma.dtype)
        options = ctx.options
        center, inverse = beta, gamma.reciprocal()
        if options.variant == "two":
            center, inverse = torch.zeros_like(beta), torch.ones_like(gamma)
        count = ctx.count if total is None else total
        dx, dgamma, dbeta, dshortcut = gradients(
            z, dz, shortcut, None, gamma, beta, rstd, center, inverse, count, options, ctx.needs_input_grad
        )
        dweight = None if weight is None else weight_gradient(dgamma, weight, options.scale)
        dbias = None if bias is None else as_type(dbeta, bias.dtype)
        return dx, dweight, dbias, dshortcut, None, None, None


def gradients(
    kept: Tensor, dz: Tensor, shortcut: Tensor | None, kept_affine: tuple[Tensor, Tensor] | None, gamma: Tensor,
    beta: Tensor, rstd: Tensor, center: Tensor, inverse: Tensor, count: Tensor | float, options: Options,
    needed: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """(dx, dgamma, dbeta, dshortcut) from the kept tensor. needed: whether x, weight, bias, shortcut need a gradient.

    Variant two of the paper (section 3.3) takes center = 0, inverse = 1, so that the sums are those of dy and dy * y,
    and the normalised input is never formed:
        dgamma = (sum(dy y) - beta dbeta) / gamma
        dx = (dy - dgamma y / (gamma m) - (dbeta - (beta / gamma) dgamma) / m) gamma rstd
    The paper prints a plus in the last bracket; variant one implies the minus.
    """
    scale, shift = (None, None) if kept_affine is None else kept_affine
    activation = CODES.index(options.activation.name), options.activation.param
    arguments = kept, dz, center, inverse, *activation, shortcut, scale, shift
    factor = gamma * rstd
    # Without an activation after the sum, the shortcut's gradient is dz itself.
    through = shortcut is not None and needed[3] and options.activation.name != "identity"
    dx = None
    if options.training and options.group is None and options.variant == "one" and kept.numel():
        dx, sums, dshortcut = ops.backward(*arguments, factor, through)
        dbeta, dgamma = sums.unbind()
    else:
        sums = ops.sums(*arguments)
        everywhere = sums
        if options.training and options.group is not None:
            everywhere = sync.all_reduce(sums, options.group)
        dbeta, dgamma = sums.unbind()
        if options.variant == "two":
            dgamma = (dgamma - beta * dbeta) / gamma
            total_dgamma = (everywhere[1] - beta * everywhere[0]) / gamma
            everywhere = torch.stack([everywhere[0] - beta / gamma * total_dgamma, total_dgamma / gamma])
        means = everywhere / count if options.training else torch.zeros_like(everywhere)
        dshortcut = None
        if needed[0] or through:
            dx, dshortcut = ops.gradient(*arguments, factor, means.to(factor.dtype), through)
    if shortcut is None or not needed[3]:
        dshortcut = None
    elif not through:
        dshortcut = dz
    return dx if needed[0] else None, dgamma, dbeta, dshortcut


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
    *,
    shortcut: Tensor | None = None,
    overwrite: bool = True,
    variant: str = "one",
    scale: str = "abs",
) -> Tensor:
    """act(gamma * (x - mean) / sqrt(var + eps) + bias (+ shortcut)) with gamma = |weight| + eps, written over x.

    x: (N, C) or (N, C, *spatial), float32, float64, float16 or bfloat16; weight, bias and running statistics: (C,),
    float32 (float64 for float64 x). In training, mean and var (biased) are the batch's, and running_mean and
    running_var (if given) move by `momentum` towards the batch's mean and unbiased variance; in eval mode the running
    statistics are used. Once differentiable.

    shortcut: of x's shape, added before the activation; it is kept for backward and not overwritten.
    overwrite=False does not write to x and still keeps only the output: for the first layer of a block, whose input
    belongs to its caller.
    variant: "one" | "two", sections 3.2 and 3.3 of the paper: two ways to compute the same gradients.
    scale="signed" multiplies with the weight itself instead of |weight| + eps, see `effective_scale`.
    Raises ValueError for what cannot be normalised or inverted, RuntimeError if x is still needed.
    """
    return call(
        x, weight, bias, running_mean, running_var, shortcut, None,
        Options(training, momentum, eps, invertible(activation, activation_param), overwrite, variant, scale),
    )  # fmt: skip


def inplace_abn_sync(
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
    group: Any = None,
    *,
    shortcut: Tensor | None = None,
    overwrite: bool = True,
    variant: str = "one",
    scale: str = "abs",
) -> Tensor:
    """`inplace_abn` with the statistics of all processes of `group` (default: all processes).

    Every process of the group must call it, with any number of images of any size, even none. One collective in
    forward, one in backward. Without torch.distributed, or with one process, it is `inplace_abn`. The gradients of
    weight and bias are this process's part; their sum over the processes (DistributedDataParallel averages) is the
    gradient. Raises RuntimeError on every process if some of them will run backward and others will not.
    """
    return call(
        x, weight, bias, running_mean, running_var, shortcut, sync.group_or_none(group) if training else None,
        Options(training, momentum, eps, invertible(activation, activation_param), overwrite, variant, scale),
    )  # fmt: skip


def call(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None,
    shortcut: Tensor | None, group: Any, options: Options,
) -> Tensor:  # fmt: skip
    check_tensors(x, weight, bias, running_mean, running_var, shortcut, options.training, options.overwrite)
    check_input(x, options.training, group is not None)
    one_of("variant", options.variant, VARIANTS)
    one_of("scale", options.scale, SCALES)
    if shortcut is not None and shortcut.dtype != x.dtype:
        raise ValueError(
            f"the shortcut, {shortcut.dtype}, must match the input, {x.dtype}, in dtype: convert one of them"
        )
    if options.overwrite:
        check_overwritten(x)
    if not x.numel() and not options.training:
        return without_values(x, weight, bias, running_mean, running_var, shortcut, options)
    follows = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias, shortcut))
    if group is not None:
        options = options._replace(group=group, backward_follows=follows)
    if torch.compiler.is_compiling() and not follows:  # dynamo inlines this, and does not support mark_dirty
        gamma, beta = affine(x, weight, bias, options.eps, options.scale)
        return normalise(x, gamma, beta, running_mean, running_var, shortcut, options)[0]
    try:
        z: Tensor = InPlaceABNFunction.apply(x, weight, bias, shortcut, running_mean, running_var, options)
    except RuntimeError as error:
        if options.overwrite and "being modified inplace" in str(error):
            raise RuntimeError(OVERWRITES.format("a view made by another autograd function")) from error
        raise
    if follows and not torch.compiler.is_compiling():
        z._segtrain_kept = True  # type: ignore[attr-defined]
    return z


# ------------------------------------------------------------------------------------------ by ordinary autograd


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
    *,
    shortcut: Tensor | None = None,
    scale: str = "abs",
) -> Tensor:
    """The same function by torch's ordinary differentiable operations: keeps input and output, saves no memory.

    The reference for `inplace_abn`, and not the layer `ABN`, which multiplies with the weight. Also takes
    activation="relu".
    """
    check_tensors(x, weight, bias, running_mean, running_var, shortcut, training)
    check_input(x, training)
    check_reference_dtypes(x, weight, bias, running_mean, running_var)
    gamma = None if weight is None else effective_scale(weight, eps, scale)
    y = nn.functional.batch_norm(x, running_mean, running_var, gamma, bias, training, momentum, eps)
    if shortcut is not None:
        y = y + shortcut
    return activate(y, activation, activation_param)


def without_values(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None,
    shortcut: Tensor | None, options: Options,
) -> Tensor:  # fmt: skip
    """The output for an empty input in eval mode, which kernels do not take: there is nothing to overwrite or keep."""
    name, param = options.activation
    statistics = running_mean, running_var, False, options.momentum, options.eps
    return abn(x, weight, bias, *statistics, name, param, shortcut=shortcut, scale=options.scale)


def activate(y: Tensor, activation: str, param: float) -> Tensor:
    """leaky_relu (param = negative slope), elu (param = alpha), relu or identity, written over y."""
    if activation == "relu":
        return nn.functional.relu_(y)
    return aten_ops.activate_(y, Activation(activation, param))
