"""Checks of options, tensors and aliasing, before any kernel: kernels take addresses and check nothing.

`check_tensors` checks what users pass to a layer or function, `contiguous_vectors` what reaches an operator.
"""

import sys

import torch
import torch.utils.checkpoint
from torch import Tensor

from segtrain.abn.backends.aten import CODES, Activation, is_dense, statistics_dtype

INVERTIBLE = CODES
ACTIVATIONS = (*INVERTIBLE, "relu")
VARIANTS = ("one", "two")
SCALES = ("abs", "signed")
KEEPS = ("exact", "8bit", "4bit")
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
NAMES = ("weight", "bias", "running_mean", "running_var")


def invertible(activation: str, param: float) -> Activation:
    """The activation of an in-place layer. ValueError if its input cannot be computed from its output."""
    if activation not in INVERTIBLE:
        advice = "; use leaky_relu with a small slope, or ABN, which keeps its input" if activation == "relu" else ""
        raise ValueError(
            f"In-Place ABN needs an invertible activation ({', '.join(INVERTIBLE)}), not {activation!r}{advice}"
        )
    if activation != "identity" and not param > 0:
        name = "negative slope" if activation == "leaky_relu" else "alpha"
        raise ValueError(f"In-Place ABN inverts {activation}: its {name} must be greater than 0, not {param}")
    return Activation(activation, param)


def one_of(name: str, value: str, known: tuple[str, ...]) -> str:
    """The value of the option `name`. ValueError, listing the known values, for any other."""
    if value not in known:
        raise ValueError(f"unknown {name} {value!r}: choose {', '.join(known)}")
    return value


def check_tensors(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None,
    shortcut: Tensor | None, training: bool, overwrite: bool = False,
) -> None:  # fmt: skip
    """ValueError for an x that is not (N, C) or (N, C, *spatial), and for tensors that do not fit it.

    weight, bias and running statistics: (C,), of any floating-point dtype and any stride, on x's device; the running
    statistics both or (in training) neither, and in training no two channels in the same memory. shortcut: of x's shape
    and device. overwrite: x will be written to, so it is not the shortcut and has no two elements in the same memory.
    """
    if x.dim() < 2:
        raise ValueError(f"expected an input of shape (N, C) or (N, C, *spatial), found {tuple(x.shape)}")
    if x.dtype not in FLOATS:
        raise ValueError(
            f"expected a float32, float64, float16 or bfloat16 input, found {x.dtype}: convert it with .to()"
        )
    check_vectors(x, weight, bias, running_mean, running_var)
    check_running_statistics(running_mean, running_var, training)
    if shortcut is not None:
        check_shortcut(x, shortcut)
    if overwrite:
        check_writable(x, shortcut)


def check_vectors(x: Tensor, *vectors: Tensor | None) -> None:
    """ValueError unless each of the vectors NAMES that is given is (C,), of a floating-point dtype, on x's device."""
    dtype, device, channels = x.dtype, x.device, x.shape[1]
    for i, t in enumerate(vectors):
        if t is None:
            continue
        if t.dim() != 1 or t.shape[0] != channels:
            raise ValueError(wrong_length(NAMES[i], t, x))
        if t.dtype != dtype and t.dtype not in FLOATS:
            raise ValueError(f"expected {NAMES[i]} of a floating-point dtype, found {t.dtype}: convert it with .to()")
        if t.device != device:
            raise ValueError(wrong_device(NAMES[i], t, x))


def check_running_statistics(mean: Tensor | None, var: Tensor | None, training: bool) -> None:
    """ValueError for one without the other, for none in eval mode, and for channels that share memory in training."""
    if (mean is None) != (var is None):
        missing = "running_mean" if mean is None else "running_var"
        raise ValueError(f"expected running_mean and running_var both or neither, found no {missing}: pass it too")
    if not training and mean is None:
        raise ValueError("eval mode needs running statistics")
    if not training:
        return
    for name, t in (("running_mean", mean), ("running_var", var)):
        if t is not None and t.shape[0] > 1 and t.stride(0) == 0:
            raise ValueError(f"{name} is updated in training, but its {t.shape[0]} channels share memory: clone it")


def check_shortcut(x: Tensor, shortcut: Tensor) -> None:
    """ValueError unless the shortcut has x's shape and device, and a floating-point dtype."""
    if shortcut.shape != x.shape:
        raise ValueError(f"the shortcut, {tuple(shortcut.shape)}, must match the input, {tuple(x.shape)}, in shape")
    if shortcut.device != x.device:
        raise ValueError(wrong_device("the shortcut", shortcut, x))
    if shortcut.dtype != x.dtype and shortcut.dtype not in FLOATS:
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
            v = (v.resolve_neg() if v.is_neg() else v).contiguous()
        found.append(v)
    return found


def check_input(x: Tensor, training: bool, synchronised: bool = False) -> None:
    """ValueError for an input, (N, C) or (N, C, *spatial), that has no statistics, which training needs.

    With synchronised statistics this process may have no value or one per channel: other processes' values count too.
    """
    if synchronised or not training:
        return
    if x.numel() == 0:
        raise ValueError(f"the input of shape {tuple(x.shape)} is empty: nothing to normalise")
    if x.numel() == x.shape[1]:
        raise ValueError(
            f"expected more than one value per channel in training, found shape {tuple(x.shape)}: "
            "use a larger batch, or eval mode to freeze the statistics"
        )


def recomputing() -> bool:
    """Whether this forward runs inside a backward pass, like the second forward of torch.utils.checkpoint."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


checkpoint_file = torch.utils.checkpoint.__file__
OVERWRITES = (
    "an In-Place ABN layer is about to overwrite a tensor that is still needed: {}. "
    "Give the first layer of a block overwrite=False: it writes elsewhere and keeps as little"
)


def check_overwritten(x: Tensor) -> None:
    """RuntimeError if x is known to be needed later: another in-place layer's output, or a checkpointed input.

    Autograd detects other cases only in backward, with a message that does not name the cause.
    """
    if torch.compiler.is_compiling():
        return
    if is_checkpointed(x):
        raise RuntimeError(OVERWRITES.format("the input of a block under torch.utils.checkpoint, which is run again"))
    if hasattr(x, "_segtrain_kept") and torch.is_grad_enabled() and x.requires_grad:
        raise RuntimeError(OVERWRITES.format("the output of the In-Place ABN layer before it"))


def is_checkpointed(x: Tensor) -> bool:
    """Whether x is an argument of a torch.utils.checkpoint call in progress."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code.co_filename == checkpoint_file and any(x is value for value in frame.f_locals.get("args", ())):
            return True
    return False
