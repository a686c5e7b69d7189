"""Check the functions of coded maps of a back end against float64, as selftest.py does for its primitives."""

import itertools
import math
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from segtrain.abn.backends.aten import Activation, per_channel
from segtrain.abn.backends.codes import (
    Coded,
    CodedShortcut,
    Composed,
    KnownRanges,
    Shortcut,
    empty_codes,
    extremes_of,
    per_value,
    squeeze,
    squeezes,
    unsqueeze_,
)
from segtrain.abn.selftest import (
    COMPUTED,
    ELU,
    EPS,
    IDENTITY,
    LEAKY,
    STORED,
    Case,
    Inputs,
    Result,
    channel_axes,
    inputs,
    placed,
    reference_activation,
    result_of,
    wide,
)

Coder = ModuleType | Composed
SHAPES = [
    (2, 16, 8, 8),  # wide accesses in both layouts, ranges of each sample
    (3, 5, 7, 11),  # wide accesses in neither, rows of an odd number of values
    (2, 40, 5, 5),  # samples too small for ranges of their own
    (1, 2, 41, 41),  # many stripes of a channel
    (5, 7),
    (2, 3, 2, 6, 6),
]


class CodedCase(NamedTuple):
    case: Case
    bits: int

    def __str__(self) -> str:
        return f"{self.case}-{self.bits}bit"


def coded_cases() -> Iterator[CodedCase]:
    """All cases: every shape with every activation and number of bits, in alternating types and forms."""
    dtypes = itertools.cycle([torch.float32, torch.bfloat16, torch.float16, torch.float32, torch.float64])
    added = itertools.cycle([False, True, True, False, True, False, False])
    for shape, activation, bits in itertools.product(SHAPES, (LEAKY, ELU, IDENTITY), (8, 4)):
        for last in (False, True) if len(shape) > 2 else (False,):
            yield CodedCase(Case(next(dtypes), shape, last, activation, shortcut=next(added)), bits)
    for last, bits in itertools.product((False, True), (8, 4)):
        yield CodedCase(Case(torch.float16, (2, 16, 8, 8), last, LEAKY, shortcut=True, offset=1), bits)


def affine_of(given: Inputs) -> tuple[Tensor, Tensor]:
    """(scale, shift) that normalise x."""
    x = wide(given.x)
    rstd = 1 / (x.var(channel_axes(x), correction=0) + EPS).sqrt().to(given.gamma.device)
    scale = given.gamma * rstd.to(given.gamma.dtype)
    return scale, given.beta - wide(given.x).mean(channel_axes(x)).to(given.gamma) * scale


def encoded(
    coder: Coder, x: Tensor, out: Tensor, scale: Tensor, shift: Tensor, activation: Activation, shortcut: Tensor | None,
    bits: int, extremes: Tensor | None = None, known: KnownRanges | None = None,
) -> Coded:  # fmt: skip
    codes, ranges = empty_codes(x, bits)
    coder.encode(x, out, codes, ranges, scale, shift, activation, shortcut, bits, extremes, known)
    return Coded(codes, ranges, bits, list(x.shape), list(x.stride()))


def check_codes(coder: Coder, what: CodedCase, given: Inputs) -> Iterator[Result | Coded]:
    """Encode elsewhere and in place, and decode. The last item is the coded map."""
    case, bits = what
    x, shortcut, (scale, shift) = given.x, given.shortcut, affine_of(given)
    stored = STORED[case.dtype] * (1 + isinstance(coder, Composed))  # that rounds y too
    y = wide(x) * per_channel(wide(scale), x) + per_channel(wide(shift), x)
    y = y if shortcut is None else y + wide(shortcut)
    before, z = x.clone(), torch.empty_like(x)
    coded = encoded(coder, x, z, scale, shift, case.activation, shortcut, bits)
    yield result_of(case, "z", z, reference_activation(y, case.activation), stored)
    yield result_of(case, "x left alone", x, wide(before), 0.0)
    over = placed(x, case, x.device)
    again = encoded(coder, over, over, scale, shift, case.activation, shortcut, bits)
    yield result_of(case, "z in place", over, wide(z), 0.0)
    yield result_of(case, "codes in place", again.codes, wide(coded.codes), 0.0)

    back = unsqueeze_(wide(coder.decode(coded, scale.dtype, IDENTITY)), case.activation)
    low, high = extremes_of(y, bits)
    half = half_cells(y, torch.stack([low, high]), what) + stored * max(1.0, float(y.abs().max()))
    yield Result(case, f"distance of y in {bits} bits, in half cells", float(((back - y).abs() / half).max()), 1.0)
    sure = (y.abs() > 1e-3) & per_value((low < 0) & (high > 0), y)
    yield Result(case, "signs that changed", float((back * y < 0)[sure].sum()), 0.0)
    found = coder.decode(coded, case.dtype, case.activation)
    yield result_of(case, "decoded z", found, reference_activation(back, case.activation), stored)
    yield Result(case, "memory layout", float(found.stride() != x.stride()), 0.0)
    yield coded


