"""`segtrain predict` for images larger than memory, and the probabilities of all classes."""

from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from segtrain.commands import predict as predicting
from segtrain.commands import predict_windows
from segtrain.config import InferenceConfig, ModelConfig, PredictConfig
from segtrain.data import tiff_writer
from segtrain.data.class_mapping import ClassMapping
from segtrain.data.labels import LabelTable
from segtrain.errors import DataError, UsageError
from segtrain.scoring.predictor import Predictor
from tests.helpers import pages
from tests.helpers.checkout import TINY
from tests.helpers.runs import refused

ROWS = [{"id": 7 * i + 3, "name": name, "color": [50 * i, 9, 80], "train_id": i} for i, name in enumerate("abcd")]
TABLE = LabelTable(ROWS, "a test")
TILED = InferenceConfig(name="tiled", tile=[96, 64])
ALL = ["labels", "raw", "palette", "color", "overlay", "prob"]


class Tiny(torch.nn.Module):
    """(N, channels, H, W) -> logits (N, 4, H / 8, W / 8)."""

    def __init__(self, channels=3):
        super().__init__()
        generator = torch.Generator().manual_seed(channels)
        self.convolution = torch.nn.Conv2d(channels, 4, 11, 8, 5, bias=False)
        self.convolution.weight.data = torch.randn(self.convolution.weight.shape, generator=generator) / 5
        self.calls = []

    def forward(self, x, upsample=False):
        self.calls.append(x.shape[2:])
        return self.convolution(x)


@pytest.fixture
def network(monkeypatch):
    """A predictor that the command takes instead of the checkpoint; TIFF tiles of 32 pixels."""
    monkeypatch.setattr(tiff_writer, "TILE", 32)
    Path("net.pt").write_bytes(b"stands for the network")
    found = Predictor(Tiny(), TABLE, ModelConfig(), torch.device("cpu"), {"config": {"dataset": {}}})
    monkeypatch.setattr(predicting, "networks_of", lambda config: found)
    return found


def call(source, output="out", inference=TILED, **options):
    config = PredictConfig(input=source, checkpoint="net.pt", output=output, inference=inference, **options)
    config.check()
    return predicting.predict(config)


