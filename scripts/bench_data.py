"""Time for one worker to turn a 2048 x 1024 Cityscapes pair into a 768 x 768 training sample, against the usual way.

    python scripts/bench_data.py [--pairs 8] [--rounds 15]

All routes run on the same images, alternately, with one thread; figures are ratios of medians. The usual way decodes
with Pillow, resizes the full image, crops, and normalises every sample (torchvision).
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from segtrain.config import IGNORE_INDEX, AugmentationConfig
from segtrain.data.augment import Augmentation
from segtrain.data.cache import Decoded
from segtrain.data.images import read_image
from segtrain.data.label_files import read_label
from segtrain.data.labels import published_table
from segtrain.data.loader import read_pixels
from segtrain.data.sample import Sample
from segtrain.data.verify.file_facts import FileFacts

CROP, SCALE = [768, 768], [0.5, 2.0]
TABLE = published_table("cityscapes")
AUGMENT = Augmentation(AugmentationConfig(crop_size=CROP, scale=SCALE))


def draw_pairs(folder: Path, pairs: int) -> list[Sample]:
    """Draw images that compress like photographs, about 2.6 MB as PNG: smooth noise plus fine noise."""
    rng = np.random.default_rng(0)
    samples = []
    for index in range(pairs):
        labels = cv2.resize(rng.choice(TABLE.ids, (32, 64)), (2048, 1024), interpolation=cv2.INTER_NEAREST)
        image = cv2.resize(
            rng.integers(0, 255, (128, 256, 3)).astype(np.uint8), (2048, 1024), interpolation=cv2.INTER_CUBIC
        )
        image = np.clip(image + rng.normal(0, 2.5, image.shape), 0, 255).astype(np.uint8)
        Image.fromarray(image).save(folder / f"{index}.png")
        Image.fromarray(labels).save(folder / f"{index}_labels.png")
        samples.append(Sample(str(index), folder / f"{index}.png", folder / f"{index}_labels.png"))
    return samples


def usual_route(sample: Sample, seed: int) -> torch.Tensor:
    """Pillow and torchvision: decode, resize the full image, pad, crop, flip, convert to float, normalise."""
    rng = np.random.default_rng(seed)
    scale = rng.uniform(*SCALE)
    with Image.open(sample.image) as file:
        image = file.convert("RGB")
    with Image.open(sample.label) as file:
        label = Image.fromarray(TABLE.encode_values(np.asarray(file)))
    size = [round(1024 * scale), round(2048 * scale)]
    image = tv.resize(image, size, antialias=True)
    label = tv.resize(label, size, interpolation=v2.InterpolationMode.NEAREST)
    missing = [max(0, CROP[1] - size[1]), max(0, CROP[0] - size[0])]
    if any(missing):
        image, label = tv.pad(image, [0, 0, *missing]), tv.pad(label, [0, 0, *missing], fill=IGNORE_INDEX)
    height, width = max(size[0], CROP[0]), max(size[1], CROP[1])
    top, left = int(rng.integers(0, height - CROP[0] + 1)), int(rng.integers(0, width - CROP[1] + 1))
    image, label = tv.crop(image, top, left, *CROP), tv.crop(label, top, left, *CROP)
    if rng.random() < 0.5:
        image, label = tv.hflip(image), tv.hflip(label)
    tensor = tv.normalize(
        tv.to_dtype(tv.to_image(image), torch.float32, scale=True), [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    )
    return tensor + 0 * torch.from_numpy(np.array(label)).sum()


def own_route(read: Callable[[Sample], tuple[np.ndarray, np.ndarray]], sample: Sample, seed: int) -> np.ndarray:
    image, labels = read(sample)
    return AUGMENT(image, labels, (0, seed), TABLE.encode_values)[0]


def resize_and_crop(image: np.ndarray, labels: np.ndarray, seed: int) -> np.ndarray:
    """The usual geometry with OpenCV: resize the full image, pad, crop, flip."""
    rng = np.random.default_rng(np.random.SeedSequence((0, seed)))
    scale = rng.uniform(*SCALE)
    size = (round(2048 * scale), round(1024 * scale))
    image = cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)
    labels = cv2.resize(labels, size, interpolation=cv2.INTER_NEAREST)
    missing = max(0, CROP[0] - size[1]), max(0, CROP[1] - size[0])
    if any(missing):
        image = cv2.copyMakeBorder(image, 0, missing[0], 0, missing[1], cv2.BORDER_CONSTANT, value=(124, 116, 104))
        labels = cv2.copyMakeBorder(labels, 0, missing[0], 0, missing[1], cv2.BORDER_CONSTANT, value=IGNORE_INDEX)
    top, left = int(rng.integers(0, image.shape[0] - CROP[0] + 1)), int(rng.integers(0, image.shape[1] - CROP[1] + 1))
    image = image[top : top + CROP[0], left : left + CROP[1]]
    labels = labels[top : top + CROP[0], left : left + CROP[1]]
    return np.ascontiguousarray(image[:, ::-1]) if rng.random() < 0.5 else np.ascontiguousarray(image)


def table(title: str, candidates: dict[str, Callable[[int], object]], rounds: int) -> None:
    """Milliseconds per sample and the ratio to the first candidate, medians of interleaved rounds."""
    for run in candidates.values():
        run(0)
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(rounds):
        for name, run in candidates.items():
            began = time.perf_counter()
            for seed in range(turn * 4, turn * 4 + 4):
                run(seed)
            times[name].append((time.perf_counter() - began) / 4)
    medians = {name: statistics.median(values) for name, values in times.items()}
    base = next(iter(medians.values()))
    print(f"\n{title}")
    for name, value in medians.items():
        print(f"  {name:<62} {1e3 * value:8.2f} ms   {base / value:5.1f}x")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as folder:
        samples = draw_pairs(Path(folder), options.pairs)
        size = samples[0].image.stat().st_size / 1e6
        print(f"{len(samples)} pairs of 2048 x 1024, {size:.1f} MB per image, crops {CROP}, scale {SCALE}, one thread")
        pixels = [(read_image(s.image), read_label(s.label)) for s in samples if s.label is not None]
        decoded = Decoded(Path(folder) / "decoded")
        decoded.build(samples, FileFacts(Path(folder), samples), print)

        def each(items: list) -> Callable[[int], object]:
            return lambda seed: items[seed % len(items)]

        take, pick = each(samples), each(pixels)
        table("only the geometry, image and label", {
            "OpenCV, the full image resized, then cropped": lambda seed: resize_and_crop(*pick(seed), seed),
            "segtrain, the window cropped, then resized": lambda seed: AUGMENT(*pick(seed), (0, seed)),
        }, options.rounds)  # fmt: skip
        table("from the files to a sample", {
            "Pillow + torchvision": lambda seed: usual_route(take(seed), seed),
            "segtrain": lambda seed: own_route(read_pixels, take(seed), seed),
            "segtrain, dataset.cache=decoded (in the page cache)": lambda seed: own_route(decoded, take(seed), seed),
        }, options.rounds)  # fmt: skip


if __name__ == "__main__":
    main()
