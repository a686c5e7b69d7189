"""Run the README at toy size, and compose all other commands of the pages."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import segtrain as package
from segtrain.cli import commands as command_table
from segtrain.config import TrainConfig
from segtrain.data.scenes.layouts import write_scenes
from segtrain.models import build_model
from segtrain.weights.layouts import LAYOUTS, to_layout
from tests.helpers import pages
from tests.helpers.checkout import ROOT
from tests.helpers.pages import NAMES
from tests.helpers.runs import small_run
from tests.helpers.weights import write_network_of_vistas

SHELL = [command for name in NAMES for command in pages.commands(name)]
CONFIGS = ROOT / "configs"


# ------------------------------------------------------------------------------------------------ the README


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """Replace the recipe toy by three steps on six scenes, under the same name, so that runs have their usual names."""
    folder = tmp_path / "configs"
    shutil.copytree(CONFIGS, folder)
    recipe = yaml.safe_load((folder / "experiment/toy.yaml").read_text())
    recipe["dataset"] = {"scenes": 6, "val_scenes": 3}
    recipe["model"]["head_channels"] = 8
    recipe["augmentation"] = {"crop_size": [64, 96], "scale": [0.3, 0.5]}
    recipe["trainer"] |= {"batch_size": 2, "max_steps": 3, "validate_every": 3, "save_every": 2}
    recipe |= {"loader": {"workers": 0}, "device": "cpu"}
    (folder / "experiment/toy.yaml").write_text(f"# @package _global_\n{yaml.safe_dump(recipe)}")
    for name, module in list(sys.modules.items()):
        if name.startswith("segtrain.") and getattr(module, "CONFIGS", None) == CONFIGS:
            monkeypatch.setattr(module, "CONFIGS", folder)


@pytest.fixture
def data(tmp_path):
    """The contents of /data on the reader's machine: own photographs with labels, and KITTI."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 2)):
        for name in (split, f"{split}_labels"):
            (tmp_path / "data/mine" / name).mkdir(parents=True)
        for i in range(count):
            label = np.zeros((64, 96), np.uint8)
            label[:, 30 + 4 * i :] = 1
            image = np.where(label[..., None] == 1, (200, 60, 40), (30, 90, 160)) + rng.integers(0, 30, (64, 96, 3))
            Image.fromarray(image.astype(np.uint8)).save(tmp_path / f"data/mine/{split}/{i}.jpg")
            Image.fromarray(label).save(tmp_path / f"data/mine/{split}_labels/{i}.png")
    shutil.copytree(tmp_path / "data/mine/val", tmp_path / "data/new")
    write_scenes(tmp_path / "data/kitti", "kitti", {"train": 4, "val": 2, "night": 0}, 0, (256, 512), workers=1)
    return tmp_path / "data"


SMALLER = {  # words of the README -> the same at toy size
    "augmentation.crop_size=[256,320]": "augmentation.crop_size=[32,48]",
    "trainer.batch_size=8": "trainer.batch_size=4",
    "trainer.epochs=60": "trainer.epochs=1",
}
ADDED = {  # further words, for speed and because there may be a GPU
    "train": ("device=cpu", "loader.workers=0"),
    "evaluate": ("device=cpu", "loader.workers=0", "inference.scales=[0.25]"),
    "predict": ("device=cpu", "inference.scales=[0.25]"),
    "submit": ("device=cpu", "inference.scales=[0.25]"),
    "report": ("device=cpu", "pictures=1"),
    "check": (),
    "--help": (),
}
WORDS = {  # commands of the README, as far as needed to tell them apart -> what their output must hold
    "train experiment=toy": ("runs/toy",),
    "train name=mine": ("runs/mine", "mIoU"),
    "evaluate runs/toy": ("mIoU", "runs/toy/evaluations"),
    "evaluate checkpoint=cityscapes_best": ("mIoU", "kitti"),
    "evaluate wide_resnet38": ("33 of the network's 65 classes", "32 have no counterpart", "mIoU"),
    "predict run=runs/toy": ("3 images", "answers"),
    "predict run=runs/mine": ("2 images", "answers"),
    "check": ("mine.yaml",),
    "check dataset=kitti": ("kitti",),
    "report runs/toy": ("runs/toy/report.html",),
    "submit": ("kitti-test.zip",),
    "--help": ("usage: segtrain COMMAND",),
}


def at_toy_size(command, data):
    """The words after `segtrain`."""
    verb, *words = command.words[1:]
    words = [SMALLER.get(word, word).replace("/data/", f"{data}/") for word in words]
    return [verb, *words, *(word for word in ADDED[verb] if "experiment=toy" not in words)]


