"""The golden recipe: a small training on street scenes, whose course is recorded in golden.json.

    python -m tests.helpers.golden record [--seeds 0 1 2 ...] # trains once a seed and writes the record
    python -m tests.helpers.golden check [key=value ...]      # trains once: is it inside the band? exit status 1 if not
    python -m tests.helpers.golden variants [--only bits]     # ... by every form of the layer: the README's table

The network has the blocks of ResNet and WideResNet and the DeepLabV3+ head. It sees images at a fifth of their size.
"""

import argparse
import contextlib
import io
import json
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import segtrain
from segtrain.abn import describe_backend
from segtrain.config import IGNORE_INDEX, TrainConfig, run_folder
from segtrain.data.augment import Augmentation
from segtrain.data.loader import TrainingData, training_batches
from segtrain.data.order import MicroBatches
from segtrain.data.registry import label_table, split_samples
from segtrain.models import BACKBONES
from segtrain.models.blocks import Backbone, IdentityResidualBlock, Norm, ResidualBlock, conv, stage
from segtrain.models.preprocess import normalise_images

RECORD = Path(__file__).with_name("golden.json")
RECIPE = [
    "dataset=streets", "dataset.scenes=16", "dataset.val_scenes=6", "dataset.cache=decoded", "model.backbone=narrow",
    "model.head=deeplabv3plus", "model.output_stride=8", "model.head_channels=32", "loss=cross_entropy",
    "optimizer.lr=0.05", "augmentation.crop_size=[48,96]", "augmentation.scale=[0.15,0.26]",
    "inference.scales=[0.19]", "trainer.batch_size=8", "trainer.epochs=null", "trainer.max_steps=150",
    "trainer.validate_every=150", "trainer.save_every=150", "loader.workers=0", "logging.every=30",
    "logging.pictures=0", "device=cpu",
]  # fmt: skip
# A figure's band is its mean over the recorded seeds, and so many standard deviations to either side: of ten seeds, one
# new figure in a thousand falls outside, and a run has a dozen, most of which go together.
DEVIATIONS = 5
CROPS = 32  # of each split, always the same, on which a trained network is measured
MOVED = 4  # pixels by which labels are moved to see where the answers sit
VARIANTS = {
    "BatchNorm + LeakyReLU": ["model.norm=batch_norm"],
    "ABN": ["model.norm=abn"],
    "In-Place ABN I": ["model.norm=inplace_abn"],
    "In-Place ABN II": ["model.norm=inplace_abn", "model.norm_variant=two"],
    "checkpointing, figure 2b": ["model.norm=abn", "model.recompute=norm"],
    "checkpointing, figure 2c": ["model.norm=abn", "model.recompute=norm_proposed"],
    "In-Place ABN I, recomputed blocks": ["model.norm=inplace_abn", "model.recompute=blocks"],
}
ROUNDED = {  # not alike in float64, because backward sees rounded outputs
    "In-Place ABN I, outputs in 8 bits": ["model.norm=inplace_abn", "model.keep=8bit"],
    "In-Place ABN I, outputs in 4 bits": ["model.norm=inplace_abn", "model.keep=4bit"],
}


class Narrow(Backbone):
    """Both kinds of residual blocks, in three modules with these numbers of blocks: (N, 3, H, W) -> (N, 64, h, w)."""

    low_channels = 16

    def __init__(self, norm: Norm, output_stride: int, blocks: int = 2) -> None:
        super().__init__()
        last, dilation = output_stride // 8, 16 // output_stride
        again = range(blocks - 1)
        self.mod1 = nn.Sequential(conv(3, 16, 3, 2), norm(16))
        self.mod2 = stage(ResidualBlock(16, (16, 16), norm, 2), *(ResidualBlock(16, (16, 16), norm) for _ in again))
        self.mod3 = stage(
            IdentityResidualBlock(16, (32, 32), norm, 2), *(IdentityResidualBlock(32, (32, 32), norm) for _ in again)
        )
        self.mod4 = stage(
            IdentityResidualBlock(32, (64, 64), norm, last, dilation),
            *(IdentityResidualBlock(64, (64, 64), norm, 1, dilation) for _ in again),
        )
        self.bn_out = norm(64)
        self.out_channels = 64


