"""model.in_channels and dataset.channels: images of other bands than RGB, from the file to the answer."""

import io
import json
import re
import struct
import zlib

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from segtrain import load
from segtrain.config.plugin_files import load_plugin
from segtrain.data.augment import fill_of
from segtrain.data.bands import read_channels
from segtrain.data.cache import read_as
from segtrain.data.images import read_header, read_image
from segtrain.data.inputs import find_inputs
from segtrain.data.sample import Sample
from segtrain.errors import DataError, UsageError
from segtrain.scoring.figures import as_rgb
from tests.helpers.checkout import TINY
from tests.helpers.runs import refused, small_run

FOUR = ["model.in_channels=4", "model.mean=[.4,.4,.4,.5]", "model.std=[.2,.2,.2,.3]"]


@pytest.fixture
def words(tmp_path, monkeypatch):
    """A folder of TIFF files of four bands, of which the last alone tells the classes, and the words of a training."""
    monkeypatch.chdir(tmp_path)
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (tmp_path / "data" / split / kind).mkdir(parents=True)
        for i in range(4):
            mask = ((np.indices((64, 96)).sum(0) // 32 + i) % 2).astype(np.uint8)
            bands = np.random.default_rng([i, len(split)]).integers(0, 200, (64, 96, 4), np.uint8)
            bands[..., 3] = 60 + 130 * mask
            Image.fromarray(bands).save(tmp_path / "data" / split / "images" / f"{i}.tif", compression="tiff_lzw")
            Image.fromarray(mask).save(tmp_path / "data" / split / "labels" / f"{i}.png")
    (tmp_path / "classes.csv").write_text("id,name\n0,dark\n1,light\n")
    splits = [f"dataset.splits.{s}={{images:{s}/images/*.tif,labels:{s}/labels/*.png}}" for s in ("train", "val")]
    own = [word for word in small_run("x") if not word.startswith(("dataset.", "augmentation.scale"))]
    data = ["dataset=folder", "dataset.root=data", "dataset.classes=classes.csv", *splits]
    return data, [
        *data,
        *own,
        f"plugins=[{TINY}]",
        "model.backbone=tiny",
        "augmentation.scale=[1,1]",
        "schedule=constant",
    ]


def losses(run):
    lines = [json.loads(line) for line in (open(f"{run}/metrics.jsonl"))]  # noqa: PTH123, SIM115
    return [line["train/loss"] for line in lines if "train/loss" in line]


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_bands_one_behind_the_other_are_read_by_channels_alone(tmp_path, dtype):
    """OpenCV mixes up their pixels, and says nothing."""
    values = np.random.default_rng(0).integers(0, 65536, (20, 30, 3)) / (1 if dtype is np.uint16 else 65535)
    values = values.astype(dtype)
    path = tmp_path / "x.tif"
    tifffile.imwrite(path, values.transpose(2, 0, 1), photometric="rgb", planarconfig="separate")
    for read in (read_image, read_header):
        with pytest.raises(
            DataError, match=r"x\.tif stores its bands one behind the other .*dataset.channels=\[0,1,2\]"
        ):
            read(path)
    tifffile.imwrite(tmp_path / "y.tif", values, photometric="rgb", planarconfig="contig")
    assert (read_channels(path, [0, 1, 2]) == read_image(tmp_path / "y.tif")).all()


def test_four_bands_from_training_to_answers(segtrain, words):
    data, training = words
    bands = ["dataset.channels=[3,0,1,2]", *FOUR]
    for run, cache in (("whole", "none"), ("cached", "decoded")):
        answer = segtrain("train", *training, *bands, f"run={run}", "trainer.max_steps=4", f"dataset.cache={cache}",
                          "dataset.cache_dir=cache")  # fmt: skip
        assert answer.status == 0, answer.err
    assert losses("whole") == losses("cached") and losses("whole")
    for steps in (2, 4):
        answer = segtrain("train", *training, *bands, "run=parts", f"trainer.max_steps={steps}")
        assert answer.status == 0, answer.err
    other = segtrain("train", *training, "dataset.channels=[3,2,1,0]", *FOUR, "run=parts", "trainer.max_steps=5")
    refused(other, "dataset.channels: [3, 0, 1, 2] in the run", status=1)
    stored = [torch.load(f"{run}/last.pt", weights_only=False)["model"] for run in ("whole", "parts")]
    assert stored[0]["body.0.weight"].shape[1] == 4
    assert all(torch.equal(tensor, stored[1][key]) for key, tensor in stored[0].items())
    for command in (["evaluate"], ["predict", "input=data/val/images", "outputs=[raw,overlay]", "output=answers"]):
        answer = segtrain(*command, "run=whole", f"plugins=[{TINY}]", "device=cpu")
        assert answer.status == 0, answer.err
    answer = segtrain("export", "run=whole", f"plugins=[{TINY}]", "format=torch_export", "output=x.pt2")
    assert answer.status == 0 and "uint8 4 channels (N, 4, H, W)" in answer.out, answer
    answer = segtrain("evaluate", "engine=x.pt2", "run=whole", f"plugins=[{TINY}]", "device=cpu")
    assert answer.status == 0, answer.err
    load_plugin(str(TINY))
    network = load("whole/last.pt", device="cpu")
    found, path = np.asarray(Image.open("answers/raw/0.png")), "data/val/images/0.tif"
    pixels = np.asarray(Image.open(path))[..., [3, 0, 1, 2]]
    assert (network.predict(path) == found).all() and (network.predict(pixels) == found).all()
    assert (network.predict(torch.from_numpy(pixels).permute(2, 0, 1)) == found).all()
    with pytest.raises(UsageError, match=r"uint8 \(H, W, 4\).*got uint8 \(64, 96, 3\)"):
        network.predict(pixels[..., :3])
    with pytest.raises(UsageError, match="got a PIL image"):
        network.predict(Image.open(path))
    answer = segtrain("show", *data, "dataset.channels=[3,0]", "count=2", "augmentation.crop_size=[32,32]")
    assert answer.status == 0, answer.err


def test_check_measures_the_channels(segtrain, words):
    """By NumPy over the same pixels."""
    answer = segtrain("check", *words[0], "dataset.channels=[3,1]")
    assert answer.status == 0, answer.err
    pixels = np.stack([np.asarray(Image.open(f"data/train/images/{i}.tif"))[..., [3, 1]] for i in range(4)]) / 255
    line = re.search(r"4 of 4 images of train: model.in_channels=2 model.mean=\[(.*)\] model.std=\[(.*)\]", answer.out)
    assert line is not None, answer.out
    for text, wanted in zip(line.groups(), (pixels.mean((0, 1, 2)), pixels.std((0, 1, 2))), strict=True):
        np.testing.assert_allclose([float(number) for number in text.split(",")], wanted, rtol=6e-4)
    assert "model.mean" not in segtrain("check", *words[0], "dataset.channels=[0,1,2]", "split=val").out


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], ["asks for"]),  # what is read without the option: see below
        (["model.in_channels=4"], ["model.mean must be 4 numbers", "[0.485, 0.456, 0.406]"]),
        ([*FOUR], ["model.in_channels=4", "dataset.channels=[0, 1, 2, 3]"]),
        (["dataset.channels=[0,1,2,3]"], ["dataset.channels=[0, 1, 2, 3]", "model.in_channels=4"]),
        (["dataset.channels=[]"], ["dataset.channels=[]", "name the bands"]),
        (["dataset.channels=[0,1,2,3]", *FOUR, "augmentation.color=0.2"], ["augmentation.color=0.2", "has 4"]),
        (["dataset.channels=[0,1,2,3]", *FOUR, "augmentation.extra=[{name:Blur}]"], ["augmentation.extra", "has 4"]),
        (["dataset.channels=[0,1,2,3]", "dataset.format=parquet", *FOUR], ["dataset.channels", "=parquet reads RGB"]),
        (["dataset.channels=[0]", "model.in_channels=0"], ["model.in_channels must be at least 1"]),
    ],
)
def test_what_does_not_fit_is_refused_by_name(segtrain, words, given, expected):
    if given:
        refused(segtrain("train", *words[1], *given, "run=r"), *expected)
    else:
        more = ["dataset.channels=[0,1,2,4]", *FOUR, "run=r"]
        refused(segtrain("train", *words[1], *more), "has 4 bands, numbered from 0 to 3", *expected, status=1)


