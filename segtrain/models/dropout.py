"""Dropout whose masks and outputs take little memory until backward. The random numbers are torch's, bit for bit."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from segtrain.abn.recipes import derive, intercepting


class ChannelDropout(nn.Dropout2d):
    """nn.Dropout2d, bit for bit, whose output is not kept where its input can be computed again."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not 0 < self.p < 1 or intercepting() is None:
            return super().forward(x)
        noise = torch.empty(*x.shape[:2], *(1,) * (x.dim() - 2), dtype=x.dtype, device=x.device)
        noise.bernoulli_(1 - self.p).div_(1 - self.p)
        out = x * noise
        derive(x, out, lambda z: z * noise)
        return out

    def _get_name(self) -> str:
        return "Dropout2d"


class ElementDropout(nn.Dropout):
    """nn.Dropout, bit for bit, that keeps one bit per element for backward.

    torch keeps the mask in the input's dtype on the CPU, and in bytes on a GPU. The output is not kept either where
    the input can be computed again. Its gradient cannot be differentiated again.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not 0 < self.p < 1 or self.inplace or not packs(x):
            return super().forward(x)
        made: list[Mask] = []
        out: Tensor = ElementDropoutFunction.apply(x, self.p, made)
        derive(x, out, made[0].times)
        return out

    def _get_name(self) -> str:
        return "Dropout"


def packs(x: Tensor) -> bool:
    """Whether a mask for x would be kept, and its random numbers are drawn in a way that is known here."""
    if torch.compiler.is_compiling() or not (x.requires_grad and torch.is_grad_enabled()):
        return False
    return x.device.type in ("cpu", "cuda") and x.is_floating_point() and x.numel() > 0


class Mask(NamedTuple):
    """What a dropout keeps: `bits` as `pack` gives them, for a map of this size and stride."""

    bits: Tensor
    p: float
    size: torch.Size
    stride: tuple[int, ...]

    def times(self, t: Tensor) -> Tensor:
        """t times the mask, divided by the probability to keep: the operations that F.dropout and its gradient do."""
        dtype = torch.bool if one_kernel(t) else t.dtype
        noise = torch.empty_strided(self.size, self.stride, dtype=dtype, device=t.device)
        unpack_into(noise, self.bits)
        if one_kernel(t):
            out: Tensor = torch.ops.aten.native_dropout_backward(t, noise, 1 / (1 - self.p))
            return out
        return t * noise.div_(1 - self.p)


def one_kernel(x: Tensor) -> bool:
    """Whether F.dropout is one kernel for such tensors, which draws other numbers than bernoulli_."""
    return x.is_cuda


class ElementDropoutFunction(torch.autograd.Function):
    """F.dropout(x, p) for 0 < p < 1; `made` receives the mask."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, made: list[Mask]) -> Tensor:
        if one_kernel(x):
            out, noise = torch.ops.aten.native_dropout(x, p, True)
            bits = pack(noise)
        else:
            noise = torch.empty_like(x).bernoulli_(1 - p)
            bits = pack(noise)
            out = x * noise.div_(1 - p)
        made.append(Mask(bits, p, noise.size(), noise.stride()))
        ctx.save_for_backward(bits)
        ctx.rest = made[0][1:]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None, None]:
        return Mask(*ctx.saved_tensors, *ctx.rest).times(dout), None, None


def pack(mask: Tensor) -> Tensor:
    """A dense mask of zeros and ones as uint8 (1, ceil(numel / 8)), in the order of its memory.

    Bit i of the bytes is the eighth number i of the mask, so that each eighth is one run of memory. Two dimensions, as
    codes have them: `kept_bytes` and the ledger take one dimension for a vector of the channels.
    """
    flat = mask.as_strided((mask.numel(),), (1,))
    eighth = -(-flat.numel() // 8)
    bits = torch.zeros(1, eighth, dtype=torch.uint8, device=mask.device)
    for i, part in enumerate(flat.split(eighth)):
        bits[0, : part.numel()].add_(part.to(torch.uint8), alpha=1 << i)
    return bits


def unpack_into(mask: Tensor, bits: Tensor) -> None:
    """Write what `pack` packed into a dense mask of the same size and stride, of any dtype."""
    flat = mask.as_strided((mask.numel(),), (1,))
    for i, part in enumerate(flat.split(bits.numel())):
        part.copy_(bits[0, : part.numel()].bitwise_right_shift(i).bitwise_and_(1))
