"""dataset.ignore_values: values of label images, of whatever size and sign, that mean no class."""

import numpy as np
import pytest
import tifffile
from PIL import Image

from segtrain.config import FolderConfig
from segtrain.data.cache import Decoded
from segtrain.data.class_weights import pixels_of_classes
from segtrain.data.label_files import read_label
from segtrain.data.loader import read_pixels
from segtrain.data.registry import label_table, split_samples, training_mixture
from segtrain.data.sets.folder import table
from segtrain.data.verify.file_facts import FileFacts
from segtrain.errors import DataError, UsageError
from tests.helpers.checkout import TINY
from tests.helpers.runs import refused, small_run


def config(root, **options):
    splits = {"train": {"images": "images/*.png", "labels": "labels/*.tif"}}
    return FolderConfig(name="folder", root=str(root), classes="classes.csv", splits=splits, **options)


@pytest.mark.parametrize(
    ("kind", "value", "rows", "void"),
    [
        (np.int16, -9999, "0,a\n1,b\n", 255), (np.int16, -32768, "0,a\n1,b\n", 255), (np.int32, -1, "0,a\n1,b\n", 255),
        (np.uint16, 65535, "0,a\n1,b\n", 255), (np.int32, 2**31 - 1, "0,a\n1,b\n", 255),
        (np.int16, -9999, "0,a\n1,b\n7,x,true\n", 7), (np.int16, -9999, "255,a\n1,b\n", 254),
        (np.uint8, 9, "0,a\n1,b\n", 9),
    ],
)  # fmt: skip
def test_values_become_an_ignored_id_everywhere(tmp_path, kind, value, rows, void):
    (tmp_path / "classes.csv").write_text("id,name,ignore\n" + rows.replace(",a\n", ",a,\n").replace(",b\n", ",b,\n"))
    first = int(rows.split(",")[0])
    values = np.array([[first, 1, value], [value, 1, 1]], kind)
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    Image.fromarray(np.zeros((2, 3, 3), np.uint8)).save(tmp_path / "images/x.png")
    tifffile.imwrite(tmp_path / "labels/x.tif", values)
    data = config(tmp_path, ignore_values=[value])
    (sample,) = split_samples(data, "train")
    expected = np.where(values == value, void, values).astype(np.uint8)
    np.testing.assert_array_equal(read_pixels(sample)[1], expected)
    train_ids = label_table(data).encode(expected, sample.label)
    np.testing.assert_array_equal(train_ids == 255, values == value)
    decoded = Decoded(tmp_path / "cache")
    decoded.build([sample], FileFacts(tmp_path / "facts", [sample]), print)
    np.testing.assert_array_equal(decoded(sample)[1], expected)
    histogram = FileFacts(tmp_path / "facts", [sample]).histogram(sample.label, sample.replaced)
    assert histogram[void] == 2 and histogram.sum() == 6
    weighed = pixels_of_classes(training_mixture(data), label_table(data), tmp_path / "facts")
    assert weighed.tolist() == [1, 3]
    if kind != np.uint8:
        with pytest.raises(DataError, match=r"dataset\.ignore_values=\["):
            read_label(sample.label)


def test_the_decoded_cache_keeps_replacements_apart(tmp_path):
    (tmp_path / "classes.csv").write_text("id,name,ignore\n0,a,\n1,b,\n7,x,true\n")
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    Image.fromarray(np.zeros((2, 3, 3), np.uint8)).save(tmp_path / "images/x.png")
    tifffile.imwrite(tmp_path / "labels/x.tif", np.array([[0, 1, -1], [-1, 1, 1]], np.int16))
    (sample,) = split_samples(config(tmp_path, ignore_values=[-1]), "train")
    decoded = Decoded(tmp_path / "cache")
    assert decoded(sample)[1].tolist() == [[0, 1, 7], [7, 1, 1]]
    assert decoded(sample._replace(replaced={-1: 9}))[1].tolist() == [[0, 1, 9], [9, 1, 1]]
    with pytest.raises(DataError, match=r"dataset\.ignore_values=\["):
        decoded(sample._replace(replaced=None))


def test_a_class_cannot_be_ignored_so(tmp_path):
    (tmp_path / "classes.csv").write_text("id,name\n0,a\n1,b\n")
    with pytest.raises(UsageError, match=r"ignore_values=\[-1, 1\] has 1, which is a class"):
        table(config(tmp_path, ignore_values=[-1, 1]))


