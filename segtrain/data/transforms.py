"""Augmentation: the only importer of albumentations, with its randomness and its label rules put right.

albumentations 2.0.8 gives every loader worker the same random numbers, repeats them every epoch, and with `seed=k` lets
all transforms of a pipeline draw the same ones. So the generator is set anew for every sample here, one for the whole
pipeline. Labels are resized to the nearest pixel on the image's own grid and filled with IGNORE, never with class 0.
"""

import random
import warnings

import albumentations
import cv2
import numpy as np

from segtrain.config import AugmentationConfig
from segtrain.data.labels import IGNORE

FILL = (124.0, 116.0, 104.0)  # the ImageNet mean in grey levels: padding that normalises to about 0


class Augmentation:
    """Random scale, crop and flip: image uint8 (H, W, 3), target uint8 (H, W) -> the same at crop_size.

    A pure function of the inputs and `seed`. Pictures smaller than the crop are padded, on random sides.
    """

    def __init__(self, config: AugmentationConfig) -> None:
        height, width = config.crop_size
        least, most = config.scale
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a misspelt argument is only warned about, and ignored
            steps = [
                albumentations.RandomScale(
                    (least - 1, most - 1), cv2.INTER_LINEAR, cv2.INTER_NEAREST_EXACT, area_for_downscale="image", p=1
                ),
                albumentations.PadIfNeeded(
                    height, width, position="random", border_mode=cv2.BORDER_CONSTANT, fill=FILL, fill_mask=IGNORE, p=1
                ),
                albumentations.RandomCrop(height, width, p=1),
                albumentations.HorizontalFlip(p=config.flip),
            ]
            self.pipeline = albumentations.Compose(steps)

    def __call__(self, image: np.ndarray, target: np.ndarray, seed: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        first, second = np.random.SeedSequence(seed).generate_state(2, np.uint64)
        self.pipeline.set_random_state(np.random.default_rng(first), random.Random(int(second)))
        result = self.pipeline(image=image, mask=target)
        return result["image"], result["mask"]
