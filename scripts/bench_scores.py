"""Time to count predictions and to turn logits into labels, against the usual ways.

    python scripts/bench_scores.py [--rounds 9] [--official PYTHON] [--images 40]

All run alternately, with one thread; figures are ratios of medians. --official names a Python interpreter that has
cityscapesscripts (in an environment of its own: pip install cityscapesscripts 'numpy<2.4'). Its evaluation of a folder
of 2048 x 1024 predictions is then timed against `segtrain score`, both as commands, with and without instance scores.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from segtrain.data.labels import published_table
from segtrain.native import pixels

SIZE = (1024, 2048)


def by_opencv(function: Callable[..., object], *arguments: object) -> object:
    """Call the function without the compiled loops."""
    library, pixels.library = pixels.library, lambda loop: None
    try:
        return function(*arguments)
    finally:
        pixels.library = library


def table(title: str, candidates: dict[str, Callable[[], object]], rounds: int) -> None:
    for run in candidates.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            began = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(values) for name, values in times.items()}
    base = next(iter(medians.values()))
    print(f"\n{title}")
    for name, value in medians.items():
        print(f"  {name:<58} {1e3 * value:9.2f} ms   {base / value:5.1f}x", flush=True)


def label_pair(classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Blocks of labels, and the same with every tenth pixel wrong."""
    rng = np.random.default_rng(classes)
    target = cv2.resize(
        rng.integers(0, classes, (64, 128)).astype(np.uint8), SIZE[::-1], interpolation=cv2.INTER_NEAREST
    )
    wrong = rng.random(SIZE) < 0.1
    prediction = np.where(wrong, rng.integers(0, classes, SIZE), target).astype(np.uint8)
    target[:50] = 255
    return target, prediction


def bincount(target: torch.Tensor, prediction: torch.Tensor, classes: int) -> torch.Tensor:
    valid = target != 255
    joint = target[valid].long() * classes + prediction[valid].long()
    return torch.bincount(joint, minlength=classes * classes).view(classes, classes)


def counting(rounds: int) -> None:
    for classes in (19, 171):
        target, prediction = label_pair(classes)
        counts = np.zeros((256, 256), np.int64)
        pair = torch.from_numpy(target), torch.from_numpy(prediction)
        pixels.joint_histogram(target, prediction, counts)
        assert (counts[:classes, :classes] == bincount(*pair, classes).numpy()).all()
        own = partial(pixels.joint_histogram, target, prediction, counts)
        table(f"counting a 2048 x 1024 prediction, {classes} classes (identical matrices)", {
            "torch.bincount of int64, with a mask": partial(bincount, *pair, classes),
            "segtrain, compiled": own, "segtrain, OpenCV": partial(by_opencv, own),
        }, rounds)  # fmt: skip


def enlarge(logits: torch.Tensor) -> torch.Tensor:
    return F.interpolate(logits, size=SIZE, mode="bilinear", align_corners=False).argmax(1)


def peaks_of(code: str) -> list[float]:
    """MiB that a line of Python adds to the memory of a process, with 19 and with 171 classes."""
    program = (
        "import re, sys, torch; from segtrain.native import pixels; from torch.nn import functional as F\n"
        "torch.set_num_threads(1); x = torch.randn(1, int(sys.argv[1]), 128, 256)\n"
        "pixels.upsampled_argmax(x[0, :2, :8, :8], (16, 16)); F.interpolate(x[:, :2, :8, :8], size=(16, 16))\n"
        "open('/proc/self/clear_refs', 'w').write('5')  # the peak counts from here\n"
        "def memory(what): return int(re.search(what + r':\\s+(\\d+)', open('/proc/self/status').read())[1]) / 1024\n"
        f"before = memory('VmRSS')\n{code}\nprint(memory('VmHWM') - before)"
    )
    peaks = [subprocess.run([sys.executable, "-c", program, str(k)], capture_output=True, text=True, check=True).stdout
             for k in (19, 171)]  # fmt: skip
    return [float(text) for text in peaks]


