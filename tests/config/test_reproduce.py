"""scripts/reproduce: each script trains the rows of its table and reports what is missing before it starts."""

import os
import shutil
import subprocess

import pytest

from tests.helpers.checkout import ROOT
from tests.helpers.recipes import FOLDER, ROWS


def test_the_scripts_train_every_row():
    for table in (3, 4):
        script = (ROOT / "scripts" / "reproduce" / f"table{table}.sh").read_text()
        rows = script.partition("rows=(")[2].partition(")")[0].split()
        assert sorted(rows) == sorted(row["recipe"] for row in ROWS if row["table"] == table)


@pytest.fixture
def script(tmp_path):
    """script("table2.sh", ...) in a copy of the scripts, with programs that only print their arguments."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    shutil.copytree(FOLDER, tmp_path / "configs" / "experiment")
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name in ("python", "segtrain", "torchrun"):
        (programs / name).write_text(f'#!/bin/sh\necho "{name} $*" >> "{tmp_path}/called"\n')
        (programs / name).chmod(0o755)
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).touch()

    def call(name, *words):
        (tmp_path / "called").write_text("")
        command = ["bash", f"scripts/reproduce/{name}", *words]
        env = {"PATH": os.environ["PATH"], "TMPDIR": str(tmp_path)}
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        return done, (tmp_path / "called").read_text()

    return call


def test_a_row_that_a_script_lacks_stops_it_before_anything_is_installed(script):
    done, called = script("table2.sh", "imagenet_resnext101", "imagenet_resnext11")
    assert (done.returncode, called) == (2, "")
    assert done.stderr.startswith("no row imagenet_resnext11; there is imagenet_resnext101_std imagenet_resnext101 ")
    done, called = script("table2.sh", "imagenet_resnext101")
    assert done.returncode == 0, done.stderr
    assert called.count(" train ") == 1 and "experiment=imagenet_resnext101 " in called
    assert called.count("segtrain evaluate run=runs/imagenet_resnext101 ") == 3


def test_a_run_that_a_row_begins_with_must_be_there_or_be_asked_for(script, tmp_path):
    vistas, kitti = "vistas_wider_resnet38", "cityscapes_kitti_wider_resnet38"
    for smoke in ([], ["--smoke"]):
        done, called = script("kitti.sh", kitti, *smoke)
        assert done.returncode == 2
        assert f"runs/{vistas}/last.pt, with which {kitti} begins; train it first: the same script" in done.stderr
        assert "torchrun" not in called and "segtrain" not in called
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "wide_resnet38_ipabn_lr_256.pth.tar").touch()
    for words, trained in (([kitti, "model.weights=none"], 1), ([kitti, vistas], 2), ([], 2)):
        done, called = script("kitti.sh", *words)
        assert (done.returncode, called.count(" train ")) == (0, trained), done.stderr
    (tmp_path / "runs" / vistas).mkdir(parents=True)
    (tmp_path / "runs" / vistas / "last.pt").touch()
    assert script("kitti.sh", kitti)[0].returncode == 0
