"""Max-pooling that keeps one byte per output element for backward, instead of its input and an int64 index."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from segtrain.abn.backends.aten import is_dense
from segtrain.abn.recipes import derive


class MaxPoolFunction(torch.autograd.Function):
    """Keeps the cell of the window that each output came from, as uint8 (N, C, h, w)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int, stride: int, padding: int) -> Tensor:
        ctx.settings = size, stride, padding, x.shape, x.stride()
        if not ctx.needs_input_grad[0]:
            return F.max_pool2d(x, size, stride, padding)
        out: Tensor | None = None
        cells: Tensor | None = None
        # An image at a time: torch's int64 indices take eight times the bytes that are kept of them.
        for i, image in enumerate(x.split(1)):
            pooled, index = F.max_pool2d(image, size, stride, padding, return_indices=True)
            if out is None or cells is None:
                shape = (x.shape[0], *pooled.shape[1:])
                layout = torch.channels_last if is_channels_last(x) else torch.contiguous_format
                out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)
                cells = torch.empty(shape, dtype=torch.uint8, device=x.device, memory_format=layout)
            out[i : i + 1] = pooled
            row, column = corner(pooled, size, stride, padding)
            down = torch.div(index, x.shape[3], rounding_mode="floor")
            index.sub_(down * x.shape[3]).sub_(column).add_(down.sub_(row), alpha=size)
            cells[i : i + 1] = index
        assert out is not None and cells is not None
        ctx.save_for_backward(cells)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None, None, None]:
        (cells,) = ctx.saved_tensors
        size, stride, padding, shape, strides = ctx.settings
        dx = torch.empty_strided(shape, strides, dtype=dout.dtype, device=dout.device)
        if not is_dense(dx):
            dx = torch.empty(shape, dtype=dout.dtype, device=dout.device)
        # torch's backward reads only the shape and memory layout of its input argument.
        for into, grad, cell in zip(dx.split(1), dout.split(1), cells.split(1), strict=True):
            row, column = corner(cell, size, stride, padding)
            wide = cell.long()
            down = torch.div(wide, size, rounding_mode="floor")
            index = wide.sub_(down * size).add_(column).add_(down.add_(row), alpha=shape[3])
            into.copy_(
                torch.ops.aten.max_pool2d_with_indices_backward(
                    grad, into, [size, size], [stride, stride], [padding, padding], [1, 1], False, index
                )
            )
        return dx, None, None, None


def is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def corner(out: Tensor, size: int, stride: int, padding: int) -> tuple[Tensor, Tensor]:
    """Row and column of the upper left cell of every window, (h, 1) and (w,); negative in the padding."""
    rows, columns = (torch.arange(extent, device=out.device) * stride - padding for extent in out.shape[2:])
    return rows[:, None], columns


class MaxPool2d(nn.Module):
    """nn.MaxPool2d(size, stride, padding), same values and gradients bit for bit, with an eighth of a map kept or less.

    Input (N, C, H, W) of any floating type; output (N, C, (H + 2 padding - size) // stride + 1, ...). For backward it
    keeps one byte per output element: which of the size x size cells of the window it came from. Raises ValueError for
    a window of more than 256 cells.
    """

    def __init__(self, size: int, stride: int, padding: int = 0) -> None:
        super().__init__()
        if size * size > 256:
            raise ValueError(f"a window of {size} x {size} cells cannot be numbered by a byte: give a size up to 16")
        self.size, self.stride, self.padding = size, stride, padding

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = MaxPoolFunction.apply(x, self.size, self.stride, self.padding)
        derive(x, out, lambda z: F.max_pool2d(z, self.size, self.stride, self.padding))
        return out

    def extra_repr(self) -> str:
        return f"{self.size}, stride={self.stride}, padding={self.padding}"
