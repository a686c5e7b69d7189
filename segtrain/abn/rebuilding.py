"""Exact rebuilding: maps that are not kept, because backward computes them again from others that are.

Two ways. The output of a convolution is computed again by that convolution. The input x of a residual sum
out = x + last(z) is out - last(z), so that a chain of sums is walked backward from the output of its last one, which
alone is kept. An In-Place ABN layer whose input can be had again keeps neither that nor its own output: the output
follows from the stored statistics. Inside `recomputed_outputs` only.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from segtrain.abn.autograd import (
    InPlaceABNFunction,
    Options,
    affine,
    as_type,
    batch_statistics,
    gradients,
    kept_passes,
    weight_gradient,
)
from segtrain.abn.backends.aten import CODES, is_dense
from segtrain.abn.operators import primitives
from segtrain.abn.recipes import Ready, Recipe, Recipes, intercepting, unpack

NARROW = (torch.float16, torch.bfloat16)

# -------------------------------------------------------------------------------------------------------- recipes


@contextmanager
def repeatable() -> Iterator[None]:
    """Have cuDNN choose among deterministic algorithms, so that the same convolution twice gives the same numbers."""
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic = before


class Convolution(NamedTuple):
    """A convolution as it ran in forward."""

    weight: Tensor
    bias: Tensor | None
    version: int  # of the weight
    dtype: torch.dtype  # of the output: that of autocast
    settings: tuple[Any, ...]  # stride, padding, dilation, groups

    def __call__(self, z: Tensor) -> Tensor:
        if self.weight._version != self.version:
            raise RuntimeError(
                "the weight of a convolution was changed between forward and backward, which computes the "
                "convolution again: update weights after backward"
            )
        bias = None if self.bias is None else self.bias.to(self.dtype)
        with torch.no_grad(), repeatable(), torch.autocast(z.device.type, enabled=False):
            return F.conv2d(z.to(self.dtype), self.weight.to(self.dtype), bias, *self.settings)


def as_ran(conv: nn.Conv2d, out: Tensor) -> Convolution:
    """The convolution that has just given `out`."""
    settings = conv.stride, conv.padding, conv.dilation, conv.groups
    return Convolution(conv.weight, conv.bias, conv.weight._version, out.dtype, settings)


class Convolved(NamedTuple):
    """The recipe of a convolution's output."""

    z: Any  # its input, as `Recipes.pack` gives it
    convolution: Convolution

    def output(self) -> Tensor:
        return self.convolution(unpack(self.z))


class Held(Ready):
    """The recipe of a map that is kept anyway."""

    def __init__(self, map: Tensor) -> None:
        self.map = map

    def output(self) -> Tensor:
        return self.map


class Normalised(NamedTuple):
    """The recipe of act(scale * x + shift)."""

    source: Recipe  # of x
    scale: Tensor
    shift: Tensor
    activation: tuple[int, float]  # the activation's code and parameter
    dtype: torch.dtype

    def output(self) -> Tensor:
        x = self.source.output()
        arguments = self.scale, self.shift, *self.activation, None
        if isinstance(self.source, Ready):
            return as_type(primitives(x).normalise(x, *arguments), self.dtype)
        primitives(x).normalise_(x, *arguments)  # x was made for this
        return as_type(x, self.dtype)


def remember_convolution(conv: nn.Conv2d, z: Tensor, out: Tensor) -> None:
    """Let nobody keep what an In-Place ABN layer makes of out = conv(z), which keeps z for its own gradient."""
    recipes = intercepting()
    if recipes is not None and out.requires_grad:
        recipes.add(out, Convolved(recipes.pack(z.detach()), as_ran(conv, out)))


# ------------------------------------------------------------------------------------------- layers without a map


class Statistics(NamedTuple):
    """What a layer computes from its input and keeps: vectors (C,), and scale and shift of the map from x to y.

    total, number: the number of values a channel, as a tensor where several processes share it, else as a number.
    """

    gamma: Tensor
    beta: Tensor
    mean: Tensor
    rstd: Tensor
    scale: Tensor
    shift: Tensor
    activation: tuple[int, float]
    total: Tensor | None
    number: float

    @classmethod
    def of(
        cls, x: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None,
        running_var: Tensor | None, options: Options,
    ) -> "Statistics":  # fmt: skip
        """Also updates the running statistics."""
        gamma, beta = affine(x, weight, bias, options.eps, options.scale)
        mean, rstd, count = batch_statistics(x, running_mean, running_var, options)
        scale = gamma * rstd
        activation = CODES.index(options.activation.name), options.activation.param
        total, number = (count, 0.0) if isinstance(count, Tensor) else (None, count)
        return cls(gamma, beta, mean, rstd, scale, beta - mean * scale, activation, total, number)