def arg_max(rounds: int) -> None:
    for classes in (19, 171):
        logits = F.interpolate(torch.randn(1, classes, 32, 64), size=(128, 256), mode="bicubic")
        expected, found = enlarge(logits)[0].numpy(), pixels.upsampled_argmax(logits[0], SIZE)
        own = partial(pixels.upsampled_argmax, logits[0], SIZE)
        differ = (expected != found).sum()
        table(f"arg-max of stride-8 logits at 2048 x 1024, {classes} classes ({differ} pixels differ)", {
            "F.interpolate + argmax": partial(enlarge, logits),
            "segtrain, compiled": own, "segtrain, OpenCV": partial(by_opencv, own),
        }, max(3, rounds // 3))  # fmt: skip
    print("\nadditional memory, 19 and 171 classes")
    for name, code in (
        ("F.interpolate + argmax", "F.interpolate(x, size=(1024, 2048), mode='bilinear').argmax(1)"),
        ("segtrain, compiled", "pixels.upsampled_argmax(x[0], (1024, 2048))"),
        ("segtrain, OpenCV", "pixels.library = lambda loop: None; pixels.upsampled_argmax(x[0], (1024, 2048))"),
    ):
        small, large = peaks_of(code)
        print(f"  {name:<58} {small:7.0f} MiB {large:7.0f} MiB", flush=True)


OFFICIAL = """
import sys
from cityscapesscripts.evaluation import evalPixelLevelSemanticLabeling as official
official.args.evalInstLevelScore = sys.argv.pop() == "with"
official.args.evalPixelAccuracy = False
official.args.quiet = True
official.main()
"""


def folder_of_predictions(python: str, images: int, rounds: int) -> None:
    """Time both commands on the same folder."""
    rng = np.random.default_rng(0)
    ids = published_table("cityscapes").ids
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        for index in range(images):
            stem = f"frankfurt_{index:06d}_000019"
            (root / "gtFine/val/frankfurt").mkdir(parents=True, exist_ok=True)
            (root / "results").mkdir(exist_ok=True)
            labels = cv2.resize(rng.choice(ids, (40, 80)), SIZE[::-1], interpolation=cv2.INTER_NEAREST)
            blocks = cv2.resize(
                np.arange(3200, dtype=np.uint16).reshape(40, 80), SIZE[::-1], interpolation=cv2.INTER_NEAREST
            )
            objects = (labels >= 24) & (blocks % 4 == 0)  # about 100 in an image; the rest are groups
            instances = np.where(objects, labels * np.uint16(1000) + blocks % 1000, labels).astype(np.uint16)
            prediction = np.where(rng.random(SIZE) < 0.05, rng.choice(ids, SIZE), labels).astype(np.uint8)
            Image.fromarray(labels).save(root / f"gtFine/val/frankfurt/{stem}_gtFine_labelIds.png")
            Image.fromarray(instances).save(root / f"gtFine/val/frankfurt/{stem}_gtFine_instanceIds.png")
            Image.fromarray(prediction).save(root / f"results/{stem}.png")
        environment = {**os.environ, "CITYSCAPES_DATASET": place, "CITYSCAPES_RESULTS": str(root / "results"),
                       "CITYSCAPES_EXPORT_DIR": place}  # fmt: skip

        def official(instance_scores: str) -> None:
            clean = {key: value for key, value in environment.items() if key != "PYTHONPATH"}
            subprocess.run([python, "-c", OFFICIAL, instance_scores], env=clean, check=True, capture_output=True)

        def own() -> None:
            call = [sys.executable, "-m", "segtrain", "score", f"predictions={root / 'results'}", "dataset=cityscapes",
                    f"dataset.root={place}", f"output={place}/out"]  # fmt: skip
            subprocess.run(call, env=environment, check=True, capture_output=True)

        def own_without() -> None:
            for path in root.rglob("*_instanceIds.png"):
                path.rename(path.with_suffix(".hidden"))
            try:
                own()
            finally:
                for path in root.rglob("*.hidden"):
                    path.rename(path.with_suffix(".png"))

        table(f"a folder of {images} Cityscapes predictions, with decoding and start of the program", {
            "cityscapesScripts, instance scores on, as shipped": partial(official, "with"), "segtrain score": own,
        }, rounds)  # fmt: skip
        theirs = json.loads((root / "resultPixelLevelSemanticLabeling.json").read_text())
        mine = json.loads((root / "out" / "evaluation.json").read_text())
        for name, key in (("mIoU", "Classes"), ("iIoU", "InstClasses"), ("category iIoU", "InstCategories")):
            ours = mine[{"mIoU": "miou", "iIoU": "iiou", "category iIoU": "category_iiou"}[name]]
            print(f"  {name}: difference {abs(ours - theirs[f'averageScore{key}']):.1e}")
        table("without instance scores", {
            "cityscapesScripts": partial(official, "without"), "segtrain score": own_without,
        }, rounds)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--official", help="Python interpreter that has cityscapesscripts")
    parser.add_argument("--images", type=int, default=40)
    options = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    if options.official:
        folder_of_predictions(options.official, options.images, 3)
    counting(options.rounds)
    arg_max(options.rounds)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"\npeak of this program {peak:.0f} MiB")


if __name__ == "__main__":
    main()
