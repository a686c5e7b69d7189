"""In-Place ABN that keeps its output in 8 or 4 bits: see backends/codes.py for the format.

The layer's output z is exact, and is freed as soon as the layers that read it have run. Backward rebuilds it from the
codes for the weight gradients of those layers, and reads the codes themselves for its own.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from segtrain.abn import coded_operators
from segtrain.abn.autograd import (
    Options,
    Passes,
    affine,
    as_type,
    batch_statistics,
    gradients,
    normalised_by,
    passes_of,
    weight_gradient,
)
from segtrain.abn.backends.aten import CODES, Activation, is_dense
from segtrain.abn.backends.codes import BITS, Coded
from segtrain.abn.operators import primitives
from segtrain.abn.recipes import Latest, Recipes, intercepting


class CodedOutput(NamedTuple):
    """The recipe of a coded output."""

    coded: Coded
    dtype: torch.dtype
    activation: Activation

    def output(self) -> Tensor:
        activation = CODES.index(self.activation.name), self.activation.param
        z: Tensor = primitives(self.coded.codes).decode(*self.coded, self.dtype, *activation)
        return z


def coding(x: Tensor, options: Options) -> Recipes | None:
    """Who intercepts what is saved of the output, if it is to be coded and can be; x fills its storage then."""
    if options.keep == "exact" or x.numel() == 0 or not is_dense(x):
        return None
    whole = not options.overwrite or x.untyped_storage().nbytes() == x.numel() * x.element_size()
    return intercepting() if whole else None


class CodedABNFunction(torch.autograd.Function):
    """As InPlaceABNFunction, but saves codes in place of z; `made` receives them for the recipe of the output."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, shortcut: Tensor | None,
        running_mean: Tensor | None, running_var: Tensor | None, options: Options, latest: Latest, made: list[Coded],
        coded_shortcut: CodedOutput | None,
    ) -> Tensor:  # fmt: skip
        gamma, beta = affine(x, weight, bias, options.eps, options.scale)
        bits, ops = BITS[options.keep], primitives(x)
        own = extremes = None
        uncoded = shortcut is not None and coded_shortcut is None
        if options.training and not uncoded and coded_operators.finds_extremes(x):
            own, extremes = ops.statistics_extremes(x, bits)
        mean, rstd, count = batch_statistics(x, running_mean, running_var, options, own)
        scale = gamma * rstd
        added: tuple[Tensor | None, Tensor | None] = (shortcut, None)
        ctx.shortcut_act = 0, 0.0
        if coded_shortcut is not None:
            added = coded_shortcut.coded[:2]
            ctx.shortcut_act = CODES.index(coded_shortcut.activation.name), coded_shortcut.activation.param
        arguments = (
            scale, beta - mean * scale, CODES.index(options.activation.name), options.activation.param, shortcut, bits,
            extremes, added[1], *ctx.shortcut_act,
        )  # fmt: skip
        if options.overwrite:
            z, (codes, ranges) = x, ops.encode_(x, *arguments)
            ctx.mark_dirty(x)
        else:
            z, codes, ranges = ops.encode(x, *arguments)
        total = count if isinstance(count, Tensor) else None
        ctx.save_for_backward(codes, ranges, weight, bias, *added, gamma, rstd, total)
        ctx.count = 0.0 if isinstance(count, Tensor) else count
        ctx.map = bits, list(z.shape), list(z.stride()), z.dtype
        ctx.options, ctx.latest = options, latest
        made.append(Coded(codes, ranges, *ctx.map[:3]))
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
        codes, ranges, weight, bias, shortcut, shortcut_ranges, gamma, rstd, total = ctx.saved_tensors
        ctx.latest.forget()  # the rebuilt output, whose readers have run backward, or a rebuilt shortcut
        options = ctx.options
        beta = torch.zeros_like(gamma) if bias is None else as_type(bias, gamma.dtype)
        center, inverse = normalised_by(gamma, beta, options.variant)
        if shortcut is not None and options.variant == "one":
            inverse = bounded(inverse, ranges)
        bits, size, stride, dtype = ctx.map
        dz = as_type(dz, dtype)
        passes = coded_passes(
            Coded(codes, ranges, bits, size, stride), dz, center, inverse, options.activation, shortcut,
            shortcut_ranges, *ctx.shortcut_act,
        )  # fmt: skip
        count = ctx.count if total is None else total
        needed = ctx.needs_input_grad
        factor = gamma * rstd
        dx, dgamma, dbeta, dshortcut = gradients(passes, dz, shortcut, gamma, beta, factor, count, options, needed)
        dweight = None if weight is None else weight_gradient(dgamma, weight, options.scale)
        dbias = None if bias is None else as_type(dbeta, bias.dtype)
        return dx, dweight, dbias, dshortcut, *(None,) * 6


def bounded(inverse: Tensor, ranges: Tensor) -> Tensor:
    """inverse of xhat = (y - shortcut - center) * inverse, where the error of two codes is at most xhat's deviation, 1.

    The range of y is the shortcut's too. So the error, a third of a cell, does not shrink with gamma as the layer's own
    share of y does, and 1 / gamma enlarges it. Beyond the bound, xhat and the gradient of the scale come out too small
    by the excess, instead of as noise; dx then lacks a part of its smallest term.
    """
    limit = (ranges[2].square().mean(0) * (2 / 12)).rsqrt()  # the error in a cell has the variance step^2 / 12
    return torch.clamp(inverse, -limit, limit)


def coded_passes(
    coded: Coded, dz: Tensor, center: Tensor, inverse: Tensor, activation: Activation, *shortcut: Any
) -> Passes:
    """As kept_passes, over a coded output. shortcut: as the operators take it."""
    ops = primitives(dz)
    arguments = *coded, dz, center, inverse, CODES.index(activation.name), activation.param, *shortcut
    return passes_of(dz.numel(), ops.coded_backward, ops.coded_sums, ops.coded_gradient, *arguments)


def read_from_codes(shortcut: Tensor | None, z: Tensor, bits: int, recipes: Recipes) -> CodedOutput | None:
    """The recipe of a shortcut that backward can read from its own layer's codes, without rebuilding it."""
    recipe = None if shortcut is None else recipes.find(shortcut)
    if not isinstance(recipe, CodedOutput) or (recipe.coded.bits, recipe.dtype) != (bits, z.dtype):
        return None
    assert shortcut is not None
    laid_out = [*shortcut.shape] == recipe.coded.size == [*z.shape] and shortcut.stride() == z.stride()
    return recipe if laid_out and recipe.coded.stride == [*z.stride()] else None


def coded_abn(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, shortcut: Tensor | None, running_mean: Tensor | None,
    running_var: Tensor | None, options: Options, recipes: Recipes,
) -> Tensor:  # fmt: skip
    """`inplace_abn` that keeps its output in options.keep bits; recipes: as `coding` gives them."""
    made: list[Coded] = []
    known = read_from_codes(shortcut, x, BITS[options.keep], recipes)
    z: Tensor = CodedABNFunction.apply(
        x, weight, bias, shortcut, running_mean, running_var, options, recipes.latest, made, known
    )
    recipes.add(z, CodedOutput(made[0], z.dtype, options.activation))
    return z
