"""Measure how long a dataset of many files takes to be listed and looked up, and how much memory.

    python scripts/bench_index.py [files=100000]

Makes that many images of 8 x 8 pixels with labels, as links to a few files, for dataset=folder and in Cityscapes'
layout. Starts twice on each: the first start opens every file, the second one finds what is known of them in the cache.
Prints the processor's seconds and the peak memory of the process, without the imports.
"""

import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from segtrain.config import CityscapesConfig, DatasetConfig, FolderConfig
from segtrain.data.registry import label_table, training_mixture
from segtrain.data.verify.files import check_samples

LINKS = 50_000  # of one file, which ext4 limits to 65000


def make(root: Path, layout: str, count: int) -> None:
    sources = {
        "image": np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8),
        "label": np.full((8, 8), 7, np.uint8),
    }
    sources["label"][:4], sources["label"][4, 0] = 21, 26  # what streets are made of, in Cityscapes' ids
    for number in range(count):
        city = f"city{number // 1000:03d}"
        name = f"{city}_{number:06d}_000019"
        places = {
            "folder": (f"train/images/{number:07d}.png", f"train/labels/{number:07d}.png"),
            "cityscapes": (f"leftImg8bit/train/{city}/{name}_leftImg8bit.png",
                           f"gtFine/train/{city}/{name}_gtFine_labelIds.png"),
        }[layout]  # fmt: skip
        for kind, place in zip(sources, places, strict=True):
            source, path = root / f"{kind}{number // LINKS}.png", root / place
            if not source.exists():
                Image.fromarray(sources[kind]).save(source)
            if number % 1000 == 0:
                path.parent.mkdir(parents=True, exist_ok=True)
            os.link(source, path)
    (root / "classes.csv").write_text("id,name\n7,road\n21,vegetation\n26,car\n")


def dataset(root: Path, layout: str) -> DatasetConfig:
    if layout == "cityscapes":
        return CityscapesConfig(name="cityscapes", root=str(root))
    splits = {"train": {"images": "train/images/*.png", "labels": "train/labels/*.png"}}
    return FolderConfig(name="folder", root=str(root), classes="classes.csv", splits=splits)


def start(root: Path, layout: str, cache: Path) -> None:
    """List and check the files, as a training does before its first step."""
    config, began = dataset(root, layout), time.process_time()
    samples = training_mixture(config).samples
    listed = time.process_time()
    check_samples(samples, label_table(config), cache, lambda text: None)
    done, memory = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"{len(samples)} samples: listed in {listed - began:.1f} s, looked up in {done - listed:.1f} s, {memory:.0f} MB"
    )


def main(count: int) -> None:
    for layout in ("folder", "cityscapes"):
        with tempfile.TemporaryDirectory() as folder:
            root, cache = Path(folder, "data"), Path(folder, "cache")
            root.mkdir()
            make(root, layout, count)
            for which in ("first", "second"):
                print(f"{layout:<11} {which:<6} start: ", end="", flush=True)
                subprocess.run([sys.executable, __file__, "start", str(root), layout, str(cache)], check=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["start"]:
        start(Path(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
    else:
        main(int(dict(word.split("=") for word in sys.argv[1:]).get("files", 100_000)))
