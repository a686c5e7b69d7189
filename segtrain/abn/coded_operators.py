"""The functions of coded maps as torch operators, beside those of operators.py; see backends/codes.py."""

from collections.abc import Sequence
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor

from segtrain.abn.backends import codes as coding
from segtrain.abn.backends import cupy as cupy_ops
from segtrain.abn.backends import cupy_codes
from segtrain.abn.backends.aten import CODES, Activation, statistics_dtype
from segtrain.abn.backends.codes import Coded
from segtrain.abn.checks import contiguous_vectors
from segtrain.abn.operators import (
    as_laid_out,
    backend_for,
    dense,
    library,
    like,
    operator,
    resolve,
    shortcut_buffer,
    vector,
)

__all__ = ["library"]


# Where a back end's functions of codes.py are, if not among its primitives.
CODERS: dict[ModuleType, ModuleType] = {cupy_ops: cupy_codes}


def coder_of(ops: ModuleType) -> ModuleType | coding.Composed:
    """The functions of codes.py: the back end's own, or composed of its primitives."""
    own = CODERS.get(ops, ops)
    return own if hasattr(own, "encode") else coding.Composed(ops)


def coder_for(x: Tensor) -> ModuleType | coding.Composed:
    """The functions of codes.py for tensors like x."""
    return coder_of(backend_for(x))


def finds_extremes(x: Tensor) -> bool:
    """Whether the extremes of x come with its statistics, without a pass of their own."""
    return hasattr(coder_for(x), "statistics_extremes")


def describe_coder(device: str) -> str:
    """One phrase: what codes the maps on this kind of device ('cpu', 'cuda')."""
    ops = resolve(device)
    composed = isinstance(coder_of(ops), coding.Composed)
    return "torch's operations" if composed else f"{ops.__name__.rpartition('.')[2]} kernels"


def extremes_like(x: Tensor, bits: int) -> Tensor:
    return x.new_empty((2, coding.ranged_samples(x, bits), x.shape[1]), dtype=statistics_dtype(x))


@operator(
    "statistics_extremes(Tensor x, int bits) -> (Tensor, Tensor)",
    lambda x, bits: (vector(x, 2), extremes_like(x, bits)),
)
def statistics_extremes(x, bits):  # type: ignore[no-untyped-def]
    """(`statistics`, the smallest and the largest value of each range: (2, 1 or N, C))"""
    x = dense(x)
    coder = coder_for(x)
    if isinstance(coder, ModuleType) and finds_extremes(x):
        return coder.statistics_extremes(x, bits)
    return backend_for(x).statistics(x), coding.extremes_of(x, bits)


# shortcut_ranges: in its own layer's codes of as many bits, made by that activation; None if it is not coded.
ENCODE = (
    "Tensor scale, Tensor shift, int act, float param, Tensor? shortcut, int bits, Tensor? extremes=None, "
    "Tensor? shortcut_ranges=None, int shortcut_act=0, float shortcut_param=0)"
)


def encode_into(  # type: ignore[no-untyped-def]
    x, out, scale, shift, act, param, shortcut, bits, extremes, shortcut_ranges, shortcut_act, shortcut_param
):
    """(codes, ranges); x and out are dense, and may be one tensor."""
    if shortcut is None and shortcut_ranges is not None:
        raise ValueError("there are ranges of a shortcut, but no shortcut")
    if None not in (shortcut, extremes) and shortcut_ranges is None:
        raise ValueError("with a shortcut, the extremes of x need the ranges of the shortcut")
    shortcut = None if shortcut is None else as_laid_out(shortcut, x)
    scale, shift = contiguous_vectors(x, scale, shift)
    codes, ranges = coding.empty_codes(x, bits)
    activation = Activation(CODES[act], param)
    known = None
    if shortcut_ranges is not None:
        known = coding.KnownRanges(shortcut_ranges, Activation(CODES[shortcut_act], shortcut_param))
        if shortcut_ranges.shape != ranges.shape or shortcut_ranges.dtype != ranges.dtype:
            raise ValueError(f"expected ranges {list(ranges.shape)} of the shortcut, not {list(shortcut_ranges.shape)}")
    coder_for(x).encode(x, out, codes, ranges, scale, shift, activation, shortcut, bits, extremes, known)
    return codes, ranges


@operator(
    f"encode(Tensor x, {ENCODE} -> (Tensor, Tensor, Tensor)", lambda x, *a: (like(x), *coding.empty_codes(x, a[5]))
)
def encode(  # type: ignore[no-untyped-def]
    x, scale, shift, act, param, shortcut, bits, extremes=None, shortcut_ranges=None, shortcut_act=0, shortcut_param=0.0
):
    """(z, codes, ranges), z a new tensor. extremes: of x, as `statistics_extremes` gives them."""
    x = dense(x)
    out, known = torch.empty_like(x), (shortcut_ranges, shortcut_act, shortcut_param)
    return out, *encode_into(x, out, scale, shift, act, param, shortcut, bits, extremes, *known)