def succeeds(command, data, segtrain):
    answer = segtrain(*at_toy_size(command, data))
    assert answer.status == 0, (command.text, answer)
    key = max((key for key in WORDS if " ".join(command.words[1:]).startswith(key)), key=len)
    for word in WORDS[key]:
        assert word in answer.out, (command.text, answer)
    return answer


def test_the_commands_of_the_readme_run(segtrain, toy, data, tmp_path):
    """In their order, in one folder. Commands other than `segtrain` are run by the tests of scripts below."""
    ran = [command for command in pages.commands("README.md") if command.words[0] == "segtrain"]
    assert len(ran) >= 11
    answers = {}
    for command in ran:
        if "checkpoint=cityscapes_best.pth" in command.words:  # a network for Cityscapes' classes
            shutil.copy("runs/toy/last.pt", "cityscapes_best.pth")
        if "wide_resnet38_deeplab_vistas.pth.tar" in command.words:
            write_network_of_vistas(Path("runs/toy/last.pt"), Path("wide_resnet38_deeplab_vistas.pth.tar"))
        answers[command.text] = succeeds(command, data, segtrain)
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"toy", "toy-optimizer.lr=0.01", "mine"}
    first, second = (answer for text, answer in answers.items() if text.startswith("segtrain train experiment=toy  "))
    assert "is finished" in second.out and "is finished" not in first.out
    run_python_of_the_readme()


@pytest.mark.slow
def test_kitti_is_evaluated_and_answered_by_a_network_with_nvidias_key_names(segtrain, data):
    """The README's commands, with random weights in the names and shapes of the published file."""
    with torch.device("meta"):
        model = build_model("wider_resnet38", "deeplabv3plus", 19, 8, norm="batch_norm", activation="relu")
    state = {key: 0.02 * torch.rand(tensor.shape) for key, tensor in model.state_dict().items()}
    state = {f"module.{key}": tensor for key, tensor in to_layout(LAYOUTS["nvidia_deeplabv3plus"], state).items()}
    torch.save({"state_dict": state}, "cityscapes_best.pth")
    commands = [command for command in pages.commands("README.md") if "dataset=kitti" in command.words]
    commands = [command for command in commands if "taxonomy" not in command.text]
    assert len(commands) == 3
    for command in commands:
        answer = succeeds(command, data, segtrain)
        assert ("nvidia_cityscapes_best" in answer.out) == ("check" not in command.words)


def run_python_of_the_readme():
    """Run the code after the commands, because the first block reads one of their runs."""
    reads, layer = pages.blocks("README.md", "python")
    scope = {"image": np.zeros((64, 96, 3), np.uint8)}
    exec(reads, scope)
    assert scope["classes"].shape == (64, 96)
    trained = []
    scope = {"train": lambda model: trained.append(model(scope["images"]).sum().backward())}
    exec(layer, scope)
    assert scope["conversion"].converted and trained
    assert scope["exported"](scope["images"]).shape == (2, 1000)
    assert len([line for line in layer.splitlines() if line.strip()]) <= 10


def program(folder, name, body='echo "$(basename "$0") $*"'):
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def test_the_scripts_of_the_readme_call_what_it_says(segtrain, tmp_path):
    """In an environment that is installed already, whose programs print their arguments."""
    folder = tmp_path / "venv/bin"
    folder.mkdir(parents=True)
    for name in ("segtrain", "ruff", "mypy"):
        program(folder, name)
    program(folder, "python", '[ "$1" = -c ] || echo "$(basename "$0") $*"')
    (folder / "activate").write_text(f"PATH={folder}:$PATH\n")
    said = {}
    scripts = [command for command in pages.commands("README.md") if command.words[0] != "segtrain"]
    for command in scripts:
        words = [word.replace(".venv", "venv") for word in command.words]
        if words[0] == "source":
            words = ["bash", "-c", f"{' '.join(words)} && segtrain train"]
        else:
            words[0] = str(ROOT / words[0])
        extras = "[dev]" if words[0].endswith("test") else ""
        stamp = (ROOT / "pyproject.toml").read_text() + (ROOT / "constraints.txt").read_text() + f"{ROOT}\n"
        (tmp_path / f"venv/.segtrain{extras}").write_text(stamp)
        answer = subprocess.run(
            words, env={**os.environ, "VENV": str(tmp_path / "venv")}, cwd=tmp_path, capture_output=True, text=True
        )
        assert answer.returncode == 0, answer.stderr
        said[command.words[0]] = answer.stdout.splitlines()
    assert said.keys() == {"./scripts/quickstart", "./scripts/test", "source"}
    assert said["source"] == ["segtrain train"]
    assert said["./scripts/quickstart"][-1] == "segtrain train experiment=streets_resnet18"
    assert [line.split()[:2] for line in said["./scripts/test"][1:]] == [
        ["ruff", "check"], ["ruff", "format"], ["mypy"], ["python", "-m"]
    ]  # fmt: skip
    assert "pytest" in said["./scripts/test"][-1]


