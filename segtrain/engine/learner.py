"""The network, what optimises it, and one step of that: from batches to changed weights."""

import inspect
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from segtrain.abn import set_active_group
from segtrain.abn.diagnosis import is_overwritten_error, overwritten_outputs
from segtrain.config import TrainConfig
from segtrain.data.loader import Batch
from segtrain.distributed.group import World
from segtrain.engine.optim import build_optimizer, learning_rate
from segtrain.errors import SegtrainError, UsageError
from segtrain.losses import Loss
from segtrain.models import Classifier, Segmenter, from_config
from segtrain.models.parallel import compiled, sharded
from segtrain.models.preprocess import normalise_images

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
RECENT = 100  # losses that a spike is measured by


class StepResult:
    """What one step gave in this process: the loss of every picture and the gradient's norm, on their way to the CPU.

    step: how many were done before it. batches: this process's parts. divisor: what the sum of the losses of all
    processes is divided by. rate: learning rate, before a group's factor.
    """

    def __init__(
        self, step: int, batches: Sequence[Batch], sums: list[Tensor], norm: Tensor, divisor: float, rate: float
    ) -> None:
        self.step = step
        self.rate = rate
        self.batches = batches
        self.divisor = divisor
        self.skipped = False
        found = torch.cat([*(s.detach().double() for s in sums), norm.detach().double().reshape(1)])
        self.event: Any = None
        if found.is_cuda:  # asked for later, when it has arrived without anybody waiting
            self.found = torch.empty(found.shape, dtype=found.dtype, pin_memory=True)
            self.found.copy_(found, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()
        else:
            self.found = found

    def values(self) -> list[float]:
        if self.event is not None:
            self.event.synchronize()
        result: list[float] = self.found.tolist()
        return result

    @property
    def losses(self) -> list[float]:
        """Of each picture: its part of the batch's loss."""
        return [value / self.divisor for value in self.values()[:-1]]

    @property
    def loss(self) -> float:
        """This process's part of the batch's loss."""
        return math.fsum(self.losses)

    @property
    def norm(self) -> float:
        """Euclidean norm of the whole gradient, before it is clipped."""
        return self.values()[-1]


class Learner:
    """A network in training: `step` changes it, `state` and `load` are what a checkpoint holds of it."""

    def __init__(
        self, network: Segmenter | Classifier, loss: Loss, config: TrainConfig, world: World, device: torch.device
    ) -> None:
        self.network = network
        self.loss = loss
        self.config = config
        self.world = world
        self.device = device
        options = config.trainer
        self.dtype = PRECISIONS[options.precision]
        self.sharded = options.parallel == "fsdp" and world.size > 1
        self.model: Callable[..., Tensor] = network
        self.raw = {"upsample": False} if isinstance(network, Segmenter) else {}  # logits at the network's own stride
        if config.model.norm.endswith("_sync") and world.size > 1:
            set_active_group(network, sync_group(options.sync_group, world))
        if self.sharded:
            sharded(network.to(memory_format=torch.contiguous_format))  # FSDP2 cannot cut channels-last weights
        elif world.size > 1:
            # Running statistics are those of the first process; the others get them when they are used.
            known = inspect.signature(DistributedDataParallel).parameters  # torch 2.14 has a new name for it
            quiet: dict[str, Any] = {
                "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False
            }
            self.model = DistributedDataParallel(network, gradient_as_bucket_view=True, **quiet)
        elif options.compile:
            self.model = compiled(network, config.model, device)
        optimizer = config.optimizer
        if (options.precision == "fp16" or self.sharded) and optimizer.fused is None:
            # Fused updates know no sharded tensors; and torch 2.14's fused SGD takes its momentum from memory that
            # nobody wrote, after a first step that was skipped because the scale was too large.
            optimizer = replace(optimizer, fused=False)
        self.optimizer = build_optimizer(network, optimizer)
        self.scaler = torch.amp.GradScaler(device.type, enabled=options.precision == "fp16")
        self.average: AveragedModel | None = None
        if options.ema_decay is not None:
            self.average = AveragedModel(
                network, multi_avg_fn=get_ema_multi_avg_fn(options.ema_decay), use_buffers=True
            )
        self.recent: deque[float] = deque(maxlen=RECENT)
        self.skipped = 0  # bad steps in a row

    # -------------------------------------------------------------------------------------------------- one step

    def step(self, batches: Sequence[Batch], divisor: float, step: int, share: float) -> StepResult:
        """One step of gradient descent on this process's parts of the batch.

        divisor: the loss's count over all parts of all processes. step, share: how many steps, and which share of the
        training, were done before this one.
        """
        options = self.config.trainer
        rate = learning_rate(self.config.optimizer, self.config.schedule, step, share)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["lr_factor"]
        before = [t.clone() for t in self.network.buffers()] if options.on_bad_step == "skip" else []
        self.network.train()
        self.optimizer.zero_grad(set_to_none=True)
        sums = []
        for part, batch in enumerate(batches):
            # Dropout too is a function of (seed, step, part), whichever process has the part.
            place = part * self.world.size + self.world.rank
            torch.manual_seed(int(np.random.SeedSequence((options.seed, step, place)).generate_state(1)[0]))
            with self.without_exchange(last=part == len(batches) - 1):
                sums.append(self.forward_backward(batch, divisor))
        self.scaler.unscale_(self.optimizer)
        norm = self.gradient_norm()
        outcome = StepResult(step, batches, sums, norm, divisor, rate)
        if options.on_bad_step == "skip" and self.bad(self.world.all_reduce(outcome.loss)[0], outcome.norm):
            outcome.skipped = True
            for now, was in zip(self.network.buffers(), before, strict=True):
                now.copy_(was)
            self.optimizer.zero_grad(set_to_none=True)
            self.scaler.update() if self.scaler.is_enabled() else None
            return outcome
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None:
            self.average.update_parameters(self.network)
        return outcome

    def forward_backward(self, batch: Batch, divisor: float) -> Tensor:
        """Adds the gradient of one part. Returns the sums of the loss, (N,) float."""
        mean, std = self.config.model.mean, self.config.model.std
        images = normalise_images(batch.images.to(self.device, non_blocking=True), mean, std)
        target = batch.targets.to(self.device, non_blocking=True).long()
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            logits = self.model(images, **self.raw)
        sums = self.loss(logits, target)
        # Data-parallel gradients are means over the processes; the loss is a sum over them.
        total = self.scaler.scale(sums.sum() * (self.world.size / divisor))
        try:
            total.backward()
        except RuntimeError as error:
            if not is_overwritten_error(error):
                raise
            names = (
                ", ".join(overwritten_outputs(self.network, images)) or "no module's (a tensor made between modules)"
            )
            raise SegtrainError(
                f"backward needs a tensor that a later operation has overwritten; the output of: {names}. If an "
                f"In-Place ABN layer comes next, give it overwrite=False ({error})"
            ) from error
        return sums.detach()

    def without_exchange(self, last: bool) -> AbstractContextManager[Any]:
        """Gradients go round once a step, with the last part."""
        if self.sharded:
            self.network.set_requires_gradient_sync(last)  # type: ignore[operator]
            return nullcontext()
        if last or not isinstance(self.model, DistributedDataParallel):
            return nullcontext()
        return self.model.no_sync()

    def gradient_norm(self) -> Tensor:
        """Of the whole gradient, which is clipped to optimizer.clip_norm if that is set."""
        parameters = [p for p in self.network.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        clip = self.config.optimizer.clip_norm
        if clip is not None:
            nn.utils.clip_grads_with_norm_(parameters, clip, norm)
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    # -------------------------------------------------------------------------------------------------- good or bad

    def bad(self, loss: float, norm: float) -> str:
        """What is wrong with a step of that loss and gradient, empty if nothing is."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not math.isfinite(norm) and not self.scaler.is_enabled():  # which tries its scale out
            return f"the gradient is {norm}"
        return self.spike(loss)

    def spike(self, loss: float) -> str:
        factor = self.config.trainer.spike_factor
        if factor and len(self.recent) >= RECENT // 5:
            usual = float(np.median(self.recent))
            if 0 < factor * usual < loss:
                return f"the loss is {loss:.4g}, {loss / usual:.0f} times the median of the last {len(self.recent)}"
        return ""

    # -------------------------------------------------------------------------------------------------- checkpoints

    def evaluation_model(self) -> Segmenter | Classifier:
        """The network whose weights are validated: the averaged one where there is one. A collective call.

        Every process then has the running statistics of the first, whose own these are.
        """
        used: Any = self.network if self.average is None else self.average.module
        if self.sharded:  # whose every call is a collective, and pictures are not divided evenly
            from torch.distributed.checkpoint import state_dict as shared

            whole = shared.get_model_state_dict(self.network, options=shared.StateDictOptions(full_state_dict=True))
            used = from_config(self.config.model, self.network.num_classes).to(self.device)
            used.load_state_dict(whole)
        if self.world.size > 1:
            from torch import distributed

            with self.world.explained():
                for buffer in used.buffers():
                    distributed.broadcast(buffer, 0)
        result: Segmenter | Classifier = used
        return result

    def state(self) -> dict[str, Any]:
        """What `load` needs to go on. A collective call where the weights are shared out, else of the first process."""
        result: dict[str, Any] = {"recent": list(self.recent), "scaler": self.scaler.state_dict()}
        if self.sharded:
            from torch.distributed.checkpoint import state_dict as shared

            whole = shared.StateDictOptions(full_state_dict=True, cpu_offload=True)
            result["model"] = shared.get_model_state_dict(self.network, options=whole)
            named = shared.get_optimizer_state_dict(self.network, self.optimizer, options=whole)
            result["optimizer"] = by_number(named) if self.world.main else {}  # only the first process gets it
        else:
            result["model"] = self.network.state_dict()
            result["optimizer"] = self.optimizer.state_dict()
        if self.average is not None:
            result["ema"] = self.average.module.state_dict()
            result["ema_updates"] = int(self.average.n_averaged)
        return result

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave, whatever the number of processes was. The shapes are known to fit."""
        factors = [group["lr_factor"] for group in self.optimizer.param_groups]
        if self.sharded:
            from torch.distributed.checkpoint import state_dict as shared

            whole = shared.StateDictOptions(full_state_dict=True)
            shared.set_model_state_dict(self.network, state["model"], options=whole)
            names = [name for group in self.optimizer.param_groups for name in self.names(group["params"])]
            named = by_name(state["optimizer"], names)
            shared.set_optimizer_state_dict(self.network, self.optimizer, named, options=whole)
        else:
            self.network.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
        for group, factor in zip(self.optimizer.param_groups, factors, strict=True):
            group["lr_factor"] = factor  # which checkpoints of the first format do not have
        self.recent.extend(state.get("recent", []))
        if state.get("scaler"):
            self.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.module.load_state_dict(state["ema"])
            self.average.n_averaged.fill_(state["ema_updates"])

    def names(self, parameters: Iterable[Tensor]) -> list[str]:
        known = {id(parameter): name for name, parameter in self.network.named_parameters()}
        return [known[id(parameter)] for parameter in parameters]


def by_number(named: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state by the parameters' names -> as torch.optim has it, by their numbers."""
    order = [name for group in named["param_groups"] for name in group["params"]]
    number = {name: index for index, name in enumerate(order)}
    groups = [{**group, "params": [number[name] for name in group["params"]]} for group in named["param_groups"]]
    return {"state": {number[name]: value for name, value in named["state"].items()}, "param_groups": groups}


def by_name(state: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """The way back; names: of all parameters in the order of the optimizer's groups."""
    groups = [{**group, "params": [names[index] for index in group["params"]]} for group in state["param_groups"]]
    return {"state": {names[index]: value for index, value in state["state"].items()}, "param_groups": groups}


def sync_group(which: str, world: World) -> Any:
    """The process group that this process normalises with: trainer.sync_group = all | node | a number of neighbours.

    UsageError where the processes cannot be divided so. Every process calls it at the same point.
    """
    from torch import distributed

    if which == "all":
        return None
    size = group_size(which, world)
    if world.size % size:
        raise UsageError(
            f"trainer.sync_group={which} is not possible: {world.size} processes are no multiple of {size}"
        )
    groups = [distributed.new_group(list(range(first, first + size))) for first in range(0, world.size, size)]
    return groups[world.rank // size]


def group_size(which: str, world: World) -> int:
    if which == "all":
        return world.size
    return int(os.environ.get("LOCAL_WORLD_SIZE", world.size)) if which == "node" else int(which)


def smallest_part(config: TrainConfig, world: World, loss: Loss) -> int:
    """Pictures in the smallest part of a batch. UsageError where the batch cannot be divided between the processes."""
    options = config.trainer
    parts = world.size * options.accumulation
    least = options.batch_size // parts
    how = f"{world.size} processes x trainer.accumulation={options.accumulation}"
    key = f"trainer.batch_size={options.batch_size} is not possible"
    if least == 0:
        raise UsageError(f"{key}: {how} need a picture each; give {parts} or more")
    synchronised = config.model.norm.endswith("_sync")
    if options.sync_group != "all" and not synchronised:
        raise UsageError(
            f"trainer.sync_group={options.sync_group} is not possible: model.norm={config.model.norm} has statistics "
            "of its own in every process; choose model.norm=inplace_abn_sync, or sync_group=all"
        )
    together = least * group_size(options.sync_group, world) if synchronised else least
    if together < 2 and config.model.head != "classifier":
        raise UsageError(
            f"{key}: divided by {how}, a part is one picture, and the pooled branch of DeepLabV3 has one value per "
            f"picture to normalise_images over; give {2 * parts} or more, or model.norm=inplace_abn_sync"
        )
    if parts > 1 and loss.per_batch:
        raise UsageError(
            f"loss.select=batch is not possible with {how}: it looks at the whole batch; choose loss.select=image"
        )
    return least
