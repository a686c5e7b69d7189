"""Of the smoke tests of the scripts beside it: random weights to begin with, and the checks at the end.

smoke.py weights BACKBONE FILE ...     writes what the published ImageNet files hold, with random numbers
smoke.py runs RUN ...                  checks that each is finished, has learnt, and began with the file it names
smoke.py archive FILE ANSWERS IMAGES   checks a zip of label pictures, one for every picture of a folder
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

FALL = 0.2  # least share by which the loss falls, from the first lines of a run to the last ones
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
    """Mean of the first and of the last lines."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = [line["train/loss"] for line in lines if line.get("train/loss") is not None]
    demand(len(found) >= 3 * LINES, f"{folder}: {len(found)} lines with a loss are too few to compare")
    return sum(found[:LINES]) / LINES, sum(found[-LINES:]) / LINES


def began_with(folder: Path) -> str:
    """What the run's checkpoint says of the file it began with, which must be the one that its options name."""
    if folder.name.startswith("imagenet_"):
        return f"began with random numbers, as it should; {tested(folder)}"
    named = yaml.safe_load((folder / "config.yaml").read_text())["model"]["weights"]
    start = checkpoint.load(folder / "last.pt")["provenance"].get("start")
    demand(start is not None, f"{folder}: began with random weights, not with {named}")
    demand(start["sha256"] == file_hash(Path(named)), f"{folder} began with another file than {named} is now")
    demand(start["share"] == 1, f"{folder}: {100 * start['share']:.0f} % of the tensors matched")
    return f"began with {start['matched']} tensors of {named} ({100 * start['share']:.0f} %)"


def tested(folder: Path) -> str:
    """In which ways a network of whole pictures was evaluated afterwards, all three and alike often."""
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
    pictures = {path.name: Image.open(path).size for path in Path(images).iterdir()}
    with zipfile.ZipFile(file) as content:
        demand(content.testzip() is None, f"{file} is damaged")
        found = {Path(name).name: Image.open(io.BytesIO(content.read(name))) for name in content.namelist()}
        wanted = sorted(f"{answers}/{name}" for name in pictures)
        demand(sorted(content.namelist()) == wanted, f"{file} holds {content.namelist()}, not {wanted}")
    for name, picture in found.items():
        ids = np.unique(np.asarray(picture))
        right = picture.mode == "L" and picture.size == pictures[name] and ids.min() >= 7 and ids.max() <= 33
        demand(right, f"{file}, {name}: {picture.mode}, {picture.size}, ids {ids}")
    print(f"{file}: {len(found)} answers, each of its picture's size, with Cityscapes' ids")


def demand(right: bool, otherwise: str) -> None:
    if not right:
        raise SystemExit(f"smoke test failed: {otherwise}")


if __name__ == "__main__":
    {"weights": weights, "runs": runs, "archive": archive}[sys.argv[1]](*sys.argv[2:])
