"""Labels that were corrected after they were painted, where the painting must not stay, and ids of COCO as texts."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from segtrain.data.formats.parquet import extract_parquet
from segtrain.data.label_files import read_label
from tests.helpers.annotations import class_masks, png, truth, write_annotations, write_json


def converted(segtrain, name):
    answer = segtrain("convert-labels", "data", "output=out")
    assert answer.status == 0, answer.err
    return read_label(next(Path("out").rglob(name)))


def test_a_mask_in_the_folder_of_another_class_is_painted_as_that_class(segtrain):
    """Its name, size and time stay: only the folder says what it is."""
    class_masks(Path("data"), {"train": {"a": truth(0), "b": truth(1)}})
    Path("data/masks/dog/a.png").unlink()
    before = converted(segtrain, "a.png")
    Path("data/masks/cat/a.png").rename("data/masks/dog/a.png")
    after = converted(segtrain, "a.png")
    assert set(np.unique(before)) == {0, 1}
    np.testing.assert_array_equal(after, 2 * before)


def test_masks_are_painted_again_if_their_colours_mean_other_classes(segtrain):
    """The ids and names of the classes stay, and so do the files."""
    write_annotations("colors", Path("data"))
    before = converted(segtrain, "train0*.png")
    table = Path("data/class_dict.csv")
    head, nothing, cat, dog = table.read_text().splitlines()
    (cat, red), (dog, green) = (row.split(",", 1) for row in (cat, dog))
    table.write_text("\n".join([head, nothing, f"{cat},{green}", f"{dog},{red}"]))
    after = converted(segtrain, "train0*.png")
    assert set(np.unique(before)) == {0, 1, 2}
    np.testing.assert_array_equal(after, np.array([0, 2, 1])[before])


def test_masks_of_a_changed_parquet_file_replace_those_of_the_same_size(tmp_path):
    arrow, writer = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    ids = np.array([[0, 1], [2, 3]], np.uint8)
    masks = [png(ids), png(ids.T)]
    assert len(masks[0]) == len(masks[1])
    for mask in masks:
        cells = {"image": [{"bytes": png(ids), "path": "a.png"}], "mask": [{"bytes": mask, "path": "m.png"}]}
        writer.write_table(arrow.table(cells), tmp_path / "train.parquet")
        _, labels, errors = extract_parquet({"train": tmp_path / "train.parquet"}, None, tmp_path / "out")
        assert not errors and labels["a"].read_bytes() == mask
        os.utime(labels["a"], ns=(1, 1))
        extract_parquet({"train": tmp_path / "train.parquet"}, None, tmp_path / "out")
        assert labels["a"].stat().st_mtime_ns == 1  # not written again


def test_ids_of_images_as_texts_lose_no_object(segtrain):
    """COCO's files of some tools have "image_id": "1" for the image of the id 1."""
    masks = write_annotations("coco", Path("data"))
    path = Path("data/annotations/instances_train2017.json")
    content = json.loads(path.read_text())
    for one in content["annotations"]:
        one["image_id"] = str(one["image_id"])
    write_json(path, content)
    found = converted(segtrain, "train1.png")
    np.testing.assert_array_equal(found, np.array([found.min(), 17, 18])[masks["train"]["train1"]])