def half_cells(y: Tensor, ends: Tensor, what: CodedCase) -> Tensor:
    """Half the size of each value's cell, in ranges with these smallest and largest values."""
    low, high = squeeze(ends, what.case.activation)
    half = per_value((high - low) / (2**what.bits - 1) / 2, y) * 1.001
    return unsqueeze_(torch.where(y < 0, -half, half), what.case.activation).abs()


def check_extremes(coder: Coder, what: CodedCase, given: Inputs) -> Iterator[Result]:
    """The pass over x that finds statistics and extremes, if the back end has one."""
    case, bits = what
    if not hasattr(coder, "statistics_extremes"):
        return
    x, (scale, shift), computed = given.x, affine_of(given), COMPUTED[given.gamma.dtype]
    statistics, extremes = coder.statistics_extremes(x, bits)
    mean, var = wide(x).mean(channel_axes(x)), wide(x).var(channel_axes(x), correction=0)
    yield result_of(case, "mean beside extremes", statistics[0], mean, computed, mean.abs().clamp(min=1))
    yield result_of(case, "variance beside extremes", statistics[1], var, computed * 2, var)
    yield result_of(case, "extremes", extremes, extremes_of(wide(x), bits), 0.0)
    for factor in (scale, -scale):
        one, other = (
            encoded(coder, x, torch.empty_like(x), factor, shift, case.activation, None, bits, ends)
            for ends in (None, extremes)
        )
        yield result_of(case, "ranges from extremes", other.ranges, wide(one.ranges), 0.0)
        yield result_of(case, "codes from extremes", other.codes, wide(one.codes), 0.0)


def check_known_ranges(coder: Coder, what: CodedCase, given: Inputs) -> Iterator[Result]:
    """A shortcut whose ranges are known: the sum is coded in ranges that hold it, and not much more."""
    case, bits = what
    added = coded_shortcut(coder, what, given)
    if added is None:
        return
    x, (scale, shift), known = given.x, affine_of(given), KnownRanges(added.ranges, added.activation)
    layout = bits, list(x.shape), list(x.stride())
    shortcut = coder.decode(Coded(added.codes, added.ranges, *layout), case.dtype, added.activation)
    border = wide(added.ranges[2]) * (2 if squeezes(added.activation) else 1)  # its extremes are within these cells
    for factor in (scale, -scale):
        own = wide(x) * per_channel(wide(factor), x) + per_channel(wide(shift), x)
        y, z = own + wide(shortcut), torch.empty_like(x)
        coded = encoded(coder, x, z, factor, shift, case.activation, shortcut, bits, None, known)
        stored = STORED[case.dtype] * (1 + isinstance(coder, Composed)) * max(1.0, float(y.abs().max()))
        yield result_of(case, "z with known ranges", z, reference_activation(y, case.activation), stored)
        back = unsqueeze_(wide(coder.decode(coded, scale.dtype, IDENTITY)), case.activation)
        ends = extremes_of(own, bits) + extremes_of(wide(shortcut), bits)
        half = half_cells(y, torch.stack([ends[0] - border, ends[1] + border]), what) + stored
        yield Result(case, "y with known ranges, in half cells", float(((back - y).abs() / half).max()), 1.0)
        if hasattr(coder, "statistics_extremes"):
            extremes = coder.statistics_extremes(x, bits)[1]
            again = encoded(coder, x, z, factor, shift, case.activation, shortcut, bits, extremes, known)
            yield result_of(case, "known ranges and extremes", again.ranges, wide(coded.ranges), 0.0)


def coded_shortcut(coder: Coder, what: CodedCase, given: Inputs) -> CodedShortcut | None:
    """The case's shortcut as a layer keeps it that has another activation."""
    if given.shortcut is None:
        return None
    one = torch.ones_like(given.gamma)
    other = {"leaky_relu": Activation("leaky_relu", 0.7), "elu": LEAKY, "identity": ELU}[what.case.activation.name]
    codes, ranges, *_ = encoded(
        coder, given.shortcut, torch.empty_like(given.shortcut), one, one * 0, other, None, what.bits
    )
    return CodedShortcut(codes, ranges, other)


