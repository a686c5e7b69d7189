"""The primitives as torch operators (`torch.ops.segtrain_abn.*`), and which back end runs them.

Operators are what torch.compile, fake tensors and torch.library.opcheck see. Each brings its tensors into one dense
memory layout and passes them to the back end chosen for their device; backends/aten.py describes every argument.
They define no gradients: the autograd functions do. In ordinary eager calls, `primitives` leaves torch's dispatcher
out, which costs more time than the functions themselves do on the host.
"""

import os
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from segtrain.abn.backends import aten as aten_ops
from segtrain.abn.backends import cupy as cupy_ops
from segtrain.abn.backends import native as native_ops
from segtrain.abn.backends.aten import CODES, LAYOUTS, Activation, is_dense, statistics_dtype
from segtrain.abn.checks import contiguous_vectors

BACKENDS: dict[str, ModuleType] = {"cupy": cupy_ops, "native": native_ops, "aten": aten_ops}
DEVICES = {"cupy": "cuda", "native": "cpu"}  # the device that a back end is for; aten runs on all
chosen = os.environ.get("SEGTRAIN_ABN_BACKEND", "auto")
resolved: dict[str, ModuleType] = {}


def use_backend(name: str) -> None:
    """Choose the back end of all layers: auto | cupy | native | aten.

    auto is cupy on CUDA and native on the CPU where they can run, else aten. RuntimeError, with the reason, if the back
    end cannot run here.
    """
    global chosen
    if name not in ("auto", *BACKENDS):
        raise ValueError(f"unknown back end {name!r}: choose auto, {', '.join(BACKENDS)}")
    reason = "" if name in ("auto", "aten") else BACKENDS[name].available()
    if reason:
        raise RuntimeError(f"the back end {name} cannot run here: {reason}")
    chosen = name
    resolved.clear()


def describe_backend(device: str) -> str:
    """One phrase: the back end for tensors on this kind of device ('cpu', 'cuda'), and why a faster one cannot run."""
    name = resolve(device).__name__.rpartition(".")[2]
    if chosen != "auto":
        return f"{name}, as chosen"
    faster = next((other for other, kind in DEVICES.items() if kind == device and other != name), None)
    return name if faster is None else f"{name} ({faster} cannot run: {BACKENDS[faster].available()})"


def resolve(device: str) -> ModuleType:
    """The back end for tensors on this kind of device."""
    if device not in resolved:
        best: ModuleType = aten_ops
        for name, kind in DEVICES.items():
            if kind == device and chosen in ("auto", name) and not BACKENDS[name].available():
                best = BACKENDS[name]
        resolved[device] = best
    return resolved[device]


def backend_for(x: Tensor) -> ModuleType:
    """The back end for x: aten for a dtype that the faster one does not support, such as float64 on CUDA."""
    ops = resolve(x.device.type)
    return ops if ops is aten_ops or x.dtype in ops.DTYPES else aten_ops


# ------------------------------------------------------------------------------------------------- memory layouts


def dense(x: Tensor) -> Tensor:
    """x itself if its memory is NC... or channels last without gaps, and holds its values, else a contiguous copy."""
    x = x.resolve_neg() if x.is_neg() else x  # an imaginary part may be stored with the other sign
    return x if is_dense(x) else x.contiguous()


def as_laid_out(x: Tensor, model: Tensor) -> Tensor:
    """x, or a copy, in the memory layout of `model`, which is dense. ValueError if shape, dtype or device differ."""
    if x.shape != model.shape or x.dtype != model.dtype or x.device != model.device:
        raise ValueError(
            f"expected a tensor like the input, {tuple(model.shape)} {model.dtype} on {model.device}, found "
            f"{tuple(x.shape)} {x.dtype} on {x.device}"
        )
    x = x.resolve_neg() if x.is_neg() else x
    if x.is_contiguous() and model.is_contiguous():
        return x
    channels_last = LAYOUTS.get(model.dim())
    if channels_last is not None and all(t.is_contiguous(memory_format=channels_last) for t in (x, model)):
        return x
    return torch.empty_like(model).copy_(x)


def affine_pair(scale: Tensor | None, shift: Tensor | None) -> tuple[Tensor, Tensor] | None:
    return None if scale is None or shift is None else (scale, shift)


# ------------------------------------------------------------------------------------------------------ operators

