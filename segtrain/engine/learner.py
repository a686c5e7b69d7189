"""The network, what optimises it, and one step of that: from batches to changed weights."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from segtrain.abn.diagnosis import is_overwritten_error, overwritten_outputs
from segtrain.config import TrainConfig
from segtrain.data.loader import Batch
from segtrain.distributed.group import World
from segtrain.engine import parallel
from segtrain.engine.graphs import DeviceCapture, StepGraphs, not_capturable
from segtrain.engine.guard import Guard
from segtrain.engine.optim import build_optimizer, learning_rate
from segtrain.engine.parallel import Network
from segtrain.engine.step_result import StepResult
from segtrain.errors import SegtrainError, UsageError
from segtrain.losses import Loss
from segtrain.models import Segmenter
from segtrain.models.precision import PRECISIONS
from segtrain.models.preprocess import normalise_images
from segtrain.weights import checkpoint


class Learner:
    """A network in training: `step` changes it, `state_dict` and `load_state_dict` are its part of a checkpoint."""

    def __init__(self, network: Network, loss: Loss, config: TrainConfig, dist: World, device: torch.device) -> None:
        self.network = network
        self.loss = loss
        self.config = config
        self.dist = dist
        self.device = device
        options = config.trainer
        self.dtype = PRECISIONS[options.precision]
        self.sharded = parallel.is_sharded(config, dist)
        self.model = parallel.parallel_model(network, config, dist, device)
        # Segmentation losses take logits at the network's own stride.
        self.forward_options = {"upsample": False} if isinstance(network, Segmenter) else {}
        optimizer = config.optimizer
        if (options.precision == "fp16" or self.sharded) and optimizer.fused is None:
            # Fused updates know no sharded tensors; and torch 2.14's fused SGD takes its momentum from uninitialised
            # memory after a first step that was skipped because the scale was too large.
            optimizer = replace(optimizer, fused=False)
        self.optimizer = build_optimizer(network, optimizer)
        self.scaler = torch.amp.GradScaler(device.type, enabled=options.precision == "fp16")
        self.guard = Guard(config, dist, self.scaler.is_enabled())
        self.graphs: StepGraphs | None = None
        if options.cuda_graphs:
            if reason := not_capturable(config, dist, device):
                raise UsageError(f"trainer.cuda_graphs=true is not possible: {reason}")
            self.graphs = StepGraphs(self.add_gradient, list(network.parameters()), DeviceCapture(), device)
        self.average: AveragedModel | None = None
        if options.ema_decay is not None:
            self.average = AveragedModel(
                network, multi_avg_fn=get_ema_multi_avg_fn(options.ema_decay), use_buffers=True
            )

    # -------------------------------------------------------------------------------------------------- one step

    def count(self, batches: Sequence[Batch]) -> float:
        """What this process's micro-batches add to the divisor of the loss."""
        return math.fsum(self.loss.count(batch.targets) for batch in batches)

    def step(self, batches: Sequence[Batch], divisor: float, step: int, progress: float) -> StepResult:
        """One step of gradient descent on this process's micro-batches.

        divisor: the loss's count over all micro-batches of all processes. step, progress: steps, and fraction of the
        training, done before this one.
        """
        options = self.config.trainer
        lr = learning_rate(self.config.optimizer, self.config.schedule, step, progress)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_factor"]
        buffers = [t.clone() for t in self.network.buffers()] if options.on_bad_step == "skip" else []
        self.network.train()
        self.optimizer.zero_grad(set_to_none=True)
        sums = []
        for part, batch in enumerate(batches):
            # Dropout too is a function of (seed, step, micro-batch), whichever process computes it.
            place = part * self.dist.size + self.dist.rank
            torch.manual_seed(int(np.random.SeedSequence((options.seed, step, place)).generate_state(1)[0]))
            with parallel.gradient_sync(self.model, last=part == len(batches) - 1):
                sums.append(self.forward_backward(batch, divisor))
        self.scaler.unscale_(self.optimizer)
        result = StepResult(step, batches, sums, self.gradient_norm(), divisor, lr)
        if options.on_bad_step == "skip":  # a decision of all processes, before the weights change
            result.total = self.dist.all_reduce(result.loss)[0]
            result.skipped = bool(self.guard.why_bad(result.total, result.norm))
        if result.skipped:
            self.undo(buffers)
            return result
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None:
            self.average.update_parameters(self.network)
        return result

    def undo(self, buffers: Sequence[Tensor]) -> None:
        """Give back the running statistics of before the step, and forget its gradients."""
        for now, before in zip(self.network.buffers(), buffers, strict=True):
            now.copy_(before)
        self.optimizer.zero_grad(set_to_none=True)
        if self.scaler.is_enabled():
            self.scaler.update()

    def forward_backward(self, batch: Batch, divisor: float) -> Tensor:
        """Add the gradient of one micro-batch. Returns each image's sum of the loss, (N,) float."""
        # Data-parallel gradients are means over the processes; the loss is a sum over them.
        factor = self.dist.size / divisor
        if self.graphs is not None:
            return self.graphs(batch.images, batch.targets, factor)
        images, target = (t.to(self.device, non_blocking=True) for t in (batch.images, batch.targets))
        with self.loss.counted(batch.targets):
            return self.add_gradient(images, target, factor)

    def add_gradient(self, images: Tensor, target: Tensor, factor: float | Tensor) -> Tensor:
        """As forward_backward, of uint8 images and targets on the device; the loss is multiplied with factor."""
        images = normalise_images(images, self.config.model.mean, self.config.model.std)
        target = target.long()
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            logits = self.model(images, **self.forward_options)
        sums = self.loss(logits, target)
        if isinstance(factor, Tensor):
            factor = factor.to(sums.dtype)
        total = self.scaler.scale(sums.sum() * factor)
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

    def gradient_norm(self) -> Tensor:
        """Norm of the whole gradient, which is then clipped to optimizer.clip_norm if that is set."""
        parameters = [p for p in self.network.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        clip = self.config.optimizer.clip_norm
        if clip is not None:
            nn.utils.clip_grads_with_norm_(parameters, clip, norm)
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    # -------------------------------------------------------------------------------------------------- checkpoints

    def evaluation_model(self) -> Network:
        """The network to validate: the averaged one where there is one. A collective call.

        Every process then has the running statistics of the first, whose own these are.
        """
        network: Any = self.network if self.average is None else self.average.module
        if self.sharded:
            network = parallel.gathered_network(network, self.config, self.device)
        parallel.broadcast_buffers(network, self.dist)
        result: Network = network
        return result

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to resume; empty but in the first process. A collective call.

        DataError, in every process, if a weight is NaN or infinite: nobody could resume from that.
        """
        if self.sharded:
            tensors = parallel.gathered_state(self.network, self.optimizer, self.dist.main)
        else:
            tensors = {"model": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}
        if self.average is not None:
            tensors["ema"] = self.average.module.state_dict()
            tensors["ema_updates"] = int(self.average.n_averaged)
        if (rebuilding := getattr(self.network, "rebuilding", None)) is not None:
            tensors["rebuilding_drift"] = rebuilding.drift
        self.guard.check_weights(tensors["model"], tensors.get("ema", {}))
        if not self.dist.main:
            return {}
        return {"recent": list(self.guard.recent), "scaler": self.scaler.state_dict(), **tensors}

    def load_state_dict(self, state: dict[str, Any], path: Path) -> None:
        """Resume from what `state_dict` gave, whatever the number of processes was.

        path: the checkpoint, which DataError names if it is another network's.
        """
        checkpoint.require_same_tensors(self.network, state["model"], path)
        for part in ("model", "ema"):
            checkpoint.require_finite(state.get(part, {}), path)
        if self.sharded:
            parallel.load_gathered_state(self.network, self.optimizer, state)
        else:
            self.network.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
        if (rebuilding := getattr(self.network, "rebuilding", None)) is not None:
            rebuilding.drift = state.get("rebuilding_drift")
        self.guard.recent.extend(state.get("recent", []))
        if state.get("scaler"):
            self.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.module.load_state_dict(state["ema"])
            self.average.n_averaged.fill_(state["ema_updates"])
