"""Augmentation: a random window of the image becomes a training sample.

Only the window is resized, image and label on one grid. albumentations 2.0.8, which changes the colours, gives every
loader worker the same random numbers and repeats them every epoch; so its generator is seeded anew for every sample.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import cv2
import numpy as np

from segtrain.config import IGNORE_INDEX, AugmentationConfig
from segtrain.data.extra_transforms import FILL, Extra, set_random


class Span(NamedTuple):
    """One axis: pixels start .. start + length - 1 of the image become place .. place + size - 1 of the crop."""

    start: int
    length: int
    place: int
    size: int


class Augmentation:
    """Random scale, crop, flip, colours and `extra`: image uint8 (H, W, C), labels uint8 (H, W) -> the same at
    crop_size.

    A pure function of the inputs and `seed`. Images smaller than the window are padded on random sides: with FILL in
    the image, with IGNORE_INDEX in the labels. UsageError for an entry of `extra` that is unknown or breaks labels.
    """

    def __init__(self, config: AugmentationConfig) -> None:
        self.config = config
        self.colors: Any = None  # built where it runs: importing it takes a second
        self.extra = [Extra(entry, config.crop_size) for entry in config.extra]

    def __call__(
        self, image: np.ndarray, labels: np.ndarray, seed: tuple[int, ...],
        encode: Callable[[np.ndarray], np.ndarray] | None = None, focus: tuple[int, int] | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
        """encode: maps the labels in the window to train ids. focus: (row, column) that the window must contain."""
        rng = np.random.default_rng(np.random.SeedSequence(seed))
        rows, columns, flip = self.draw(image.shape, rng, focus)
        window = np.s_[rows.start : rows.start + rows.length, columns.start : columns.start + columns.length]
        target = np.ascontiguousarray(labels[window])
        sample = resize_window(image[window], rows, columns, self.config.crop_size, cv2.INTER_LINEAR, fill_of(image))
        if encode is not None:
            target = encode(target)
        target = resize_window(target, rows, columns, self.config.crop_size, cv2.INTER_NEAREST_EXACT, IGNORE_INDEX)
        if flip:
            sample, target = with_axes(cv2.flip(sample, 1), image), cv2.flip(target, 1)
        if self.config.color > 0:
            sample = self.recolored(sample, rng)
        for extra in self.extra:
            sample, target = extra(sample, target, rng)
        return sample, target

    def draw(
        self, shape: tuple[int, ...], rng: np.random.Generator, focus: tuple[int, int] | None
    ) -> tuple[Span, Span, bool]:
        """(rows, columns, mirrored?): the window in an image of that shape."""
        scale = rng.uniform(self.config.scale[0], self.config.scale[1])
        rows, columns = (
            draw_span(shape[axis], self.config.crop_size[axis], scale, rng, None if focus is None else focus[axis])
            for axis in (0, 1)
        )
        return rows, columns, bool(rng.random() < self.config.flip)

    def window(self, shape: tuple[int, ...], seed: tuple[int, ...], focus: tuple[int, int] | None) -> list[int]:
        """[top, left, height, width, mirrored?] in pixels of the image: the window of a call with these arguments."""
        rows, columns, flip = self.draw(shape, np.random.default_rng(np.random.SeedSequence(seed)), focus)
        return [rows.start, columns.start, rows.length, columns.length, int(flip)]

    def recolored(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        if self.colors is None:
            import albumentations

            most = self.config.color
            jitter = albumentations.ColorJitter(
                (1 - most, 1 + most), (1 - most, 1 + most), (1 - most, 1 + most), (0, 0), p=1
            )
            self.colors = albumentations.Compose([jitter])
        set_random(self.colors, rng)
        result: np.ndarray = self.colors(image=image)["image"]
        return result


def fill_of(image: np.ndarray) -> tuple[int, ...]:
    """What surrounds an image (H, W, C): FILL, or its mean in every channel where they are not red, green and blue."""
    channels = image.shape[2]
    return FILL if channels == 3 else (round(sum(FILL) / 3),) * channels


def with_axes(result: np.ndarray, given: np.ndarray) -> np.ndarray:
    """What OpenCV made of an array, with the last axis that it drops from (H, W, 1)."""
    return result[..., None] if result.ndim < given.ndim else result


def draw_span(extent: int, crop: int, scale: float, rng: np.random.Generator, focus: int | None) -> Span:
    """A window that is `crop` pixels when enlarged by `scale`, anywhere in 0 .. extent - 1, or around `focus`."""
    length = max(1, round(crop / scale))
    if length <= extent:
        first, last = 0, extent - length
        if focus is not None:
            first, last = max(first, focus - length + 1), min(last, focus)
        return Span(int(rng.integers(first, last + 1)), length, 0, crop)
    size = min(crop, max(1, round(crop * extent / length)))
    return Span(0, extent, int(rng.integers(0, crop - size + 1)), size)


def resize_window(
    window: np.ndarray, rows: Span, columns: Span, crop: list[int], interpolation: int, fill: int | tuple[int, ...]
) -> np.ndarray:
    """The window at the size of the crop, padded with `fill` where it is smaller."""
    size = (columns.size, rows.size)
    content = with_axes(cv2.resize(window, size, interpolation=interpolation), window)
    if [rows.size, columns.size] == crop:
        return content
    result = np.full((*crop, *content.shape[2:]), fill, np.uint8)
    result[rows.place : rows.place + rows.size, columns.place : columns.place + columns.size] = content
    return result