@contextlib.contextmanager
def narrow():
    """Inside, model.backbone=narrow exists."""
    BACKBONES["narrow"] = Narrow
    try:
        yield
    finally:
        del BACKBONES["narrow"]


# ------------------------------------------------------------------------------------------------ one training


def train(root: Path, run: Path, *overrides: str) -> TrainConfig:
    """Train by the recipe on the scenes in `root`, which are drawn if they are missing."""
    with narrow():
        config = segtrain.compose(*RECIPE, f"dataset.root={root}", f"run={run}", *overrides)
        segtrain.train(config)
    return config


def figures(config: TrainConfig) -> dict[str, float]:
    """Figures of a finished run, and of its network's predictions on fixed crops of both splits."""
    run = run_folder(config)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = {f"loss, steps to {line['step']}": line["train/loss"] for line in lines if "train/loss" in line}
    result = json.loads((run / "evaluation.json").read_text())
    found |= {"val mIoU": result["miou"], "val pixel accuracy": result["pixel_accuracy"]}
    with narrow():
        trained = segtrain.load(run / "last.pt", config.device)
    found["weight norm"] = float(nn.utils.get_total_norm(list(trained.network.parameters())))
    for split in ("train", "val"):
        images, targets = crops(config, split)
        with torch.inference_mode():
            ready = normalise_images(images.to(trained.device), config.model.mean, config.model.std)
            logits = trained.network(ready).cpu()
        found[f"{split} loss"] = float(F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX))  # torch's, not ours
        if split == "train":
            found |= places(logits, targets)
    return found