def check_coded_backward(
    coder: Coder, what: CodedCase, given: Inputs, coded: Coded, added: Shortcut
) -> Iterator[Result]:
    """The passes over the codes, against the rebuilt maps in float64."""
    case, _ = what
    dz, gamma, beta = given.dz, given.gamma, given.beta
    axes, count = channel_axes(dz), dz.numel() // dz.shape[1]
    stored = lost = STORED[case.dtype]
    if not isinstance(coder, Composed):
        lost = COMPUTED[gamma.dtype] * 4
    elif case.activation.name == "elu":
        stored = lost = stored * 100  # it inverts z, which a half type rounds
    y = unsqueeze_(wide(coder.decode(coded, gamma.dtype, IDENTITY)), case.activation).requires_grad_()
    (dy,) = torch.autograd.grad(reference_activation(y, case.activation), y, wide(dz))
    shortcut = None if isinstance(added, CodedShortcut) else added
    if isinstance(added, CodedShortcut):
        shortcut = coder.decode(Coded(added.codes, added.ranges, *coded[2:]), case.dtype, added.activation)
    t = y.detach() if shortcut is None else y.detach() - wide(shortcut)
    center, inverse = beta, 1 / gamma
    xhat = (t - per_channel(wide(center), t)) * per_channel(wide(inverse), t)
    arguments = coded, dz, center, inverse, case.activation, added
    want = torch.stack([dy.sum(axes), (dy * xhat).sum(axes)])
    unit = torch.stack([dy.abs().sum(axes), (dy * xhat).abs().sum(axes)]).clamp(min=1)
    yield result_of(case, "sums of codes", coder.coded_sums(*arguments), want, lost, unit)
    factor = gamma * 0.7

    def gradient(means: Tensor) -> Tensor:
        inner = dy - per_channel(means[0], dy) - xhat * per_channel(means[1], dy)
        return per_channel(wide(factor), dy) * inner

    dshortcut = torch.full_like(dz, math.nan) if shortcut is not None else None
    dx, sums = coder.coded_backward(*arguments, factor, dshortcut)
    yield result_of(case, "sums of codes, with dx", sums, want, lost, unit)
    yield result_of(case, "dx of codes", dx, gradient(want / count), stored + lost)
    if dshortcut is not None:
        yield result_of(case, "dshortcut of codes", dshortcut, dy, stored)
    other = torch.linspace(-1, 1, 2 * dz.shape[1], dtype=gamma.dtype).view(2, -1).to(dz.device)
    found = coder.coded_gradient(*arguments, factor, other, None)
    yield result_of(case, "dx of codes and given means", found, gradient(wide(other)), stored + lost)
    yield Result(case, "memory layout of dx", float(not dx.stride() == found.stride() == dz.stride()), 0.0)


def check_degenerate(coder: Coder, device: torch.device | str) -> list[Result]:
    """Constants, ranges far from zero, infinite numbers and nan, in both layouts and numbers of bits."""
    layouts = {"NCHW": torch.contiguous_format, "channels last": torch.channels_last}
    return [
        result for bits, (name, layout) in itertools.product((8, 4), layouts.items())
        for result in degenerate(coder, degenerate_map().to(device).contiguous(memory_format=layout), bits, name)
    ]  # fmt: skip


def degenerate_map() -> Tensor:
    x = torch.randn((2, 8, 9, 8), generator=torch.Generator().manual_seed(0))
    x[:, 0], x[:, 1] = 7.25, 0
    x[:, 2], x[:, 3] = x[:, 2].abs() + 1000, -x[:, 3].abs() - 1000
    x[0, 4, 1, 1], x[0, 5, 2, 2], x[0, 6, 0, 0] = math.inf, math.nan, -math.inf
    x[:, 7] *= 1e-42
    return x


def degenerate(coder: Coder, y: Tensor, bits: int, layout: str) -> Iterator[Result]:
    one, x = torch.ones(8, device=y.device), y.cpu()
    coded = encoded(coder, y, torch.empty_like(y), one, one * 0, IDENTITY, None, bits)
    back = coder.decode(coded, torch.float32, IDENTITY).cpu()
    name = f"degenerate ranges in {bits} bits, {layout}"
    yield Result(name, "constants", float((back[:, :2] - x[:, :2]).abs().max()), 0.0)
    far = x[:, 2:4]
    cell = (far.amax((0, 2, 3)) - far.amin((0, 2, 3))).max() / (2**bits - 1)
    yield Result(name, "far from zero", float((back[:, 2:4] - far).abs().max()), float(cell / 2 * 1.02 + 3e-4))
    broken = slice(None) if bits == 8 else slice(0, 1)  # samples whose ranges hold such a number
    yield Result(name, "infinite or nan", float((~back[broken, 4:7].isnan()).sum()), 0.0)
    yield Result(name, "samples beside them", float((back[1:, 4:7].isfinite() != (bits == 4)).sum()), 0.0)
    yield Result(name, "tiny numbers", float((back[:, 7] - x[:, 7]).abs().max()), 1e-38)


def check_coder(coder: Coder, device: torch.device | str, which: Iterable[CodedCase] | None = None) -> list[Result]:
    """Every check of every case (all of `coded_cases()` by default) by `coder` on a device."""
    results: list[Result] = []
    where = torch.device(device)
    for what in coded_cases() if which is None else which:
        given = inputs(what.case, where)
        *checks, coded = check_codes(coder, what, given)
        assert isinstance(coded, Coded)
        results += [check for check in checks if isinstance(check, Result)]
        results += check_extremes(coder, what, given)
        results += check_known_ranges(coder, what, given)
        results += check_coded_backward(coder, what, given, coded, given.shortcut)
        if given.shortcut is not None:
            results += check_coded_backward(coder, what, given, coded, coded_shortcut(coder, what, given))
    return results
