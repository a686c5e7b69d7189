"""Residual blocks and the norm layers inside them, with the key names of the published checkpoints."""

from collections import OrderedDict
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from segtrain.abn import (
    ABN,
    BatchNormAct,
    InPlaceABN,
    InPlaceABNSync,
    RecomputedABN,
    ScaledABN,
    recomputed_outputs,
)
from segtrain.abn.rebuilding import NARROW, Chain, Link, add_residual, autocast_dtype, fills
from segtrain.abn.recipes import derive, intercepting
from segtrain.console import say
from segtrain.models.dropout import ChannelDropout, ElementDropout

NORMS: dict[str, type[ABN]] = {
    "inplace_abn": InPlaceABN,
    "inplace_abn_sync": InPlaceABNSync,
    "abn": ScaledABN,
    "batch_norm": BatchNormAct,
    "batch_norm_sync": RecomputedABN,
}
VECTOR = 16  # float32 in an AVX-512 register
KEEP = {"norm": "input", "norm_proposed": "normalised"}  # model.recompute -> what a layer keeps


class Watcher(Protocol):
    """Who sees a network's forward pass."""

    def watch(self) -> AbstractContextManager[object]: ...


def interception(recompute: str, keep: str, rebuilding: Watcher | None = None) -> AbstractContextManager[object]:
    """The context of a network's forward pass in which layers do not keep what can be computed again."""
    if rebuilding is not None and recompute != "none":
        return rebuilding.watch()
    return recomputed_outputs() if recompute in KEEP or keep != "exact" else nullcontext()


class Norm:
    """Builds the layers of one network that normalise and activate.

    `norm(channels)` may overwrite its input; `norm.first(channels)` does not, for the first operation of a block, whose
    input belongs to the caller; `norm.linear(channels)` has no activation. The options are those of the same name in
    ModelConfig.
    """

    def __init__(
        self,
        norm: str = "inplace_abn",
        activation: str = "leaky_relu",
        negative_slope: float = 0.01,
        variant: str = "one",
        scale: str = "abs",
        recompute: str = "none",
        keep: str = "exact",
    ) -> None:
        self.layer = NORMS[norm]
        self.activation = activation
        self.negative_slope = negative_slope
        self.options: dict[str, Any] = {}
        if issubclass(self.layer, InPlaceABN):
            self.options |= {"variant": variant, "keep": keep}
        if norm == "batch_norm_sync":
            self.options |= {"synchronised": True, "keep": "input"}
        if recompute in KEEP:
            self.layer = RecomputedABN
            self.options["keep"] = KEEP[recompute]
        if issubclass(self.layer, ScaledABN):
            self.options["scale"] = "signed" if norm.startswith("batch_norm") else scale

    def __call__(self, channels: int, activation: str | None = None, **options: bool) -> ABN:
        return self.layer(
            channels,
            activation=activation or self.activation,
            activation_param=self.negative_slope,
            **{**self.options, **options},
        )

    def first(self, channels: int) -> ABN:
        overwrites = issubclass(self.layer, InPlaceABN | RecomputedABN)
        return self(channels, overwrite=False) if overwrites else self(channels)

    def linear(self, channels: int) -> ABN:
        return self(channels, activation="identity")