# ------------------------------------------------------------------------------------------------------- reading

VALUES = np.random.default_rng(0).integers(0, 65536, (37, 50, 5), np.uint16)
FORMS = [
    {}, {"tile": (16, 32)}, {"compression": "zlib", "rowsperstrip": 7},
    {"planarconfig": "separate"}, {"planarconfig": "separate", "tile": (16, 16), "compression": "zlib"},
    {"byteorder": ">", "rowsperstrip": 5}, {"bigtiff": True},
]  # fmt: skip


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.float32])
def test_bands_of_every_form_of_tiff(tmp_path, form, kind):
    """As another library writes them: the upper eight bits of each value, whatever the form."""
    values = {np.uint8: VALUES >> 8, np.uint16: VALUES, np.float32: (VALUES >> 8) / np.float32(255)}[kind].astype(kind)
    separate = form.get("planarconfig") == "separate"
    options = {"planarconfig": "contig", **form, "photometric": "minisblack"}
    tifffile.imwrite(tmp_path / "x.tif", values.transpose(2, 0, 1) if separate else values, **options)
    wanted = (VALUES >> 8).astype(np.uint8)[..., [4, 0, 2]]
    assert np.array_equal(read_channels(tmp_path / "x.tif", (4, 0, 2)), wanted)
    with pytest.raises(DataError, match=r"5 bands.*dataset.channels=\[0, 1, 2, 3, 4\]"):
        read_image(tmp_path / "x.tif")


