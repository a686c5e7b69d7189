"""Trace training steps on fake tensors: no GPU, no data, no memory."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from segtrain.abn.sync import on_its_own
from segtrain.config import TrainConfig, classifies
from segtrain.data.loader import Batch
from segtrain.distributed.group import World
from segtrain.engine.learner import Learner
from segtrain.losses import Loss, build_loss
from segtrain.losses.tiles import tiles_of
from segtrain.models import from_config
from segtrain.models.ledger import GRANULE, Ledger, bytes_of, on_fake_tensors
from segtrain.tasks.classification import ImageCrossEntropy

PHASES = ("forward", "loss", "backward", "optimizer")


@dataclass
class StepTrace:
    """Bytes of one training step on one device, without context and workspace.

    images: of a micro-batch. crop: [height, width]. peaks: the most that is alive in each phase. static: what is there
    before the step and after it, by kind. kept: what forward and loss leave for backward; kept_by: (part of the
    network, kind) -> bytes of it. at_peak: what is alive at the highest of the peaks, by kind. growing: of that, maps
    of all images, which grow with their pixels.
    """

    images: int
    crop: tuple[int, int]
    peaks: dict[str, int]
    static: dict[str, int]
    kept: int
    kept_by: dict[tuple[str, str], int] = field(default_factory=dict)
    at_peak: dict[str, int] = field(default_factory=dict)
    growing: int = 0

    @property
    def peak(self) -> int:
        return max(self.peaks.values())


def kind_of_device(config: TrainConfig) -> str:
    """The kind of device that is planned for: a GPU, unless device=cpu."""
    return "cpu" if config.device == "cpu" else "cuda"


def granule_of(kind: str) -> int:
    """Bytes that an allocation is rounded up to."""
    return GRANULE if kind == "cuda" else 1


def loss_of(config: TrainConfig, num_classes: int) -> Loss:
    if classifies(config.dataset):
        return ImageCrossEntropy(config.loss.label_smoothing)
    loss = config.loss
    if loss.class_weights == "auto":  # known when the labels are counted; they need no memory
        loss = replace(loss, class_weights=[1.0] * num_classes)
    return build_loss(loss, num_classes)


def fake_batch(config: TrainConfig, images: int, crop: tuple[int, int]) -> Batch:
    """A batch as the loader gives it; its numbers are never read."""
    whole = classifies(config.dataset)
    pixels = torch.empty(images, config.model.in_channels, *crop, dtype=torch.float32 if whole else torch.uint8)
    targets = torch.empty(images, dtype=torch.int64) if whole else torch.empty(images, *crop, dtype=torch.uint8)
    return Batch(pixels, targets, [""] * images, [0] * images, [[0] * 5] * images)


class StepTracer:
    """Runs training steps of one configuration on fake tensors, as the training loop runs them, and counts.

    devices: with more than one, DDP's buckets are there. static: bytes that are there between two steps, by kind.
    """

    def __init__(self, config: TrainConfig, num_classes: int, devices: int = 1) -> None:
        # Compiled steps are not traced, and a back end that this machine lacks holds the same.
        config = replace(
            config, trainer=replace(config.trainer, compile=False), model=replace(config.model, backend="auto")
        )
        self.config = config
        self.kind = kind_of_device(config)
        self.granule = granule_of(self.kind)
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        with torch.device("meta"):
            network = from_config(config.model, num_classes)
        with self.mode, Ledger(self.granule):  # the ledger stands in for fused optimizers
            on_fake_tensors(network)
            self.learner = Learner(network, loss_of(config, num_classes), config, World(), torch.device("cpu"))
            make_state(self.learner)
            self.buckets = make_buckets(network) if devices > 1 else []
        self.network: nn.Module = network
        self.forward, self.loss, self.norm = self.learner.model, self.learner.loss, self.learner.gradient_norm
        average = self.learner.average
        state = [t for one in self.learner.optimizer.state.values() for t in one.values() if isinstance(t, Tensor)]
        kinds: dict[str, list[Tensor]] = {
            "parameters": [*network.parameters(), *network.buffers()],
            "optimizer": state,
            "averaged weights": [] if average is None else [*average.parameters(), *average.buffers()],
            "gradients": self.buckets,
        }
        self.there = [t for tensors in kinds.values() for t in tensors]
        self.static = {name: bytes_of(tensors, self.granule) for name, tensors in kinds.items()}

    def trace(self, images: int, crop: tuple[int, int], details: bool = False) -> StepTrace:
        """Count one step of micro-batches of `images` crops, two of them where trainer.accumulation is more than 1:
        the second one finds gradients. details: also kept bytes by module."""
        self.learner.optimizer.zero_grad(set_to_none=True)
        ledger = Ledger(self.granule, self.there, reorders=self.kind == "cpu")
        with self.mode, tiles_of(self.kind), on_its_own(), ledger:
            step = Phases(ledger, self)
            batches = [fake_batch(self.config, images, crop)] * min(self.config.trainer.accumulation, 2)
            with ledger.attributing(self.network) if details else nullcontext():
                self.learner.step(batches, 1.0, 0, 0.0)
            gradients = ledger.numbers(parameter.grad for parameter in self.network.parameters())
        base, peaks = sum(self.static.values()), ledger.peaks()
        kept = ledger.alive_after(step.kept_at) - gradients
        found = {name: base + peaks[name][0] for name in PHASES}
        static = self.static | {"gradients": self.static["gradients"] + ledger.size(gradients)}
        alive = ledger.alive_after(max(peaks.values())[1])
        at_peak = self.static | {
            "gradients": self.static["gradients"] + ledger.size(alive & gradients),
            "kept maps": ledger.size((alive & kept) - gradients),
            "working set": ledger.size(alive - kept - gradients),
        }
        kept_by = ledger.by_module(kept, self.network) if details else {}
        growing = ledger.size(ledger.maps(alive - gradients, images))
        return StepTrace(images, crop, found, static, ledger.size(kept), kept_by, at_peak, growing)


def make_state(learner: Learner) -> None:
    """Give the optimizer its state: one update with gradients that are freed again."""
    for parameter in learner.network.parameters():
        parameter.grad = torch.empty_like(parameter)
    learner.optimizer.step()
    learner.optimizer.zero_grad(set_to_none=True)


def make_buckets(network: nn.Module) -> list[Tensor]:
    """The buckets of DDP, which hold the gradients all the time; a fresh gradient is copied there and freed."""
    buckets = []
    for parameter in network.parameters():
        if parameter.requires_grad:
            bucket = torch.empty_like(parameter, requires_grad=False)
            buckets.append(bucket)

            def keep(parameter: Tensor, bucket: Tensor = bucket) -> None:
                parameter.grad = bucket

            parameter.register_post_accumulate_grad_hook(keep)
    return buckets


@contextmanager
def all_counted(loss: Loss, target: Tensor) -> Iterator[None]:
    """`Loss.counted` for a target whose numbers cannot be read: at most, all pixels are labelled."""
    loss.host_counts = [target[0].numel()] * len(target)
    try:
        yield
    finally:
        loss.host_counts = None


class Phases:
    """Marks in a ledger where the phases of a step begin. kept_at: the last event of the last loss."""

    def __init__(self, ledger: Ledger, tracer: StepTracer) -> None:
        self.ledger = ledger
        self.kept_at = 0
        learner: Any = tracer.learner
        learner.model = self.then(tracer.forward, "loss", "forward")
        loss: Any = self.then(tracer.loss, "backward")
        loss.counted = partial(all_counted, tracer.loss)
        learner.loss = loss
        learner.gradient_norm = self.then(tracer.norm, "optimizer")
        ledger.begin("forward")

    def then(self, function: Callable[..., Any], next_phase: str, own: str = "") -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if own:
                self.ledger.begin(own)
            result = function(*args, **kwargs)
            self.ledger.begin(next_phase)
            if next_phase == "backward":
                self.kept_at = len(self.ledger.events) - 1
            return result

        return call
