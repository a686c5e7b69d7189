"""Options of the training samples: augmentation.*, sampling.*, loader.*"""

import os
from dataclasses import dataclass
from typing import Any

from segtrain.config.options import option, refuse_unread, require, require_size
from segtrain.threads import cpus


@dataclass
class AugmentationConfig:
    name: str = option("segmentation", "segmentation | imagenet, for whole pictures; set by augmentation=...")
    crop_size: list[int] = option([512, 512], "[height,width] in pixels of a training sample")
    scale: list[float] = option([0.7, 2.0], "[least,most] random enlargement before the crop, uniform")
    flip: float = option(0.5, "probability of a mirror image")
    area: list[float] = option([0.08, 1.0], "imagenet: [least,most] share of the picture that is shown, uniform")
    aspect: list[float] = option([0.75, 1.3333333333], "imagenet: [least,most] width / height of that, log-uniform")
    lighting: float = option(0.0, "imagenet: deviation of the shift along the principal components of its colours")
    color: float = option(
        0.0, "most change of brightness, contrast and saturation, as a share: 0.2 is 0.8 to 1.2 times"
    )
    extra: list[Any] = option(
        [], "transforms of albumentations after that, [{name: GaussianBlur, p: 0.3, blur_limit: [3,7]}, ...]"
    )

    def check(self) -> None:
        read = {"segmentation": ("scale", "extra"), "imagenet": ("area", "aspect", "lighting")}
        require(self.name in read, "augmentation.name", self.name, "choose segmentation or imagenet")
        refuse_unread(self, "augmentation", self.name, read)
        shares = len(self.area) == 2 and 0 < self.area[0] <= self.area[1] <= 1
        require(shares, "augmentation.area", self.area, "give [least,most], both above 0 and at most 1")
        positive = len(self.aspect) == 2 and 0 < self.aspect[0] <= self.aspect[1]
        require(positive, "augmentation.aspect", self.aspect, "give [least,most], both positive")
        require(self.lighting >= 0, "augmentation.lighting", self.lighting, "give 0 or more")
        require_size("augmentation.crop_size", self.crop_size, 32)
        ordered = len(self.scale) == 2 and 0 < self.scale[0] <= self.scale[1]
        require(ordered, "augmentation.scale", self.scale, "give [least,most], both positive")
        require(0 <= self.flip <= 1, "augmentation.flip", self.flip, "give a probability")
        require(0 <= self.color < 1, "augmentation.color", self.color, "give a share of 0 or more, less than 1")
        # Transforms and their arguments are checked where albumentations is known, in data/transforms.py.
        for entry in self.extra:
            named = isinstance(entry, dict) and isinstance(entry.get("name"), str)
            require(named, "augmentation.extra", entry, "give mappings with the name of a transform of albumentations")


@dataclass
class SamplingConfig:
    class_uniform: float = option(0.0, "share of the crops drawn by class: a class, a picture with it, a pixel of it")

    def check(self) -> None:
        share = 0 <= self.class_uniform <= 1
        require(share, "sampling.class_uniform", self.class_uniform, "give a share from 0 to 1")


@dataclass
class LoaderConfig:
    workers: int | None = option(
        None, "loader processes of each process, 0 = none; default: one per CPU, shared by the processes of a machine"
    )
    prefetch: int = option(4, "batches that every loader process reads ahead")

    def check(self) -> None:
        require(self.workers is None or self.workers >= 0, "loader.workers", self.workers, "give 0 or more")
        require(self.prefetch >= 1, "loader.prefetch", self.prefetch, "give 1 or more")

    def count(self) -> int:
        """Processes to start."""
        here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return max(1, cpus() // here) if self.workers is None else self.workers
