"""Views of an image that is classified as a whole: a random one to train on, fixed ones for evaluation."""

import math
from typing import NamedTuple

import numpy as np
from PIL import Image

from segtrain.config import AugmentationConfig, InferenceConfig

GREY = np.array([0.299, 0.587, 0.114], np.float32)
# Principal components of ImageNet's colours, on a scale of 0 to 1: Krizhevsky et al. 2012 as fb.resnet.torch has them.
DEVIATIONS = np.array([0.2175, 0.0188, 0.0045])
COMPONENTS = np.array([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])


class View(NamedTuple):
    """A window of an image in pixels, and whether it is mirrored."""

    top: int
    left: int
    height: int
    width: int
    mirrored: bool


class RandomView:
    """A random window at crop_size, mirrored or not, its colours changed: uint8 (H, W, 3) -> float32 (h, w, 3).

    Values are on a scale of 0 to 255 and, as published, neither rounded nor clipped after their colours were changed
    (inplace_abn v0.1.1, imagenet/: RandomResizedCrop with torchvision's defaults, ColorJitter of 0.4, Lighting of 0.1).
    A pure function of the image and `seed`.
    """

    def __init__(self, config: AugmentationConfig) -> None:
        self.config = config

    def __call__(self, image: np.ndarray, seed: tuple[int, ...]) -> tuple[np.ndarray, View]:
        rng = np.random.default_rng(np.random.SeedSequence(seed))
        view = self.draw(image.shape[0], image.shape[1], rng)
        height, width = self.config.crop_size
        window = image[view.top : view.top + view.height, view.left : view.left + view.width]
        seen = resize_image(window, height, width)
        if view.mirrored:
            seen = seen[:, ::-1]
        return self.lit(self.recolored(seen.astype(np.float32), rng), rng), view

    def draw(self, height: int, width: int, rng: np.random.Generator) -> View:
        """Area and aspect ratio uniform, the latter on a logarithmic scale; the middle if ten trials do not fit."""
        config = self.config
        low, high = config.aspect
        mirrored = bool(rng.random() < config.flip)
        for _ in range(10):
            area = height * width * rng.uniform(config.area[0], config.area[1])
            aspect = math.exp(rng.uniform(math.log(low), math.log(high)))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                top, left = int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1))
                return View(top, left, h, w, mirrored)
        h, w = min(height, max(1, round(width / low))), min(width, max(1, round(height * high)))
        return View((height - h) // 2, (width - w) // 2, h, w, mirrored)

    def recolored(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Saturation, brightness and contrast, in random order, each by a factor within 1 - color .. 1 + color."""
        color = self.config.color
        if color == 0:
            return image
        for change in rng.permutation(3):
            factor = np.float32(rng.uniform(1 - color, 1 + color))
            other: np.ndarray = np.zeros((), np.float32)  # brightness
            if change == 1:  # saturation
                other = (image @ GREY)[..., None]
            elif change == 2:  # contrast
                other = (image @ GREY).mean()
            image = factor * image + (1 - factor) * other
        return image

    def lit(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Along the principal components of ImageNet's colours, by normal deviates of deviation `lighting`."""
        shift = COMPONENTS @ (DEVIATIONS * rng.normal(0, 1, 3) * self.config.lighting) * 255
        return np.ascontiguousarray(image + shift.astype(np.float32))


def resize_image(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize by Pillow, bilinear, which averages all pixels when it shrinks."""
    return np.asarray(Image.fromarray(np.ascontiguousarray(image)).resize((width, height), Image.Resampling.BILINEAR))


def crop_views(image: np.ndarray, options: InferenceConfig) -> np.ndarray:
    """uint8 (H, W, 3) -> (n, crop, crop, 3): the centre, or the centre and the four corners, each mirrored too.

    The shorter side is first resized to `resize` by Pillow; sizes are truncated and the centre is rounded as in
    torchvision. `InferenceConfig` makes sure that the crop fits: crop <= resize.
    """
    assert options.crop is not None and options.resize is not None
    height, width = image.shape[:2]
    short = min(height, width)
    image = resize_image(image, int(options.resize * height / short), int(options.resize * width / short))
    room = image.shape[0] - options.crop, image.shape[1] - options.crop
    corners = [(round(room[0] / 2), round(room[1] / 2))]
    if options.crops == "ten":
        corners += [(0, 0), (0, room[1]), (room[0], 0), room]
    sides = [image, image[:, ::-1]] if options.crops == "ten" else [image]  # as torchvision: mirrored, then cut
    return np.stack([s[top : top + options.crop, left : left + options.crop] for s in sides for top, left in corners])