class RebuiltABNFunction(torch.autograd.Function):
    """InPlaceABNFunction over the output of a convolution: what it saves of its output is computed again."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None,
        running_var: Tensor | None, options: Options, source: Recipe, recipes: Recipes,
    ) -> Tensor:  # fmt: skip
        found = Statistics.of(x, weight, bias, running_mean, running_var, options)
        primitives(x).normalise_(x, found.scale, found.shift, *found.activation, None)
        ctx.mark_dirty(x)
        recipes.add(x, Normalised(source, found.scale, found.shift, found.activation, x.dtype), writes=1)
        ctx.save_for_backward(x, weight, bias, None, found.gamma, found.rstd, found.total)
        ctx.count = found.number
        ctx.options, ctx.recipes, ctx.samples = options, recipes, recipes.samples
        ctx.sample = None if recipes.samples is None else recipes.samples.take(x)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.sample is not None:
            ctx.samples.compare(ctx.saved_tensors[0], ctx.sample)
        found = InPlaceABNFunction.backward(ctx, dz)
        ctx.recipes.latest.forget()
        return (*found[:3], None, None, None, None, None)


class SourcedABNFunction(torch.autograd.Function):
    """ABN of an input that `source` gives again in backward: a new output, and nothing kept of either.

    The output has autocast's dtype where the input is float32.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None,
        running_var: Tensor | None, options: Options, source: Recipe, recipes: Recipes,
    ) -> Tensor:  # fmt: skip
        found = Statistics.of(x, weight, bias, running_mean, running_var, options)
        z = as_type(primitives(x).normalise(x, found.scale, found.shift, *found.activation, None), autocast_dtype(x))
        recipes.add(z, Normalised(source, found.scale, found.shift, found.activation, z.dtype))
        ctx.save_for_backward(x, weight, bias, *found[:6], found.total)
        ctx.count = found.number
        ctx.options, ctx.recipes = options._replace(variant="one"), recipes
        ctx.link = source if isinstance(source, Link) else None
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, gamma, beta, mean, rstd, scale, shift, total = ctx.saved_tensors
        ctx.recipes.latest.forget()
        count = ctx.count if total is None else total
        passes = kept_passes(x, dz, mean, rstd, ctx.options.activation, None, (scale, shift))
        needed = (*ctx.needs_input_grad[:3], False)
        dx, dgamma, dbeta, _ = gradients(passes, dz, None, gamma, beta, gamma * rstd, count, ctx.options, needed)
        dweight = None if weight is None else weight_gradient(dgamma, weight, ctx.options.scale)
        dbias = None if bias is None else as_type(dbeta, bias.dtype)
        if ctx.link is not None:
            ctx.link.read()
        return dx, dweight, dbias, None, None, None, None, None, None


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a convolution takes x."""
    if x.dtype == torch.float32 and torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def sourced(x: Tensor, shortcut: Tensor | None, options: Options) -> tuple[type[Any], Recipe, Recipes] | None:
    """The function for a layer whose input can be computed again, that input's recipe, and who intercepts."""
    recipes = intercepting()
    source = None if recipes is None or options.keep != "exact" or shortcut is not None else recipes.find(x)
    if recipes is None or source is None or not x.numel() or not is_dense(x) or not fills(x):
        return None
    overwrites = isinstance(source, Convolved) and options.overwrite
    return RebuiltABNFunction if overwrites else SourcedABNFunction, source, recipes


def fills(x: Tensor) -> bool:
    """Whether x is all of its storage."""
    return x.untyped_storage().nbytes() == x.numel() * x.element_size()


# ------------------------------------------------------------------------------------------------ walking backward


class Chain:
    """Successive residual sums in backward: the input of one of them, which the last step of the walk computed."""

    def __init__(self) -> None:
        self.x: Tensor | None = None
        self.at = -1  # the sum whose input x is

    def take(self, index: int) -> Tensor:
        if self.x is None or self.at != index:
            raise RuntimeError(
                f"backward asks for the input of residual block {index} of a chain, and is at block {self.at}: "
                "model.recompute=identity_input cannot run this backward; choose none"
            )
        return self.x


