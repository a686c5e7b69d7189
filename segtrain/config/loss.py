"""Options of the loss: loss.*"""

from dataclasses import dataclass
from math import inf
from typing import Any, ClassVar

from segtrain.config.options import Group, option, require

LOSSES = ("cross_entropy", "bootstrapped", "max_pooling", "focal", "dice", "lovasz")


@dataclass
class LossConfig(Group):
    PREFIX: ClassVar[str] = "loss."

    name: str = option("cross_entropy", "loss function", choices=LOSSES)
    hardest: float = option(
        1.0, "fraction of an image's pixels that counts, the hardest ones", above=0, high=1,
        only=("bootstrapped", "max_pooling"),
    )  # fmt: skip
    normalisation: str = option(
        "chosen", "mean over all images at once, or per image as in mapillary/seamseg",
        choices=("chosen", "seamseg"), only=("bootstrapped",),
    )  # fmt: skip
    select: str = option(
        "image", "set among which the hardest pixels are chosen; batch: one process only",
        choices=("image", "batch"), only=("bootstrapped",),
    )  # fmt: skip
    p: float = option(
        1.0,
        "norm of the pixels' weights; 1: only the hardest count, .inf: all",
        low=1,
        limit=inf,
        only=("max_pooling",),
    )
    gamma: float = option(
        2.0, "exponent of 1 - probability, which weighs easy pixels down", low=0, below=inf, limit=1000, only=("focal",)
    )
    class_weights: Any = option(
        None, "weight of each class; auto: inverse to its pixels; null: equal weights", choices=("auto",),
        other="[NUMBER,...]", low=0, below=inf, limit=1e9,
        only=("cross_entropy", "focal", "bootstrapped", "max_pooling"),
    )  # fmt: skip
    label_smoothing: float = option(
        0.0, "fraction of the target spread evenly over all classes", low=0, below=1,
        only=("cross_entropy", "bootstrapped", "max_pooling"),
    )  # fmt: skip
    options: dict[str, Any] = option({}, "arguments of a plugin's loss, {key: value}", only=())

    def check(self) -> None:
        super().check()
        require(
            self.select == "image" or self.normalisation == "chosen", "loss.select", self.select,
            "loss.normalisation=seamseg is a mean per image; choose image",
        )  # fmt: skip
        weights = self.class_weights
        require(
            weights is None or weights == "auto" or isinstance(weights, list), "loss.class_weights", weights,
            "give auto, null, or a list of one number for each class",
        )  # fmt: skip
        if isinstance(weights, list):
            require(any(weights), "loss.class_weights", self.class_weights, "give at least one above 0")