def crops(config: TrainConfig, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """images uint8 (CROPS, 3, h, w) and targets int64 (CROPS, h, w), drawn as for training."""
    augmentation = Augmentation(config.augmentation)
    data = TrainingData(split_samples(config.dataset, split), label_table(config.dataset), augmentation, seed=1000)
    batch = next(training_batches(data, MicroBatches(CROPS, 0, 1), workers=0, pin_memory=False))[0]
    return batch.images, batch.targets.long()


def places(logits: torch.Tensor, targets: torch.Tensor) -> dict[str, float]:
    """Where the answers sit, told on the pixels where labels moved one way differ from labels moved the other way: how
    much lower the loss is for those moved right than left, and down than up; and the share that fits mirrored labels
    better than the true ones. And how probable the first class, road, is where there is no label."""

    def gain(labels: torch.Tensor, opposite: torch.Tensor) -> torch.Tensor:
        one, other = (
            F.cross_entropy(logits, t, ignore_index=IGNORE_INDEX, reduction="none") for t in (labels, opposite)
        )
        differ = (labels != opposite) & (labels != IGNORE_INDEX) & (opposite != IGNORE_INDEX)
        inner = (..., slice(MOVED, -MOVED), slice(MOVED, -MOVED))
        return (other - one)[inner][differ[inner]]

    return {
        "labels to the right": float(gain(targets.roll(MOVED, 2), targets.roll(-MOVED, 2)).mean()),
        "labels down": float(gain(targets.roll(MOVED, 1), targets.roll(-MOVED, 1)).mean()),
        "labels mirrored": float((gain(targets.flip(2), targets) > 0).float().mean()),
        "road where ignored": float(logits.softmax(1)[:, 0][targets == IGNORE_INDEX].mean()),
    }


# ------------------------------------------------------------------------------------------------ the band


def recorded() -> dict[str, dict[str, float]]:
    """seed -> its figures"""
    content = json.loads(RECORD.read_text())
    assert content["recipe"] == RECIPE, f"another recipe was recorded: {content['how']}"
    seeds: dict[str, dict[str, float]] = content["seeds"]
    return seeds


def band(seeds: list[dict[str, float]]) -> dict[str, tuple[float, float]]:
    """figure -> (least, most)"""
    result = {}
    for name in seeds[0]:
        values = [seed[name] for seed in seeds]
        mean, reach = statistics.fmean(values), DEVIATIONS * statistics.stdev(values)
        result[name] = mean - reach, mean + reach
    return result


def outside(found: dict[str, float], allowed: dict[str, tuple[float, float]]) -> dict[str, float]:
    """The figures outside the band, with their distance from its middle in half widths; NaN is outside."""
    assert found.keys() == allowed.keys()
    distances = {name: (found[name] - (low + high) / 2) / ((high - low) / 2) for name, (low, high) in allowed.items()}
    return {name: distance for name, distance in distances.items() if not abs(distance) <= 1}


# ------------------------------------------------------------------------------------------------ the commands


def trained(folder: Path, *overrides: str) -> dict[str, float]:
    """Train without output, in a folder that others may have used."""
    told = io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
        return figures(train(folder / "streets", folder / "run", "restart=true", *overrides))


def record(folder: Path, seeds: list[int]) -> None:
    """Add seeds to the record of the same recipe."""
    here = {"torch": torch.__version__, "machine": platform.machine(), "threads": torch.get_num_threads()}
    here |= {"instructions": torch.backends.cpu.get_cpu_capability(), "kernels": describe_backend("cpu")}
    for seed in seeds:
        began = time.monotonic()
        found = {str(seed): trained(folder, f"trainer.seed={seed}")}
        before = json.loads(RECORD.read_text()) if RECORD.exists() else {}
        if before.get("recipe") == RECIPE:
            found = before["seeds"] | found
        how = f"python -m tests.helpers.golden record --seeds {' '.join(found)}"
        content = {"how": how, "where": here, "recipe": RECIPE, "seeds": found}
        RECORD.write_text(json.dumps(content, indent=1) + "\n")
        print(f"seed {seed}: {time.monotonic() - began:.0f} s", flush=True)


def check(folder: Path, overrides: list[str]) -> int:
    allowed = band(list(recorded().values()))
    found = trained(folder, *overrides)
    left = outside(found, allowed)
    for name, value in found.items():
        low, high = allowed[name]
        print(f"{name:20} {value:8.4f}  [{low:.4f}, {high:.4f}]{'  OUTSIDE' if name in left else ''}")
    return int(bool(left))


def variants(folder: Path, seeds: list[int], only: str) -> int:
    """A Markdown table: mean, minimum and maximum over the seeds. only: part of the names of the rows."""
    allowed = band(list(recorded().values()))
    status = 0
    print("| norm layers | training loss at the end | val mIoU % | runs inside the golden band |\n|---|---|---|---|")
    for name, overrides in (VARIANTS | ROUNDED).items():
        if only not in name:
            continue
        runs = [trained(folder, f"trainer.seed={seed}", *overrides) for seed in seeds]
        inside = sum(not outside(found, allowed) for found in runs)
        losses, scores = ([found[key] * by for found in runs] for key, by in (("train loss", 1), ("val mIoU", 100)))
        print(f"| {name} | {spread(losses, 3)} | {spread(scores, 1)} | {inside} of {len(runs)} |", flush=True)
        status |= inside < len(runs)
    return status


def spread(values: list[float], digits: int) -> str:
    mean, least, most = (f"{value:.{digits}f}" for value in (statistics.fmean(values), min(values), max(values)))
    return f"{mean} ({least} to {most})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("record").add_argument("--seeds", type=int, nargs="+", default=list(range(10)))
    forms = commands.add_parser("variants")
    forms.add_argument("--seeds", type=int, nargs="+", default=[100, 101, 102])
    forms.add_argument("--only", default="", help="part of the names of the rows")
    commands.add_parser("check").add_argument("overrides", nargs="*")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if options.command == "record":
            record(folder, options.seeds)
            return 0
        if options.command == "check":
            return check(folder, options.overrides)
        return variants(folder, options.seeds, options.only)


if __name__ == "__main__":
    sys.exit(main())
