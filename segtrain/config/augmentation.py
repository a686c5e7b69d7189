"""Options of the augmentation of training samples: augmentation.*"""

from dataclasses import dataclass
from typing import Any, ClassVar

from segtrain.config.dataset import SIZE
from segtrain.config.options import LARGEST_SIZE, Group, option, require

RANGE = ("least", "most")


@dataclass
class AugmentationConfig(Group):
    PREFIX: ClassVar[str] = "augmentation."

    name: str = option(
        "segmentation", "kind of augmentation, set by augmentation=NAME", choices=("segmentation", "imagenet")
    )
    crop_size: list[int] = option(
        [512, 512], "height and width of a training crop [pixels]", items=SIZE, low=32, limit=LARGEST_SIZE
    )
    scale: list[float] = option(
        [0.7, 2.0], "range of the random enlargement before cropping, uniform", items=RANGE, above=0, limit=100,
        ascending=True, only=("segmentation",),
    )  # fmt: skip
    flip: float = option(0.5, "probability of a horizontal flip", low=0, high=1)
    area: list[float] = option(
        [0.08, 1.0], "range of the fraction of the image that is shown, uniform", items=RANGE, above=0, high=1,
        ascending=True, only=("imagenet",),
    )  # fmt: skip
    aspect: list[float] = option(
        [0.75, 1.3333333333], "range of the crop's width / height, log-uniform", items=RANGE, above=0, limit=1000,
        ascending=True, only=("imagenet",),
    )  # fmt: skip
    lighting: float = option(
        0.0,
        "standard deviation of the shift along the principal components of colour",
        low=0,
        limit=100,
        only=("imagenet",),
    )
    color: float = option(0.0, "maximum change of brightness, contrast and saturation [fraction]", low=0, below=1)
    extra: list[Any] = option(
        [], "albumentations transforms applied last, [{name: GaussianBlur, p: 0.3}, ...]", only=("segmentation",)
    )

    def check(self) -> None:
        super().check()
        # Names and arguments of transforms are checked where albumentations is imported.
        for entry in self.extra:
            named = isinstance(entry, dict) and isinstance(entry.get("name"), str)
            require(named, "augmentation.extra", entry, "give mappings with the name of a transform of albumentations")
