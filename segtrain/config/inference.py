"""Options of inference: inference.*"""

from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

from segtrain.config.dataset import SIZE
from segtrain.config.options import LARGEST_SIZE, Group, as_written, default_of, option, require

LARGEST_BATCH = 4096
VIEWS = 32  # of images, in classification
ONLY_SPEED = {"batch_size", "compile"}  # options that change results by rounding at most


@dataclass
class InferenceConfig(Group):
    PREFIX: ClassVar[str] = "inference."

    name: str = option("whole", "name of the evaluation's folder, set by inference=NAME", component=True)
    scales: list[float] = option(
        [1.0], "scales of the image whose class probabilities are averaged", above=0, limit=100
    )
    flip: bool = option(False, "average with the horizontally flipped image")
    tile: list[int] | None = option(
        None,
        "height and width of a tile [pixels]; null: the whole image at once",
        items=SIZE,
        low=32,
        limit=LARGEST_SIZE,
    )
    overlap: float = option(0.25, "minimum overlap of neighbouring tiles [fraction of a tile]", low=0, below=1)
    longest_side: int | None = option(
        None, "longer side of the image as the network sees it [pixels]; null: unchanged", low=32, limit=LARGEST_SIZE
    )
    resize: int | None = option(
        None, "shorter side of the image, in classification [pixels]", low=1, limit=LARGEST_SIZE
    )
    crop: int | None = option(None, "side of the central square, in classification [pixels]", low=1, limit=LARGEST_SIZE)
    crops: str = option("center", "crops per image, in classification; ten: with flips", choices=("center", "ten"))
    precision: str = option(
        "fp32", "precision of the network; weights and logits stay float32", choices=("fp32", "bf16", "fp16")
    )

    batch_size: int | None = option(
        None, "images or tiles per call of the network; null: 1, in classification 32", low=1, limit=LARGEST_BATCH
    )

    compile: bool = option(False, "compile the network by torch.compile, which takes minutes at first")

    def __str__(self) -> str:
        """'inference whole in fp32', or 'inference whole (scales=[0.45] flip=true) in fp32'."""
        plain = {item.name: default_of(item) for item in fields(self)}
        seen = ("scales", "flip", "tile", "longest_side")
        chosen = [f"{key}={as_written(getattr(self, key))}" for key in seen if getattr(self, key) != plain[key]]
        how = f"{self.name} ({' '.join(chosen)})" if chosen else self.name
        batch = "" if self.batch_size is None else f", in batches of {self.batch_size}"
        return f"inference {how} in {self.precision}{batch}{', compiled' if self.compile else ''}"

    def together(self) -> int:
        """Images, tiles or, in classification, views that go through the network at a time, at most."""
        return self.batch_size or (1 if self.crop is None else VIEWS)

    def stated(self) -> dict[str, Any]:
        """As results state it: without what changes no score, and without the precision where it is fp32, which all
        had before there was a choice."""
        stated = {key: value for key, value in asdict(self).items() if key not in ONLY_SPEED}
        return {key: value for key, value in stated.items() if (key, value) != ("precision", "fp32")}

    def execution(self) -> dict[str, Any]:
        """How the network was called, as the protocol of an evaluation states it; nothing by default."""
        batch = {} if self.batch_size is None else {"batch_size": self.batch_size}
        return batch | ({"compiled": True} if self.compile else {})

    def check(self) -> None:
        super().check()
        require(len(self.scales) >= 1, "inference.scales", self.scales, "give one or more positive numbers")
        classification = self.crop is not None
        require(
            classification == (self.resize is not None), "inference.resize", self.resize,
            "set inference.resize and inference.crop, or neither",
        )  # fmt: skip
        if self.crop is not None and self.resize is not None:
            require(
                32 <= self.crop <= self.resize, "inference.crop", self.crop, "give 32 or more, at most inference.resize"
            )
            for key, unread in (("scales", [1.0]), ("flip", False), ("tile", None), ("longest_side", None)):
                value = getattr(self, key)
                require(
                    value == unread, f"inference.{key}", value,
                    "it is for segmentation; with inference.crop leave it out",
                )  # fmt: skip
        require(classification or self.crops == "center", "inference.crops", self.crops, "it needs inference.crop")
        require(
            self.tile is not None or self.overlap == 0.25, "inference.overlap", self.overlap,
            "without tiles nothing reads it; leave it at 0.25, or give inference.tile=[height,width]",
        )  # fmt: skip
        if self.tile is not None:
            whole = all(extent % 32 == 0 for extent in self.tile)
            require(whole, "inference.tile", self.tile, "give multiples of 32: tiles must meet the network's cells")
