"""What would make the host wait for a device: every read of a tensor's numbers, and every copy of numbers to it."""

import traceback

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# Functions of Python that read a tensor, or make one of numbers that are then copied to its device.
FUNCTIONS = {
    "item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "__complex__", "nonzero",
    "argwhere", "unique", "unique_consecutive", "masked_select", "is_nonzero", "equal", "allclose", "bincount",
    "tensor", "as_tensor", "from_numpy", "new_tensor",
}  # fmt: skip
OPERATORS = {
    "aten::_local_scalar_dense", "aten::nonzero", "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive",
    "aten::masked_select", "aten::is_nonzero", "aten::equal", "aten::bincount", "aten::lift_fresh",
    "aten::repeat_interleave.Tensor",
}  # fmt: skip
INDEXING = {"aten::index.Tensor", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_"}


CONSTANT, COUNT = "device.py kept_constant", "losses/tiles.py labelled_pixels"


def where() -> str:
    """The innermost function of segtrain that is running; CONSTANT for what is made once, by device.kept_constant."""
    frames = [frame for frame in traceback.extract_stack() if "/segtrain/" in frame.filename]
    if any(frame.name == "kept_constant" for frame in frames):
        return CONSTANT
    return f"{frames[-1].filename.rpartition('/segtrain/')[2]} {frames[-1].name}" if frames else "?"


class Calls(TorchFunctionMode):
    """Lists the calls from Python, [(name, where)]."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in FUNCTIONS or (name == "to" and "cpu" in args[1:]):
            self.found.append((name, where()))
        return func(*args, **(kwargs or {}))


class Operators(TorchDispatchMode):
    """Lists the operators below torch's functions, [(name, where)]."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        masks = name in INDEXING and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        if name in OPERATORS or masks:
            self.found.append((name, where()))
        return func(*args, **(kwargs or {}))


def waits_of(function):
    """[(name, where)] of everything that would wait while function() runs, with torch's dispatch watched and not.

    Without the counts that a loss takes of its labels on the host, and the constants that are made anew for who
    watches dispatch.
    """
    calls = Calls()
    with calls:
        function()
    under, operators = Calls(), Operators()
    with operators, under:
        function()
    watched = [(name, place) for name, place in (*under.found, *operators.found) if place != CONSTANT]
    return [(name, place) for name, place in (*calls.found, *watched) if place != COUNT]
