"""`inplace_abn`: BatchNorm and activation as one autograd function that keeps only its output for backward."""

from typing import Any

import torch
from torch import Tensor, nn

from segtrain.abn import sync
from segtrain.abn.autograd import InPlaceABNFunction, Options, affine, effective_scale, normalise
from segtrain.abn.backends import aten as aten_ops
from segtrain.abn.backends.aten import Activation
from segtrain.abn.checks import (
    KEEPS,
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
from segtrain.abn.coded import coded_abn, coding
from segtrain.abn.operators import direct, primitives
from segtrain.abn.rebuilding import sourced
from segtrain.abn.recipes import intercepting
from segtrain.abn.straight import needs_no_conversion, noted, signature


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
    keep: str = "exact",
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
    keep: "exact", or "8bit" | "4bit" to keep the output in so many bits for backward, which sees it rounded; the output
    itself is exact. Inside `recomputed_outputs` only, where no other layer keeps the output either.
    Raises ValueError for what cannot be normalised or inverted, RuntimeError if x is still needed.
    """
    return call(
        x, weight, bias, running_mean, running_var, shortcut, None, momentum,
        (training, eps, activation, activation_param, overwrite, variant, scale, keep),
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
    keep: str = "exact",
) -> Tensor:
    """`inplace_abn` with the statistics of all processes of `group` (default: all processes).

    Every process of the group must call it, with any number of images of any size, even none. One collective in
    forward, one in backward. Without torch.distributed, or with one process, it is `inplace_abn`. The gradients of
    weight and bias are this process's part; their sum over the processes (DistributedDataParallel averages) is the
    gradient. Raises RuntimeError on every process if some of them will run backward and others will not.
    """
    return call(
        x, weight, bias, running_mean, running_var, shortcut, sync.group_or_none(group) if training else None, momentum,
        (training, eps, activation, activation_param, overwrite, variant, scale, keep),
    )  # fmt: skip


def call(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None,
    shortcut: Tensor | None, group: Any, momentum: float, chosen: tuple[Any, ...],
) -> Tensor:  # fmt: skip
    """chosen: training, eps, activation, its parameter, overwrite, variant, scale, keep."""
    tensors = x, weight, bias, running_mean, running_var, shortcut
    eager = primitives(x) is direct
    if eager:
        key = chosen, group is None, shortcut is x, signature(*tensors)
        options = examined_calls.get(key)
        if options is None:
            options = noted(examined_calls, key, examined(*tensors, group is not None, momentum, *chosen))
        if options.momentum != momentum:
            options = options._replace(momentum=momentum)
    else:
        options = examined(*tensors, group is not None, momentum, *chosen)
    if options.overwrite:
        check_overwritten(x)
    if not options.training and not x.numel():
        return without_values(*tensors, options)
    follows = torch.is_grad_enabled() and gradients_wanted(x, weight, bias, shortcut)
    if group is not None:
        options = options._replace(group=group, backward_follows=follows)
    compiling = not eager and torch.compiler.is_compiling()
    if compiling and not follows:  # dynamo inlines this, and does not support mark_dirty
        gamma, beta = affine(x, weight, bias, options.eps, options.scale)
        return normalise(x, gamma, beta, running_mean, running_var, shortcut, options)[0]
    try:
        z = applied(x, weight, bias, running_mean, running_var, shortcut, options, follows)
    except RuntimeError as error:
        if options.overwrite and "being modified inplace" in str(error):
            raise RuntimeError(OVERWRITES.format("a view made by another autograd function")) from error
        raise
    if follows and not compiling:
        z._segtrain_kept = True  # type: ignore[attr-defined]
    return z


def gradients_wanted(*tensors: Tensor | None) -> bool:
    return any(t is not None and t.requires_grad for t in tensors)


examined_calls: dict[Any, Options] = {}  # what `examined` found, by all that it depends on


def examined(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None,
    shortcut: Tensor | None, synchronised: bool, momentum: float, training: bool, eps: float, name: str, param: float,
    overwrite: bool, variant: str, scale: str, keep: str,
) -> Options:  # fmt: skip
    """The options of a call. ValueError for tensors and options that do not fit each other.

    Depends on the options, on what `signature` shows of the tensors, and on whether the shortcut is x.
    """
    activation = invertible(name, param)
    check_tensors(x, weight, bias, running_mean, running_var, shortcut, training, overwrite)
    check_input(x, training, synchronised)
    one_of("variant", variant, VARIANTS)
    one_of("scale", scale, SCALES)
    one_of("keep", keep, KEEPS)
    if shortcut is not None and shortcut.dtype != x.dtype:
        raise ValueError(
            f"the shortcut, {shortcut.dtype}, must match the input, {x.dtype}, in dtype: convert one of them"
        )
    alone = training and not synchronised and variant == "one" and not torch.compiler.is_compiling()
    straight = alone and needs_no_conversion(x, (weight, bias, running_mean, running_var), (shortcut,))
    return Options(training, momentum, eps, activation, overwrite, variant, scale, keep=keep, straight=straight)


def applied(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None,
    shortcut: Tensor | None, options: Options, follows: bool,
) -> Tensor:  # fmt: skip
    """By the autograd function that keeps least: that of an input which can be had again, of codes, or of z."""
    watched = follows and intercepting() is not None
    rebuilt = sourced(x, shortcut, options) if watched else None
    if rebuilt is not None:
        function, *rest = rebuilt
        options = options._replace(straight=False)  # they keep other vectors
        z: Tensor = function.apply(x, weight, bias, running_mean, running_var, options, *rest)
        return z
    recipes = coding(x, options) if watched else None
    if recipes is not None:
        return coded_abn(x, weight, bias, shortcut, running_mean, running_var, options, recipes)
    kept: Tensor = InPlaceABNFunction.apply(x, weight, bias, shortcut, running_mean, running_var, options)
    return kept


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
