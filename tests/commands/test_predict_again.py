"""`segtrain predict`: what is finished stays, what is broken is named at the end, and processes share the images."""

import errno
import os
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from segtrain import load
from segtrain.commands import predict as predicting
from segtrain.config import ModelConfig
from segtrain.data import inputs
from segtrain.data.labels import LabelTable
from segtrain.errors import UsageError
from segtrain.scoring import figures
from segtrain.scoring.predictor import Predictor
from tests.helpers.checkout import TINY
from tests.helpers.runs import Ranks, refused


@pytest.fixture
def trained(segtrain, folder_data):
    answer = segtrain("train", *folder_data[1], f"plugins=[{TINY}]", "model.backbone=tiny", "run=run")
    assert answer.status == 0, answer
    rng = np.random.default_rng(0)
    for name in ("a.png", "b/c.png", "b/d.png"):
        path = Path("photos", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 56, 3), dtype=np.uint8)).save(path)
    return ["input=photos", "run=run", f"plugins=[{TINY}]", "output=out", "outputs=[raw,color]", "device=cpu"]


def written():
    return {str(path.relative_to("out")): path.stat().st_mtime_ns for path in Path("out").rglob("*.png")}


def test_the_same_command_does_what_is_left(segtrain, trained):
    assert segtrain("predict", *trained).status == 0
    first = written()
    assert len(first) == 6
    Path("out/color/b/c.png").unlink()
    Path("photos/e.png").write_bytes(Path("photos/a.png").read_bytes())
    os.utime("photos/b/d.png")  # has changed since
    answer = segtrain("predict", *trained)
    assert "finished    1 of 4 images before" in answer.out and "predicting  3 images" in answer.out
    again = written()
    same = {name for name, time in first.items() if again[name] == time}
    assert same == {"raw/a.png", "color/a.png"} and len(again) == 8
    assert "predicting  0 images" in segtrain("predict", *trained).out
    assert "predicting  4 images" in segtrain("predict", *trained, "overwrite=true").out


def test_the_answers_of_another_network_or_inference_are_replaced(segtrain, trained):
    assert segtrain("predict", *trained).status == 0
    answer = segtrain("predict", *trained, "inference.flip=true")
    assert "replaced    out holds" in answer.out and "predicting  3 images" in answer.out
    assert "predicting  0 images" in segtrain("predict", *trained, "inference.flip=true").out
    Path("out/predict.json").write_text("damaged")
    assert "predicting  3 images" in segtrain("predict", *trained, "inference.flip=true").out
    for word, names in (("taxonomy=own.yaml", "wet dry"), ("taxonomy=own.yaml", "dry wet"),
                        ("checkpoint_weights=raw", "dry wet")):  # fmt: skip
        Path("own.yaml").write_text("water: {}\nland: {}\n".format(*names.split()))
        answer = segtrain("predict", *trained, word)
        assert "replaced    out holds" in answer.out and "predicting  3 images" in answer.out, answer
    checkpoint = torch.load("run/last.pt", weights_only=True)
    names = [name for name in checkpoint["model"] if name.endswith("weight")]
    checkpoint["model"][names[-1]] *= -1  # trained again, under the same name
    torch.save(checkpoint, "run/last.pt")
    answer = segtrain("predict", *trained, "checkpoint_weights=raw")
    assert "replaced    out holds" in answer.out and "predicting  3 images" in answer.out, answer
    Path("run").rename("moved")
    answer = segtrain("predict", *(word.replace("run=run", "run=moved") for word in trained), "checkpoint_weights=raw")
    assert "predicting  0 images" in answer.out, answer


def test_only_networks_of_the_same_classes_and_inputs_are_averaged():
    rows = [{"id": i, "name": name, "color": [i, i, i], "train_id": i} for i, name in enumerate("ab")]
    table, other = LabelTable(rows, "a test"), LabelTable([rows[0], rows[1] | {"name": "c"}], "a test")

    def network(table=table, options=None, **dataset):
        options = options or ModelConfig()
        return Predictor(torch.nn.Identity(), table, options, torch.device("cpu"), {"config": {"dataset": dataset}})

    first = network(value_range=[0, 4095], channels=[0, 1, 2])
    same = network(value_range=[0, 4095], channels=[0, 1, 2])
    assert first.averaged_with([same], ["a.pt", "b.pt"]).others == (same,)
    for what, second in (
        ("classes", network(other, value_range=[0, 4095], channels=[0, 1, 2])),
        ("dataset.channels", network(value_range=[0, 4095], channels=[2, 1, 0])),
        ("dataset.value_range", network(value_range=[0, 255], channels=[0, 1, 2])),
        ("mean and std", network(options=ModelConfig(std=[1, 1, 1]), value_range=[0, 4095], channels=[0, 1, 2])),
    ):
        with pytest.raises(UsageError, match=f"c.pt has other {what} than a.pt"):
            first.averaged_with([same, second], ["a.pt", "b.pt", "c.pt"])


def test_images_that_cannot_be_read_are_named_at_the_end(segtrain, trained):
    Path("photos/b/c.png").write_bytes(b"no image")
    answer = segtrain("predict", *trained)
    refused(answer, "photos/b/c.png", status=1)
    assert set(written()) == {f"{kind}/{name}.png" for kind in ("raw", "color") for name in ("a", "b/d")}


