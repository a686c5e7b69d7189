"""Statistics over several processes: one collective in forward, one in backward."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.utils.weak import WeakTensorKeyDictionary

groups: dict[frozenset[int], Any] = {}
apart = False  # inside of `on_its_own`


@contextmanager
def on_its_own() -> Iterator[None]:
    """Inside, layers of this process synchronise with no other: it alone runs them."""
    global apart
    before, apart = apart, True
    try:
        yield
    finally:
        apart = before


def group_or_none(group: Any) -> Any:
    """The process group to synchronise over, by default all processes; None if there is only this process."""
    if apart or not (dist.is_available() and dist.is_initialized()):
        return None
    group = dist.group.WORLD if group is None else group
    return None if dist.get_world_size(group) == 1 else group


# The last checked call of a layer, known by its running mean: its count, whether backward followed, its group.
checked: Any = WeakTensorKeyDictionary()


def reading_waits(t: Tensor) -> bool:
    """Whether the host waits for a device to read t."""
    return t.is_cuda


def merge_statistics(
    mean: Tensor, var: Tensor, count: float, backward_follows: bool, group: Any, layer: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(mean, biased variance, count) over the group from each process's own. mean, var: (C,). One all-gather.

    The processes also exchange whether they will run backward: if they differ, backward's collective would wait for
    ever, so all raise the same RuntimeError here. ValueError on all where the group has one value per channel in total.

    layer: its running mean, if any. On a device, where the host would have to wait, only those processes check for
    which this call differs in count, mode or group from the layer's call before: all of them in the first step. If a
    single process changes alone later, it raises, and the others stop when it is gone.
    """
    # float64, so that a count is exact beyond 2 ** 24. Filled in on the device: copied there, the host would wait.
    own = torch.empty(2 + 2 * len(mean), dtype=torch.float64, device=mean.device)
    own[:1].fill_(count)
    own[1:2].fill_(float(backward_follows))
    own[2:].copy_(torch.cat([mean, var]))
    everyone = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, own, group=group)
    gathered = torch.stack(everyone)
    counts, follows = gathered[:, :1], gathered[:, 1]
    call = count, backward_follows, id(group)
    known = layer is not None and reading_waits(mean) and checked.get(layer) == call
    # A CUDA graph cannot read; the warm-up before a capture has run the same checks.
    if not known and not (mean.is_cuda and torch.cuda.is_current_stream_capturing()):
        check_processes(counts.flatten().tolist(), follows.tolist())
        if layer is not None:
            checked[layer] = call
    means, variances = gathered[:, 2:].chunk(2, dim=1)
    total = counts.sum()
    merged = (counts * means).sum(0) / total
    # Chan's formula: the variance within the processes and between them
    spread = (counts * (variances + (means - merged) ** 2)).sum(0) / total
    return merged.to(mean.dtype), spread.to(mean.dtype), total.to(mean.dtype)


def check_processes(counts: list[float], follows: list[float]) -> None:
    """Raise the same error on all processes; see merge_statistics. Both lists have one entry for each process."""
    if len(set(follows)) > 1:
        with_backward = [rank for rank, value in enumerate(follows) if value]
        without = [rank for rank, value in enumerate(follows) if not value]
        raise RuntimeError(
            f"synchronised In-Place ABN: processes {with_backward} of the group will run backward, {without} will not "
            "(torch.no_grad(), or nothing that requires a gradient), and backward would wait for them for ever. Run "
            "the same mode everywhere, or leave processes out by set_active_group(model, active_group(...))"
        )
    if sum(counts) <= 1:
        raise ValueError(
            f"expected more than one value per channel over all processes in training, found {sum(counts):.0f}: "
            "use a larger batch, or eval mode to freeze the statistics"
        )


def all_reduce(sums: Tensor, group: Any) -> Tensor:
    """The sums over the group, in a new tensor. One all-reduce."""
    total = sums.clone()
    dist.all_reduce(total, group=group)
    return total


def active_group(active: bool) -> Any:
    """The group of the processes that pass True, None if all pass False. Every process calls it at the same point,
    outside of any step.

    For processes that skip a part of the network together: `set_active_group(part, active_group(True or False))`.
    """
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    own = torch.tensor([dist.get_rank() if active else -1], device=device)
    everyone = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, own)
    members = frozenset(rank for rank in torch.cat(everyone).tolist() if rank >= 0)
    if not members:
        return None
    if len(members) == dist.get_world_size():
        return dist.group.WORLD
    if members not in groups:
        groups[members] = dist.new_group(sorted(members))
    return groups[members]


def set_active_group(module: nn.Module, group: Any) -> None:
    """Set the process group of every synchronised layer in `module`. Not between a forward and its backward."""
    for child in module.modules():
        set_group = getattr(child, "set_group", None)
        if callable(set_group):
            set_group(group)
