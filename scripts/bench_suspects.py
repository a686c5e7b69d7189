"""How many of the regions that `segtrain suspects` lists first are label errors, where the errors are known.

    python scripts/bench_suspects.py [--output FOLDER] [--seed 0] [--share 0.05] [--scenes 320] [--val-scenes 60]
                                     [key=value ...]

Draws the street scenes of `scripts/quickstart`, plants errors in the labels of training and validation, trains
experiment=streets_resnet18 on them and lists suspects. key=value are options of the training, such as
trainer.max_steps=20. A second call with the same folder draws and trains nothing again.

A planted error is one object, a connected part of a class of THINGS of at least SMALLEST_OBJECT pixels: relabelled as
another such class, shifted by 8 to 24 pixels along both axes, or erased (it gets the class around it), a third each. A
suspect is right if planted pixels of its label in its box are at least half of its area.
"""

import argparse
import csv
import subprocess
import sys
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from segtrain.data.labels import published_table

THINGS = (24, 25, 26, 27, 28, 31, 32, 33, 20, 19, 17)  # person to bicycle, traffic sign and light, pole: Cityscapes ids
SMALLEST_OBJECT = 150  # pixels
FIRST = (10, 50, 100)  # of how many suspects the precision is printed


def objects_of(label: np.ndarray) -> list[np.ndarray]:
    """The masks of all objects that may get an error. label: Cityscapes ids uint8 (H, W)."""
    found = []
    for thing in THINGS:
        _, numbers, stats, _ = cv2.connectedComponentsWithStats((label == thing).astype(np.uint8), connectivity=4)
        large = np.flatnonzero(stats[:, cv2.CC_STAT_AREA] >= SMALLEST_OBJECT)
        found += [numbers == number for number in large if number]
    return found


def plant_error(label: np.ndarray, truth: np.ndarray, thing: np.ndarray, rng: np.random.Generator) -> str:
    """Give one object of `truth` a wrong label, in `label`; both uint8 (H, W). thing: its mask. Returns the kind."""
    own = int(truth[thing][0])
    around = cv2.dilate(thing.astype(np.uint8), np.ones((13, 13), np.uint8)).astype(bool) & ~thing
    ground = int(np.bincount(truth[around]).argmax())
    kind = ("relabelled", "shifted", "erased")[rng.integers(3)]
    if kind == "relabelled":
        label[thing] = rng.choice([other for other in THINGS if other != own])
        return kind
    label[thing] = ground
    if kind == "shifted":
        down, right = rng.integers(8, 25, 2) * rng.choice([-1, 1], 2)
        rows, columns = (axis + by for axis, by in zip(np.nonzero(thing), (down, right), strict=True))
        inside = (rows >= 0) & (rows < label.shape[0]) & (columns >= 0) & (columns < label.shape[1])
        label[rows[inside], columns[inside]] = own
    return kind


def plant_errors(data: Path, truths: Path, share: float, seed: int) -> Counter[str]:
    """Plant errors in the label files below data/gtFine, and keep the true ones below `truths`. Returns the counts of
    objects and of errors of each kind."""
    rng, counts = np.random.default_rng(seed), Counter[str]()
    for path in sorted(data.glob("gtFine/*/*/*_labelIds.png")):
        kept = truths / path.relative_to(data)
        if not kept.exists():  # a second call starts from the true labels again
            kept.parent.mkdir(parents=True, exist_ok=True)
            path.replace(kept)
        truth = np.array(Image.open(kept))
        label = truth.copy()
        for thing in objects_of(truth):
            counts["objects"] += 1
            if rng.random() < share:
                counts[plant_error(label, truth, thing, rng)] += 1
        Image.fromarray(label).save(path)
    return counts


def right_suspects(suspects: Path, data: Path, truths: Path) -> tuple[np.ndarray, np.ndarray]:
    """Of each line of suspects.csv in order, whether it is a planted error, bool (N,), and the split, str (N,)."""
    table = published_table("cityscapes")
    ids = dict(zip(table.names, table.ids, strict=True))
    right, splits = [], []
    with suspects.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            _, split, *rest = Path(row["file"]).parts
            image = Path("gtFine", split, *rest)
            name = image.with_name(image.name.replace("_leftImg8bit", "_gtFine_labelIds"))
            x, y, w, h = (int(row[key]) for key in "xywh")
            label, truth = (np.array(Image.open(root / name))[y : y + h, x : x + w] for root in (data, truths))
            planted = (label != truth) & (label == ids[row["label"]])
            right.append(2 * planted.sum() >= int(row["area"]))
            splits.append(split)
    return np.array(right, bool), np.array(splits, str)


def segtrain(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "segtrain", *words], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("bench-suspects"))
    parser.add_argument("--seed", type=int, default=0, help="of the planted errors")
    parser.add_argument("--share", type=float, default=0.05, help="of the objects that get an error")
    parser.add_argument("--scenes", type=int, default=320)
    parser.add_argument("--val-scenes", type=int, default=60)
    parser.add_argument("options", nargs="*", help="options of the training, key=value")
    arguments = parser.parse_args()
    data, truths, run = (arguments.output.resolve() / name for name in ("streets", "truths", "run"))
    count = f"scenes={arguments.scenes}", f"val_scenes={arguments.val_scenes}"
    if not (data / "scenes.json").exists():
        segtrain("streets", f"output={data}", *count, "night_scenes=0")
    planted = plant_errors(data, truths, arguments.share, arguments.seed)
    print(", ".join(f"{number} {kind}" for kind, number in sorted(planted.items())), flush=True)
    of_data = f"dataset.root={data}", *(f"dataset.{option}" for option in count)
    segtrain("train", "experiment=streets_resnet18", *of_data, f"run={run}", "loader.workers=0", *arguments.options)
    segtrain("suspects", f"run={run}", f"top={FIRST[-1]}")
    right, splits = right_suspects(run / "suspects" / "suspects.csv", data, truths)
    for first in FIRST:
        parts = [f"{right[:first].mean():.0%}"]
        for split in ("train", "val"):
            of_split = right[:first][splits[:first] == split]
            parts.append(f"{split} {of_split.sum()} of {len(of_split)}")
        print(f"right of the first {min(first, len(right)):3}: {', '.join(parts)}")


if __name__ == "__main__":
    main()
