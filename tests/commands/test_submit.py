"""`segtrain submit`: the archive in the form that the servers require, and what is refused before it is sent."""

import io
import json
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from segtrain.data.label_files import read_label
from segtrain.data.labels import published_table
from segtrain.data.scenes.layouts import write_scenes
from segtrain.data.sets.cocostuff import decode_runs, encode_runs, verify_coco
from segtrain.errors import DataError
from tests.helpers import zygote
from tests.helpers.runs import small_run


@pytest.fixture
def root(tmp_path):
    """root("kitti"): test pictures in that layout; of cocostuff and cityscapes made from the validation scenes."""

    def draw(layout):
        folder = tmp_path / layout
        write_scenes(folder, layout, {"train": 1, "val": 3, "night": 3}, 0, (256, 512), workers=1)
        if layout == "cityscapes":
            (folder / "leftImg8bit" / "val").rename(folder / "leftImg8bit" / "test")
        if layout == "cocostuff":
            (folder / "images" / "val2017").rename(folder / "images" / "test2017")
        return folder

    return draw


def answers(folder, root, layout, value=None):
    """A label PNG for every test picture: kinds of class ids, or one value everywhere."""
    pattern = {"kitti": "testing/image_2/*", "vistas": "testing/images/*", "cocostuff": "images/test2017/*",
               "cityscapes": "leftImg8bit/test/*/*"}[layout]  # fmt: skip
    ids = {"kitti": [7, 11, 26], "cityscapes": [7, 23, 24], "vistas": [0, 13, 64], "cocostuff": [91, 100, 181]}[layout]
    folder.mkdir()
    paths = sorted(root.glob(pattern))
    for path in paths:
        with Image.open(path) as picture:
            width, height = picture.size
        values = (
            np.full((height, width), ids[0], np.uint8) if value is None else np.full((height, width), value, np.uint8)
        )
        if value is None:
            values[: height // 3] = ids[1]
            values[:, : width // 4] = ids[2]
        name = path.name.replace("_leftImg8bit", "")
        Image.fromarray(values).save(folder / Path(name).with_suffix(".png"))
    return paths


NAMES = {"kitti": "semantic/{}.png", "cityscapes": "{}.png", "vistas": "{}.png"}


@pytest.mark.parametrize("layout", ["kitti", "cityscapes", "vistas"])
def test_archives_hold_what_was_given(root, segtrain, tmp_path, layout):
    data = root(layout)
    paths = answers(tmp_path / "given", data, layout)
    answer = segtrain("submit", "predictions=given", f"dataset={layout}", f"dataset.root={data}", "output=out")
    assert answer.status == 0, answer.err
    assert answer.out.splitlines()[-1] == f"out/{layout}-test.zip"
    assert "the server will refuse this" in answer.out  # 3 pictures are not all of them
    with zipfile.ZipFile(f"out/{layout}-test.zip") as archive:
        stems = [path.name.replace("_leftImg8bit", "").rpartition(".")[0] for path in paths]
        assert sorted(archive.namelist()) == sorted(NAMES[layout].format(stem) for stem in stems)
        for stem in stems:
            with Image.open(io.BytesIO(archive.read(NAMES[layout].format(stem)))) as picture:
                assert picture.mode == "L"
                assert (np.asarray(picture) == read_label(tmp_path / "given" / f"{stem}.png")).all()


def test_the_stuff_challenges_json(root, segtrain, tmp_path):
    data = root("cocostuff")
    paths = answers(tmp_path / "given", data, "cocostuff")
    call = [
        "submit",
        "predictions=given",
        "dataset=cocostuff",
        "dataset.classes=stuff91",
        f"dataset.root={data}",
        "output=o",
    ]
    answer = segtrain(*call)
    assert answer.status == 0, answer.err
    with zipfile.ZipFile("o/cocostuff-test.zip") as archive:
        segments = json.loads(archive.read("stuff_results.json"))
    assert {segment["category_id"] for segment in segments} == {92, 101, 182}
    assert {segment["image_id"] for segment in segments} == {int(path.stem) for path in paths}
    values = read_label(tmp_path / "given" / f"{paths[0].stem}.png")
    for segment in segments:
        if segment["image_id"] == int(paths[0].stem):
            assert (decode_runs(segment["segmentation"]) == (values == segment["category_id"] - 1)).all()
    answers(tmp_path / "things", data, "cocostuff", value=0)
    answer = segtrain(*[word.replace("given", "things").replace("stuff91", "all171") for word in call])
    assert answer.status == 1
    assert "is a thing" in answer.err


@pytest.mark.parametrize(("mask", "counts"), [
    ([[0, 0, 0], [0, 1, 0], [0, 0, 0]], "414"),  # down the columns: 4 zeros, 1 one, 4 zeros
    ([[1, 1], [1, 1]], "04"),
    ([[0, 0], [0, 0]], "4"),
    ([[0, 1, 0, 1, 1]] , "1112"),  # 1 1 1 2: the fourth is 2 - 1 = 1, see below
])  # fmt: skip
def test_runs_worked_by_hand(mask, counts):
    """Runs below 16 are one character, '0' + n; from the fourth on, the difference from the run two before."""
    expected = "1111" if counts == "1112" else counts
    assert encode_runs(np.array(mask, bool)) == {"size": list(np.shape(mask)), "counts": expected}


@pytest.mark.parametrize(("masks", "good"), [([1, 0], True), ([1], False), ([1, 0, 0], False), ([], False)])
def test_every_pixel_must_have_one_category(tmp_path, masks, good):
    """Of a picture whose left half is 1: both halves, a hole, the right half twice, nothing."""
    left = np.zeros((4, 6), bool)
    left[:, :3] = True
    segments = [{"image_id": 7, "category_id": 92 + i, "segmentation": encode_runs(left == bool(mask))}
                for i, mask in enumerate(masks)]  # fmt: skip
    Image.new("RGB", (6, 4)).save(tmp_path / "7.png")
    if good:
        verify_coco(segments, {"000000000007": tmp_path / "7.png"})
        return
    with pytest.raises(DataError, match="do not cover its 6x4 pixels once each"):
        verify_coco(segments, {"000000000007": tmp_path / "7.png"})


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(1, 40), st.integers(1, 70), st.integers(0, 2**31), st.floats(0, 1))
def test_runs_come_back(height, width, seed, share):
    mask = np.random.default_rng(seed).random((height, width)) < share
    assert (decode_runs(encode_runs(mask)) == mask).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda values: np.searchsorted(published_table("cityscapes").ids, values), "holds train ids"),
        (lambda values: np.where(values == 7, 200, values).astype(np.uint8), r"holds the values \[200\]"),
        (lambda values: values[:-1], "predict at the image's own size"),
    ],
)
def test_what_a_server_would_refuse_is_refused_here(root, segtrain, tmp_path, change, words):
    data = root("kitti")
    answers(tmp_path / "given", data, "kitti")
    for path in (tmp_path / "given").iterdir():
        Image.fromarray(change(read_label(path)).astype(np.uint8)).save(path)
    answer = segtrain("submit", "predictions=given", "dataset=kitti", f"dataset.root={data}")
    assert answer.status == 1
    assert re.search(words, answer.err), answer.err


