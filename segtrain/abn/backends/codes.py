"""Maps kept in 8 or 4 bits: the format, and its functions in torch's operations, for any device.

What is coded is y, the input of the activation: leaky ReLU squeezes the negative half of it into a hundredth of the
range, and inverting a rounded z = act(y) would enlarge the error as much. The gradient depends less on a negative y
than on a positive one, so negative values have cells of twice the size: coded is w = squeeze(y), which is y / 2 where y
is negative and the slope there at most a half. A range holds the values of a channel, or with 4 bits those of a channel
in one sample (if these are APART or more). It has 2 ** bits cells of one size between its smallest and its largest w.
Where it has both signs, 0 is the boundary between two cells, so that every value keeps its sign. A w is rebuilt as the
middle of its cell. Where a shortcut is added whose own layer keeps it in codes, the smallest and largest y are not
searched for in the sum, which would read both maps once more: the sums of theirs bound them.

    codes   uint8 (rows, bytes), in the order of the map's memory: a row is a plane (N, C, spatial), or the channels of
            a pixel where channels are last; with 4 bits the lower half of a byte is the earlier value
    ranges  (3, 1 or N, C) in the statistics dtype: origin, zero and step of each range; w is in the cell number
            floor((w - origin) / step) + zero. nan where a value is infinite or nan: the range is rebuilt as nan.

A back end may have functions of these names of its own, with the same arguments: those of `Composed`. One that finds
the extremes of x in its pass over x for the statistics has a `statistics_extremes` too, and takes them in `encode`.
"""

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from segtrain.abn.backends.aten import Activation, activate_, layout, normalise, statistics_dtype

BITS = {"8bit": 8, "4bit": 4}  # by the name of the option
APART = 64  # a range of fewer values would take as many bytes as their codes


class Coded(NamedTuple):
    """A coded map, and what is needed to rebuild it."""

    codes: Tensor
    ranges: Tensor
    bits: int
    size: list[int]
    stride: list[int]


class CodedShortcut(NamedTuple):
    """A shortcut that another layer keeps in codes, of the bits, size and stride of the map that it was added to."""

    codes: Tensor
    ranges: Tensor
    activation: Activation  # that made the shortcut of what is coded


Shortcut = Tensor | CodedShortcut | None


class KnownRanges(NamedTuple):
    """The ranges of a shortcut in its own layer's codes, as many as the sum's."""

    ranges: Tensor
    activation: Activation  # that made the shortcut of what is coded


def rows(x: Tensor) -> tuple[int, int]:
    """Rows of a dense map in memory, and values of a row, see above."""
    outer, channels, inner = layout(x)
    return (outer, channels) if inner == 1 else (outer * channels, inner)