class Link(Ready):
    """One residual sum of a chain, and the recipe of its input.

    before: the link of the sum before it, or None where the walk ends. last: whether the walk begins with it.
    """

    def __init__(self, chain: Chain, index: int, x: Tensor, before: "Link | None", last: bool) -> None:
        self.chain, self.index, self.first, self.last = chain, index, before is None, last
        self.strides = x.stride()
        self.next: Link | None = None
        self.added = False  # by `add_residual`
        self.kept: Tensor | None = None  # the input, of a block that did not add the sum by `add_residual`
        if before is not None:
            before.next = self

    def output(self) -> Tensor:
        return self.chain.take(self.index) if self.kept is None else self.kept

    def read(self) -> None:
        """The last reader of the input has run."""
        if self.first:
            self.chain.x = None

    def walk(self, branch: Tensor, out: Tensor | None) -> Tensor:
        """Compute the input from the output: that of the next sum's input, or `out` for the last one."""
        if out is None and self.next is not None:
            out = self.next.kept
        x = torch.sub(out, branch) if out is not None else self.chain.take(self.index + 1).sub_(branch)
        if x.stride() != self.strides:
            x = torch.empty_strided(x.shape, self.strides, dtype=x.dtype, device=x.device).copy_(x)
        self.chain.x, self.chain.at = x, self.index
        return x


class SumFunction(torch.autograd.Function):
    """branch + x for branch = convolution(z), in float32 where branch is narrower; saves z, and the sum of the last.

    Its backward is the first of the block's, and computes x again.
    """

    @staticmethod
    def forward(
        ctx: Any, branch: Tensor, x: Tensor, z: Tensor, convolution: Convolution, link: Link, recipes: Recipes
    ) -> Tensor:
        if branch.dtype == x.dtype:
            out = branch.add_(x)
            ctx.mark_dirty(branch)
        else:
            out = torch.add(x, branch)
        ctx.save_for_backward(z, out if link.last else None)
        ctx.convolution, ctx.link, ctx.dtype, ctx.samples = convolution, link, branch.dtype, recipes.samples
        ctx.sample = None if recipes.samples is None else recipes.samples.take(x)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        z, out = ctx.saved_tensors
        x = ctx.link.walk(ctx.convolution(z), out)
        if ctx.sample is not None:
            ctx.samples.compare(x, ctx.sample)
        return as_type(dout, ctx.dtype), dout, None, None, None, None


def add_residual(branch: Tensor, x: Tensor, z: Tensor, conv: nn.Conv2d, link: Link, recipes: Recipes) -> Tensor:
    """x + branch for branch = conv(z), whose x backward computes again. Overwrites branch if it has x's dtype."""
    out: Tensor = SumFunction.apply(branch, x, z.detach(), as_ran(conv, branch), link, recipes)
    link.added = True
    if link.last:
        recipes.add(out, Held(out.detach()))
    return out


# ------------------------------------------------------------------------------------------------------- the guard

SAMPLE = 4096  # elements


class Drift:
    """Compares samples of rebuilt maps with what they were. `worst`: the largest relative distance so far.

    concluded: called with that after each backward pass that rebuilt a map.
    """

    def __init__(self, concluded: Any) -> None:
        self.worst: Tensor | None = None
        self.concluded = concluded
        self.queued = False

    def take(self, t: Tensor) -> Tensor | None:
        return None if is_fake(t) else picked(t).clone()

    def compare(self, made: Tensor, sample: Tensor | None) -> None:
        if sample is None:
            return
        true, found = sample.double(), picked(made).double()
        distance = (found - true).norm() / true.norm().clamp(min=torch.finfo(sample.dtype).tiny)
        # An overflow in forward, of the map or of the sum that it is rebuilt from, is not the rebuilding's fault.
        finite = true.isfinite().all() & found.isfinite().all()
        distance = torch.where(finite, distance, torch.zeros_like(distance))
        self.worst = distance if self.worst is None else torch.maximum(self.worst, distance)
        if not self.queued:
            self.queued = True
            torch.autograd.Variable._execution_engine.queue_callback(self.conclude)

    def conclude(self) -> None:
        self.queued = False
        if self.worst is not None:
            self.concluded(float(self.worst))


def picked(t: Tensor) -> Tensor:
    """Elements of t at equal distances in memory."""
    flat = t.detach().as_strided((t.numel(),), (1,), t.storage_offset())
    return flat[:: max(1, t.numel() // SAMPLE) | 1]