# ------------------------------------------------------------------------------------------------ commands of all pages


def segtrain_words(command):
    """The words that a command of a page gives to segtrain, however it starts it; None if it starts something else."""
    words = list(command.words)
    if words[0] == "segtrain":
        return words[1:]
    if words[0] == "torchrun" or words[:2] == ["docker", "run"]:
        return words[next(i for i, word in enumerate(words) if word in command_table.COMMANDS) :]
    if words[0] == "sbatch":
        return ["train", *words[words.index("scripts/slurm.sh") + 1 :]]
    if words[0].startswith("./scripts/reproduce/"):
        return ["train", *(word for word in words if "=" in word), *(f"experiment={w}" for w in words[1:] if "_" in w)]
    return None


def composable(words, checkpoint):
    """The words with one value of each sweep, and with an existing checkpoint."""
    for word in words:
        key, equals, value = word.partition("=")
        if key.startswith("hydra/") or word in ("-m", "--smoke"):
            continue
        if "-m" in words and value[:1] not in "[{'\"":
            word = f"{key}={value.partition(',')[0]}"
        if key in ("checkpoint", "run"):
            word = f"checkpoint={checkpoint}"
        elif not equals and words[0] in ("evaluate", "submit") and word != words[0]:
            word = str(checkpoint)
        yield word


@pytest.fixture(scope="session")
def run_folder(scenes, compiled, tmp_path_factory):
    """A finished training of one step on the street scenes."""
    folder = tmp_path_factory.mktemp("trained")
    shutil.copytree(compiled, folder / "abn", copy_function=os.link)  # a link would be refused, and all compiled again
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SEGTRAIN_CACHE", str(folder))
        package.train(package.compose(*small_run(scenes, "trainer.max_steps=1", f"run={folder / 'run'}")))
    return folder / "run"


SEGTRAIN = [command for command in SHELL if segtrain_words(command) is not None]
OTHERS = [command for command in SHELL if segtrain_words(command) is None]


@pytest.mark.parametrize("command", SEGTRAIN, ids=[f"{c.page}: {' '.join(c.words)[:60]}" for c in SEGTRAIN])
def test_a_command_composes(command, segtrain, run_folder, tmp_path):
    words = list(composable(segtrain_words(command), run_folder / "last.pt"))
    for word in words:
        if word.startswith("dataset=") and word.endswith(".yaml"):  # as `segtrain check write_config=` writes it
            (tmp_path / word.partition("=")[2]).write_text("name: folder\n")
    if any(word.startswith("--") for word in words):  # prints something instead of training
        answer = segtrain(*words)
        assert answer.status == 0 and answer.out, answer
        return
    answer = segtrain(*words, "--cfg", "job")
    assert answer.status == 0, answer
    if words[0] == "train":
        assert isinstance(package.compose(*words[1:]), TrainConfig)


def test_the_other_commands_are_known():
    """Another test runs or looks up each of them; a program that is not listed here needs a test."""
    tested = {"./scripts/quickstart", "./scripts/test", "source", "docker", "eval", "pytest", "python"}
    assert {command.words[0] for command in OTHERS} <= tested
    assert [command.words[1] for command in OTHERS if command.words[0] == "docker"] == ["build"]
    inner = [command.words[1] for command in OTHERS if command.words[0] == "eval"]
    assert inner == ["$(segtrain --completion bash)"]


def test_completion_prints_a_script(segtrain):
    assert "complete" in segtrain("--completion", "bash").out


def test_the_scripts_that_reproduce_the_paper_have_the_rows_that_are_named():
    for command in SHELL:
        if command.words[0].startswith("./scripts/reproduce/"):
            text = (ROOT / command.words[0]).read_text()
            for word in command.words[1:]:
                assert word == "--smoke" or "=" in word or f" {word} " in f"{text} ".replace("\n", " "), word
            for variable in command.variables:
                known = text + (ROOT / "scripts/reproduce/common.sh").read_text()
                assert variable.partition("=")[0] in known, variable
