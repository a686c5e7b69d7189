"""What the commands of tests.fuzz_options and tests.fuzz_files work on."""

import contextlib
import os
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from segtrain import config
from segtrain.cli import entry
from segtrain.cli.commands import COMMANDS
from tests.helpers.checkout import TINY
from tests.helpers.forked import forked
from tests.helpers.runs import small_run


class Files:
    """A folder with data of every layout, a run, published-like weights and predictions, all of them tiny."""

    def __init__(self, root: Path) -> None:
        from segtrain.data.scenes.layouts import write_scenes

        self.root = root
        self.data: dict[str, list[str]] = {}
        counts = {"train": 4, "val": 2, "test": 2}
        for layout in ("cityscapes", "kitti", "vistas", "cocostuff", "imagenet"):
            some = {split: count for split, count in counts.items() if split != "test" or layout != "imagenet"}
            with contextlib.redirect_stdout(open(os.devnull, "w")):  # noqa: PTH123
                write_scenes(root / layout, layout, some, 0, (256, 512), workers=1)
            self.data[layout] = [f"dataset.root={root / layout}"]
        self.data["streets"] = [f"dataset.root={root / 'cityscapes'}", "dataset.scenes=4", "dataset.val_scenes=2"]
        self.data["folder"] = self.folder()
        self.data["mixture"] = [
            f"dataset.parts.cityscapes.root={root / 'cityscapes'}", "dataset.parts.cityscapes.weight=1",
        ]  # fmt: skip
        self.words = self.training("streets")
        Image.fromarray(np.zeros((40, 60, 3), np.uint8)).save(root / "photo.png")
        (root / "predictions").mkdir()
        for path in (root / "cityscapes" / "gtFine" / "val").rglob("*_labelIds.png"):
            name = path.name.replace("_gtFine_labelIds", "_leftImg8bit")
            (root / "predictions" / name).write_bytes(path.read_bytes())
        self.make_network()

    def folder(self) -> list[str]:
        place = self.root / "folder"
        for split, count in (("train", 4), ("val", 2)):
            for kind, shape in (("images", (64, 96, 3)), ("labels", (64, 96))):
                (place / split / kind).mkdir(parents=True)
                for i in range(count):
                    pixels = np.full(shape, 7 * i % 2, np.uint8)
                    Image.fromarray(pixels).save(place / split / kind / f"{i}.png")
        (place / "classes.csv").write_text("id,name,color,ignore\n0,water,#1040a0,\n1,land,200 60 40,false\n")
        splits = [
            f"dataset.splits.{split}={{images:{split}/images/*.png,labels:{split}/labels/*.png}}"
            for split in ("train", "val")
        ]
        return [f"dataset.root={place}", "dataset.classes=classes.csv", *splits]

    def training(self, dataset: str) -> list[str]:
        """Words of a training of one step."""
        own = [word for word in small_run(Path("x")) if not word.startswith("dataset.")]
        words = [f"dataset={dataset}", *self.data[dataset], *own, f"plugins=[{TINY}]", "model.backbone=tiny"]
        words += ["trainer.max_steps=1", "logging.pictures=0"]
        if dataset == "imagenet":
            classify = [
                "model.head=classifier",
                "model.head_channels=256",
                "augmentation=imagenet",
                "loss=cross_entropy",
            ]
            words += [*classify, "augmentation.crop_size=[32,32]", "inference=center224"]
            words = [word for word in words if not word.startswith(("augmentation.scale", "model.head_channels=8"))]
        return words

    def base(self, command: str, dataset: str) -> list[str]:
        """The words that a case of this command adds its own to."""
        run, data = self.root / "run", self.data.get(dataset, [])
        given = [f"dataset={dataset}", *data] if dataset else []
        plain = [f"plugins=[{TINY}]"]
        network = [f"run={run}", "device=cpu", *plain]
        return {
            "streets": ["scenes=1", "val_scenes=1", "night_scenes=0", "workers=1"],
            "check": given,
            "show": [*given, "count=2", "augmentation.crop_size=[32,32]"],
            "train": self.training(dataset or "streets"),
            "replay": [f"run={run}", *plain],
            "verify-resume": self.training(dataset or "streets"),
            "plan": self.training(dataset or "streets"),
            "runs": [f"root={self.root}"],
            "evaluate": [*network, "loader.workers=0", "pictures=1", *given],
            "score": [f"predictions={self.root / 'predictions'}", *(given or self.given("cityscapes"))],
            "compare": [f"inputs=[{run},{self.root / 'second'}]"],
            "report": [f"run={run}", "device=cpu", "pictures=1", *plain],
            "suspects": [f"run={run}", "device=cpu", "top=3", *plain],
            "submit": [f"predictions={self.root / 'predictions'}", "split=val", *(given or self.given("cityscapes"))],
            "predict": [f"input={self.root / 'photo.png'}", *network],
            "export": [f"run={run}", *plain, "output=out.onnx", *given],
            "convert": [f"input={self.root / 'weights.pth'}", "output=out.safetensors"],
            "convert-labels": [f"input={self.root / 'folder'}", "output=labels"],
            "weights": [],
            "info": [],
        }[command]

    def given(self, dataset: str) -> list[str]:
        return [f"dataset={dataset}", *self.data[dataset]]

    def make_network(self) -> None:
        """A finished run, and weights of a backbone, made in a process of its own."""
        status, text = forked(
            lambda: entry.run_command("train", COMMANDS["train"], [*self.words, f"run={self.root / 'run'}"]), self.root
        )
        if not (self.root / "run" / "last.pt").is_file():
            raise SystemExit(f"the run that the cases use was not made, status {status}:\n{text}")
        shutil.copytree(self.root / "run", self.root / "second")
        import torch

        from segtrain.models import from_config

        weights = from_config(config.ModelConfig(backbone="resnet18", head_channels=8), 19).state_dict()
        torch.save(weights, self.root / "weights.pth")


def remove(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        path.unlink() if path.is_symlink() or not path.is_dir() else path.rmdir()
    folder.rmdir()
