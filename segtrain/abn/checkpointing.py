"""The paper's two checkpointing variants: the output is freed, and computed again when the next layer needs it.

Both keep one full-size tensor, as In-Place ABN does: the input x (the standard way, figure 2b of the paper), or the
normalised input written over x (the proposed one, figure 2c). It is the next layer that saves the output for backward,
so what it saves has to be intercepted, by `recomputed_outputs` in recipes.py. Without that, the layers give the same
numbers and keep two tensors.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from segtrain.abn.autograd import (
    Options,
    affine,
    as_type,
    batch_statistics,
    gradients,
    kept_passes,
    normalise,
    weight_gradient,
)
from segtrain.abn.backends.aten import CODES, Activation
from segtrain.abn.checks import check_input, check_overwritten, check_tensors
from segtrain.abn.functional import without_values
from segtrain.abn.operators import primitives
from segtrain.abn.recipes import watching

KEEP = ("input", "normalised")


class Normalisation(NamedTuple):
    """How to compute an output again: act(scale * kept + shift)."""

    kept: Tensor
    scale: Tensor
    shift: Tensor
    activation: tuple[int, float]  # the activation's code and parameter

    def output(self) -> Tensor:
        z: Tensor = primitives(self.kept).normalise(self.kept, self.scale, self.shift, *self.activation, None)
        return z


class RecomputedABNFunction(torch.autograd.Function):
    """(z, kept): z is new; kept is x or, with keep="normalised", the normalised input, written over x."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None,
        running_var: Tensor | None, options: Options, keep: str,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        gamma, beta = affine(x, weight, bias, options.eps, options.scale)
        activation = CODES.index(options.activation.name), options.activation.param
        ctx.set_materialize_grads(False)
        if keep == "input":
            kept = x
            mean, rstd, count = batch_statistics(x, running_mean, running_var, options)
            center, inverse, scale = mean, rstd, gamma * rstd
            shift = beta - mean * scale
        else:
            center, inverse = torch.zeros_like(gamma), torch.ones_like(gamma)
            plain = options._replace(activation=Activation("identity", 0.0))
            kept, _, rstd, count = normalise(x, inverse, center, running_mean, running_var, None, plain)
            scale, shift = gamma, beta
            if options.overwrite:
                ctx.mark_dirty(x)
        z = primitives(kept).normalise(kept, scale, shift, *activation, None)
        total = count if isinstance(count, Tensor) else None
        ctx.save_for_backward(kept, weight, bias, gamma, beta, rstd, center, inverse, scale, shift, total)
        ctx.count = 0.0 if isinstance(count, Tensor) else count
        ctx.options = options
        for recipes in watching:
            recipes.add(z, Normalisation(kept.detach(), scale, shift, activation))
        return z, (kept if keep == "normalised" and options.overwrite else None)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: Tensor | None, dkept: Tensor | None) -> tuple[Tensor | None, ...]:
        kept, weight, bias, gamma, beta, rstd, center, inverse, scale, shift, total = ctx.saved_tensors
        options = ctx.options
        if dkept is not None:
            raise RuntimeError(
                "something else used the input that a RecomputedABN layer wrote its normalised form over"
            )
        if dz is None:
            return (None,) * 7
        count = ctx.count if total is None else total
        needed = (*ctx.needs_input_grad[:3], False)
        passes = kept_passes(kept, dz, center, inverse, options.activation, None, (scale, shift))
        dx, dgamma, dbeta, _ = gradients(passes, dz, None, gamma, beta, gamma * rstd, count, options, needed)
        dweight = None if weight is None else weight_gradient(dgamma, weight, options.scale)
        dbias = None if bias is None else as_type(dbeta, bias.dtype)
        return dx, dweight, dbias, None, None, None, None


def recomputed_abn(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None,
    shortcut: Tensor | None, keep: str, group: Any, options: Options,
) -> Tensor:  # fmt: skip
    """act(gamma * xhat + bias) as a new tensor, keeping x or (keep="normalised") the normalised input over x.

    Tensors as for `inplace_abn`; any activation of CODES, and relu as leaky_relu with slope 0, because nothing is
    inverted. group: as `group_or_none` gives it. shortcut: is checked only; the caller adds it.
    """
    overwrite = keep == "normalised" and options.overwrite
    check_tensors(x, weight, bias, running_mean, running_var, shortcut, options.training, overwrite)
    check_input(x, options.training, group is not None)
    if not x.numel() and not options.training:
        return without_values(x, weight, bias, running_mean, running_var, None, options)
    if overwrite:
        check_overwritten(x)
    follows = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
    if group is not None:
        options = options._replace(group=group, backward_follows=follows)
    z: Tensor = RecomputedABNFunction.apply(x, weight, bias, running_mean, running_var, options, keep)[0]
    return z