def conv(in_channels: int, channels: int, size: int, stride: int = 1, dilation: int = 1, groups: int = 1) -> nn.Conv2d:
    """Convolution without bias, padded so that stride 1 keeps height and width."""
    padding = (size // 2) * dilation
    kind = NarrowConv2d if size == 1 and stride > 1 and in_channels // groups < VECTOR else nn.Conv2d
    return kind(in_channels, channels, size, stride, padding, dilation, groups, bias=False)


class NarrowConv2d(nn.Conv2d):
    """1x1 convolution without bias, with a stride and few input channels, which trains safely on the CPU.

    torch 2.14.1 (oneDNN's jit_1x1:avx512_core) corrupts the heap in the weight gradient of such a convolution in
    float32 and channels-last memory. Here that gradient is an ordinary 1x1 convolution's over the pixels that the
    stride picks: equal to rounding. All else is Conv2d's to the bit, and so are parameters and keys.
    """

    stands_for = nn.Conv2d  # for code that asks for the exact type

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        z: Tensor = NarrowConvolution.apply(x, self.weight, self.stride, self.groups)
        return z

    def _get_name(self) -> str:
        return "Conv2d"


class NarrowConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: tuple[int, int], groups: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.groups = stride, groups
        return nn.functional.conv2d(x, weight, None, stride, groups=groups)

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        gradient = torch.ops.aten.convolution_backward
        rest = [0, 0], [1, 1], False, [0, 0], ctx.groups
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            dx = gradient(dz, x, weight, [0], ctx.stride, *rest, [True, False, False])[0]
        if ctx.needs_input_grad[1]:
            last = x.is_contiguous(memory_format=torch.channels_last)
            picked = x[..., :: ctx.stride[0], :: ctx.stride[1]]
            picked = picked.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
            dweight = gradient(dz, picked, weight, [0], [1, 1], *rest, [False, True, False])[1]
        return dx, dweight, None, None


class IdentityResidualBlock(nn.Module):
    """Pre-activation block of WideResNet-38 and ResNeXt: x + convs(act(norm(x))), nothing after the sum.

    channels: two entries make a basic block (3x3, 3x3), three a bottleneck (1x1, 3x3, 1x1, grouped in the middle).
    The stride is on the first convolution. If stride or channels change, the shortcut is a 1x1 projection of the
    activated input. Input (N, in_channels, H, W), output (N, channels[-1], H / stride, W / stride).
    """

    def __init__(
        self,
        in_channels: int,
        channels: Sequence[int],
        norm: Norm,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        dropout: float = 0.0,
        drops: str = "channel",
    ) -> None:
        super().__init__()
        self.bn1 = norm.first(in_channels)
        layers: list[tuple[str, nn.Module]]
        if len(channels) == 2:
            layers = [
                ("conv1", conv(in_channels, channels[0], 3, stride, dilation)),
                ("bn2", norm(channels[0])),
                ("conv2", conv(channels[0], channels[1], 3, 1, dilation)),
            ]
        else:
            layers = [
                ("conv1", conv(in_channels, channels[0], 1, stride)),
                ("bn2", norm(channels[0])),
                ("conv2", conv(channels[0], channels[1], 3, 1, dilation, groups)),
                ("bn3", norm(channels[1])),
                ("conv3", conv(channels[1], channels[2], 1)),
            ]
        if dropout:
            kind = ElementDropout if drops == "element" else ChannelDropout
            layers.insert(-1, ("dropout", kind(dropout)))
        self.convs = nn.Sequential(OrderedDict(layers))
        changes = stride != 1 or in_channels != channels[-1]
        self.proj_conv = conv(in_channels, channels[-1], 1, stride) if changes else None

    wide_sum = False  # add in float32 where inputs are rebuilt from the sum
    said = False  # that this block keeps its input

    def forward(self, x: Tensor, link: Link | None = None) -> Tensor:
        """link: the block's place in a chain of sums whose inputs backward rebuilds."""
        z = self.bn1(x)
        recipes = intercepting()
        if link is not None and recipes is not None:
            *convs, last = self.convs
            assert isinstance(last, nn.Conv2d)
            for layer in convs:
                z = layer(z)
            return add_residual(last(z), x, z, last, link, recipes)
        shortcut = x if self.proj_conv is None else self.proj_conv(z)
        out: Tensor = self.convs(z)
        if self.wide_sum and recipes is not None and out.dtype in NARROW:
            out = out.float()
        return out.add_(shortcut)


class ResidualBlock(nn.Module):
    """Post-activation block of ResNet v1: act(norm(convs(x)) + x), stride on the (first) 3x3 convolution.

    The last norm adds the shortcut and activates the sum. In place, that is one operation that keeps its output only:
    the normalised branch is the inverse of the output minus the shortcut. channels, input and output as in
    IdentityResidualBlock. first_dilation: of the first 3x3 convolution, if it differs.
    """

    def __init__(
        self,
        in_channels: int,
        channels: Sequence[int],
        norm: Norm,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        first_dilation: int | None = None,
    ) -> None:
        super().__init__()
        first = first_dilation or dilation
        layers: list[tuple[str, nn.Module]]
        if len(channels) == 2:
            layers = [
                ("conv1", conv(in_channels, channels[0], 3, stride, first)),
                ("bn1", norm(channels[0])),
                ("conv2", conv(channels[0], channels[1], 3, 1, dilation)),
                ("bn2", norm(channels[1])),
            ]
        else:
            layers = [
                ("conv1", conv(in_channels, channels[0], 1)),
                ("bn1", norm(channels[0])),
                ("conv2", conv(channels[0], channels[1], 3, stride, first, groups)),
                ("bn2", norm(channels[1])),
                ("conv3", conv(channels[1], channels[2], 1)),
                ("bn3", norm(channels[2])),
            ]
        self.convs = nn.Sequential(OrderedDict(layers))
        changes = stride != 1 or in_channels != channels[-1]
        self.proj_conv = conv(in_channels, channels[-1], 1, stride) if changes else None
        self.proj_bn = norm.linear(channels[-1]) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        if self.proj_conv is not None and self.proj_bn is not None:
            shortcut = self.proj_bn(self.proj_conv(x))
        *convs, last = self.convs
        for layer in convs:
            x = layer(x)
        out: Tensor = last(x, shortcut)
        return out


class Stage(nn.Sequential):
    """A sequence of blocks. With `recompute`, only each block's input is kept, and backward runs the block again.

    With `walks`, identity blocks do not keep their input where that is intercepted: see segtrain/abn/rebuilding.py.
    """

    recompute = False
    walks = False

    def forward(self, x: Tensor) -> Tensor:
        if self.walks and intercepting() is not None:
            return self.chained(x)
        again = self.recompute and torch.is_grad_enabled()
        for block in self:
            x = checkpoint(block, x, use_reentrant=False) if again else block(x)
        return x

    def chained(self, x: Tensor) -> Tensor:
        recipes, chain = intercepting(), Chain()
        before: Link | None = None
        assert recipes is not None
        able = [able_to_walk(block) for block in self]
        for i, block in enumerate(self):
            # The sum of a block in the chain is what the next one needs of its input.
            if able[i] and (before or (x.requires_grad and x.dtype not in NARROW and fills(x) and x.numel())):
                link = Link(chain, i, x, before, last=not any(able[i + 1 : i + 2]))
                recipes.add(x, link)
                out = block(x, link)
                if not link.added:
                    assert isinstance(block, IdentityResidualBlock)
                    link.kept = x.detach()
                    keeps_input(block, "it runs under torch.utils.checkpoint")
                x, before = out, link if link.added else None
            else:
                x, before = block(x), None
        return x


def able_to_walk(block: nn.Module) -> bool:
    """Whether a block's input is its output minus its last convolution; says why an identity block's is not."""
    if not isinstance(block, IdentityResidualBlock) or block.proj_conv is not None:
        return False
    reason = unlike_a_convolution(block.convs[-1])
    if reason:
        keeps_input(block, f"its last convolution {reason}")
    return not reason


def keeps_input(block: IdentityResidualBlock, reason: str) -> None:
    if not block.said:
        block.said = True
        say(f"WARNING    a block of {block.bn1.num_features} channels keeps its input: {reason}")


def unlike_a_convolution(layer: nn.Module, hooks: int = 0) -> str:
    """'' if the layer's output is that of its convolution, else the reason. hooks: how many forward hooks are ours."""
    if type(layer) is not nn.Conv2d:
        return f"is a {type(layer).__name__}"
    if layer.padding_mode != "zeros":
        return f"pads by {layer.padding_mode}"
    if len(layer._forward_hooks) > hooks or layer._forward_pre_hooks:
        return "has hooks"
    return ""


def stage(*blocks: nn.Module) -> Stage:
    """A sequence of blocks under the published names block1, block2, ..."""
    return Stage(OrderedDict((f"block{i}", block) for i, block in enumerate(blocks, 1)))


class Backbone(nn.Sequential):
    """A sequence of modules: (N, in_channels, H, W) -> (N, out_channels, H / output_stride, W / output_stride).

    low_level: name of the module whose output, with low_channels channels, a decoder may use too; None if a later layer
    overwrites it. With `keeps` set to that name, forward returns (output, early map).
    """

    out_channels: int
    low_level: str | None = "mod2"
    low_channels: int
    keeps: str | None = None

    def forward(self, x: Tensor) -> Any:
        if self.keeps is None:
            return super().forward(x)
        low = x
        for name, module in self.named_children():
            x = module(x)
            if name == self.keeps:
                low = narrowed(x)
        return narrowed(x), low


def narrowed(x: Tensor) -> Tensor:
    """A sum of blocks for convolutions: in autocast's dtype where it was rebuilt in float32, and not kept in that."""
    recipes = intercepting()
    if recipes is None or recipes.find(x) is None or (dtype := autocast_dtype(x)) == x.dtype:
        return x
    out = x.to(dtype)
    derive(x, out, lambda z: z.to(dtype))
    return out
