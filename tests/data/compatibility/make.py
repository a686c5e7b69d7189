"""Make this folder: python tests/data/compatibility/make.py [runs] [composed] [options]

`runs` was made once, by the code before its modules moved into packages, and stays: it stands for the runs and
checkpoints that users have. `composed` and `options` are made anew when an option is added or changed on purpose.
"""

import contextlib
import io
import json
import os
import platform
import re
import shutil
import signal
import socket
import sys
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image

from segtrain import cli, load
from segtrain.models import build_model

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
STOP = 7  # inside the third epoch of five images by twos, and between two saves
NAMES = ("host", "Linux")  # instead of this machine's
DATA = [
    "dataset=folder", "dataset.root=water", "dataset.classes=classes.csv",
    "dataset.splits.train={images:train/images/*.png,labels:train/labels/*.png}",
    "dataset.splits.val={images:val/images/*.png,labels:val/labels/*.png}",
]  # fmt: skip
PLUGIN = "plugins=[plugins/my_small_backbone.py]"
TRAIN = [
    *DATA, PLUGIN, "model.backbone=small", "model.output_stride=16",
    "model.head_channels=8", "model.backend=aten", "augmentation=colour", "augmentation.crop_size=[32,48]",
    "augmentation.scale=[0.8,1.2]", "trainer.batch_size=2", "trainer.epochs=null", "trainer.max_steps=12",
    "trainer.save_every=2", "trainer.validate_every=4", "loader.workers=0", "logging.every=1", "logging.pictures=1",
    "device=cpu",
]  # fmt: skip
INTERRUPTED = [*TRAIN, "model.norm=inplace_abn", "model.backbone_options={dropout:0.5}", "trainer.ema_decay=0.9"]
ABN = [*TRAIN, "model.norm=abn", "optimizer.lr=0.05", "trainer.max_steps=40", "loss=cross_entropy"]
EVALUATE = ["evaluate", "runs/abn/last.pt", PLUGIN, "device=cpu", "loader.workers=0", "output=evaluated"]


class Stopping(io.StringIO):
    """Sends SIGTERM when it reads that a step is done, as a scheduler might."""

    def write(self, text: str) -> int:
        if text.startswith(f"step {STOP}/"):
            signal.raise_signal(signal.SIGTERM)
        return super().write(text)


def segtrain(*words: str, out: io.StringIO | None = None) -> tuple[int, str]:
    """Exit status, and what was printed."""
    sys.argv = ["segtrain", *words]
    out, status = out or io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            cli.main([*words])
        except SystemExit as stop:
            status = int(stop.code or 0)
    return status, out.getvalue()


def draw() -> None:
    """Images of water beside land, 48x64 pixels, five to train on and two to validate."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 5), ("val", 2)):
        for kind in ("images", "labels"):
            Path("water", split, kind).mkdir(parents=True)
        for i in range(count):
            label = np.zeros((48, 64), np.uint8)
            label[:, 20 + 4 * i :] = 7
            label[:3] = 9
            image = np.where(label[..., None] == 7, (150, 90, 60), (70, 100, 130)) + rng.integers(0, 40, (48, 64, 3))
            Image.fromarray(image.astype(np.uint8)).save(f"water/{split}/images/p{i}.png")
            Image.fromarray(label).save(f"water/{split}/labels/p{i}.png")
    Path("water/classes.csv").write_text(
        "id,name,color,ignore\n0,water,#1040a0,\n7,land,200 60 40,false\n9,void,,true\n"
    )


def runs() -> None:
    """A run that was interrupted, the same one left alone, and a finished one with its scores and logits."""
    for name in ("water", "runs", "evaluated"):
        shutil.rmtree(name, ignore_errors=True)
    draw()
    os.environ |= {"GIT_DIR": "none", "PYTHONHASHSEED": "0"}
    host, system = NAMES
    socket.gethostname, platform.platform = (lambda: host), (lambda *_: system)
    torch.set_num_threads(1)
    status, out = segtrain("train", *INTERRUPTED, "run=runs/interrupted", out=Stopping())
    assert status == 75, out
    for words in ([*INTERRUPTED, "run=runs/whole"], [*ABN, "run=runs/abn"]):
        status, out = segtrain("train", *words)
        assert status == 0, out
    for name in ("whole", "abn"):
        for path in Path("runs", name).iterdir():
            if path.name not in ("last.pt", "metrics.jsonl", "blackbox"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    status, out = segtrain(*EVALUATE)
    assert status == 0, out
    shutil.move("evaluated/evaluation.json", "runs/abn/evaluation.json")
    shutil.rmtree("evaluated")
    model = build_model("small", num_classes=2, output_stride=16, norm="abn", head_channels=8)
    model.load_state_dict(torch.load("runs/abn/last.pt", weights_only=True)["model"])
    image = np.asarray(Image.open("water/val/images/p0.png"))
    with torch.inference_mode():
        logits = model.eval()(torch.from_numpy(image.transpose(2, 0, 1) / 255).float()[None], upsample=False)
    np.savez("runs/abn/answers.npz", logits=logits, train_ids=load("runs/abn/last.pt", device="cpu").predict(image))
    versions = {"torch": torch.__version__, "opencv": cv2.__version__, "numpy": np.__version__}
    versions["instructions"] = torch.backends.cpu.get_cpu_capability()
    commands = {"interrupted": ["train", *INTERRUPTED, "run=runs/interrupted"], "evaluate": EVALUATE, "data": DATA}
    Path("made.json").write_text(
        json.dumps({"by": versions, "stopped_at": STOP, "commands": commands}, indent=2) + "\n"
    )


def composed() -> None:
    """What every recipe, every command and every choice of every group composes to."""
    shutil.rmtree("composed", ignore_errors=True)
    Path("composed").mkdir()
    choices: dict[str, list[str]] = {}
    for path in sorted((ROOT / "configs").glob("*/*.yaml")):
        choices.setdefault(path.parent.name, []).append(path.stem)
    commands = {f"train_{name}": ["train", f"experiment={name}"] for name in choices.pop("experiment")}
    for i in range(max(map(len, choices.values()))):  # the choices of different groups do not meet before the checks
        commands[f"groups_{i}"] = ["train", *(f"{group}={found[i % len(found)]}" for group, found in choices.items())]
    own = [PLUGIN, "checkpoint=runs/abn/last.pt"]
    more = {"evaluate": own, "predict": [*own, "input=photo.png"], "check": ["dataset=folder"]}
    more |= {verb: ["predictions=answers", "dataset=kitti"] for verb in ("score", "submit")}
    commands |= {verb: [verb, *more.get(verb, [])] for verb in cli.COMMANDS}
    for name, words in commands.items():
        status, out = segtrain(*words, "--cfg", "job")
        assert status == 0, out
        Path("composed", f"{name}.yaml").write_text(f"# {' '.join(words)}\n{out}")


def options() -> None:
    """Every option of every command with its default, from the help."""
    found: dict[str, list[str]] = {}
    for verb in cli.COMMANDS:
        for line in segtrain(verb, "--help")[1].splitlines():
            if re.match(r"  [\w.]+=\S", line):
                assert line[46] == " ", line
                found.setdefault(verb, []).append(
                    line[2:46].rstrip() + "".join(re.findall(r"^ \[\w+\](?= )", line[46:]))
                )
    Path("options.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    os.chdir(HERE)
    for name in sys.argv[1:]:
        {"runs": runs, "composed": composed, "options": options}[name]()
