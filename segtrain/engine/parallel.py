"""A network in several processes: DDP or FSDP2, groups of synchronised norms, and how a batch is divided."""

import inspect
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from segtrain.abn import set_active_group
from segtrain.config import TrainConfig
from segtrain.distributed.group import World
from segtrain.errors import UsageError
from segtrain.losses import Loss
from segtrain.models import Classifier, Segmenter, from_config
from segtrain.models.execution import compiled, sharded

Network = Segmenter | Classifier

# ------------------------------------------------------------------------------------------------ the network


def is_sharded(config: TrainConfig, dist: World) -> bool:
    return config.trainer.parallel == "fsdp" and dist.size > 1


def parallel_model(network: Network, config: TrainConfig, dist: World, device: torch.device) -> Callable[..., Tensor]:
    """What to call instead of the network in training: itself after sharding in place, or compiled and with DDP around.

    Synchronised norms get the process group of trainer.sync_group.
    """
    if config.model.norm.endswith("_sync") and dist.size > 1:
        set_active_group(network, sync_group(config.trainer.sync_group, dist))
    if is_sharded(config, dist):
        sharded(network.to(memory_format=torch.contiguous_format))  # FSDP2 cannot cut channels-last weights
        return network
    model: nn.Module = network
    if config.trainer.compile:
        model = compiled(network, config.model, device, config.trainer.memory_budget)
    if dist.size > 1:
        # Running statistics are those of the first process; the others get them when they are used.
        known = inspect.signature(DistributedDataParallel).parameters  # torch 2.14 has a new name for it
        buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        options: dict[str, Any] = {buffers: False, "gradient_as_bucket_view": True}
        return DistributedDataParallel(model, **options)
    return model


def gradient_sync(model: Callable[..., Tensor], last: bool) -> AbstractContextManager[Any]:
    """Synchronise gradients once a step, in the backward of the last micro-batch."""
    if hasattr(model, "set_requires_gradient_sync"):  # sharded by FSDP2
        model.set_requires_gradient_sync(last)
        return nullcontext()
    return nullcontext() if last or not isinstance(model, DistributedDataParallel) else model.no_sync()


def gathered_network(network: Network, config: TrainConfig, device: torch.device) -> Network:
    """An unsharded copy of a sharded network. A collective call.

    Every call of a sharded network is a collective too, and images are not divided evenly between the processes.
    """
    from torch.distributed.checkpoint import state_dict as distributed_state

    options = distributed_state.StateDictOptions(full_state_dict=True)
    state = distributed_state.get_model_state_dict(network, options=options)
    copy = from_config(config.model, network.num_classes).to(device)
    copy.load_state_dict(state)
    return copy


def broadcast_buffers(network: nn.Module, dist: World) -> None:
    """Replace the running statistics by those of the first process. A collective call."""
    if dist.size > 1:
        from torch import distributed

        with dist.explained():
            for buffer in network.buffers():
                distributed.broadcast(buffer, 0)


# ------------------------------------------------------------------------------------------------ sharded state


def gathered_state(network: nn.Module, optimizer: torch.optim.Optimizer, main: bool) -> dict[str, Any]:
    """ "model" and "optimizer" of a sharded network as they are without sharding, on the CPU. A collective call."""
    from torch.distributed.checkpoint import state_dict as distributed_state

    options = distributed_state.StateDictOptions(full_state_dict=True, cpu_offload=True)
    model = distributed_state.get_model_state_dict(network, options=options)
    named = distributed_state.get_optimizer_state_dict(network, optimizer, options=options)
    return {"model": model, "optimizer": numbered_state(named) if main else {}}  # only the first process gets it


def load_gathered_state(network: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Shard "model" and "optimizer" of an unsharded checkpoint. A collective call."""
    from torch.distributed.checkpoint import state_dict as distributed_state

    options = distributed_state.StateDictOptions(full_state_dict=True)
    distributed_state.set_model_state_dict(network, state["model"], options=options)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    order = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
    named = named_state(state["optimizer"], order)
    distributed_state.set_optimizer_state_dict(network, optimizer, named, options=options)


def numbered_state(named: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state by the parameters' names -> by their numbers, as torch.optim has it."""
    order = [name for group in named["param_groups"] for name in group["params"]]
    number = {name: index for index, name in enumerate(order)}
    groups = [{**group, "params": [number[name] for name in group["params"]]} for group in named["param_groups"]]
    return {"state": {number[name]: value for name, value in named["state"].items()}, "param_groups": groups}


def named_state(state: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """The inverse of `numbered_state`; names: of all parameters in the order of the optimizer's groups."""
    groups = [{**group, "params": [names[index] for index in group["params"]]} for group in state["param_groups"]]
    return {"state": {names[index]: value for index, value in state["state"].items()}, "param_groups": groups}


# ------------------------------------------------------------------------------------------------ groups and batches


def sync_group(which: str, dist: World) -> Any:
    """The process group that this process normalises with: trainer.sync_group = all | node | a number of neighbours.

    UsageError where the processes cannot be divided so. Every process calls it at the same point.
    """
    from torch import distributed

    if which == "all":
        return None
    size = group_size(which, dist)
    if dist.size % size:
        raise UsageError(f"trainer.sync_group={which} is not possible: {dist.size} processes are no multiple of {size}")
    groups = [distributed.new_group(list(range(first, first + size))) for first in range(0, dist.size, size)]
    return groups[dist.rank // size]


def group_size(which: str, dist: World) -> int:
    """Processes that share their statistics."""
    if which == "all":
        return dist.size
    return int(os.environ.get("LOCAL_WORLD_SIZE", dist.size)) if which == "node" else int(which)


def smallest_micro_batch(config: TrainConfig, dist: World, loss: Loss) -> int:
    """Images in the smallest micro-batch. UsageError where the batch cannot be divided between the processes."""
    options = config.trainer
    parts = dist.size * options.accumulation
    smallest = options.images // parts
    how = f"{dist.size} processes x trainer.accumulation={options.accumulation}"
    key = f"trainer.batch_size={options.batch_size} is not possible"
    if smallest == 0:
        raise UsageError(f"{key}: {how} need an image each; give {parts} or more")
    synchronised = config.model.norm.endswith("_sync")
    if options.sync_group != "all" and not synchronised:
        raise UsageError(
            f"trainer.sync_group={options.sync_group} is not possible: model.norm={config.model.norm} has statistics "
            "of its own in every process; choose model.norm=inplace_abn_sync, or sync_group=all"
        )
    together = smallest * group_size(options.sync_group, dist) if synchronised else smallest
    if together < 2 and config.model.head != "classifier":
        raise UsageError(
            f"{key}: divided by {how}, a micro-batch is one image, and DeepLabV3's pooled branch has one value per "
            f"image and channel to normalise over; give {2 * parts} or more, or model.norm=inplace_abn_sync"
        )
    if parts > 1 and loss.per_batch:
        raise UsageError(
            f"loss.select=batch is not possible with {how}: it looks at the whole batch; choose loss.select=image"
        )
    return smallest
