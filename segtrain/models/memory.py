"""Count the bytes that a training step keeps for backward, on fake tensors: needs no memory and no GPU."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._functorch import config as functorch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from segtrain.models.build import build_model
from segtrain.models.execution import inductor, run_as_graph, within_budget
from segtrain.models.pooling import MaxPool2d


def kept_bytes(function: Callable[[], Tensor]) -> int:
    """Bytes that autograd keeps for backward while `function` runs: each storage once, without parameters.

    Vectors (statistics per channel) are not counted. Works on real and on fake tensors.
    """
    storages: dict[int, tuple[Any, int]] = {}

    def pack(t: Tensor) -> Tensor:
        if not isinstance(t if t._base is None else t._base, nn.Parameter) and t.dim() > 1:
            storage = t.untyped_storage()
            storages[storage._cdata] = storage, storage.nbytes()  # held, so that no other storage gets its address
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        function()
    return sum(size for _, size in storages.values())


class Allocations(TorchDispatchMode):
    """Tracks the memory of every tensor made inside: the bytes `alive` now, and their `peak` so far.

    A view of a tensor made outside, such as a weight that a hook unpacks, is not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for t in result if isinstance(result, tuple | list) else [result]:
            if isinstance(t, Tensor):
                storage = t.untyped_storage()
                if storage._cdata in given and storage._cdata not in self.made:
                    continue
                self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, self.alive())
        return result

    def alive(self) -> int:
        """Bytes of the tensors that have not been freed."""
        self.made = {key: entry for key, entry in self.made.items() if not entry[0].expired()}
        return sum(size for _, size in self.made.values())


class Operations(TorchDispatchMode):
    """Counts the FLOPs of what runs inside, by torch's formulas.

    torch's own FlopCounterMode follows the modules too, and with them it holds the maps of checkpointed blocks: a step
    has a higher peak under it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=result)
        return result


class Saving(NamedTuple):
    """One way to hold a training step: norm, `keep`, `recompute`, and whether pooling and loss are ours or torch's.

    budget: the memory budget of a compiled network; None: it is not compiled.
    """

    name: str
    norm: str = "inplace_abn"
    pooling: bool = True
    loss: bool = True
    keep: str = "exact"
    recompute: str = "none"
    budget: float | None = None


SAVINGS = (
    Saving("BatchNorm + LeakyReLU in place", "batch_norm", pooling=False, loss=False),
    Saving("In-Place ABN", pooling=False, loss=False),
    Saving("+ max-pooling that keeps bytes", loss=False),
    Saving("+ loss that keeps no full-resolution copy"),
    Saving("+ outputs in 8 bits", keep="8bit"),
    Saving("+ outputs in 4 bits", keep="4bit"),
)


# What backward rebuilds, on top of SAVINGS[3]; each of them for the backbones that have such blocks.
REBUILT = (
    Saving("+ inputs of last convolutions rebuilt", recompute="grouped"),
    Saving("+ inputs of identity blocks rebuilt", recompute="identity_input"),
    Saving("+ both rebuilt", recompute="both"),
)


class Costs(NamedTuple):
    """A training step's kept bytes, the most bytes alive in backward (gradients with them), and its FLOPs."""

    kept: int
    peak: int
    flops: int


def training_step_costs(
    saving: Saving, backbone: str, loss: Callable[[Tensor, Tensor], Tensor], batch: int, crop: tuple[int, int],
    dtype: torch.dtype = torch.float32, output_stride: int = 8, make_code: Callable[..., Any] = run_as_graph,
) -> Costs:  # fmt: skip
    """What forward, loss and backward of DeepLabV3 on `backbone` cost, on fake tensors; FLOPs as torch counts them.

    loss, crop: as in `training_step_bytes`. dtype: bfloat16 and float16 by autocast. Of a compiled network, the graphs
    are counted in their order, each operation with a result of its own; Inductor's code is fused and sorted otherwise.
    make_code: called with each of these graphs, and with around=, as `run_as_graph`.
    """
    with FakeTensorMode():
        model = build_model(
            backbone, output_stride=output_stride, norm=saving.norm, keep=saving.keep, recompute=saving.recompute
        )
        if not saving.pooling:
            use_torchs_pooling(model)
        counter = Counter()
        call: Callable[..., Tensor] = model
        if saving.budget is not None:
            backend = within_budget(partial(graphs_of, make_code=partial(make_code, around=counter)), saving.budget)
            call = torch.compile(model, fullgraph=True, dynamic=False, backend=backend)

        def forward() -> Tensor:
            with counter():
                images, target = torch.randn(batch, 3, *crop), torch.zeros(batch, *crop, dtype=torch.int64)
            around = counter() if saving.budget is None else nullcontext()  # else the graph counts
            with around, torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                logits = call(images, upsample=not saving.loss)
            with counter():
                return loss(logits, target).sum() if saving.loss else F.cross_entropy(logits, target, ignore_index=255)

        if saving.budget is not None:  # torch.compile does not look into what is counted
            forward().backward()
            model.zero_grad(set_to_none=True)
        counter.enabled = True
        out = forward()
        kept, counter.allocations.peak = counter.allocations.alive(), 0
        with counter():
            out.backward()
        return Costs(kept, counter.allocations.peak, counter.flops)


class Counter:
    """`with counter():` counts allocations and FLOPs of what runs inside, once `enabled` is True."""

    def __init__(self) -> None:
        self.allocations = Allocations()
        self.flops = 0
        self.enabled = self.inside = False

    @contextmanager
    def __call__(self) -> Iterator[None]:
        if self.inside or not self.enabled:
            yield
            return
        operations = Operations()
        self.inside = True
        try:
            with self.allocations, operations:
                yield
        finally:
            self.inside = False
        self.flops += operations.flops


def graphs_of(graph: Any, inputs: Any, make_code: Callable[..., Any] = run_as_graph) -> Any:
    """A back end of torch.compile that runs the graphs an operation at a time: `inductor` without its code."""
    with functorch.patch(enable_autograd_cache=False):  # what it would store is code
        return inductor(graph, inputs, make_code)


def training_step_bytes(
    saving: Saving,
    backbone: str,
    loss: Callable[[Tensor, Tensor], Tensor],
    batch: int,
    crop: tuple[int, int],
    num_classes: int = 19,
    output_stride: int = 8,
) -> int:
    """Bytes kept by a training step of DeepLabV3 on `backbone`: forward pass and loss, float32.

    loss: logits at the network's stride and target -> a sum for each image; where saving.loss is False, upsampled
    logits and torch's cross-entropy take its place. crop: height and width in pixels.
    """
    with FakeTensorMode():
        model = build_model(
            backbone, num_classes=num_classes, output_stride=output_stride, norm=saving.norm, keep=saving.keep,
            recompute=saving.recompute,
        )  # fmt: skip
        if not saving.pooling:
            use_torchs_pooling(model)
        with Allocations() as allocations:
            images = torch.randn(batch, 3, *crop)
            target = torch.zeros(batch, *crop, dtype=torch.int64)

            def step() -> Tensor:
                if saving.loss:
                    return loss(model(images, upsample=False), target).sum()
                return F.cross_entropy(model(images), target, ignore_index=255)

            if saving.keep == "exact" and saving.recompute == "none":
                return kept_bytes(step)
            out = step()
            assert out.requires_grad
            return allocations.alive()  # recipes hold tensors that no hook sees


def use_torchs_pooling(model: nn.Module) -> None:
    """Replace every MaxPool2d of ours by nn.MaxPool2d."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, MaxPool2d):
                setattr(parent, name, nn.MaxPool2d(child.size, child.stride, child.padding))
