"""Options of the loss: loss.*"""

from dataclasses import dataclass
from typing import Any

from segtrain.config.options import option, refuse_unread, require


@dataclass
class LossConfig:
    name: str = option(
        "cross_entropy", "cross_entropy | bootstrapped | max_pooling | focal | dice | lovasz, or one of a plugin"
    )
    hardest: float = option(
        1.0, "bootstrapped, max_pooling: share of a picture's pixels, the hardest ones, that counts; 1 = all"
    )
    normalisation: str = option(
        "chosen", "bootstrapped: chosen, over the chosen pixels of all pictures, ignored ones not part of the share | "
        "seamseg, per picture, ignored ones part of it with loss 0",
    )  # fmt: skip
    select: str = option("image", "bootstrapped: hardest pixels of each image | of the batch, one process only")
    p: float = option(1.0, "max_pooling: norm of the pixels' weights, 1 = only the hardest share counts, to .inf = all")
    gamma: float = option(2.0, "focal: power of 1 - probability that weighs a pixel down")
    class_weights: list[float] | None = option(
        None, "cross_entropy, focal: weight of each class, for a weighted mean over the pixels; null: all alike"
    )
    label_smoothing: float = option(
        0.0, "cross_entropy, bootstrapped, max_pooling: share of the target spread evenly over all classes"
    )
    options: dict[str, Any] = option({}, "arguments of a plugin's loss")

    def check(self) -> None:
        read = {
            "cross_entropy": ("class_weights", "label_smoothing"),
            "bootstrapped": ("hardest", "normalisation", "select", "label_smoothing"),
            "max_pooling": ("hardest", "p", "label_smoothing"),
            "focal": ("gamma", "class_weights"),
            "dice": (),
            "lovasz": (),
        }
        # Names are checked by losses.build_loss: a plugin's loss may read whatever there is.
        refuse_unread(self, "loss", self.name, read)
        require(0 < self.hardest <= 1, "loss.hardest", self.hardest, "give a share above 0 and at most 1")
        for key, known in (("normalisation", ("chosen", "seamseg")), ("select", ("image", "batch"))):
            require(getattr(self, key) in known, f"loss.{key}", getattr(self, key), f"choose {' or '.join(known)}")
        require(
            self.select == "image" or self.normalisation == "chosen", "loss.select", self.select,
            "loss.normalisation=seamseg is a mean per image; choose image",
        )  # fmt: skip
        require(self.p >= 1, "loss.p", self.p, "give 1 or more, up to .inf")
        require(0 <= self.gamma < float("inf"), "loss.gamma", self.gamma, "give 0 or more")
        require(0 <= self.label_smoothing < 1, "loss.label_smoothing", self.label_smoothing, "give 0 or more, below 1")
        if self.class_weights is not None:
            weights = self.class_weights
            sound = all(0 <= weight < float("inf") for weight in weights) and any(weights)
            require(sound, "loss.class_weights", weights, "give one number of 0 or more for each class, not all 0")
