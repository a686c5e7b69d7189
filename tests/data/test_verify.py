"""Checks of all files before the training."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from segtrain.data.labels import published_table
from segtrain.data.sample import Sample
from segtrain.data.verify.files import check_samples
from segtrain.errors import DataError
from tests.helpers.runs import refused
from tests.helpers.samples import picture


@pytest.fixture
def pairs(tmp_path):
    samples = []
    for i in range(3):
        picture(tmp_path / f"i{i}.png", 50)
        picture(tmp_path / f"l{i}.png", 7)
        samples.append(Sample(str(i), tmp_path / f"i{i}.png", tmp_path / f"l{i}.png"))
    return samples


def check(samples, tmp_path):
    return check_samples(samples, published_table("cityscapes"), tmp_path / "cache", lambda text: None)


def test_good_files_pass_and_the_largest_size_is_told(pairs, tmp_path):
    picture(pairs[1].image, size=(9, 5))
    picture(pairs[1].label, 7, size=(9, 5))
    assert check(pairs, tmp_path) == (9, 5)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda p: p.image.write_bytes(p.image.read_bytes()[:-20]), r"i1\.png cannot be read.*truncated"),
        (lambda p: p.label.write_bytes(p.label.read_bytes()[:30]), r"l1\.png cannot be read"),
        (lambda p: p.label.write_bytes(flip_byte(p.label.read_bytes(), -20)), r"l1\.png cannot be read.*checksum"),
        (lambda p: p.image.write_text("text"), r"i1\.png cannot be read"),
        (lambda p: p.image.unlink(), r"i1\.png cannot be read.*no such file"),
        (lambda p: picture(p.label, 7, (6, 5)), r"i1\.png is 4x6 but its label .*l1\.png is 5x6"),
        (lambda p: picture(p.label, 40), r"l1\.png: label id 40"),
        (lambda p: Image.new("RGB", (4, 6)).save(p.label), r"l1\.png is a RGB colour image"),
    ],
)
def test_damage_is_named(pairs, tmp_path, damage, words):
    check(pairs, tmp_path)  # remembered as good, until it changes
    damage(pairs[1])
    with pytest.raises(DataError, match=words):
        check(pairs, tmp_path)


def flip_byte(data, place):
    changed = bytearray(data)
    changed[place] ^= 0xFF
    return bytes(changed)


def test_a_truncated_jpeg_is_named(tmp_path):
    path = tmp_path / "x.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 90, 3)).astype(np.uint8)).save(path)
    check([Sample("x", path, None)], tmp_path)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(DataError, match=r"x\.jpg cannot be read.*end of the JPEG"):
        check([Sample("x", path, None)], tmp_path)


def test_many_errors_are_counted_and_some_shown(pairs, tmp_path):
    for sample in pairs:
        picture(sample.label, 99)
    with pytest.raises(DataError, match="3 of 3 samples cannot be used"):
        check(pairs, tmp_path)


def test_a_second_check_reads_no_file(pairs, tmp_path, monkeypatch):
    check(pairs, tmp_path)

    def no_reading(path):
        raise AssertionError(f"{path} was read again")

    monkeypatch.setattr("segtrain.data.verify.file_facts.read_bytes", no_reading)
    monkeypatch.setattr("segtrain.data.verify.file_facts.read_label", no_reading)
    assert check(pairs, tmp_path) == (6, 4)


def test_files_that_cannot_be_used_are_counted_and_all_are_in_the_report(folder_data, segtrain):
    root, words = folder_data
    for number in range(30):
        for kind in ("images", "labels"):
            (root / "train" / kind / f"broken{number}.png").write_bytes(b"nothing")
    answer = segtrain("train", *words, "run=r")
    more = "... and 25 more: segtrain check lists them in report.json"
    refused(answer, "30 of 34 samples cannot be used", more, status=1)
    data = [word for word in words if word.startswith("dataset")]
    assert segtrain("check", *data, "output=o").status == 1
    report = json.loads(Path("o/report.json").read_text())
    assert [len(texts) for texts in report["splits"]["train"]["bad_files"].values() if texts] == [30]
