"""The golden recipe: a small training on street scenes whose course is recorded in tests/data/golden.json.

    python -m tests.golden record [--seeds 0 1 2 ...]      # trains once a seed and writes the record
    python -m tests.golden check [key=value ...]           # trains once: is it inside the band? exit status 1 if not
    python -m tests.golden variants [--seeds 0 1 2]        # ... by every form of the layer: the README's table

The network is a ResNet and a WideResNet in small, with the DeepLabV3 head. It sees pictures at a quarter of their size.
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
from segtrain.config import TrainConfig
from segtrain.data.datasets import label_table, split_samples
from segtrain.data.labels import IGNORE
from segtrain.data.loader import Parts, TrainingData, training_batches
from segtrain.data.transforms import Augmentation
from segtrain.inference import normalise
from segtrain.models import BACKBONES
from segtrain.models.blocks import Backbone, IdentityResidualBlock, Norm, ResidualBlock, conv, stage

RECORD = Path(__file__).with_name("data") / "golden.json"
RECIPE = [
    "dataset=streets", "dataset.scenes=16", "dataset.val_scenes=6", "dataset.cache=decoded", "model.backbone=narrow",
    "model.output_stride=8", "model.head_channels=32", "loss=cross_entropy", "optimizer.lr=0.05",
    "augmentation.crop_size=[64,128]", "augmentation.scale=[0.2,0.35]", "inference.scales=[0.25]",
    "trainer.batch_size=8", "trainer.epochs=null", "trainer.max_steps=100", "trainer.validate_every=100",
    "trainer.save_every=100", "loader.workers=0", "logging.every=20", "logging.pictures=0", "device=cpu",
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


class Narrow(Backbone):
    """Both kinds of residual blocks: (N, 3, H, W) -> (N, 64, H / output_stride, W / output_stride)."""

    def __init__(self, norm: Norm, output_stride: int) -> None:
        super().__init__()
        last, dilation = output_stride // 8, 16 // output_stride
        self.mod1 = nn.Sequential(conv(3, 16, 3, 2), norm(16))
        self.mod2 = stage(ResidualBlock(16, (16, 16), norm, 2), ResidualBlock(16, (16, 16), norm))
        self.mod3 = stage(IdentityResidualBlock(16, (32, 32), norm, 2), IdentityResidualBlock(32, (32, 32), norm))
        self.mod4 = stage(
            IdentityResidualBlock(32, (64, 64), norm, last, dilation),
            IdentityResidualBlock(64, (64, 64), norm, 1, dilation),
        )
        self.bn_out = norm(64)
        self.out_channels = 64


@contextlib.contextmanager
def narrow():
    """Inside, model.backbone=narrow is known."""
    BACKBONES["narrow"] = Narrow
    try:
        yield
    finally:
        del BACKBONES["narrow"]


# ------------------------------------------------------------------------------------------------ one training


def course(root: Path, run: Path, *overrides: str) -> dict[str, float]:
    """Trains by the recipe with the scenes of `root`, which are drawn if missing: the figures that are compared."""
    config = segtrain.compose(*RECIPE, f"dataset.root={root}", f"run={run}", *overrides)
    with narrow():
        folder = segtrain.train(config)
        return figures(config, folder)


def figures(config: TrainConfig, run: Path) -> dict[str, float]:
    """What a finished run recorded, and what its network answers on fixed crops of either split."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = {f"loss, steps to {line['step']}": line["train/loss"] for line in lines if "train/loss" in line}
    result = json.loads((run / "evaluation.json").read_text())
    found |= {"val mIoU": result["miou"], "val pixel accuracy": result["pixel_accuracy"]}
    trained = segtrain.load(run / "last.pt", config.device)
    for split in (config.dataset.train_split, config.dataset.val_split):
        images, targets = crops(config, split)
        with torch.inference_mode():
            ready = normalise(images.to(trained.device), config.model.mean, config.model.std)
            logits = trained.network(ready).cpu()
        found |= {f"{split} {name}": value for name, value in answers(logits, targets).items()}
    return found


