"""Options of inference and of what a training records: inference.*, logging.*"""

import importlib.util
import sys
from dataclasses import dataclass

from segtrain.config.options import option, require, require_size


def installed(module: str) -> bool:
    """Whether it can be imported, without doing that."""
    if module in sys.modules:
        return sys.modules[module] is not None
    return importlib.util.find_spec(module) is not None


@dataclass
class InferenceConfig:
    name: str = option("whole", "names the folder of an evaluation; set by inference=...")
    scales: list[float] = option([1.0], "enlargements whose class probabilities are averaged")
    flip: bool = option(False, "average with the mirrored picture too")
    tile: list[int] | None = option(None, "[height,width] in pixels of a window; null: the whole picture at once")
    overlap: float = option(0.25, "least share of a window that its neighbour covers too")
    longest_side: int | None = option(
        None,
        "pixels that pictures are brought to, small ones too; answers go back to their own size; null: as they are",
    )
    resize: int | None = option(None, "whole pictures: length that the shorter side is made, in pixels")
    crop: int | None = option(None, "whole pictures: side of the square that is looked at, in pixels")
    crops: str = option("center", "whole pictures: center | ten, the corners and mirror images too")

    def check(self) -> None:
        require(self.crops in ("center", "ten"), "inference.crops", self.crops, "choose center or ten")
        whole_pictures = self.crop is not None
        require(
            whole_pictures == (self.resize is not None), "inference.resize", self.resize,
            "set inference.resize and inference.crop, or neither",
        )  # fmt: skip
        if self.crop is not None and self.resize is not None:
            require(
                32 <= self.crop <= self.resize, "inference.crop", self.crop, "give 32 or more, at most inference.resize"
            )
            for key, unread in (("scales", [1.0]), ("flip", False), ("tile", None), ("longest_side", None)):
                value = getattr(self, key)
                require(
                    value == unread, f"inference.{key}", value, "it is for pixels; with inference.crop leave it out"
                )
        require(whole_pictures or self.crops == "center", "inference.crops", self.crops, "it needs inference.crop")
        positive = len(self.scales) >= 1 and min(self.scales) > 0
        require(positive, "inference.scales", self.scales, "give one or more positive numbers")
        require(0 <= self.overlap < 1, "inference.overlap", self.overlap, "give 0 or more, less than 1")
        require(
            self.tile is not None or self.overlap == 0.25, "inference.overlap", self.overlap,
            "without windows nothing reads it; leave it at 0.25, or give inference.tile=[height,width]",
        )  # fmt: skip
        least = self.longest_side is None or self.longest_side >= 32
        require(least, "inference.longest_side", self.longest_side, "give 32 or more, or null")
        if self.tile is not None:
            require_size("inference.tile", self.tile, 32)
            whole = all(extent % 32 == 0 for extent in self.tile)
            require(whole, "inference.tile", self.tile, "give multiples of 32: windows must meet the network's cells")


@dataclass
class LoggingConfig:
    every: int = option(20, "steps between lines of progress")
    pictures: int = option(6, "validation pictures drawn (image | target | prediction)")
    wandb: bool = option(False, "also to Weights & Biases; WANDB_MODE=offline keeps it in the run folder")
    mlflow: bool = option(False, "also to MLflow, where MLFLOW_TRACKING_URI says, else in the folder mlruns")
    project: str = option("segtrain", "wandb's project, MLflow's experiment")

    def check(self) -> None:
        for name, package in (("wandb", "wandb"), ("mlflow", "mlflow-skinny")):
            missing = getattr(self, name) and not installed(name)
            require(not missing, f"logging.{name}", "true", f"the package is not installed: pip install {package}")
        require(self.every >= 1, "logging.every", self.every, "give 1 or more")
        require(self.pictures >= 0, "logging.pictures", self.pictures, "give 0 or more")
