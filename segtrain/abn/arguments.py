"""Checks of the tensors that belong to a layer's input. Kernels take addresses: nothing after these checks looks again.

`check_tensors` is for what users pass to a layer or function, `contiguous_vectors` for what reaches an operator.
"""

import torch
from torch import Tensor

from segtrain.abn.backends.aten import is_dense, statistics_dtype

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
NAMES = ("weight", "bias", "running_mean", "running_var")


def check_tensors(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None,
    shortcut: Tensor | None, training: bool, overwrite: bool = False,
) -> None:  # fmt: skip
    """ValueError for an x that is not (N, C) or (N, C, *spatial), and for tensors that do not fit it.

    weight, bias and running statistics: (C,), of any floating-point dtype and any stride, on x's device; the running
    statistics both or (in training) neither, and in training no two channels in the same memory. shortcut: of x's
    shape and any floating-point dtype, on x's device.
    overwrite: x will be written to, so it is not the shortcut and has no two elements in the same memory.
    """
    if x.dim() < 2:
        raise ValueError(f"expected an input of shape (N, C) or (N, C, *spatial), found {tuple(x.shape)}")
    dtype, device, channels = x.dtype, x.device, x.shape[1]
    if dtype not in FLOATS:
        raise ValueError(
            f"expected a float32, float64, float16 or bfloat16 input, found {dtype}: convert it with .to()"
        )
    for t in (weight, bias, running_mean, running_var):
        # One condition for the usual case: this runs in every call.
        if t is not None and (t.dim() != 1 or t.shape[0] != channels or t.dtype not in FLOATS or t.device != device):
            raise ValueError(misfit(x, weight, bias, running_mean, running_var))
    check_statistics(running_mean, running_var, training)
    if shortcut is not None:
        check_shortcut(x, shortcut)
    if overwrite:
        check_writable(x, shortcut)


def check_statistics(running_mean: Tensor | None, running_var: Tensor | None, training: bool) -> None:
    if running_mean is None or running_var is None:
        if running_mean is not running_var:
            missing = "running_mean" if running_mean is None else "running_var"
            raise ValueError(f"expected running_mean and running_var both or neither, found no {missing}: pass it too")
        if not training:
            raise ValueError("eval mode needs running statistics")
        return
    if training and len(running_mean) > 1 and 0 in (running_mean.stride(0), running_var.stride(0)):
        name = "running_mean" if running_mean.stride(0) == 0 else "running_var"
        raise ValueError(f"{name} is updated in training, but its channels share memory: clone it")


def check_shortcut(x: Tensor, shortcut: Tensor) -> None:
    if shortcut.shape != x.shape:
        raise ValueError(f"the shortcut, {tuple(shortcut.shape)}, must match the input, {tuple(x.shape)}, in shape")
    if shortcut.device != x.device:
        raise ValueError(wrong_device("the shortcut", shortcut, x))
    if shortcut.dtype not in FLOATS:
        raise ValueError(f"the shortcut, {shortcut.dtype}, must match the input, {x.dtype}, in dtype")


def check_writable(x: Tensor, shortcut: Tensor | None) -> None:
    """ValueError where writing over x would also change another element of x, or the shortcut."""
    if shortcut is x:
        raise ValueError("the shortcut is the input, which is overwritten: clone it, or use overwrite=False")
    if not is_dense(x) and any(step == 0 and size > 1 for size, step in zip(x.shape, x.stride(), strict=True)):
        raise ValueError(
            f"the input of shape {tuple(x.shape)} is an expanded view, which cannot be overwritten: clone it, or use "
            "overwrite=False"
        )


def misfit(x: Tensor, *vectors: Tensor | None) -> str:
    """What is wrong with the first of weight, bias, running_mean and running_var that does not fit x."""
    channels = x.shape[1]
    for name, t in zip(NAMES, vectors, strict=True):
        if t is None:
            continue
        if t.shape != (channels,):
            return (
                f"expected {name} of shape ({channels},) for an input of {channels} channels (shape {tuple(x.shape)}), "
                f"found {tuple(t.shape)}: construct the layer with num_features={channels}, or check its input"
            )
        if t.dtype not in FLOATS:
            return f"expected {name} of a floating-point dtype, found {t.dtype}: convert it with .to()"
        if t.device != x.device:
            return wrong_device(name, t, x)
    raise AssertionError("all vectors fit")


def wrong_device(name: str, t: Tensor, x: Tensor) -> str:
    return f"expected {name} on the input's device, {x.device}, found {t.device}: move one of them with .to()"


def check_reference_dtypes(x: Tensor, *vectors: Tensor | None) -> None:
    """ValueError for dtypes that torch's batch norm does not combine on the CPU; other devices decide themselves."""
    if x.device.type != "cpu":
        return
    found = {t.dtype for t in vectors if t is not None}
    if len(found) > 1 or not found <= {x.dtype, statistics_dtype(x)}:
        raise ValueError(
            f"expected weight, bias and running statistics all of the input's dtype, {x.dtype}, or all "
            f"{statistics_dtype(x)}, found {', '.join(sorted(map(str, found)))}: convert one of them with .to()"
        )


def contiguous_vectors(x: Tensor, *vectors: Tensor | None, rows: int | None = None) -> list[Tensor | None]:
    """The vectors, contiguous. ValueError unless each is (C,), or (rows, C), in x's statistics dtype on x's device."""
    shape = (x.shape[1],) if rows is None else (rows, x.shape[1])
    dtype, device = statistics_dtype(x), x.device
    found: list[Tensor | None] = []
    for v in vectors:
        if v is not None:
            if v.shape != shape:
                raise ValueError(f"expected per-channel values {shape} for {tuple(x.shape)}, found {tuple(v.shape)}")
            if v.dtype != dtype or v.device != device:
                raise ValueError(f"expected per-channel values in {dtype} on {device}, found {v.dtype} on {v.device}")
            v = v.contiguous()
        found.append(v)
    return found