def photograph(height=200, width=150, channels=3):
    small = np.random.default_rng(0).integers(0, 256, (-(-height // 6), -(-width // 6), channels), np.uint8)
    return small.repeat(6, 0).repeat(6, 1)[:height, :width].copy()


def pixels_of(path):
    with Image.open(path) as image:
        return np.asarray(image)


@pytest.mark.parametrize("tag", [1, 3, 6])
def test_the_answers_of_both_ways_are_the_same(network, capsys, tag):
    """Every output, of a tiled BigTIFF beside a small PNG; the first line says why it is read so."""
    more = {"photometric": "rgb", "extratags": [(274, 3, 1, tag, True), (33550, 12, 3, (0.5, 0.5, 0.0), True)]}
    Path("photos/b").mkdir(parents=True)
    tifffile.imwrite("photos/b/x.tif", photograph(), tile=(32, 48), bigtiff=True, compression="zlib", **more)
    Image.fromarray(photograph(40, 50)).save("photos/y.png")
    call("photos", "whole", outputs=ALL, in_memory=1)
    assert "windows" not in capsys.readouterr().out
    call("photos", outputs=ALL, in_memory=5e-5)
    printed = capsys.readouterr().out
    line = "windows     photos/b/x.tif: 150 x 200 pixels, 9e-05 GB decoded, above in_memory=5e-05 GB"
    assert line in printed and "predicting  2 images" in printed and "\n2 images; labels/ holds" in printed
    assert ("exif        1 " in printed) == (tag != 1)
    for kind in ALL:
        found, expected = Path(f"out/{kind}/b/x.tif"), Path(f"whole/{kind}/b/x.png")
        assert (
            np.array_equal(pixels_of(found), pixels_of(expected))
            and Image.open(found).mode == Image.open(expected).mode
        )
        assert Path(f"out/{kind}/y.png").read_bytes() == Path(f"whole/{kind}/y.png").read_bytes()
        with tifffile.TiffFile(found) as file:
            assert file.pages[0].is_tiled and (33550 in file.pages[0].tags) == (tag == 1)
    assert np.array_equal(pixels_of("out/palette/b/x.tif"), pixels_of("out/raw/b/x.tif"))
    assert not list(Path("out").rglob(".*"))
    call("photos", outputs=ALL, in_memory=5e-5)
    assert "finished    2 of 2 images before" in capsys.readouterr().out


def test_bands_and_ranges_of_the_training(monkeypatch, network):
    """Bands one behind the other, in 16 bits, two of five."""
    values = photograph(200, 150, 5).astype(np.uint16) * 3
    tifffile.imwrite(
        "x.tif", values.transpose(2, 0, 1), tile=(32, 48), planarconfig="separate", photometric="minisblack"
    )
    options = ModelConfig(in_channels=2, mean=[0.4, 0.5], std=[0.2, 0.3])
    metadata = {"config": {"dataset": {"channels": [4, 1], "value_range": [0, 800]}}}
    found = Predictor(Tiny(2), TABLE, options, torch.device("cpu"), metadata)
    monkeypatch.setattr(predicting, "networks_of", lambda config: found)
    call("x.tif", "whole", outputs=["raw", "overlay"], in_memory=1)
    call("x.tif", outputs=["raw", "overlay"], in_memory=0)
    for kind in ("raw", "overlay"):
        assert np.array_equal(pixels_of(f"out/{kind}/x.tif"), pixels_of(f"whole/{kind}/x.png"))
    three = Predictor(Tiny(3), TABLE, ModelConfig(), torch.device("cpu"), metadata)
    monkeypatch.setattr(predicting, "networks_of", lambda config: three)
    with pytest.raises(UsageError, match="the network takes images of 3 channels .* got 2"):
        call("x.tif", in_memory=0, overwrite=True)


def test_a_killed_prediction_goes_on_inside_the_image(network, monkeypatch, capsys):
    """What is finished is not written again, and of the rows of tiles those are predicted again that reach what is
    left."""
    tifffile.imwrite("x.tif", photograph(500, 60), tile=(32, 48), photometric="rgb")
    call("x.tif", "once", outputs=["raw", "color"], in_memory=0)
    tiles = network.network.calls.copy()
    network.network.calls.clear()
    write, rows = tiff_writer.TiledWriter.write, []

    def killed(self, pixels):
        if self.rows == 256 and self.samples == 3:
            raise KeyboardInterrupt
        write(self, pixels)

    with monkeypatch.context() as changed:
        changed.setattr(tiff_writer.TiledWriter, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            call("x.tif", outputs=["raw", "color"], in_memory=0)
    assert not list(Path("out").rglob("*.tif")) and len(list(Path("out").rglob(".*.part"))) == 2

    def counted(self, pixels):
        rows.append((self.rows, self.samples))
        write(self, pixels)

    monkeypatch.setattr(tiff_writer.TiledWriter, "write", counted)
    call("x.tif", outputs=["raw", "color"], in_memory=0)
    assert "resumed     x.tif: 256 of its 500 rows are written" in capsys.readouterr().out
    assert rows[:2] == [(256, 1), (256, 3)]
    assert len(tiles) == 7 and len(network.network.calls) == 10  # two that overlap with what is left, one cut short
    for kind in ("raw", "color"):
        assert np.array_equal(pixels_of(f"out/{kind}/x.tif"), pixels_of(f"once/{kind}/x.tif"))
    assert not list(Path("out").rglob(".*"))


def test_rows_of_another_image_or_network_are_not_gone_on_with(network, monkeypatch, capsys):
    finish = tiff_writer.TiledWriter.finish

    def killed(self):
        raise KeyboardInterrupt

    def stop_at_the_end(**options):
        with monkeypatch.context() as changed:
            changed.setattr(tiff_writer.TiledWriter, "finish", killed)
            with pytest.raises(KeyboardInterrupt):
                call("x.tif", outputs=["raw"], in_memory=0, **options)
        return capsys.readouterr().out

    tifffile.imwrite("x.tif", photograph(), photometric="rgb", rowsperstrip=16)
    stop_at_the_end()
    assert "resumed     x.tif: 200 of its 200 rows" in stop_at_the_end()
    assert "resumed" not in stop_at_the_end(overwrite=True)
    assert "resumed" not in stop_at_the_end(inference=InferenceConfig(name="tiled", tile=[64, 64]))
    tifffile.imwrite("x.tif", photograph()[::-1], photometric="rgb", rowsperstrip=16)
    assert "resumed" not in stop_at_the_end(inference=InferenceConfig(name="tiled", tile=[64, 64]))
    Path("net.pt").write_bytes(b"another network")
    assert "resumed" not in stop_at_the_end(inference=InferenceConfig(name="tiled", tile=[64, 64]))
    assert tiff_writer.TiledWriter.finish is finish


def test_what_windows_cannot_do_is_refused_by_name(network, monkeypatch):
    tifffile.imwrite("x.tif", photograph(), photometric="rgb", rowsperstrip=16)
    for options, words in (
        ({"inference": InferenceConfig()}, r"inference.tile=null is not possible for x.tif, .* give inference=tiled"),
        ({"inference": InferenceConfig(tile=[64, 64], longest_side=99)}, "inference.longest_side=99"),
        ({"outputs": ["raw", "probabilities"]}, "outputs=probabilities is not possible for x.tif"),
    ):
        with pytest.raises(UsageError, match=words):
            call("x.tif", in_memory=0, **options)
    assert not Path("out").exists()
    monkeypatch.setattr("segtrain.data.tiff_windows.LARGEST_BLOCK", 1000)
    tifffile.imwrite("y.tif", photograph(), photometric="rgb", rowsperstrip=200, compression="zlib")
    with pytest.raises(DataError, match=r"y.tif is stored in compressed strips of 150 x 200 pixels.*`gdal_translate"):
        call("y.tif", in_memory=0)


def test_large_images_of_other_formats_are_refused_before_they_are_decoded(network, monkeypatch, capsys):
    Path("photos").mkdir()
    Image.fromarray(photograph()).save("photos/a.png")
    Image.fromarray(photograph()).save("photos/b.jpg")
    tifffile.imwrite("photos/c.png.tif", photograph(20, 30), photometric="rgb")
    Path("photos/c.png.tif").rename("photos/c.png")
    np.save("d.npy", photograph())
    monkeypatch.setattr(predicting, "read_channels", None)
    with pytest.raises(DataError) as found:
        call("photos", in_memory=1e-6)
    lines = str(found.value).splitlines()
    assert len(lines) == 3 and all("and only TIFF files can be read in part" in line for line in lines)
    assert lines[0].startswith("photos/a.png has 150 x 200 pixels, 9e-05 GB decoded, above in_memory=1e-06 GB")
    assert lines[1].endswith(
        "by `gdal_translate -co TILED=YES -co COMPRESS=DEFLATE -co BIGTIFF=IF_SAFER b.jpg tiled.tif`"
    )
    assert lines[2].endswith("rename it to c.tif, which is read in windows")
    with pytest.raises(DataError, match=r"d.npy has 9.01e-05 GB, above .*: write it as a tiled TIFF"):
        call("d.npy", in_memory=1e-6)


def test_the_limit_is_a_quarter_of_the_memory(monkeypatch):
    whole = predict_windows.main_memory()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert whole is not None and predict_windows.main_memory() == whole // 2
    monkeypatch.setattr(predict_windows, "main_memory", lambda: 8 * 10**9)
    limit = predict_windows.memory_limit(None)
    assert limit.size == 2e9 and limit.why == "2 GB, a quarter of the memory (in_memory=null)"
    assert predict_windows.memory_limit(0.5).size == 5e8
    monkeypatch.setattr(predict_windows, "main_memory", lambda: None)
    assert predict_windows.memory_limit(None).size == float("inf")


def test_an_image_that_cannot_be_read_does_not_stop_the_others(network):
    Path("photos").mkdir()
    for name in "ab":
        tifffile.imwrite(f"photos/{name}.tif", photograph(), photometric="rgb", tile=(32, 32))
    data = Path("photos/a.tif").read_bytes()
    Path("photos/a.tif").write_bytes(data[: len(data) - 3000])
    with pytest.raises(DataError, match=r"photos/a.tif cannot be read as an image \(the file is truncated\)"):
        call("photos", in_memory=0)
    assert Path("out/labels/b.tif").exists() and not Path("out/labels/a.tif").exists()


# ------------------------------------------------------------------------------------------------ probabilities


def softmax_of(network, image):
    """float64 (C, H, W), by torch's enlargement of the logits."""
    logits = network.logits(torch.from_numpy(image.transpose(2, 0, 1)[None].copy())).double()
    return torch.nn.functional.interpolate(logits, image.shape[:2], mode="bilinear").softmax(1)[0].detach().numpy()


@pytest.mark.parametrize("mapped", [False, True])
def test_probabilities_of_all_classes(network, monkeypatch, mapped):
    """Those of float64 within the rounding of float16, which add up to 1, and whose greatest is the label."""
    image = photograph(90, 70)
    Image.fromarray(image).save("x.png")
    if mapped:  # a and c become wet, b is void, d has no class; nothing leads to dry
        rows = [{"id": i, "name": name, "color": [i, i, i], "train_id": i} for i, name in enumerate(("wet", "dry"))]
        mapping = ClassMapping(LabelTable(rows, "a test"), list("abcd"), ((0, 2), ()), (1, 3), False, "a test")
        one = network._replace(mapping=mapping, table=mapping.target)
        monkeypatch.setattr(predicting, "networks_of", lambda config: one)
    call("x.png", outputs=["probabilities", "raw"], inference=InferenceConfig())
    wanted = softmax_of(network, image)
    if mapped:
        wanted = np.stack([wanted[0] + wanted[2], np.zeros((90, 70)), wanted[1] + wanted[3]])
    with np.load("out/probabilities/x.npz") as file:
        found, names = file["probabilities"], file["classes"].tolist()
    assert found.dtype == np.float16 and names == (["wet", "dry", "void"] if mapped else list("abcd"))
    assert np.abs(found - wanted).max() <= 2**-12 + 1e-6  # half the distance of float16 numbers below 1
    assert np.abs(found.astype(float).sum(0) - 1).max() <= 2**-11 + 1e-6
    labels, tied = pixels_of("out/raw/x.png"), (found == found.max(0)).sum(0) > 1
    best = np.where(found.argmax(0) == 2, 255, found.argmax(0)) if mapped else found.argmax(0)
    assert np.array_equal(labels[~tied], best[~tied]) and tied.mean() < 0.05
    assert len(np.unique(labels)) > 1


def test_probabilities_of_several_views_are_their_mean(network):
    image = photograph(90, 70)
    Image.fromarray(image).save("x.png")
    call("x.png", outputs=["probabilities"], inference=InferenceConfig(flip=True))
    wanted = (softmax_of(network, image) + softmax_of(network, image[:, ::-1])[:, :, ::-1]) / 2
    assert np.abs(np.load("out/probabilities/x.npz")["probabilities"] - wanted).max() <= 2**-12 + 1e-6
    call("x.png", "other", outputs=["probabilities"], inference=InferenceConfig(longest_side=45))
    assert np.load("other/probabilities/x.npz")["probabilities"].shape == (4, 90, 70)


def test_the_page_reads_the_probabilities(network, capsys):
    (block,) = (block for block in pages.blocks("configs/README.md", "python") if "probabilities" in block)
    Image.fromarray(photograph(130, 210)).save("photo.png")
    call("photo.png", "answers", outputs=["probabilities", "raw"], inference=InferenceConfig())
    capsys.readouterr()
    exec(block, {})
    assert capsys.readouterr().out == f"{'abcd'[pixels_of('answers/raw/photo.png')[120, 200]]}\n"


def test_the_words_on_the_command_line(segtrain, folder_data):
    assert segtrain("train", *folder_data[1], f"plugins=[{TINY}]", "model.backbone=tiny", "run=run").status == 0
    tifffile.imwrite("x.tif", photograph(), photometric="rgb", tile=(32, 32))
    words = ["predict", "run=run", "input=x.tif", f"plugins=[{TINY}]", "outputs=[raw]", "device=cpu"]
    answer = segtrain(*words, "inference=tiled", "inference.tile=[96,64]", "in_memory=0", "output=out")
    assert answer.status == 0 and "windows     x.tif" in answer.out, answer
    whole = segtrain(*words, "inference=tiled", "inference.tile=[96,64]", "output=whole")
    assert whole.status == 0 and "windows" not in whole.out, whole
    assert np.array_equal(pixels_of("out/raw/x.tif"), pixels_of("whole/raw/x.png"))
    refused(segtrain(*words, "inference=whole", "in_memory=0"), "inference.tile=null", "give inference=tiled")
    refused(segtrain(*words, "in_memory=-1"), "in_memory")