def test_train_ids_are_converted_when_stated(root, segtrain, tmp_path):
    data = root("kitti")
    paths = answers(tmp_path / "given", data, "kitti", value=13)
    call = ["submit", "predictions=given", "dataset=kitti", f"dataset.root={data}", "output=out"]
    assert segtrain(*call, "predictions_encoding=train_ids").status == 0
    with (
        zipfile.ZipFile("out/kitti-test.zip") as archive,
        Image.open(io.BytesIO(archive.read(f"semantic/{paths[0].stem}.png"))) as picture,
    ):
        assert np.unique(picture).tolist() == [published_table("cityscapes").ids[13]]


def test_a_checkpoint_answers_and_goes_on_where_it_stopped(root, scenes, tmp_path):
    zygote.call(["train", *small_run(scenes, "run=run", "trainer.max_steps=1")], tmp_path).check_returncode()
    data = root("kitti")
    call = ["submit", "run=run", "dataset=kitti", f"dataset.root={data}", "output=o", "device=cpu"]
    first = zygote.call(call, tmp_path)
    assert first.returncode == 0, first.stderr
    archive = tmp_path / "o" / "kitti-test.zip"
    content = archive.read_bytes()
    with zipfile.ZipFile(archive) as file:
        assert len(file.namelist()) == 3
    (labels,) = (tmp_path / "o").glob("labels-*")
    kept = sorted(labels.rglob("*.png"))
    times = [path.stat().st_mtime_ns for path in kept[1:]]
    kept[0].unlink()
    zygote.call(call, tmp_path).check_returncode()
    assert archive.read_bytes() == content
    assert [path.stat().st_mtime_ns for path in kept[1:]] == times


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["predictions=x", "dataset=streets"], "no server to submit to"),
        (["predictions=x"], "dataset"),
        (["dataset=kitti"], "give checkpoint=FILE or run=FOLDER"),
        (["predictions=x", "checkpoint=y.pt", "dataset=kitti", "dataset.root=K"], "not both"),
        (["predictions=nowhere", "dataset=kitti", "dataset.root=K"], "no such folder"),
    ],
)
def test_wrong_options(segtrain, root, words, message):
    data = root("kitti")
    answer = segtrain("submit", *[word.replace("=K", f"={data}") for word in words])
    assert answer.status == 2
    assert message in answer.err
