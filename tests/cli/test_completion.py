"""Shell completion: what is offered after which words, and that bash accepts it."""

import os
import subprocess
import sys
from dataclasses import fields

import pytest

from segtrain import config
from segtrain.cli import completion
from segtrain.cli.commands import COMMANDS
from segtrain.cli.words import override
from tests.helpers.checkout import environment
from tests.helpers.runs import refused


def offered(*words):
    return completion.complete(list(words), COMMANDS)


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["tra"], ["train"]),
        (["s"], ["streets", "show", "score", "suspects", "submit"]),
        (["--c"], ["--completion"]),
        (["--completion", ""], ["bash", "zsh", "fish"]),
        (["nonsense", "x"], []),
        (["train", "optimizer.l"], ["optimizer.lr="]),
        (["train", "optim"], [*(f"optimizer.{field.name}=" for field in fields(config.OptimizerConfig)), "optimizer="]),
        (["train", "dataset=ci"], ["dataset=cityscapes"]),
        (["train", "experiment=to"], ["experiment=toy"]),
        (["train", "augmentation="], [f"augmentation={name}" for name in ("colour", "imagenet", "none", "paper")]),
        (["train", "dataset=streets", "dataset.val_s"], ["dataset.val_scenes=", "dataset.val_split="]),
        (["train", "dataset=kitti", "dataset.val_list=n"], [f"dataset.val_list=nvidia_sdcnet_cv{i}" for i in range(3)]),
        (["train", "model.norm=in"], ["model.norm=inplace_abn", "model.norm=inplace_abn_sync"]),
        (["train", "model.scale="], ["model.scale=abs", "model.scale=signed"]),
        (["train", "model.output_stride="], [f"model.output_stride={n}" for n in (8, 16, 32)]),
        (["train", "model.backbone=wi"], ["model.backbone=wider_resnet38", "model.backbone=wider_resnet38_pooled"]),
        (["train", "optimizer.nesterov=t"], ["optimizer.nesterov=true"]),
        (["train", "device=c"], ["device=cuda", "device=cpu"]),
        (["train", "optimizer.lr="], []),
        (["train", "--cfg", ""], ["job"]),
        (["train", "--con"], ["--config-dir"]),
        (["check", "dataset=vistas", "dataset.version="], ["dataset.version=v1.2", "dataset.version=v2.0"]),
        (["predict", "dev"], ["device="]),
    ],
)  # fmt: skip
def test_what_is_offered(words, wanted):
    assert sorted(offered(*words)) == sorted(wanted)


def test_files(tmp_path):
    for name in ("my (runs)/a/last.pt", ".hidden/x", "parts.py", "photo.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert offered("predict", "input=") == ["input=my (runs)/", "input=parts.py", "input=photo.jpg"]
    assert offered("predict", "input=.h") == ["input=.hidden/"]
    assert offered("predict", "run=my (runs)/") == ["run=my (runs)/a/"]
    assert offered("predict", f"input={tmp_path}/ph") == [f"input={tmp_path}/photo.jpg"]
    assert offered("evaluate", "my") == ["my (runs)/"]  # a bare path
    assert offered("train", "my") == []
    assert offered("train", "plugins=[photo.jpg,pa") == ["plugins=[photo.jpg,parts.py"]
    assert offered("train", "--config-dir", "") == ["my (runs)/"]
    assert offered("predict", "input=nowhere/x") == []
    assert offered("train", "name=p") == []


def test_recipes_of_ones_own(tmp_path):
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "topmost.yaml").touch()
    for flag in (["--config-dir", "mine"], ["--config-dir=mine"]):
        assert offered("train", *flag, "experiment=to") == ["experiment=topmost", "experiment=toy"]


def test_every_offered_name_exists():
    for verb, command in COMMANDS.items():
        for name in offered(verb, ""):
            if name.endswith("="):
                assert override(verb, command, f"{name}x")
                assert offered(verb, name) is not None


def test_it_is_quick_and_imports_nothing_heavy():
    program = (
        "import sys, time; from segtrain.cli.entry import run; "
        "run(['--complete', 'train', 'model.']); "
        "print(time.process_time(), [m for m in ('torch', 'hydra', 'omegaconf', 'cv2', 'numpy') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment(), capture_output=True, text=True, check=True
    )
    *found, last = result.stdout.splitlines()
    assert "model.norm=" in found
    seconds, _, modules = last.partition(" ")
    assert modules == "[]"
    assert float(seconds) < 0.3  # of the processor, Python's own start included


def test_the_scripts_are_printed_and_documented(segtrain):
    assert "--completion bash" in segtrain("--help").out
    for shell, word in (
        ("bash", "complete -F _segtrain segtrain"),
        ("zsh", "compdef"),
        ("fish", "complete -c segtrain"),
    ):
        answer = segtrain("--completion", shell)
        assert word in answer.out
        assert "segtrain --complete" in answer.out
    refused(segtrain("--completion", "tcsh"), "--completion tcsh", "bash, zsh, fish")
    refused(segtrain("--completion"), "bash, zsh, fish")


@pytest.mark.parametrize(
    ("line", "words", "reply"),
    [
        ("segtrain tra", ["segtrain", "tra"], ["train"]),
        ("segtrain train model.norm=inplace_abn_", ["segtrain", "train", "model.norm", "=", "inplace_abn_"],
         ["inplace_abn_sync"]),
        ("segtrain train dataset=", ["segtrain", "train", "dataset", "="],
         ["cityscapes", "cocostuff", "folder", "imagenet", "kitti", "mixture", "streets", "vistas"]),
        ("segtrain predict ", ["segtrain", "predict", ""], None),
        ("segtrain predict input=my", ["segtrain", "predict", "input", "=", "my"], ["my\\ photos/"]),
    ],
)  # fmt: skip
def test_bash(line, words, reply, tmp_path):
    """As bash calls it: it splits the line at = too, and replaces what follows the last =."""
    (tmp_path / "my photos").mkdir()
    program = tmp_path / "bin" / "segtrain"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m segtrain "$@"\n')
    program.chmod(0o755)
    quoted = " ".join(f"'{word}'" for word in words)
    script = (
        f"eval \"$(segtrain --completion bash)\"; COMP_WORDBREAKS=$' \\t\\n\"\\'><=;|&(:'; "
        f"COMP_LINE='{line}' COMP_POINT={len(line)} COMP_WORDS=({quoted}) COMP_CWORD={len(words) - 1}; "
        '_segtrain; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    result = subprocess.run(
        ["bash", "--norc", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True,
        env=environment() | {"PATH": f"{program.parent}:{os.environ['PATH']}"},
    )  # fmt: skip
    found = result.stdout.splitlines()
    if reply is None:
        assert {"checkpoint=", "device=", "my\\ photos/"} <= set(found)
    else:
        assert found == reply
