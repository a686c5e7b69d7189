"""Street scenes that are there already are taken as they are, also where nothing can be written; and plain scripts."""

import subprocess
import sys

import pytest

from segtrain.config import StreetsConfig
from segtrain.data.registry import split_files
from segtrain.data.scenes.layouts import write_scenes
from segtrain.data.sets import streets
from tests.helpers.checkout import environment


@pytest.fixture
def ready(tmp_path):
    root = tmp_path / "X"
    write_scenes(root, "cityscapes", {"train": 3, "val": 2, "night": 0}, 0, (256, 512), workers=1)
    streets.say_once.cache_clear()
    return root


def listing(root):
    return sorted((str(path), path.stat().st_mtime_ns) for path in root.rglob("*"))


def test_a_folder_that_is_named_is_taken_as_it_is(ready, capsys):
    before, config = listing(ready), StreetsConfig(name="streets", root=str(ready))
    for _ in range(2):
        assert [len(split_files(config, split).images) for split in ("train", "val")] == [3, 2]
    assert listing(ready) == before
    said = capsys.readouterr().out
    assert said.count("holds 3 scenes of train, which are used; fewer than dataset.scenes=240") == 1


def test_another_number_than_the_default_is_drawn(ready):
    config = StreetsConfig(name="streets", root=str(ready), scenes=4, night_scenes=1)
    assert len(split_files(config, "train").images) == 4
    assert len(split_files(config, "night").images) == 1
    assert len(list((ready / "leftImg8bit/val").rglob("*.png"))) == 2  # the splits that nobody asked for stay


def test_a_folder_that_cannot_be_written_is_taken_as_it_is(ready, monkeypatch):
    before = listing(ready)
    monkeypatch.setattr(streets.os, "access", lambda path, mode: False)
    for scenes, there in ((2, 2), (3, 3), (9, 3)):
        config = StreetsConfig(name="streets", root=str(ready), scenes=scenes)
        assert len(split_files(config, "train").images) == there
    assert listing(ready) == before


def test_a_script_without_a_main_guard_runs_once(tmp_path):
    (tmp_path / "plain.py").write_text(
        "from pathlib import Path\nfrom segtrain.data.scenes.layouts import write_scenes\n"
        "print('began')\nwrite_scenes(Path('Y'), 'cityscapes', {'train': 3}, workers=2)\nprint(__file__, __spec__)\n"
    )
    result = subprocess.run([sys.executable, "plain.py"], env=environment(), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("began") == 1 and "plain.py None" in result.stdout
    assert len(list((tmp_path / "Y/leftImg8bit/train").rglob("*.png"))) == 3
