"""Forward and backward of a micro-batch as a CUDA graph: captured once for each shape, then replayed.

A replay spares the host everything but a few copies. The update of the weights stays outside: its learning rate is a
number of the host. The captured work reads its images, labels and factor from buffers that stay where they are, and
leaves the loss and the gradients where the capture has put them.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from segtrain.config import TrainConfig
from segtrain.distributed.group import World

WARM_UP = 2  # ordinary steps before a capture, in which kernels are compiled, loaded and chosen
MOST_GRAPHS = 8  # a batch of another shape then is an ordinary step: each graph has memory of its own
STATIC_LOSSES = ("cross_entropy", "focal", "dice")  # whose operations depend on shapes alone


def not_capturable(config: TrainConfig, dist: World, device: torch.device) -> str:
    """Why a step cannot be captured, in one sentence; '' if it can."""
    model, trainer = config.model, config.trainer
    if device.type != "cuda":
        return f"the device is {device.type}, and graphs are CUDA's"
    if dist.size > 1:
        return "several processes exchange gradients inside of backward, which is not captured; use one process"
    if trainer.compile:
        return "trainer.compile=true has graphs of its own; choose one of the two"
    if config.loss.name not in STATIC_LOSSES:
        return f"what loss={config.loss.name} computes depends on the data; choose {', '.join(STATIC_LOSSES)}"
    if model.recompute != "none":
        return f"model.recompute={model.recompute} reads the state of random numbers, or samples, inside of a step"
    if model.keep != "exact":
        return f"model.keep={model.keep} has not been tried in a graph"
    return ""


class Capture(Protocol):
    """What a device has for graphs."""

    def aside(self) -> Any:
        """A context for work on the stream of the captures."""

    def record(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """(replay, the result of work): work() is recorded, and runs at each replay, which overwrites the result."""


class DeviceCapture:
    """torch's CUDA graphs."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()

    @contextmanager
    def aside(self) -> Iterator[None]:
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            yield
        torch.cuda.current_stream().wait_stream(self.stream)

    def record(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        graph = torch.cuda.CUDAGraph()
        # Loader threads pin memory meanwhile, which a capture that watches all threads would not allow.
        with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
            result = work()
        return graph.replay, result


class Recorded(NamedTuple):
    replay: Callable[[], None]
    images: Tensor  # the graph reads these three
    target: Tensor
    factor: Tensor
    sums: Tensor  # and writes these
    gradients: list[Tensor | None]  # of each parameter


class StepGraphs:
    """Calls `work` or replays its graph.

    work: images, targets and a factor (a scalar tensor) on the device -> the sum of the loss of each image; adds the
    gradients to those of the parameters.
    """

    def __init__(
        self, work: Callable[[Tensor, Tensor, Tensor], Tensor], parameters: Sequence[nn.Parameter], capture: Capture,
        device: torch.device,
    ) -> None:  # fmt: skip
        self.work, self.parameters, self.capture, self.device = work, parameters, capture, device
        self.recorded: dict[Any, Recorded] = {}
        self.seen: dict[Any, int] = {}
        self.owner: Any = None  # the graph whose gradients the parameters have; None: those of ordinary steps

    def __call__(self, images: Tensor, target: Tensor, factor: float) -> Tensor:
        """The sum of the loss of each image; gradients are added up. images, target: on the host."""
        first = all(p.grad is None for p in self.parameters)
        if first:
            self.owner = None
        # The first micro-batch of a step makes the gradients, in memory of its graph; others add to that very memory.
        key = images.shape, images.dtype, target.shape, target.dtype, first, self.owner
        if key in self.recorded:
            self.fill(self.recorded[key], images, target, factor)
            return self.replayed(key)
        self.seen[key] = self.seen.get(key, 0) + 1
        ordinary = not first and self.owner is None
        if ordinary or self.seen[key] <= WARM_UP or len(self.recorded) >= MOST_GRAPHS:
            with self.capture.aside():
                return self.work(*self.moved(images, target, factor))
        given = self.moved(images, target, factor)
        replay, sums = self.capture.record(lambda: self.work(*given))
        self.recorded[key] = Recorded(replay, *given, sums, [p.grad for p in self.parameters])
        return self.replayed(key)

    def moved(self, images: Tensor, target: Tensor, factor: float) -> tuple[Tensor, Tensor, Tensor]:
        """Copies on the device, never the given tensors themselves."""
        copies = [torch.empty_like(t, device=self.device).copy_(t, non_blocking=True) for t in (images, target)]
        return copies[0], copies[1], torch.full((), factor, dtype=torch.float64, device=self.device)

    def fill(self, graph: Recorded, images: Tensor, target: Tensor, factor: float) -> None:
        graph.images.copy_(images, non_blocking=True)
        graph.target.copy_(target, non_blocking=True)
        graph.factor.fill_(factor)

    def replayed(self, key: Any) -> Tensor:
        graph = self.recorded[key]
        graph.replay()
        first = key[-2]
        if first:
            self.owner = key
            for p, gradient in zip(self.parameters, graph.gradients, strict=True):
                p.grad = gradient
        return graph.sums.clone()  # the next replay overwrites them