@operator(f"encode_(Tensor(a!) x, {ENCODE} -> (Tensor, Tensor)", lambda x, *a: coding.empty_codes(x, a[5]))
def encode_(  # type: ignore[no-untyped-def]
    x, scale, shift, act, param, shortcut, bits, extremes=None, shortcut_ranges=None, shortcut_act=0, shortcut_param=0.0
):
    """(codes, ranges); z is written over x, which is dense."""
    known = shortcut_ranges, shortcut_act, shortcut_param
    return encode_into(x, x, scale, shift, act, param, shortcut, bits, extremes, *known)


CODED = "Tensor codes, Tensor ranges, int bits, SymInt[] size, SymInt[] stride"


@operator(
    f"decode({CODED}, ScalarType dtype, int act, float param) -> Tensor",
    lambda codes, ranges, bits, size, stride, dtype, *_: codes.new_empty_strided(size, stride, dtype=dtype),
)
def decode(codes, ranges, bits, size, stride, dtype, act, param):  # type: ignore[no-untyped-def]
    model = codes.new_empty(0, dtype=dtype)
    return coder_for(model).decode(Coded(codes, ranges, bits, size, stride), dtype, Activation(CODES[act], param))


# shortcut: a map; or, where its ranges are given, the codes of one, with the activation that made it.
BACKWARD = (
    f"{CODED}, Tensor dz, Tensor center, Tensor inverse, int act, float param, Tensor? shortcut, "
    "Tensor? shortcut_ranges, int shortcut_act, float shortcut_param"
)


def laid_out(x: Tensor, size: Sequence[int], stride: Sequence[int]) -> Tensor:
    """x, or a copy of it with these strides."""
    if list(x.stride()) == list(stride):
        return x
    return torch.empty_strided(size, stride, dtype=x.dtype, device=x.device).copy_(x)


def prepared(codes, ranges, bits, size, stride, dz, center, inverse, act, param, *added):  # type: ignore[no-untyped-def]
    """The first arguments of the functions of codes.py that run backward. added: the last four of BACKWARD."""
    dz, (shortcut, shortcut_ranges, shortcut_act, shortcut_param) = laid_out(dz, size, stride), added
    if shortcut_ranges is not None:
        shortcut = coding.CodedShortcut(shortcut, shortcut_ranges, Activation(CODES[shortcut_act], shortcut_param))
    elif shortcut is not None:
        shortcut = laid_out(shortcut, size, stride)
    coded = Coded(codes, ranges, bits, size, stride)
    return coded, dz, *contiguous_vectors(dz, center, inverse), Activation(CODES[act], param), shortcut


@operator(f"coded_sums({BACKWARD}) -> Tensor", lambda *a: vector(a[5], 2))
def coded_sums(*arguments):  # type: ignore[no-untyped-def]
    given = prepared(*arguments)
    return coder_for(given[1]).coded_sums(*given)


@operator(
    f"coded_gradient({BACKWARD}, Tensor factor, Tensor means, bool want_dshortcut) -> (Tensor, Tensor)",
    lambda *a: (a[5].new_empty_strided(a[3], a[4]), shortcut_buffer(a[5], a[-1])),
)
def coded_gradient(*arguments):  # type: ignore[no-untyped-def]
    """(dx, dshortcut or an empty tensor)"""
    *first, factor, means, want_dshortcut = arguments
    given = prepared(*first)
    dz, coder = given[1], cast(Any, coder_for(given[1]))
    (factor,), (means,) = contiguous_vectors(dz, factor), contiguous_vectors(dz, means, rows=2)
    dshortcut = shortcut_buffer(dz, want_dshortcut)
    dx = coder.coded_gradient(*given, factor, means, dshortcut if want_dshortcut else None)
    return dx, dshortcut


@operator(
    f"coded_backward({BACKWARD}, Tensor factor, bool want_dshortcut) -> (Tensor, Tensor, Tensor)",
    lambda *a: (a[5].new_empty_strided(a[3], a[4]), vector(a[5], 2), shortcut_buffer(a[5], a[-1])),
)
def coded_backward(*arguments):  # type: ignore[no-untyped-def]
    """(dx, sums, dshortcut or an empty tensor)"""
    *first, factor, want_dshortcut = arguments
    given = prepared(*first)
    dz, coder = given[1], cast(Any, coder_for(given[1]))
    (factor,) = contiguous_vectors(dz, factor)
    dshortcut = shortcut_buffer(dz, want_dshortcut)
    dx, found = coder.coded_backward(*given, factor, dshortcut if want_dshortcut else None)
    return dx, found, dshortcut