def empty_codes(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Uninitialised (codes, ranges) of the dense map x."""
    count, length = rows(x)
    codes = torch.empty((count, -(-length * bits // 8)), dtype=torch.uint8, device=x.device)
    shape = 3, ranged_samples(x, bits), x.shape[1]
    return codes, torch.empty(shape, dtype=statistics_dtype(x), device=x.device)


def ranged_samples(x: Tensor, bits: int) -> int:
    """The number of samples with ranges of their own; 1: all have the same."""
    return 1 if bits == 8 or x.shape[2:].numel() < APART else x.shape[0]


def extremes_of(x: Tensor, bits: int) -> Tensor:
    """(2, 1 or N, C): smallest and largest value of each range, in the statistics dtype; zeros if x is empty."""
    samples = ranged_samples(x, bits)
    found = torch.zeros((2, samples, x.shape[1]), dtype=statistics_dtype(x), device=x.device)
    axes = [axis for axis in range(x.dim()) if axis != 1 and (axis != 0 or samples == 1)]
    if x.numel():
        found[0], found[1] = (extreme.view(samples, -1) for extreme in (x.amin(axes), x.amax(axes)))
    return found


def squeezes(activation: Activation) -> bool:
    return activation.name == "leaky_relu" and abs(activation.param) <= 0.5


def squeeze(y: Tensor, activation: Activation) -> Tensor:
    """What is coded of y."""
    return torch.where(y < 0, y * 0.5, y) if squeezes(activation) else y


def unsqueeze_(w: Tensor, activation: Activation) -> Tensor:
    """y of what is coded, written over it."""
    return w.mul_(torch.where(w < 0, 2.0, 1.0)) if squeezes(activation) else w


def bounds_of(known: KnownRanges, bits: int) -> Tensor:
    """As `extremes_of`: what act(y) lies between, by the ranges of y."""
    origin, zero, step = known.ranges
    ends = unsqueeze_(torch.stack([origin - zero * step, origin + (2**bits - zero) * step]), known.activation)
    inner = torch.where((ends[0] < 0) & (ends[1] > 0), 0.0, ends[0])  # a negative slope has its least value there
    found = activate_(torch.cat([ends, inner[None].to(ends)]), known.activation)
    return torch.stack([found.amin(0), found.amax(0)])


def extremes_of_sum(
    x: Tensor, scale: Tensor, shift: Tensor, known: KnownRanges, bits: int, extremes: Tensor | None
) -> Tensor:
    """As `extremes_of`: what scale * x + shift + shortcut lies between."""
    ends = (extremes_of(x, bits) if extremes is None else extremes) * scale + shift
    return torch.stack([ends.amin(0), ends.amax(0)]) + bounds_of(known, bits)


def per_value(v: Tensor, x: Tensor) -> Tensor:
    """(1 or N, C) to the shape that broadcasts against x."""
    return v.view(*v.shape, *(1,) * (x.dim() - 2))


def find_ranges(extremes: Tensor, bits: int, out: Tensor) -> None:
    """Fill `ranges` from the smallest and largest w, as `extremes_of` gives them."""
    low, high = extremes
    step = (high - low) / (2**bits - 1)
    step = torch.where(step >= torch.finfo(step.dtype).tiny, step, torch.zeros_like(step))  # a constant: one cell
    both = (low < 0) & (high > 0) & (step > 0)
    origin = torch.where(both, torch.zeros_like(low), low)
    zero = torch.where(both, torch.ceil(-low / step), torch.zeros_like(low))
    found = torch.stack([origin, zero, step])
    out.copy_(torch.where(torch.isfinite(high - low), found, torch.full_like(found, torch.nan)))


def encode(
    x: Tensor, out: Tensor, codes: Tensor, ranges: Tensor, scale: Tensor, shift: Tensor, activation: Activation,
    shortcut: Tensor | None, bits: int, extremes: Tensor | None = None, known: KnownRanges | None = None,
) -> None:  # fmt: skip
    """y = scale * x + shift (+ shortcut) as codes and ranges, and out = act(y); out may be x.

    extremes: of x, (2, 1 or N, C), where the back end found them with the statistics; else the ranges take a pass of
    their own. known: of the shortcut; a shortcut without them is read in that pass, and there are no extremes then.
    """
    ends = extremes_of_sum(x, scale, shift, known, bits, extremes) if known and x.numel() else None
    normalise(x, out, scale, shift, Activation("identity", 0.0), shortcut)
    if out.numel() == 0:
        ranges.zero_()
        return
    find_ranges(squeeze(extremes_of(out, bits) if ends is None else ends, activation), bits, ranges)
    top = 2**bits - 1
    numbers = torch.empty_like(out, dtype=torch.uint8)
    for i in range(out.shape[0]):  # a sample at a time: the numbers before rounding take four times their bytes or more
        origin, zero, step = (per_value(v[min(i, v.shape[0] - 1)][None], out) for v in ranges)
        cell = squeeze(out[i : i + 1].to(ranges.dtype), activation) - origin
        cell.mul_(torch.where(step > 0, 1 / step, torch.zeros_like(step)))
        numbers[i : i + 1] = cell.floor_().add_(zero).clamp_(0, top).nan_to_num_(0)
    activate_(out, activation)
    flat = memory_rows(numbers)
    if bits == 8:
        codes.copy_(flat)
        return
    codes.copy_(flat[:, ::2])
    codes[:, : flat.shape[1] // 2].bitwise_or_(flat[:, 1::2] << 4)


def memory_rows(x: Tensor) -> Tensor:
    """A dense map as (rows, values), a view."""
    outer, channels, inner = layout(x)
    if inner == 1 and not x.is_contiguous():
        return x.movedim(1, -1).reshape(outer, channels)
    return x.view((outer, channels) if inner == 1 else (outer * channels, inner))


def decode(coded: Coded, dtype: torch.dtype, activation: Activation) -> Tensor:
    """act(y) as a map of this dtype."""
    codes, ranges, bits, size, stride = coded
    out = torch.empty_strided(size, stride, dtype=dtype, device=codes.device)
    numbers = torch.empty_like(out, dtype=torch.uint8)
    flat = memory_rows(numbers)
    if bits == 8:
        flat.copy_(codes)
    else:
        flat[:, ::2] = codes & 15
        flat[:, 1::2] = codes[:, : flat.shape[1] // 2] >> 4
    for i in range(out.shape[0]):
        origin, zero, step = (per_value(v[min(i, v.shape[0] - 1)][None], out) for v in ranges)
        w = numbers[i : i + 1].to(ranges.dtype).sub_(zero - 0.5).mul_(step).add_(origin)
        y = unsqueeze_(w, activation)
        out[i : i + 1] = y if activation.name == "identity" else activate_(y, activation)
    return out


def as_map(shortcut: Shortcut, like: Coded, dtype: torch.dtype) -> Tensor | None:
    """The shortcut itself, rebuilt if it is coded."""
    if not isinstance(shortcut, CodedShortcut):
        return shortcut
    return decode(Coded(shortcut.codes, shortcut.ranges, *like[2:]), dtype, shortcut.activation)


class Composed:
    """The functions of coded maps from the six primitives of a back end."""

    def __init__(self, ops: ModuleType) -> None:
        self.ops = ops

    encode = staticmethod(encode)
    decode = staticmethod(decode)

    def coded_sums(
        self, coded: Coded, dz: Tensor, center: Tensor, inverse: Tensor, activation: Activation,
        shortcut: Shortcut,
    ) -> Tensor:  # fmt: skip
        """As `sums` of aten.py."""
        z, added = decode(coded, dz.dtype, activation), as_map(shortcut, coded, dz.dtype)
        found: Tensor = self.ops.sums(z, dz, center, inverse, activation, added, None)
        return found

    def coded_gradient(
        self, coded: Coded, dz: Tensor, center: Tensor, inverse: Tensor, activation: Activation,
        shortcut: Shortcut, factor: Tensor, means: Tensor, dshortcut: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """As `gradient` of aten.py."""
        z, added = decode(coded, dz.dtype, activation), as_map(shortcut, coded, dz.dtype)
        dx: Tensor = self.ops.gradient(z, dz, center, inverse, activation, added, None, factor, means, dshortcut)
        return dx

    def coded_backward(
        self, coded: Coded, dz: Tensor, center: Tensor, inverse: Tensor, activation: Activation,
        shortcut: Shortcut, factor: Tensor, dshortcut: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """As `backward` of aten.py."""
        z, added = decode(coded, dz.dtype, activation), as_map(shortcut, coded, dz.dtype)
        found: tuple[Tensor, Tensor] = self.ops.backward(
            z, dz, center, inverse, activation, added, None, factor, dshortcut
        )
        return found