def crops(config: TrainConfig, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """images uint8 (CROPS, 3, h, w) and targets int64 (CROPS, h, w), drawn as for training."""
    augmentation = Augmentation(config.augmentation)
    data = TrainingData(split_samples(config.dataset, split), label_table(config.dataset), augmentation, seed=1000)
    batch = next(training_batches(data, Parts(CROPS, 0, 1), workers=0, pin_memory=False))[0]
    return batch.images, batch.targets.long()


def answers(logits: torch.Tensor, targets: torch.Tensor) -> dict[str, float]:
    """The loss; how much worse labels fit when moved to the right rather than to the left, down rather than up, and
    mirrored rather than as they are; how probable the first class, road, is where there is no label."""
    inner = (..., slice(MOVED, -MOVED), slice(MOVED, -MOVED))

    def losses(labels: torch.Tensor) -> torch.Tensor:
        found = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none")  # torch's, not ours
        return found.where(labels != IGNORE, torch.nan)[inner]

    def moved(down: int, right: int) -> torch.Tensor:
        return losses(targets.roll((down, right), (1, 2)))

    plain = losses(targets)
    return {
        "loss": float(plain.nanmean()),
        "labels to the right": float((moved(0, MOVED) - moved(0, -MOVED)).nanmean()),
        "labels down": float((moved(MOVED, 0) - moved(-MOVED, 0)).nanmean()),
        "labels mirrored": float((losses(targets.flip(2)) - plain).nanmean()),
        "road where ignored": float(logits.softmax(1)[:, 0][targets == IGNORE].mean()),
    }


# ------------------------------------------------------------------------------------------------ the band


def recorded() -> dict[str, dict[str, float]]:
    """seed -> its figures"""
    seeds: dict[str, dict[str, float]] = json.loads(RECORD.read_text())["seeds"]
    return seeds


def band(seeds: list[dict[str, float]]) -> dict[str, tuple[float, float]]:
    """figure -> (least, most)"""
    result = {}
    for name in seeds[0]:
        values = [figures[name] for figures in seeds]
        mean, reach = statistics.fmean(values), DEVIATIONS * statistics.stdev(values)
        result[name] = mean - reach, mean + reach
    return result


def outside(found: dict[str, float], allowed: dict[str, tuple[float, float]]) -> dict[str, float]:
    """The figures that left the band, each with how far it is from the middle, in half widths; NaN is outside."""
    assert found.keys() == allowed.keys()
    distances = {name: (found[name] - (low + high) / 2) / ((high - low) / 2) for name, (low, high) in allowed.items()}
    return {name: distance for name, distance in distances.items() if not abs(distance) <= 1}


# ------------------------------------------------------------------------------------------------ the commands


def trained(folder: Path, *overrides: str) -> dict[str, float]:
    """One quiet training in a folder that others may have used."""
    told = io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
        return course(folder / "streets", folder / "run", "restart=true", *overrides)


def record(folder: Path, seeds: list[int]) -> None:
    found = {}
    for seed in seeds:
        began = time.monotonic()
        found[str(seed)] = trained(folder, f"trainer.seed={seed}")
        print(f"seed {seed}: {time.monotonic() - began:.0f} s", flush=True)
    here = {"torch": torch.__version__, "machine": platform.machine(), "threads": torch.get_num_threads()}
    here |= {"instructions": torch.backends.cpu.get_cpu_capability()}
    how = f"python -m tests.golden record --seeds {' '.join(map(str, seeds))}"
    RECORD.write_text(json.dumps({"how": how, "where": here, "recipe": RECIPE, "seeds": found}, indent=1) + "\n")


def check(folder: Path, overrides: list[str]) -> int:
    allowed = band(list(recorded().values()))
    found = trained(folder, *overrides)
    left = outside(found, allowed)
    for name, value in found.items():
        low, high = allowed[name]
        print(f"{name:45} {value:8.4f}  [{low:.4f}, {high:.4f}]{'  OUTSIDE' if name in left else ''}")
    return int(bool(left))


def variants(folder: Path, seeds: list[int]) -> int:
    """A Markdown table: mean and least to most over the seeds."""
    allowed = band(list(recorded().values()))
    status = 0
    print("| norm layers | training loss at the end | val mIoU % | runs inside the golden band |\n|---|---|---|---|")
    for name, overrides in VARIANTS.items():
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
    commands.add_parser("variants").add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    commands.add_parser("check").add_argument("overrides", nargs="*")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if options.command == "record":
            record(folder, options.seeds)
            return 0
        if options.command == "check":
            return check(folder, options.overrides)
        return variants(folder, options.seeds)


if __name__ == "__main__":
    sys.exit(main())
