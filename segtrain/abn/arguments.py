"""Checks of the tensors that belong to a layer's input. Kernels take addresses: nothing after these checks looks again.

`check_arguments` is for what users pass to a layer or function, `contiguous_vectors` for what reaches an operator.
"""

import torch
from torch import Tensor

from segtrain.abn.backends.aten import is_dense, statistics_dtype

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
NAMES = ("weight", "bias", "running_mean", "running_var")


def check_arguments(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None,
    shortcut: Tensor | None, training: bool, overwrite: bool = False,
) -> None:  # fmt: skip
    """ValueError for an x that is not (N, C) or (N, C, *spatial), and for tensors that do not fit it.

    weight, bias and running statistics: (C,), of any floating-point dtype and any stride, on x's device; the running
    statistics both or (in training) neither, and in training no two channels in the same memory. shortcut: x's shape
    and device. overwrite: x will be written to, so it is not the shortcut and has no two elements in the same memory.
    """
    if x.dim() < 2:
        raise ValueError(f"expected an input of shape (N, C) or (N, C, *spatial), found {tuple(x.shape)}")
    dtype, device, channels = x.dtype, x.device, x.shape[1]
    if dtype not in FLOATS:
        raise ValueError(
            f"expected a float32, float64, float16 or bfloat16 input, found {dtype}: convert it with .to()"
        )
    for i, t in enumerate((weight, bias, running_mean, running_var)):
        if t is None:
            continue
        if t.dim() != 1 or t.shape[0] != channels:
            raise ValueError(wrong_length(NAMES[i], t, x))
        if t.dtype != dtype and t.dtype not in FLOATS:
            raise ValueError(f"expected {NAMES[i]} of a floating-point dtype, found {t.dtype}: convert it with .to()")
        if t.device != device:
            raise ValueError(wrong_device(NAMES[i], t, x))
    if (running_mean is None) != (running_var is None):
        missing = "running_mean" if running_mean is None else "running_var"
        raise ValueError(f"expected running_mean and running_var both or neither, found no {missing}: pass it too")
    if not training and running_mean is None:
        raise ValueError("eval mode needs running statistics")
    if training and channels > 1:
        for name, t in (("running_mean", running_mean), ("running_var", running_var)):
            if t is not None and t.stride(0) == 0:
                raise ValueError(f"{name} is updated in training, but its {channels} channels share memory: clone it")
    if shortcut is not None:
        if shortcut.shape != x.shape:
            raise ValueError(f"the shortcut, {tuple(shortcut.shape)}, must match the input, {tuple(x.shape)}, in shape")
        if shortcut.device != device:
            raise ValueError(wrong_device("the shortcut", shortcut, x))
        if shortcut.dtype != dtype and shortcut.dtype not in FLOATS:
            raise ValueError(f"the shortcut, {shortcut.dtype}, must match the input, {dtype}, in dtype")
    if overwrite:
        check_writable(x, shortcut)


def check_writable(x: Tensor, shortcut: Tensor | None) -> None:
    """ValueError where writing over x would also change another element of x, or the shortcut."""
    if shortcut is x:
        raise ValueError("the shortcut is the input, which is overwritten: clone it, or use overwrite=False")
    if not is_dense(x) and any(step == 0 and size > 1 for size, step in zip(x.shape, x.stride(), strict=True)):
        raise ValueError(
            f"the input of shape {tuple(x.shape)} is an expanded view, which cannot be overwritten: clone it, or use "
            "overwrite=False"
        )


def wrong_length(name: str, t: Tensor, x: Tensor) -> str:
    channels = x.shape[1]
    return (
        f"expected {name} of shape ({channels},) for an input of {channels} channels (shape {tuple(x.shape)}), found "
        f"{tuple(t.shape)}: construct the layer with num_features={channels}, or check what its input comes from"
    )


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
