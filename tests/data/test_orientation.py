"""dataset.exif: how images with an EXIF orientation fit their labels, in every place that reads an image."""

import numpy as np
import pytest
from PIL import Image, ImageOps

from segtrain import load
from segtrain.config import MixtureConfig, adopt_earlier, store_rules, with_defaults
from segtrain.config.plugin_files import load_plugin
from segtrain.data.cache import Decoded
from segtrain.data.images import orientation_of, read_header, read_image
from segtrain.data.label_files import read_label
from segtrain.data.loader import EvaluationData, read_pixels
from segtrain.data.orientation import OrientationError, tag_to_apply, turned
from segtrain.data.sample import Sample
from segtrain.data.verify.file_facts import FileFacts
from segtrain.errors import DataError
from tests.helpers.checkout import TINY
from tests.helpers.runs import refused, small_run


def tagged(path, pixels, tag):
    """Write an image of that orientation, which shows `pixels` turned."""
    exif = Image.Exif()
    exif[274] = tag
    Image.fromarray(pixels).save(path, exif=exif)
    return path


def noise(height=20, width=30, channels=(3,)):
    return np.random.default_rng(0).integers(0, 256, (height, width, *channels), np.uint8)


@pytest.mark.parametrize("tag", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp"])
def test_images_are_turned_as_pillow_turns_them(tmp_path, suffix, tag):
    pixels = noise()
    path = tagged(tmp_path / f"a.{suffix}", pixels, tag)
    plain = tmp_path / f"plain.{suffix}"
    Image.fromarray(pixels).save(plain)
    stored = read_image(plain)
    assert orientation_of(path.read_bytes(), path) == tag
    assert read_header(path)[:2] == (20, 30)
    np.testing.assert_array_equal(read_image(path), stored)
    with Image.open(plain) as image:
        image.getexif()[274] = tag
        shown = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    if suffix in ("png", "tif"):  # decoders of the others differ by a grey level
        np.testing.assert_array_equal(read_image(path, exif="apply"), shown)
    np.testing.assert_array_equal(read_image(path, exif="apply"), turned(stored, tag))
    assert read_image(path, exif="apply").shape == shown.shape


@pytest.mark.parametrize("tag", range(1, 9))
def test_labels_and_deep_images_of_tiff_files_are_read_as_stored(tmp_path, tag):
    label, deep = noise(channels=()), np.random.default_rng(1).integers(0, 65536, (20, 30)).astype(np.uint16)
    for name, pixels in (("label.tif", label), ("deep.tif", deep)):
        Image.fromarray(pixels).save(tmp_path / name, tiffinfo={274: tag})
    np.testing.assert_array_equal(read_label(tmp_path / "label.tif"), label)
    np.testing.assert_array_equal(read_image(tmp_path / "deep.tif")[..., 0], deep >> 8)
    np.testing.assert_array_equal(read_image(tmp_path / "deep.tif", exif="apply")[..., 0], turned(deep >> 8, tag))


def test_when_the_size_of_the_label_tells_how_it_lies(tmp_path):
    path = tmp_path / "a.jpg"
    for tag in (5, 6, 7, 8):
        assert tag_to_apply(tag, "auto", (20, 30), (30, 20), path) == tag
        assert tag_to_apply(tag, "auto", (20, 30), (20, 30), path) == 1
    for tag, size, label in ((3, (20, 30), (20, 30)), (2, (20, 30), (20, 30)), (6, (20, 20), (20, 20)),
                             (6, (20, 30), None)):  # fmt: skip
        with pytest.raises(OrientationError, match=rf"a.jpg has the EXIF orientation {tag} .*dataset.exif=apply"):
            tag_to_apply(tag, "auto", size, label, path)
        assert tag_to_apply(tag, "apply", size, label, path) == tag
        assert tag_to_apply(tag, "ignore", size, label, path) == 1
        with pytest.raises(OrientationError, match="dataset.exif=refuse does not allow"):
            tag_to_apply(tag, "refuse", size, label, path)
    for rule in ("auto", "apply", "ignore", "refuse"):
        assert tag_to_apply(1, rule, (20, 30), (30, 20), path) == 1


def sideways(tmp_path, exif):
    """A sample whose label is drawn on the image as a viewer shows it."""
    shown = noise(30, 20)
    path = tagged(tmp_path / "a.png", turned(shown, 8), 6)
    Image.fromarray(shown[..., 0] % 2).save(tmp_path / "a_label.png")
    return shown, Sample("a", path, tmp_path / "a_label.png", exif=exif)


def test_training_evaluation_and_the_cache_read_the_same_pixels(tmp_path):
    shown, sample = sideways(tmp_path, "auto")
    np.testing.assert_array_equal(read_pixels(sample)[0], shown)
    from segtrain.data.labels import LabelTable

    rows = [{"id": i, "name": str(i), "color": [i, 0, 0], "train_id": i} for i in range(2)]
    item = EvaluationData([sample], LabelTable(rows, "here"))[0]
    np.testing.assert_array_equal(item.image, shown)
    decoded, told = Decoded(tmp_path / "cache"), []
    facts = FileFacts(tmp_path / "facts", [sample])
    assert facts.image_size(sample) == (30, 20) and facts.tags == {sample.image: (6, 6)}
    decoded.build([sample], facts, told.append)
    assert decoded.place(sample.image, "\nexif auto 30 20").is_file()
    np.testing.assert_array_equal(decoded(sample)[0], shown)
    stored = sample._replace(exif="ignore")
    np.testing.assert_array_equal(decoded(stored)[0], turned(shown, 8))  # not the other one's pixels
    np.testing.assert_array_equal(decoded(sample)[0], shown)
    Image.fromarray(noise(20, 30, ()) % 2).save(sample.label)  # drawn anew, on the stored pixels
    np.testing.assert_array_equal(decoded(sample)[0], turned(shown, 8))


def test_what_does_not_fit_names_the_orientation(tmp_path):
    _, sample = sideways(tmp_path, "ignore")
    with pytest.raises(DataError, match=r"EXIF orientation 6, which dataset.exif=ignore does not apply: auto does"):
        FileFacts(tmp_path / "facts", [sample]).sample(sample)
    tagged(sample.label, noise(30, 20, ()) % 2, 3)
    with pytest.raises(DataError, match=r"a_label.png has an EXIF orientation itself \(3\)"):
        FileFacts(tmp_path / "facts", [sample]).sample(sample._replace(exif="auto"))


# ---------------------------------------------------------------------------------------------------- commands


@pytest.fixture
def words(tmp_path, monkeypatch):
    """Images on their side, whose labels are drawn upright, and the words of a training on them."""
    monkeypatch.chdir(tmp_path)
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (tmp_path / "data" / split / kind).mkdir(parents=True)
        for i in range(4):
            mask = np.zeros((96, 64), np.uint8)
            mask[20 + i : 60, 5:30] = 1
            shown = np.repeat(200 * mask[..., None], 3, 2) + np.random.default_rng([i, len(split)]).integers(
                0, 50, (96, 64, 3), np.uint8
            )
            tagged(tmp_path / "data" / split / "images" / f"{i}.png", turned(shown, 8), 6)
            Image.fromarray(mask).save(tmp_path / "data" / split / "labels" / f"{i}.png")
    (tmp_path / "classes.csv").write_text("id,name\n0,dark\n1,light\n")
    splits = [f"dataset.splits.{s}={{images:{s}/images/*.png,labels:{s}/labels/*.png}}" for s in ("train", "val")]
    own = [word for word in small_run("x") if not word.startswith(("dataset.", "augmentation."))]
    data = ["dataset=folder", "dataset.root=data", "dataset.classes=classes.csv", *splits]
    return data, [*data, *own, f"plugins=[{TINY}]", "model.backbone=tiny", "augmentation.crop_size=[64,64]"]


def test_check_train_evaluate_and_predict_agree(segtrain, words):
    data, training = words
    answer = segtrain("check", *data)
    assert answer.status == 0, answer.err
    assert "note: train: 4 of 4 images have an orientation: 4 on its left side (6); 4 turned by it" in answer.out
    refused(segtrain("check", *data, "dataset.exif=ignore"), "EXIF orientation 6", status=1)
    refused(segtrain("train", *training, "run=r", "dataset.exif=refuse"), "write the image anew", status=1)
    refused(segtrain("train", *training, "run=r", "dataset.exif=sideways"), "one of auto, apply, ignore", status=2)
    answer = segtrain("train", *training, "run=r")
    assert answer.status == 0, answer.err
    assert "exif       4 of 4 images have an orientation" in answer.out
    refused(segtrain("train", *training, "run=r", "dataset.exif=apply"), "dataset.exif: auto in the run", status=1)
    answer = segtrain("evaluate", "run=r", f"plugins=[{TINY}]", "device=cpu")
    assert answer.status == 0, answer.err
    answer = segtrain("predict", "run=r", "input=data/val/images", "outputs=[raw]", "output=answers", "device=cpu",
                      f"plugins=[{TINY}]")  # fmt: skip
    assert answer.status == 0, answer.err
    assert "exif        4 on its left side (6): turned" in answer.out
    load_plugin(str(TINY))
    with Image.open("answers/raw/0.png") as found:
        assert found.size == (64, 96)
        np.testing.assert_array_equal(load("r/last.pt").predict("data/val/images/0.png"), np.asarray(found))
    answer = segtrain("score", *data, "split=val", "predictions=answers/raw", "predictions_encoding=train_ids")
    assert answer.status == 0 and "warning" not in answer.out, answer


def test_what_the_tag_leaves_open_is_refused_with_the_remedy(segtrain, words):
    data, training = words
    with Image.open("data/train/images/2.png") as image:
        tagged("data/train/images/2.png", turned(np.asarray(image), 6), 3)
    refused(segtrain("train", *training, "run=r"), "2.png has the EXIF orientation 3 (upside down)",
            "dataset.exif=ignore for those that fit the stored pixels", status=1)  # fmt: skip
    answer = segtrain("check", *data)
    assert answer.status == 1 and "error: train: data/train/images/2.png has the EXIF orientation 3" in answer.out
    assert segtrain("train", *training, "run=r", "dataset.exif=apply").status == 0


def test_predictions_of_turned_images_are_not_compared_in_silence(segtrain, words):
    data, _ = words
    for i in range(4):  # labels as the pixels are stored
        with Image.open(f"data/val/labels/{i}.png") as label:
            Image.fromarray(turned(np.asarray(label), 8)).save(f"data/val/labels/{i}.png")
    answer = segtrain("score", *data, "split=val", "predictions=data/val/labels")
    assert answer.status == 0
    assert "warning     4 images have an EXIF orientation that their labels do not follow" in answer.out


def test_a_run_without_the_option_goes_on_as_it_began(segtrain, words):
    import torch

    _, training = words
    for i in range(4):
        with Image.open(f"data/train/images/{i}.png") as image:
            tagged(f"data/train/images/{i}.png", turned(np.asarray(image), 6), 3)
    for split in ("train", "val"):
        for i in range(4):
            with Image.open(f"data/{split}/images/{i}.png") as image:
                tagged(f"data/{split}/images/{i}.png", np.asarray(image.resize((64, 96))), 3)
    assert segtrain("train", *training, "run=r", "dataset.exif=ignore").status == 0
    saved = torch.load("r/last.pt", weights_only=True)
    del saved["config"]["dataset"]["exif"]
    torch.save(saved, "r/last.pt")
    answer = segtrain("train", *training, "run=r", "trainer.max_steps=10")
    assert answer.status == 0, answer.err
    assert "dataset.exif=ignore, as the run began before" in answer.out
    answer = segtrain("evaluate", "run=r", f"plugins=[{TINY}]", "device=cpu")
    assert answer.status == 0, answer.err
    assert torch.load("r/last.pt", weights_only=True)["config"]["dataset"]["exif"] == "ignore"


def test_parts_of_a_mixture_from_before_the_option_go_on_as_they_began(segtrain, words):
    import torch

    data, training = words
    for split in ("train", "val"):  # labels fit the pixels as stored, and as turned
        for i in range(4):
            with Image.open(f"data/{split}/images/{i}.png") as image:
                tagged(f"data/{split}/images/{i}.png", np.asarray(image.resize((64, 96))), 3)
    rest = [word for word in training if word not in data]
    part = "dataset:folder,root:data,classes:classes.csv,splits:{" + ",".join(
        f"{s}:{{images:{s}/images/*.png,labels:{s}/labels/*.png}}" for s in ("train", "val")
    )
    words = ["dataset=mixture", "dataset.target=mine", f"dataset.parts.mine={{{part}}}}}", *rest]
    ignored = ["dataset=mixture", "dataset.target=mine", f"dataset.parts.mine={{{part}}},exif:ignore}}", *rest]
    refused(segtrain("train", *words, "run=r"), "0.png has the EXIF orientation 3", status=1)  # a new run: auto
    answer = segtrain("train", *ignored, "run=r")
    assert answer.status == 0, answer.err
    refused(segtrain("train", *words, "run=r"), "dataset.parts.mine.exif: ignore in the run, auto", status=1)
    saved = torch.load("r/last.pt", weights_only=True)
    del saved["config"]["dataset"]["parts"]["mine"]["exif"]
    torch.save(saved, "r/last.pt")
    answer = segtrain("evaluate", "run=r", f"plugins=[{TINY}]", "device=cpu")
    assert answer.status == 0, answer.err
    answer = segtrain("train", *words, "run=r", "trainer.max_steps=10")
    assert answer.status == 0, answer.err
    assert "dataset.parts.mine.exif=ignore, as the run began before" in answer.out
    assert torch.load("r/last.pt", weights_only=True)["config"]["dataset"]["parts"]["mine"]["exif"] == "ignore"


def test_a_new_mixture_stores_what_its_parts_do_with_orientations():
    parts = {"mine": {"dataset": "folder", "weight": 1}, "kitti": None, "other": {"dataset": "folder", "exif": "apply"}}
    new = MixtureConfig(name="mixture", target="mine", parts=parts)
    stored = with_defaults({"dataset": {"name": "mixture", "parts": parts}})["dataset"]["parts"]
    store_rules(new)
    for filled, rule in ((new.parts, "auto"), (stored, "ignore")):
        assert filled == {"mine": parts["mine"] | {"exif": rule}, "kitti": None, "other": parts["other"]}
    assert "exif" not in parts["mine"]  # what was given is not changed
    assert adopt_earlier(new, {"parts": {"mine": {"dataset": "folder", "exif": "ignore"}}}) == {}  # it was asked for
    assert new.parts["mine"]["exif"] == "auto"