def test_lzw_with_differences(tmp_path):
    """Pillow writes them by libtiff; tag 317 is the predictor."""
    pixels = (VALUES[..., :4] >> 8).astype(np.uint8)
    for predictor in (1, 2):
        Image.fromarray(pixels).save(tmp_path / "x.tif", compression="tiff_lzw", tiffinfo={317: predictor})
        assert np.array_equal(read_channels(tmp_path / "x.tif", (3, 2, 1, 0)), pixels[..., ::-1])


@pytest.mark.parametrize("turned", [False, True])
def test_arrays_of_numpy(tmp_path, turned):
    np.save(tmp_path / "x.npy", VALUES.transpose(2, 0, 1) if turned else VALUES)
    assert np.array_equal(read_channels(tmp_path / "x.npy", (1, 4)), (VALUES >> 8).astype(np.uint8)[..., [1, 4]])


@pytest.mark.parametrize(("name", "mode"), [("x.png", "RGBA"), ("x.png", "RGB"), ("x.png", "LA"), ("x.bmp", "L")])
def test_bands_of_other_pictures(tmp_path, name, mode):
    bands = np.squeeze((VALUES[..., : len(mode)] >> 8).astype(np.uint8))
    Image.fromarray(bands, mode).save(tmp_path / name)
    last = len(mode) - 1
    assert np.array_equal(read_channels(tmp_path / name, (last, 0)), np.atleast_3d(bands)[..., [last, 0]])


def test_grey_and_transparency_of_sixteen_bits(tmp_path):
    """A PNG file by its specification: signature, header, pixels with their bytes high first, end."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = VALUES[..., :2].astype(">u2")
    head = struct.pack(">IIBBBBB", 50, 37, 16, 4, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n" + parts)
    assert np.array_equal(read_channels(tmp_path / "x.png", (1, 0)), (rows >> 8).astype(np.uint8)[..., ::-1])


@pytest.mark.parametrize(
    ("form", "text"),
    [
        ({"photometric": "miniswhite"}, "the colours 0"),
        ({"photometric": "palette", "colormap": np.zeros((3, 256), np.uint16)}, "the colours 3"),
    ],
)
def test_forms_of_tiff_that_mean_something_else_are_refused(tmp_path, form, text):
    tifffile.imwrite(tmp_path / "x.tif", (VALUES[..., 0] >> 8).astype(np.uint8), **form)
    with pytest.raises(DataError, match=rf"x.tif has {text}.*bands cannot be read"):
        read_channels(tmp_path / "x.tif", (0,))


@pytest.mark.parametrize(
    ("array", "text"),
    [
        (np.zeros((4, 9, 4)), "can be its first or its last axis"),
        (np.zeros((2, 4, 9, 4)), "expected numbers of the shape"),
        (np.zeros((4, 4), bool), "array bool"),
        (np.full((4, 4), np.nan), "NaN"),
        (np.zeros((4, 4), object), "cannot be read as an image"),
    ],
)
def test_arrays_that_are_no_images(tmp_path, array, text):
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(DataError, match=text):
        read_channels(tmp_path / "x.npy", (0,))


def test_differences_of_floating_point_are_refused(tmp_path):
    whole = io.BytesIO()
    Image.fromarray(VALUES[..., 0].astype(np.uint8)).save(whole, "TIFF", compression="tiff_lzw", tiffinfo={317: 2})
    entry = struct.pack("<HHI", 317, 3, 1)
    assert entry + b"\2" in whole.getvalue()
    (tmp_path / "x.tif").write_bytes(whole.getvalue().replace(entry + b"\2", entry + b"\3"))
    with pytest.raises(DataError, match="the predictor 3"):
        read_channels(tmp_path / "x.tif", (0,))


def test_the_cache_keeps_channels_apart(tmp_path):
    sample = Sample("x", tmp_path / "x.npy", None)
    keys = {read_as(sample._replace(channels=channels), (4, 6)) for channels in (None, (0, 1, 2), (2, 1, 0), (0,))}
    assert len(keys) == 4


def test_arrays_are_found_where_there_are_no_images(tmp_path):
    for name in ("a.npy", "b.npy"):
        np.save(tmp_path / name, VALUES)
    for text in (str(tmp_path), f"{tmp_path}/*.npy", f"{tmp_path}/*"):
        assert [one.name for one in find_inputs(text)] == ["a", "b"]
    Image.fromarray(VALUES[..., 0]).save(tmp_path / "c.png")
    assert [one.name for one in find_inputs(str(tmp_path))] == ["c"]


def test_a_file_cut_short_is_no_image(tmp_path):
    whole = io.BytesIO()
    Image.fromarray((VALUES[..., :4] >> 8).astype(np.uint8)).save(whole, "TIFF")
    (tmp_path / "x.tif").write_bytes(whole.getvalue()[:4000])
    with pytest.raises(DataError, match="cannot be read as an image"):
        read_channels(tmp_path / "x.tif", (0, 3))


def test_drawings_and_borders_of_other_channels():
    bands = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    assert np.array_equal(as_rgb(bands), bands[..., :3])
    assert np.array_equal(as_rgb(bands[..., :2]), bands[..., [0, 0, 0]])
    assert fill_of(bands) == (115,) * 4 and len(fill_of(bands[..., :3])) == 3