def test_more_classes_than_eight_bits_hold_are_refused_in_one_sentence(tmp_path):
    (tmp_path / "classes.csv").write_text("id,name\n" + "".join(f"{i},c{i}\n" for i in range(300)))
    with pytest.raises(DataError, match="id must be a whole number from 0 to 255, found '256'"):
        table(config(tmp_path))
    (tmp_path / "classes.csv").write_text("id,name\n" + "".join(f"{i},c{i}\n" for i in range(254)))
    with pytest.raises(DataError, match="found 254 classes .* between 2 and 253 work, as ids have 8 bits"):
        table(config(tmp_path))
    Image.fromarray(np.arange(300, dtype=np.uint16).reshape(10, 30)).save(tmp_path / "wide.png")
    with pytest.raises(DataError, match="values up to 299.*ids have 8 bits, from 0 to 255, for at most 253 classes"):
        read_label(tmp_path / "wide.png")


def test_training_check_and_score_take_them(segtrain, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for split in ("train", "val"):
        for folder in ("images", "labels"):
            (tmp_path / split / folder).mkdir(parents=True)
        for i in range(3):
            mask = np.zeros((64, 96), np.int16)
            mask[:, 30 + i + 5 * len(split) :], mask[:8] = 1, -9999
            Image.fromarray(np.repeat((120 * (mask + 1)).clip(0, 255).astype(np.uint8)[..., None], 3, 2)).save(
                tmp_path / split / "images" / f"{i}.png"
            )
            tifffile.imwrite(tmp_path / split / "labels" / f"{i}.tif", mask)
    (tmp_path / "classes.csv").write_text("id,name\n0,a\n1,b\n")
    data = ["dataset=folder", "dataset.root=.", "dataset.classes=classes.csv"]
    data += [f"dataset.splits.{s}={{images:{s}/images/*.png,labels:{s}/labels/*.tif}}" for s in ("train", "val")]
    own = [word for word in small_run("x") if not word.startswith(("dataset.", "augmentation."))]
    training = [*own, f"plugins=[{TINY}]", "model.backbone=tiny", "augmentation.crop_size=[64,64]", "run=r"]
    refused(segtrain("train", *data, *training), "dataset.ignore_values=[-9999]", status=1)
    ignored = "dataset.ignore_values=[-9999]"
    assert segtrain("check", *data, ignored).status == 0
    assert segtrain("train", *data, *training, ignored).status == 0
    refused(segtrain("train", *data, *training, "dataset.ignore_values=[-9999,-1]"), "dataset.ignore_values", status=1)
    assert segtrain("predict", "run=r", "input=val/images", "outputs=[labels]", "output=out", "device=cpu",
                    f"plugins=[{TINY}]").status == 0  # fmt: skip
    assert segtrain("score", *data, ignored, "split=val", "predictions=out/labels").status == 0


def test_check_train_evaluate_and_score_refuse_more_classes(segtrain, folder_data, tmp_path):
    root, words = folder_data
    words = [*words, f"plugins=[{TINY}]", "model.backbone=tiny"]
    data = [word for word in words if word.startswith("dataset")]
    assert segtrain("train", *words, "run=r").status == 0
    entries = (
        ["check", *data], ["train", *words, "run=other"],
        ["evaluate", "run=r", f"plugins=[{TINY}]", "device=cpu", *data],
        ["score", *data, "split=val", f"predictions={root}/val/labels"],
    )  # fmt: skip
    named = (root / "classes.csv").read_text()
    (root / "classes.csv").write_text("id,name\n" + "".join(f"{i},c{i}\n" for i in range(254)))
    for entry in entries:
        refused(segtrain(*entry), "found 254 classes", "between 2 and 253 work, as ids have 8 bits", status=1)
    (root / "classes.csv").write_text(named)
    for split in ("train", "val"):
        wide = np.arange(48 * 64, dtype=np.uint16).reshape(48, 64) % 300
        Image.fromarray(wide).save(root / split / "labels" / "p0.png")
    for entry in entries:
        answer = segtrain(*entry)
        assert answer.status == 1, answer
        assert "values up to 299" in answer.out + answer.err and "at most 253 classes" in answer.out + answer.err, entry