library = torch.library.Library("segtrain_abn", "DEF")
PLAIN = (Tensor, torch.nn.Parameter)
direct = SimpleNamespace()  # the same functions by name, without torch's dispatcher


FAKES: dict[Any, Callable[..., Any]] = {}  # operator -> the function that gives the shapes of its results


def operator(schema: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Define the decorated function as an operator for every device; `fake` gives the shapes of its results."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        name = schema.partition("(")[0]
        library.define(schema, tags=torch.Tag.pt2_compliant_tag)
        library.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"segtrain_abn::{name}", fake, lib=library)
        FAKES[getattr(torch.ops.segtrain_abn, name).default] = fake
        setattr(direct, name, function)
        return function

    return register


def primitives(x: Tensor) -> Any:
    """What has the operators as functions: torch's own where something traces x or watches its dispatch, else `direct`.

    Traced: torch.compile, torch.export, torch.jit.trace, tensors of subclasses (fake, functional) or without memory,
    dispatch modes.
    """
    if (
        torch.compiler.is_compiling()
        or type(x) not in PLAIN
        or x.is_meta
        or torch._C._len_torch_dispatch_stack()
        or torch._C._get_tracing_state() is not None
    ):
        return torch.ops.segtrain_abn
    return direct


def vector(x: Tensor, rows: int | None = None) -> Tensor:
    """Uninitialised (C,) or (rows, C) in x's statistics dtype."""
    shape = (x.shape[1],) if rows is None else (rows, x.shape[1])
    return x.new_empty(shape, dtype=statistics_dtype(x))


def like(x: Tensor) -> Tensor:
    """Uninitialised, of x's shape, and dense."""
    return torch.empty_like(x) if is_dense(x) else torch.empty_like(x, memory_format=torch.contiguous_format)


FORWARD = (
    "Tensor gamma, Tensor beta, Tensor(b!)? running_mean, Tensor(c!)? running_var, float momentum, float eps, "
    "int act, float param, Tensor? shortcut)"
)


def fused_forward(x, out, gamma, beta, running_mean, running_var, momentum, eps, act, param, shortcut):  # type: ignore[no-untyped-def]
    """Normalise and activate x, which is dense, into out, which may be x. Updates the running statistics.

    Returns (mean, rstd).
    """
    if x.numel() == 0 or (running_mean is None) != (running_var is None):
        raise ValueError("expected an input that is not empty, and both running statistics or neither of them")
    shortcut = None if shortcut is None else as_laid_out(shortcut, x)
    gamma, beta, mean, var = contiguous_vectors(x, gamma, beta, running_mean, running_var)
    activation = Activation(CODES[act], param)
    found = backend_for(x).forward(x, out, gamma, beta, mean, var, momentum, eps, activation, shortcut)
    for updated, given in ((mean, running_mean), (var, running_var)):
        if updated is not given:
            given.copy_(updated)
    return found


@operator(f"forward(Tensor x, {FORWARD} -> (Tensor, Tensor, Tensor)", lambda x, *_: (like(x), vector(x), vector(x)))
def forward(x, gamma, beta, running_mean, running_var, momentum, eps, act, param, shortcut):  # type: ignore[no-untyped-def]
    """(z, mean, rstd), z a new tensor."""
    x = dense(x)
    out = torch.empty_like(x)
    found = fused_forward(x, out, gamma, beta, running_mean, running_var, momentum, eps, act, param, shortcut)
    return out, *found


@operator(f"forward_(Tensor(a!) x, {FORWARD} -> (Tensor, Tensor)", lambda x, *_: (vector(x), vector(x)))
def forward_(x, gamma, beta, running_mean, running_var, momentum, eps, act, param, shortcut):  # type: ignore[no-untyped-def]
    """(mean, rstd); z is written over x."""
    source = dense(x)
    found = fused_forward(source, source, gamma, beta, running_mean, running_var, momentum, eps, act, param, shortcut)
    if source is not x:
        x.copy_(source)
    return found


@operator("statistics(Tensor x) -> Tensor", lambda x: vector(x, 2))
def statistics(x):  # type: ignore[no-untyped-def]
    return backend_for(x).statistics(dense(x))


NORMALISE = "Tensor scale, Tensor shift, int act, float param, Tensor? shortcut)"


@operator(f"normalise(Tensor x, {NORMALISE} -> Tensor", lambda x, *_: like(x))
def normalise(x, scale, shift, act, param, shortcut):  # type: ignore[no-untyped-def]
    x = dense(x)
    out = torch.empty_like(x)
    shortcut = None if shortcut is None else as_laid_out(shortcut, x)
    scale, shift = contiguous_vectors(x, scale, shift)
    backend_for(x).normalise(x, out, scale, shift, Activation(CODES[act], param), shortcut)
    return out


@operator(f"normalise_(Tensor(a!) x, {NORMALISE} -> ()", lambda x, *_: None)
def normalise_(x, scale, shift, act, param, shortcut):  # type: ignore[no-untyped-def]
    source = dense(x)
    shortcut = None if shortcut is None else as_laid_out(shortcut, source)
    scale, shift = contiguous_vectors(x, scale, shift)
    backend_for(x).normalise(source, source, scale, shift, Activation(CODES[act], param), shortcut)
    if source is not x:
        x.copy_(source)


BACKWARD = (
    "Tensor kept, Tensor dz, Tensor center, Tensor inverse, int act, float param, "
    "Tensor? shortcut, Tensor? scale, Tensor? shift"
)


def together(kept: Tensor, dz: Tensor, shortcut: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The tensors in kept's memory layout, and dz in kept's dtype: a custom gradient may come in another."""
    kept = dense(kept)
    dz = dz if dz.dtype == kept.dtype else dz.to(kept.dtype)
    return kept, as_laid_out(dz, kept), None if shortcut is None else as_laid_out(shortcut, kept)


def shortcut_buffer(kept: Tensor, wanted: bool) -> Tensor:
    """Room for the shortcut's gradient, or an empty tensor that stands for none."""
    return like(kept) if wanted else kept.new_empty(0)


@operator(f"sums({BACKWARD}) -> Tensor", lambda kept, *_: vector(kept, 2))
def sums(kept, dz, center, inverse, act, param, shortcut, scale, shift):  # type: ignore[no-untyped-def]
    kept, dz, shortcut = together(kept, dz, shortcut)
    center, inverse, scale, shift = contiguous_vectors(kept, center, inverse, scale, shift)
    return backend_for(kept).sums(
        kept, dz, center, inverse, Activation(CODES[act], param), shortcut, affine_pair(scale, shift)
    )


@operator(
    f"gradient({BACKWARD}, Tensor factor, Tensor means, bool want_dshortcut) -> (Tensor, Tensor)",
    lambda kept, *rest: (like(kept), shortcut_buffer(kept, rest[-1])),
)
def gradient(kept, dz, center, inverse, act, param, shortcut, scale, shift, factor, means, want_dshortcut):  # type: ignore[no-untyped-def]
    """(dx, dshortcut or an empty tensor)"""
    kept, dz, shortcut = together(kept, dz, shortcut)
    center, inverse, scale, shift, factor = contiguous_vectors(kept, center, inverse, scale, shift, factor)
    (means,) = contiguous_vectors(kept, means, rows=2)
    dshortcut = shortcut_buffer(kept, want_dshortcut)
    dx = backend_for(kept).gradient(
        kept, dz, center, inverse, Activation(CODES[act], param), shortcut, affine_pair(scale, shift), factor, means,
        dshortcut if want_dshortcut else None,
    )  # fmt: skip
    return dx, dshortcut


@operator(
    f"backward({BACKWARD}, Tensor factor, bool want_dshortcut) -> (Tensor, Tensor, Tensor)",
    lambda kept, *rest: (like(kept), vector(kept, 2), shortcut_buffer(kept, rest[-1])),
)
def backward(kept, dz, center, inverse, act, param, shortcut, scale, shift, factor, want_dshortcut):  # type: ignore[no-untyped-def]
    """(dx, sums, dshortcut or an empty tensor)"""
    kept, dz, shortcut = together(kept, dz, shortcut)
    center, inverse, scale, shift, factor = contiguous_vectors(kept, center, inverse, scale, shift, factor)
    dshortcut = shortcut_buffer(kept, want_dshortcut)
    dx, found = backend_for(kept).backward(
        kept, dz, center, inverse, Activation(CODES[act], param), shortcut, affine_pair(scale, shift), factor,
        dshortcut if want_dshortcut else None,
    )  # fmt: skip
    return dx, found, dshortcut