def test_images_are_computed_before_all_are_read_and_written(segtrain, trained, monkeypatch):
    """At most 2 x 2 images are read ahead, and 2 + 1 wait for two threads that write; the order is that of one
    thread."""
    for number in range(20):
        Path(f"photos/b/x{number:02}.png").write_bytes(Path("photos/a.png").read_bytes())
    read, computed, written, ahead, behind = [], [], [], [], []
    read_file, segment, write = predicting.read_file, Predictor.segment_batch, predicting.write_outputs

    def reading(predictor, limit, one):
        read.append(one.name)
        return read_file(predictor, limit, one)

    def computing(self, *arguments, **options):
        ahead.append(len(read) - len(computed))
        behind.append(len(computed) - len(written))
        computed.append(None)
        return segment(self, *arguments, **options)

    def writing(one, *arguments):
        time.sleep(0.005)
        write(one, *arguments)
        written.append(one.name)

    for name, function in (("read_file", reading), ("write_outputs", writing), ("cpus", lambda: 2)):
        monkeypatch.setattr(predicting, name, function)
    monkeypatch.setattr(Predictor, "segment_batch", computing)
    assert segtrain("predict", *trained).status == 0
    assert len(written) == 23 and sorted(written) == sorted(read)
    assert 1 < max(ahead) <= 4 and max(behind) <= 3


@pytest.mark.parametrize("broken", ["b/c", "b/d"])
def test_what_cannot_be_written_ends_the_command(segtrain, trained, monkeypatch, broken):
    """Also the last one. What was written before is whole, and done."""
    write = figures.write_png

    def full(path, *arguments, **options):
        if path == Path(f"out/color/{broken}.png"):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, *arguments, **options)

    with monkeypatch.context() as changed:
        changed.setattr(figures, "write_png", full)
        answer = segtrain("predict", *trained)
    assert answer.status == 1 and f"out/color/{broken}.png" in answer.err and "disk" in answer.err, answer
    assert {"raw/a.png", "color/a.png", f"raw/{broken}.png"} <= written().keys()
    answer = segtrain("predict", *trained)
    assert "finished    1 of 3 images before" in answer.out or "finished    2 of 3 images before" in answer.out


def test_the_frames_of_a_video(segtrain, trained, monkeypatch):
    writer = cv2.VideoWriter("film.avi", cv2.VideoWriter.fourcc(*"MJPG"), 10, (64, 48))
    for level in (0, 120, 240):
        writer.write(np.full((48, 64, 3), level, np.uint8))
    writer.release()
    answer = segtrain("predict", *trained[1:], "input=film.avi")
    assert answer.status == 0 and "3 images" in answer.out
    assert {name for name in written() if name.startswith("raw")} == {f"raw/film/00000{n}.png" for n in (1, 2, 3)}
    monkeypatch.setattr(inputs, "count_frames", lambda path: 5)  # as if it had become shorter since
    answer = segtrain("predict", *trained[1:], "input=film.avi", "overwrite=true")
    refused(answer, "film.avi ends at frame 3", status=1)
    assert "predicting  5 images" in answer.out and "\n3 images; " in answer.out


def test_two_processes_share_the_images(segtrain, trained):
    Path("photos/b/e.png").write_bytes(b"no image")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open("photos/b/c.png").save("photos/b/c.png", exif=exif)  # the second process reads it
    out, err = Ranks(2, "predict", *trained).ended(status=1)
    assert "photos/b/e.png" in err and "Traceback" not in err
    assert out.count("predicting  4 images") == 1 and "\n3 images; " in out
    assert "exif        1 on its left side (6)" in out
    predictor = load("run", device="cpu")
    for name in ("a", "b/c", "b/d"):
        assert (np.asarray(Image.open(f"out/raw/{name}.png")) == predictor.predict(f"photos/{name}.png")).all()


def test_several_checkpoints_are_averaged(segtrain, trained, folder_data):
    """The arg-max of the mean of both networks' probabilities, enlarged first."""
    words = [*folder_data[1], trained[2], "model.backbone=tiny"]
    assert segtrain("train", *words, "run=other", "trainer.seed=1", "model.output_stride=8").status == 0
    common = [word for word in trained if not word.startswith("run=")]
    answer = segtrain("predict", *common, "checkpoint=[run/last.pt,other/last.pt]")
    assert answer.status == 0 and answer.out.count("checkpoint  ") == 2, answer
    image = np.asarray(Image.open("photos/a.png"))
    total = np.zeros((2, *image.shape[:2]))
    for run in ("run", "other"):
        logits = load(run, device="cpu").logits(torch.from_numpy(image.transpose(2, 0, 1)[None].copy()))
        enlarged = torch.nn.functional.interpolate(logits.double(), image.shape[:2], mode="bilinear")
        total += enlarged.softmax(1)[0].detach().numpy()
    assert (np.asarray(Image.open("out/raw/a.png")) == total.argmax(0)).mean() > 0.999
    assert segtrain("train", *words, "run=third", "model.mean=[0.1,0.1,0.1]").status == 0
    refused(segtrain("predict", *common, "checkpoint=[run/last.pt,third/last.pt]"), "third/last.pt", "mean and std")
    refused(segtrain("predict", *common, "checkpoint=[run/last.pt]", "run=run"), "one of them")
    refused(segtrain("predict", *common, "checkpoint=[]"), "checkpoint")
