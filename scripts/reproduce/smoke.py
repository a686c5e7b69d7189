"""Random weights for the smoke tests of the other scripts, and the checks at their end.

smoke.py weights BACKBONE FILE ...     write files like the published ImageNet weights, with random numbers
smoke.py runs RUN ...                  check that each run is finished, has learned, and started from the file it names
smoke.py archive FILE ANSWERS IMAGES   check a zip of label images, one for every image of a folder
"""

import io
import json
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image

from segtrain.models import build_classifier
from segtrain.scoring.report import file_hash
from segtrain.weights import checkpoint

FALL = 0.2  # minimum relative decrease of the loss, from the first lines of a run to the last
LINES = 2


def weights(backbone: str, *files: str) -> None:
    torch.manual_seed(0)
    state = build_classifier(backbone).state_dict()
    content = {"state_dict": {f"module.{key}": value for key, value in state.items()}, "arch": backbone}
    for file in files:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, file)


def runs(*folders: str) -> None:
    for folder in map(Path, folders):
        finished(folder)
        before, after = losses(folder)
        demand(after <= (1 - FALL) * before, f"{folder}: the loss went from {before:.3f} to {after:.3f} only")
        print(f"{folder}: loss {before:.3f} -> {after:.3f} ({100 * (after / before - 1):.0f} %), {began_with(folder)}")


def finished(folder: Path) -> None:
    written = ("last.pt", "best.pt", "evaluation.json", "summary.txt", "config.yaml", "environment.json")
    missing = [name for name in written if not (folder / name).is_file()]
    demand(not missing, f"{folder} lacks {', '.join(missing)}")
    state = json.loads((folder / "state.json").read_text())
    demand(state["state"] == "finished", f"{folder} is {state['state']}, not finished")
    result = json.loads((folder / "evaluation.json").read_text())
    score = result.get("miou", result.get("top1"))
    demand(0 < score <= 1, f"{folder}: mIoU or top-1 {score}")


def losses(folder: Path) -> tuple[float, float]:
    """Mean loss of the first lines and of the last lines of a run."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = [line["train/loss"] for line in lines if line.get("train/loss") is not None]
    demand(len(found) >= 3 * LINES, f"{folder}: only {len(found)} lines with a loss, {3 * LINES} are needed")
    return sum(found[:LINES]) / LINES, sum(found[-LINES:]) / LINES


def began_with(folder: Path) -> str:
    """Describe the weights that a run started from, which must be the file that its options name."""
    if folder.name.startswith("imagenet_"):
        return f"started from random weights, as it should; {tested(folder)}"
    named = yaml.safe_load((folder / "config.yaml").read_text())["model"]["weights"]
    start = checkpoint.load(folder / "last.pt")["provenance"].get("start")
    demand(start is not None, f"{folder}: started from random weights, not from {named}")
    demand(start["sha256"] == file_hash(Path(named)), f"{folder} started from a file other than the present {named}")
    demand(start["share"] == 1, f"{folder}: {100 * start['share']:.0f} % of the tensors matched")
    return f"started from {start['matched']} tensors of {named} ({100 * start['share']:.0f} %)"


def tested(folder: Path) -> str:
    """Describe the protocols by which an image classifier was evaluated: all three, each with the same activations."""
    ways: dict[str, list[str]] = {}
    for path in folder.glob("evaluations/*/evaluation.json"):
        result = json.loads(path.read_text())
        demand(0 <= result["top1"] <= result["top5"] <= 1, f"{path}: {result['top1']}, {result['top5']}")
        ways.setdefault(result["inference"]["name"], []).append(result["protocol"]["activation"])
    asked = {"center224", "tencrop", "center320"}
    right = ways.keys() == asked and len({tuple(sorted(found)) for found in ways.values()}) == 1
    demand(right, f"{folder} was evaluated by {ways}, not by {asked}")
    return f"evaluated by {', '.join(sorted(ways))} with {' and '.join(sorted(ways['tencrop']))}"


def archive(file: str, answers: str, images: str) -> None:
    """answers: folder inside the zip."""
    sizes = {path.name: Image.open(path).size for path in Path(images).iterdir()}
    with zipfile.ZipFile(file) as content:
        demand(content.testzip() is None, f"{file} is damaged")
        found = {Path(name).name: Image.open(io.BytesIO(content.read(name))) for name in content.namelist()}
        wanted = sorted(f"{answers}/{name}" for name in sizes)
        demand(sorted(content.namelist()) == wanted, f"{file} holds {content.namelist()}, not {wanted}")
    for name, label in found.items():
        ids = np.unique(np.asarray(label))
        right = label.mode == "L" and label.size == sizes[name] and ids.min() >= 7 and ids.max() <= 33
        demand(right, f"{file}, {name}: {label.mode}, {label.size}, ids {ids}")
    print(f"{file}: {len(found)} predictions, each of its image's size, with Cityscapes' ids")


def demand(right: bool, otherwise: str) -> None:
    if not right:
        raise SystemExit(f"smoke test failed: {otherwise}")


if __name__ == "__main__":
    {"weights": weights, "runs": runs, "archive": archive}[sys.argv[1]](*sys.argv[2:])
