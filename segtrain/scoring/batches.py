"""Predictions of many images: images of equal size in batches, the next batch on its way to the device meanwhile."""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from segtrain.config import InferenceConfig
from segtrain.data.images import announced_size
from segtrain.scoring.inference import Prediction
from segtrain.scoring.predictor import Predictor, naming_image
from segtrain.threads import portion, threaded_map

T = TypeVar("T")
Begun = TypeVar("Begun")


class Given(NamedTuple):
    """An image to predict. key: comes back with its prediction. name: for errors. image: uint8 (H, W, in_channels).
    target: train ids uint8 (H, W), for the loss. asked: those of the classes whose probabilities to return."""

    key: Any
    name: str
    image: np.ndarray
    target: np.ndarray | None = None
    asked: np.ndarray | None = None


class Transfer(Protocol):
    """How images reach the device. ahead: whether the next ones begin to while these are computed."""

    ahead: bool

    def begin(self, images: Tensor) -> Any:
        """Begin to copy images that are on the host."""

    def finish(self, begun: Any) -> Tensor:
        """The copy, for what is computed from now on."""


class PlainTransfer:
    """Images are copied when they are needed, or not at all where the device is the CPU."""

    ahead = False

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def begin(self, images: Tensor) -> Tensor:
        return images

    def finish(self, begun: Tensor) -> Tensor:
        return begun.to(self.device)


class StreamTransfer:
    """Images are copied from pinned memory by a CUDA stream of its own, while the current stream computes."""

    ahead = True

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)

    def begin(self, images: Tensor) -> tuple[Tensor, torch.cuda.Event]:
        with torch.cuda.stream(self.stream):
            copy = images.pin_memory().to(self.device, non_blocking=True)
            return copy, self.stream.record_event()

    def finish(self, begun: tuple[Tensor, torch.cuda.Event]) -> Tensor:
        copy, event = begun
        current = torch.cuda.current_stream(self.device)
        current.wait_event(event)
        copy.record_stream(current)  # so that its memory is not used again before `current` has read it
        return copy


def transfer_to(device: torch.device) -> Transfer:
    return StreamTransfer(device) if device.type == "cuda" else PlainTransfer(device)


def predictions(
    predictor: Predictor, items: Iterable[Given], options: InferenceConfig, probability: bool = False,
    transfer: Transfer | None = None, every: bool = False,
) -> Generator[tuple[Any, Prediction], None, None]:  # fmt: skip
    """(key, prediction) of every item, in order.

    Items of equal size that follow each other go through the network together, up to inference.batch_size of them. With
    a transfer that is `ahead`, a batch is read and begins to move to the device before the one before it is computed.
    transfer: default, that of the device. every: with the probabilities of all classes.

    ImageTooLarge, with the first name of a batch, if memory runs out.
    """
    transfer = transfer or transfer_to(predictor.device)

    def begin(batch: list[Given]) -> Any:
        with naming_image(batch[0].name, batch[0].image.shape, len(batch)):
            return transfer.begin(predictor.seen([one.image for one in batch], options))

    batches = equal_sizes(items, options.together())
    with closing(one_ahead(batches, begin) if transfer.ahead else at_once(batches, begin)) as begun_batches:
        for batch, begun in begun_batches:
            targets = [one.target for one in batch if one.target is not None]
            asked = [one.asked for one in batch if one.asked is not None]
            with naming_image(batch[0].name, batch[0].image.shape, len(batch)):
                images, seen = [one.image for one in batch], transfer.finish(begun)
                found = predictor.segment_batch(
                    images, seen, options, probability, targets or None, asked or None, every
                )
            yield from zip([one.key for one in batch], found, strict=True)


def pixels_to_predict(paths: Sequence[Path], options: InferenceConfig) -> list[int]:
    """How many pixels of each image file the network will see; 1 where the file does not say its size."""

    def seen(path: Path) -> int:
        size = announced_size(path)
        if size is None or min(size) < 1:
            return 1
        enlarged = 1.0 if options.longest_side is None else options.longest_side / max(size)
        return max(1, round(size[0] * size[1] * enlarged**2))

    with closing(threaded_map(seen, paths, at_once=portion(len(paths)))) as found:
        return list(found)


def equal_sizes(items: Iterable[Given], most: int) -> Iterator[list[Given]]:
    """Items that follow each other and whose images have the same shape, at most so many together."""
    batch: list[Given] = []
    for item in items:
        if batch and item.image.shape != batch[0].image.shape:
            yield batch
            batch = []
        batch.append(item)
        if len(batch) == most:  # without waiting for the next item
            yield batch
            batch = []
    if batch:
        yield batch


def at_once(batches: Iterable[T], begin: Callable[[T], Begun]) -> Generator[tuple[T, Begun], None, None]:
    for batch in batches:
        yield batch, begin(batch)


def one_ahead(batches: Iterable[T], begin: Callable[[T], Begun]) -> Generator[tuple[T, Begun], None, None]:
    """Every batch with begin(batch), which is called before the batch before it is given away."""
    waiting: tuple[T, Begun] | None = None
    for batch in batches:
        following = batch, begin(batch)
        if waiting is not None:
            yield waiting
        waiting = following
    if waiting is not None:
        yield waiting
