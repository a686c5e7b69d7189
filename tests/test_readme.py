"""Run the README at toy size, compose all other commands of the pages, and run all code blocks."""

import json
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hydra.core.config_store import ConfigStore
from PIL import Image

import segtrain as package
from segtrain import abn, config
from segtrain.abn import selftest
from segtrain.cli import commands as command_table
from segtrain.config import DATASET_CONFIGS, TrainConfig
from segtrain.data.datasets import DATASETS
from segtrain.data.scenes.layouts import write_scenes
from segtrain.engine.optim import OPTIMIZERS, SCHEDULES
from segtrain.losses import LOSSES
from segtrain.metrics import METRICS
from segtrain.models import BACKBONES, HEADS, build_model
from segtrain.weights.layouts import LAYOUTS, to_layout
from tests.helpers import pages
from tests.helpers.checkout import ROOT
from tests.helpers.own_parts import FOLDER
from tests.helpers.pages import NAMES, PAGES
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


# ------------------------------------------------------------------------------------------------ code of the pages


@pytest.fixture
def forgotten(monkeypatch):
    """Remove parts of plugins, commands and configurations after a test."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    repo = ConfigStore.instance().repo
    stored = {group: set(repo.get(group, ())) for group in STORED}
    before = [dict(table) for table in TABLES]
    yield
    for group, names in stored.items():
        for name in set(repo.get(group, ())) - names:
            del repo[group][name]
    for table, parts in zip(TABLES, before, strict=True):
        table.clear()
        table.update(parts)
    for name in [name for name in sys.modules if name.startswith("my_")]:
        del sys.modules[name]


STORED = ("model", "loss", "dataset", "optimizer", "schedule")
TABLES = (BACKBONES, HEADS, LOSSES, DATASETS, DATASET_CONFIGS, OPTIMIZERS, SCHEDULES, METRICS)
PLUGINS = sorted(path.name for path in FOLDER.glob("*.py"))


class Encoder(torch.nn.Module):
    """A stand-in for what segmentation_models_pytorch gives: maps of all strides, with BatchNorm."""

    def __init__(self, output_stride):
        super().__init__()
        self.conv, self.norm = torch.nn.Conv2d(3, 6, 3, output_stride, 1), torch.nn.BatchNorm2d(6)
        torch.nn.init.constant_(self.conv.bias, 0.125)
        self.out_channels = (3, 6)

    def forward(self, x):
        return [x, self.norm(self.conv(x)).relu()]


@pytest.fixture
def smp(monkeypatch):
    """The package segmentation_models_pytorch, as far as my_encoder.py needs it."""
    module = types.ModuleType("segmentation_models_pytorch.encoders")
    module.get_encoder = lambda name, weights, output_stride: Encoder(output_stride)
    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch", types.ModuleType("segmentation_models_pytorch"))
    monkeypatch.setitem(sys.modules, module.__name__, module)


def test_an_encoder_of_ones_own_keeps_its_weights(smp, forgotten):
    from segtrain.models import build_model

    exec((FOLDER / "my_encoder.py").read_text(), {})
    model = build_model("smp", output_stride=16)
    assert (model.body.encoder.conv.bias == 0.125).all()


@pytest.mark.parametrize("name", PLUGINS)
def test_a_plugin_of_the_page_does_what_its_first_line_says(name, segtrain, ponds, forgotten, smp, tmp_path):
    """The command in the first line trains two steps, on a dataset like that of my_dataset.py."""
    text = (FOLDER / name).read_text()
    line = text.splitlines()[0]
    words = [word.rstrip('.;"') for word in re.findall(r"[a-z_.]+=\S+", line)]
    plugins = f"plugins=[{name},my_dataset.py]"
    for file in (name, "my_dataset.py"):
        shutil.copy(FOLDER / file, tmp_path)
    own = [word for word in words if not word.startswith(("plugins=", "dataset"))]
    assert own or name in ("my_dataset.py", "my_metric.py")
    answer = segtrain("train", plugins, "dataset=ponds", *own, *ponds, "name=own")
    assert answer.status == 0, answer
    assert (tmp_path / "runs/own/evaluation.json").exists()
    if "segtrain evaluate" in line:
        answer = segtrain("evaluate", "run=runs/own", plugins, ponds[0], "device=cpu", "loader.workers=0")
        assert answer.status == 0, answer
        assert json.loads((tmp_path / "runs/own/evaluations/ponds-val-whole/evaluation.json").read_text())["metrics"]


def test_the_plugins_stand_on_the_page_as_they_are_tested():
    text = PAGES["segtrain/README.md"]
    for path in sorted((ROOT / "tests/fixtures/plugins").glob("*.py")):
        assert path.read_text().strip() in text, path


def test_the_other_python_of_the_page_is_run_here():
    """By the two tests below."""
    assert len(examples()) == 4


def examples():
    """Python blocks of the page other than plugins: options, function and row of a command; a back end."""
    plugins = {(FOLDER / name).read_text().strip() for name in PLUGINS}
    return [block for block in pages.blocks("segtrain/README.md", "python") if block.strip() not in plugins]


def test_the_command_of_the_page_runs(segtrain, toy, scenes, forgotten, monkeypatch, tmp_path):
    options, function, row, _ = examples()
    scope = vars(config.commands)
    for name in set(re.findall(r"class (\w+)", options)):
        monkeypatch.setitem(scope, name, None)
        exec(options, scope)
        monkeypatch.setattr(config, name, scope[name], raising=False)
    module = types.ModuleType("segtrain.commands.count")
    exec(function, vars(module))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for verb, command in eval(f"{{{row}}}", vars(command_table)).items():
        monkeypatch.setitem(command_table.COMMANDS, verb, command)
    (group,) = (block for block in pages.blocks("segtrain/README.md", "yaml") if "schema/count" in block)
    (tmp_path / "configs/count.yaml").write_text(group)
    words = "dataset=streets", f"dataset.root={scenes}", "dataset.scenes=6", "dataset.val_scenes=3"
    assert segtrain("count", *words).out == "3 images in val\n"
    assert segtrain("count", *words, "split=train").out == "6 images in train\n"
    assert "split=null" in segtrain("count", "--help").out
    for example in command_table.COMMANDS["count"].examples:
        assert segtrain(*example.split()[1:], "--cfg", "job").status == 0


def test_the_back_end_of_the_page_passes_the_selftest(monkeypatch):
    if abn.operators.native_ops.available():
        pytest.skip("no C++ compiler")
    module = types.ModuleType("segtrain.abn.backends.mine")
    exec(examples()[3], vars(module))
    results = selftest.check_backend(module, "cpu", [case for case in selftest.cases() if case.dtype == torch.float32])
    assert len(results) > 100
    assert not [str(result) for result in results if not result.good]
    monkeypatch.setitem(abn.operators.BACKENDS, "mine", module)
    monkeypatch.setitem(abn.operators.DEVICES, "mine", "cpu")
    before = abn.operators.chosen
    try:
        abn.use_backend("mine")
        assert abn.describe_backend("cpu") == "mine, as chosen"
        x = torch.randn(2, 8, 4, 4, requires_grad=True)
        abn.InPlaceABN(8)(x * 1).sum().backward()
        assert x.grad is not None
    finally:
        abn.use_backend(before)
