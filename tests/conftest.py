"""Shared fixtures, and the rule that every skipped test must be listed as allowed."""

import contextlib
import functools
import io
import os
import shutil
import sys
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from segtrain.cli import entry as cli
from segtrain.models import BACKBONES
from tests.helpers.checkout import ROOT

ALLOWED = {
    line.strip() for line in (ROOT / "tests" / "allowed_skips.txt").read_text().splitlines() if line and line[0] != "#"
}
BUILT_IN = set(BACKBONES)
unexpected: list[str] = []


def pytest_runtest_logreport(report):
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = str(report.longrepr[2]).removeprefix("Skipped: ")
        if reason not in ALLOWED:
            unexpected.append(f"{report.nodeid}: {reason}")


def pytest_sessionfinish(session):
    if unexpected and session.exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter):
    if unexpected:
        terminalreporter.section("skips that tests/allowed_skips.txt does not list", red=True)
        for line in unexpected:
            terminalreporter.line(line)


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """The folder of the compiled In-Place ABN libraries, which all processes share and every test's cache gets."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "compiled"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, tmp_path_factory, monkeypatch, compiled):
    """Every test runs in an empty folder, with a cache of its own and only the data that it makes."""
    monkeypatch.chdir(tmp_path)
    cache = tmp_path_factory.mktemp("cache")
    shutil.copytree(compiled, cache / "abn", copy_function=os.link)
    monkeypatch.setenv("SEGTRAIN_CACHE", str(cache))
    monkeypatch.delenv("SEGTRAIN_DATA", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    threads = torch.get_num_threads()
    monkeypatch.setattr(sys, "path", [*sys.path])  # to which a plugin's folder is added
    yield
    for library in (cache / "abn").glob("*.so"):
        with contextlib.suppress(FileExistsError):  # it was there, or another process was first
            os.link(library, compiled / library.name)
    torch.set_num_threads(threads)  # sums, and so the bits of a training, depend on it
    for name in BACKBONES.keys() - BUILT_IN:  # a plugin is of the test that named it, and of its fixtures
        sys.modules.pop(BACKBONES.pop(name).__module__, None)


class Answer(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture
def segtrain():
    """segtrain("train", "experiment=toy") -> exit status and output, run in this process."""

    def call(*arguments: str) -> Answer:
        out, err = io.StringIO(), io.StringIO()
        status = 0
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                cli.main([str(argument) for argument in arguments])
            except SystemExit as stop:
                status = int(stop.code or 0)
        return Answer(status, out.getvalue(), err.getvalue())

    return call


@pytest.fixture(scope="session", autouse=True)
def scenes_drawn_once():
    """Several modules write the same few scenes in several layouts: draw each scene once."""
    from segtrain.data.scenes import layouts

    layouts._draw = functools.lru_cache(maxsize=48)(layouts._draw)


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """A folder of built-in scenes in Cityscapes' layout: 6 train, 3 val, 2 night. Read only."""
    from segtrain.data.scenes.layouts import write_scenes

    root = tmp_path_factory.mktemp("streets") / "streets"
    write_scenes(root, "cityscapes", {"train": 6, "val": 3, "night": 2}, 0, (256, 512), workers=1)
    return root


@pytest.fixture
def folder_data(tmp_path):
    """A folder dataset of two classes plus void: 4 train and 2 val pairs of 48x64 pixels, and its overrides."""
    root = tmp_path / "mine"
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2)):
        for kind in ("images", "labels"):
            (root / split / kind).mkdir(parents=True)
        for i in range(count):
            label = np.zeros((48, 64), np.uint8)
            label[:, 20 + 4 * i :] = 7
            label[:3] = 9
            image = np.where(label[..., None] == 7, (200, 60, 40), (30, 90, 160)) + rng.integers(0, 30, (48, 64, 3))
            Image.fromarray(image.astype(np.uint8)).save(root / split / "images" / f"p{i}.png")
            Image.fromarray(label).save(root / split / "labels" / f"p{i}.png")
    (root / "classes.csv").write_text("id,name,color,ignore\n0,water,#1040a0,\n7,land,200 60 40,false\n9,void,,true\n")
    overrides = [
        "dataset=folder", f"dataset.root={root}", "dataset.classes=classes.csv",
        "dataset.splits.train={images:train/images/*.png,labels:train/labels/*.png}",
        "dataset.splits.val={images:val/images/*.png,labels:val/labels/*.png}",
        "augmentation.crop_size=[32,48]", "augmentation.scale=[0.9,1.1]", "model.output_stride=16",
        "model.head_channels=8", "trainer.batch_size=2", "trainer.epochs=null", "trainer.max_steps=2",
        "loader.workers=0", "device=cpu",
    ]  # fmt: skip
    return root, overrides


@pytest.fixture
def ponds(tmp_path):
    """Overrides for a training of two steps on images in the layout of my_dataset.py."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2)):
        folder = tmp_path / "ponds" / split
        folder.mkdir(parents=True)
        for i in range(count):
            label = np.zeros((64, 96), np.uint8)
            label[:, 30 + 5 * i :] = 1
            image = np.where(label[..., None] == 1, (20, 60, 200), (90, 70, 30)) + rng.integers(0, 30, (64, 96, 3))
            Image.fromarray(image.astype(np.uint8)).save(folder / f"{i}.jpg")
            Image.fromarray(label).save(folder / f"{i}.png")
    return [
        f"dataset.root={tmp_path / 'ponds'}", "augmentation.crop_size=[32,48]", "augmentation.scale=[0.9,1.1]",
        "model.output_stride=16", "model.head_channels=8", "trainer.batch_size=2", "trainer.epochs=null",
        "trainer.max_steps=2", "loader.workers=0", "device=cpu",
    ]  # fmt: skip


@pytest.fixture(scope="session")
def class_images(tmp_path_factory):
    """Images with one class each, of several sizes and file types: six classes, four images of each in train, three in
    val. Read only."""
    root = tmp_path_factory.mktemp("imagenet")
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 3)):
        for number in range(6):
            folder = root / split / f"n{number:08d}"
            folder.mkdir(parents=True)
            for i in range(count):
                colour = np.array([40 * number, 255 - 40 * number, 90 * (number % 3)])
                size = (40 + 9 * i, 60 - 5 * i, 3)
                picture = np.clip(colour + rng.integers(-25, 26, size), 0, 255).astype(np.uint8)
                name = f"{folder.name}_{i}.JPEG" if split == "train" else f"ILSVRC2012_val_{number}{i}.JPEG"
                Image.fromarray(picture).save(folder / name, "PNG" if i == 2 else "JPEG", quality=95)
    return root
