"""Results of operations on fake tensors, made again without torch's dispatch.

A traced step is thousands of operations of a few hundred kinds. torch remembers their results too, but what it asks of
each argument, which may be any kind of tensor, takes half the time of a trace. Here arguments are plain dense tensors,
and whatever is not is left to torch.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

PLAIN = {int, float, bool, str, type(None), torch.dtype, torch.layout, torch.memory_format, torch.device}
KNOWN: dict[Any, "tuple[type[Any] | None, list[Result]] | None"] = {}  # key -> the results; None: ask torch
UNSEEN: Any = object()


class Unknown(Exception):
    """Arguments or results that are not plain dense tensors."""


class Result(NamedTuple):
    """One result: argument number `tensor` itself, a view of it, or, without one, a new tensor."""

    tensor: int | None
    view: tuple[Any, ...] | None  # size, stride, dtype, offset, device

    def make(self, tensors: list[FakeTensor]) -> Tensor:
        if self.view is None:
            assert self.tensor is not None
            return tensors[self.tensor]
        size, stride, dtype, offset, device = self.view
        with torch._C._DisableTorchDispatch():
            if self.tensor is None:
                made = torch.empty_strided(size, stride, dtype=dtype, device="meta")
            else:
                made = torch.empty(0, dtype=dtype, device="meta")
                made.set_(tensors[self.tensor].untyped_storage(), offset, size, stride)
        return FakeTensor(tensors[0].fake_mode, made, device)


def remembered(func: Any, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """The results of call(*args, **kwargs), which gives those of the operator `func` on fake tensors."""
    tensors: list[FakeTensor] = []
    try:
        key = func, keys_of(args, tensors), *[(name, key_of(value, tensors)) for name, value in kwargs.items()]
    except Unknown:
        return call(*args, **kwargs)
    known = KNOWN.get(key, UNSEEN) if tensors else None
    if known is UNSEEN:
        results = call(*args, **kwargs)
        KNOWN[key] = ways_to_make(results, tensors, key, (args, kwargs))
        return results
    if known is None:
        return call(*args, **kwargs)
    kind, made = known
    if kind is None:
        return made[0].make(tensors)
    return kind([one.make(tensors) for one in made])


def keys_of(values: Any, tensors: list[FakeTensor]) -> tuple[Any, ...]:
    return tuple([key_of(value, tensors) for value in values])


def key_of(value: Any, tensors: list[FakeTensor]) -> Any:
    """What the results depend on; adds the tensors inside, in their order."""
    kind = type(value)
    if kind in PLAIN:
        return kind, value  # 1, 1.0 and True are equal
    if kind is list or kind is tuple:
        return keys_of(value, tensors)
    if not isinstance(value, FakeTensor) or value.constant is not None:
        raise Unknown
    tensors.append(value)
    return value.shape, value.stride(), value.dtype, value.storage_offset(), value.fake_device


def ways_to_make(
    results: Any, tensors: list[FakeTensor], key: tuple[Any, ...], given: tuple[Any, Any]
) -> tuple[type[Any] | None, list[Result]] | None:
    """How to make the results again; None where that is not certain, or where an argument's shape was changed."""
    storages = [t.untyped_storage()._cdata for t in tensors]
    args, kwargs = given
    again = key[0], keys_of(args, []), *[(name, key_of(value, [])) for name, value in kwargs.items()]
    if len(set(storages)) < len(storages) or again != key:
        return None
    kind = type(results) if isinstance(results, list | tuple) else None
    try:
        return kind, [way_to_make(one, tensors, storages) for one in (results if kind else [results])]
    except Unknown:
        return None


def way_to_make(one: Any, tensors: list[FakeTensor], storages: list[int]) -> Result:
    if type(one) is not FakeTensor or one.constant is not None or one.dtype.is_complex:
        raise Unknown
    if not all(type(n) is int for n in (*one.shape, *one.stride())):
        raise Unknown
    storage = one.untyped_storage()
    place = storages.index(storage._cdata) if storage._cdata in storages else None
    if place is not None and one is tensors[place]:
        return Result(place, None)
    extent = 1 + sum((n - 1) * step for n, step in zip(one.shape, one.stride(), strict=True)) if one.numel() else 0
    if place is None and (one.storage_offset() or storage.nbytes() != extent * one.element_size()):
        raise Unknown
    return Result(place, (one.shape, one.stride(), one.dtype, one.storage_offset(), one.fake_device))
