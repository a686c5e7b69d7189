"""What to begin a training with on images of one's own, by their number and size and by the device."""

import math
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from segtrain.data.images import read_extent
from segtrain.data.sample import spread
from segtrain.errors import DataError

SIZES_READ = 50
CROP = {"CPU": 256 * 256, "GPU": 512 * 512}  # pixels of a crop
STEPS = {"CPU": 600, "GPU": 5000}
BATCH = {"CPU": 8, "GPU": 16}
LEAST = 0.2  # scale of the images
RATE = 0.1  # from random weights, with BATCH["CPU"] crops, and the next from trained ones: configs/README.md, CamVid
TUNING_RATE = 0.03


def typical_size(paths: Sequence[Path]) -> tuple[int, int] | None:
    """Median height and width of a few of the images; None if none can be read."""
    sizes = []
    for path in spread(paths, SIZES_READ):
        try:
            sizes.append(read_extent(path))
        except DataError:
            continue  # `segtrain check` names it
    return None if not sizes else (round(median(h for h, _ in sizes)), round(median(w for _, w in sizes)))


def suggested_words(images: int, size: tuple[int, int], device: str) -> list[str]:
    """Options of a first training from random weights.

    images: how many are trained on. size: their height and width [pixels]. device: "CPU" or "GPU".
    """
    fraction = min(1.0, math.sqrt(CROP[device] / (size[0] * size[1])))
    crop = [max(32, min(extent, round(fraction * extent / 32) * 32)) for extent in size]
    words = [f"augmentation.crop_size=[{crop[0]},{crop[1]}]"]
    if any(side > extent for side, extent in zip(crop, size, strict=True)):  # tiny images are enlarged
        words.append("augmentation.scale=[1.0,2.0]")
    elif fraction < 0.6:  # a crop shows much of the scene, and validation is at the scale that is trained
        fraction = max(fraction, LEAST)
        words.append(f"augmentation.scale=[{0.9 * fraction:.2g},{1.75 * fraction:.2g}]")
        words.append(f"inference.scales=[{1.3 * fraction:.2g}]")
    batch = batch_of(images, device)
    epochs = min(max(round(STEPS[device] * batch / max(images, 1)), 5), 400)
    return [
        *words, *(["model.output_stride=16"] if device == "CPU" else []), "loss=cross_entropy",
        rate_word(RATE, images, device), "optimizer.nesterov=true",
        f"trainer.batch_size={batch}", f"trainer.epochs={epochs}",
    ]  # fmt: skip


def batch_of(images: int, device: str) -> int:
    return max(2, min(BATCH[device], images))


def rate_word(rate: float, images: int, device: str) -> str:
    """A rate for BATCH["CPU"] crops as an option, lower for fewer."""
    return f"optimizer.lr={min(rate, rate * batch_of(images, device) / BATCH['CPU']):.3g}"


def suggestion(path: Path, images: Sequence[Path], more: Sequence[str] = ()) -> list[str]:
    """Lines with a first command for the data that the file `path` describes, and how it was chosen. more: options
    that these images need."""
    from segtrain.device import nvidia_gpus  # which needs torch

    size, device = typical_size(images), "GPU" if nvidia_gpus() else "CPU"
    name = [f"name={path.stem}"] if re.fullmatch(r"[\w-]+", path.stem) else []
    start = ["segtrain", "train", *name, f"dataset={path}", *more]
    if size is None:
        return [f"and         {shlex.join([*start, 'augmentation.crop_size=[256,256]', 'trainer.epochs=60'])}"]
    words = [*start, *suggested_words(len(images), size, device)]
    return [
        f"and         {shlex.join(words)}",
        f"            (for {len(images)} images of about {size[1]}x{size[0]}, random weights and a {device}; with "
        "model.weights=FILE, such as a run's last.pt or a file that `segtrain weights` lists, "
        f"{rate_word(TUNING_RATE, len(images), device)})",
    ]
