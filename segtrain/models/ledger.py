"""Follow every allocation of a step on fake tensors: what is alive when, and whose it is."""

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from segtrain.abn.operators import FAKES
from segtrain.models.remembered import remembered

GRANULE = 512  # bytes to which CUDA's caching allocator rounds up
OUTSIDE = "outside"  # of every module: losses, the optimizer


class Block(NamedTuple):
    """One allocation. module: the one that ran when it was made; shape: of the tensor that it was made for."""

    size: int
    module: str
    dtype: str
    shape: tuple[int, ...]


def rounded(size: int, granule: int = GRANULE) -> int:
    return -(-size // granule) * granule


def bytes_of(tensors: Iterable[Tensor], granule: int = GRANULE) -> int:
    """Bytes of tensors, those that share memory once."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(rounded(size, granule) for size in storages.values())


class Ledger(TorchDispatchMode):
    """The allocations and frees inside, in their order, divided into named phases.

    A tensor's memory counts once, from the operation that makes it until the last tensor on it is gone. granule: bytes
    that every allocation is rounded up to. Works on fake tensors: numbers read out of them are upper bounds of counts,
    else 0 or 1.0. there: tensors that exist already and are not followed. reorders: count the copies that oneDNN makes
    for a convolution on the CPU.
    """

    def __init__(self, granule: int = GRANULE, there: Iterable[Tensor] = (), reorders: bool = False) -> None:
        super().__init__()
        self.granule = granule
        self.reorders = reorders
        self.there = {t.untyped_storage()._cdata for t in there}
        self.blocks: list[Block] = []
        self.events: list[int] = []  # n: block n is made; -n - 1: it is freed
        self.phases: list[tuple[int, str]] = []  # (first event, name)
        self.known: dict[int, tuple[int, Any]] = {}  # address of a storage -> its block, a weak reference
        self.modules = [OUTSIDE]
        self.writers: dict[int, str] = {}  # block -> the module that wrote its last content

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            return args[0].fake_device if hasattr(args[0], "fake_device") else func(*args)
        if func is torch.ops.aten._local_scalar_dense.default:
            return getattr(args[0], "most", 1.0 if args[0].is_floating_point() else 0)
        if func.__name__.startswith("_fused_"):  # optimizers: they write in place, and have no fake form
            return None
        result = data_dependent(func, args)
        if result is None:  # FAKES: as the dispatcher would, but without it
            result = remembered(func, FAKES.get(func, func), args, kwargs or {})
        for t in result if isinstance(result, tuple | list) else (result,):
            if isinstance(t, Tensor):
                self.add(t)
        self.use(reordered(func, args, result) if self.reorders else 0)
        if func is torch.ops.aten.sum.default and args[0].dtype == torch.bool:
            result.most = args[0].numel()  # of a mask, at most all is set
        return result

    def add(self, t: Tensor) -> None:
        storage = t.untyped_storage()
        address = storage._cdata
        if address not in self.known and address not in self.there:
            number, size = len(self.blocks), rounded(storage.nbytes(), self.granule)
            self.blocks.append(Block(size, self.modules[-1], str(t.dtype)[6:], t.shape))
            self.events.append(number)
            self.known[address] = number, weakref.ref(storage, lambda _: self.free(address))

    def use(self, size: int) -> None:
        """Memory that the last operation took, and gave back before it ended."""
        if size:
            self.blocks.append(Block(size, self.modules[-1], "uint8", (size,)))
            self.events += [len(self.blocks) - 1, -len(self.blocks)]

    def free(self, address: int) -> None:
        self.events.append(-self.known.pop(address)[0] - 1)

    def number(self, t: Tensor) -> int | None:
        """The block of a tensor; None if it was made outside."""
        found = self.known.get(t.untyped_storage()._cdata)
        return None if found is None else found[0]

    def numbers(self, tensors: Iterable[Tensor | None]) -> set[int]:
        found = {self.number(t) for t in tensors if t is not None}
        return {number for number in found if number is not None}

    def begin(self, phase: str) -> None:
        self.phases.append((len(self.events), phase))

    # ------------------------------------------------------------------------------------------------ what was alive

    def peaks(self) -> dict[str, tuple[int, int]]:
        """Phase -> (most bytes alive in it, the event after which). What is alive when it begins counts too."""
        found: dict[str, tuple[int, int]] = {}
        alive = 0
        edges = [(0, ""), *self.phases, (len(self.events), "")]
        for (first, phase), (last, _) in pairwise(edges):
            most = alive, first - 1
            for place in range(first, last):
                event = self.events[place]
                alive += self.blocks[event].size if event >= 0 else -self.blocks[-event - 1].size
                if alive > most[0]:
                    most = alive, place
            if phase and most[0] > found.get(phase, (-1, 0))[0]:
                found[phase] = most
        return found

    def alive_after(self, place: int) -> set[int]:
        """The blocks that are alive after an event."""
        alive: set[int] = set()
        for event in self.events[: place + 1]:
            if event >= 0:
                alive.add(event)
            else:
                alive.discard(-event - 1)
        return alive

    def size(self, numbers: Iterable[int]) -> int:
        return sum(self.blocks[number].size for number in numbers)

    def maps(self, numbers: Iterable[int], images: int) -> set[int]:
        """Those of these blocks that hold maps of so many images, or codes of maps, whose rows are planes."""

        def is_map(block: Block) -> bool:
            shape = block.shape
            return (len(shape) == 4 and shape[0] == images) or (
                len(shape) == 2 and block.dtype == "uint8" and shape[0] % images == 0
            )

        return {number for number in numbers if is_map(self.blocks[number])}

    # ------------------------------------------------------------------------------------------------ whose it is

    @contextmanager
    def attributing(self, network: nn.Module) -> Iterator[None]:
        """Inside, allocations belong to the innermost module that runs, and contents to the last module without
        submodules that returned them."""
        names = {id(module): name for name, module in network.named_modules()}
        leaves = {id(module) for module in network.modules() if next(module.children(), None) is None}

        def enter(module: nn.Module, _: Any) -> None:
            if id(module) in names:
                self.modules.append(names[id(module)])

        def leave(module: nn.Module, _: Any, out: Any) -> None:
            if id(module) in names:
                self.modules.pop()
            if id(module) in leaves and isinstance(out, Tensor) and (number := self.number(out)) is not None:
                self.writers[number] = names[id(module)]

        # Hooks of the modules themselves would keep model.recompute from walking backward through them.
        handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def by_module(self, numbers: Iterable[int], network: nn.Module) -> dict[tuple[str, str], int]:
        """(part of the network, kind of module that wrote it) -> bytes of these blocks."""
        kinds = {name: type(module).__name__ for name, module in network.named_modules()}
        result: dict[tuple[str, str], int] = defaultdict(int)
        for number in numbers:
            block = self.blocks[number]
            name = self.writers.get(number, block.module)
            kind = "loss" if name == OUTSIDE else f"{kinds.get(name, '')} {content(block)}".strip()
            result[".".join(name.split(".")[:2]), kind] += block.size
        return dict(result)


def data_dependent(func: Any, args: Any) -> Any:
    """Results of the operations whose size the data decide: as large as possible for what a mask picks, and one value
    among those that occur. None for other operations."""
    if func is torch.ops.aten._unique2.default:
        return tuple(args[0].new_empty(1, dtype=dtype) for dtype in (args[0].dtype, torch.int64, torch.int64))
    if func is torch.ops.aten.index.Tensor and len(args[1]) == 1 and args[1][0].dtype == torch.bool:
        picked, mask = args[0], args[1][0]
        return picked.new_empty(mask.numel(), *picked.shape[mask.dim() :])
    return None


def reordered(func: Any, args: Any, result: Any) -> int:
    """Bytes that oneDNN takes for a convolution beside its results, where the kernel has more than one pixel.

    It copies input and weight to its own layout, computes there, and copies the result back, into memory that no one
    has touched before. The first two copies are gone by then. Of a backward pass, it computes the input's gradient
    first. So measured; 1 x 1 convolutions are computed as they are.
    """
    if func is torch.ops.aten.convolution.default and args[1].shape[2:].numel() > 1:
        x, weight, out = (t.nbytes for t in (args[0], args[1], result))
        return max(x + weight, out)
    if func is not torch.ops.aten.convolution_backward.default or args[2].shape[2:].numel() == 1:
        return 0
    dout, x, weight = (t.nbytes for t in args[:3])
    dx, dweight = (0 if t is None else t.nbytes for t in result[:2])
    first = weight + dout + dx if dx else 0
    second = dx + max(2 * dweight, x + dout + dweight) if dweight else 0
    return max(first, second) - dx - dweight


def content(block: Block) -> str:
    """What a kept block holds, in a word."""
    if len(block.shape) <= 1:
        return "vectors"
    return {"uint8": "codes", "int32": "indices", "int64": "indices", "bool": "mask"}.get(block.dtype, "output")


def on_fake_tensors(network: nn.Module) -> None:
    """Give a network on the meta device parameters and buffers of its shapes on the CPU, inside FakeTensorMode."""
    made: dict[int, Tensor] = {}

    def twin(t: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
        if id(t) not in made:
            made[id(t)] = make(torch.empty_strided(t.shape, t.stride(), dtype=t.dtype))
        return made[id(t)]

    for module in network.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                wanted = parameter.requires_grad
                module._parameters[key] = twin(parameter, lambda t, w=wanted: nn.Parameter(t, w))  # type: ignore
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = twin(buffer, lambda t: t)
