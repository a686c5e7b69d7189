"""The counts of each image, images.npz: exact sums, any number of processes, sound files only."""

import tracemalloc
from array import array

import numpy as np
import pytest

from segtrain.data.labels import LabelTable
from segtrain.data.rules import COCOSTUFF, PLAIN, VISTAS
from segtrain.errors import DataError
from segtrain.scoring import image_counts
from segtrain.scoring.image_counts import ImageCounts, read_image_counts
from segtrain.scoring.scores import Scores, iou_of

NAMES = ["b/1", "a \U0001f600", "c\udcff"]  # the last one is no UTF-8
OF = {"dataset": "mine", "split": "val"}


def small_table():
    """Classes 0 and 1 with ids 7 and 9, class 2 with the ids 11 and 12, and the ignored id 0."""
    rows = [(7, 0), (9, 1), (11, 2), (12, 2), (0, 255)]
    return LabelTable([{"id": i, "name": str(i), "color": [i, i, i], "train_id": t} for i, t in rows], "a test")


def counted(rules=PLAIN, images=3, order=None):
    """Scores, and the counts of each image, of random labels and predictions."""
    table, rng = small_table(), np.random.default_rng(0)
    scores, collected = Scores(table, rules), ImageCounts(3)
    pairs = [rng.choice(np.array([7, 9, 11, 12, 0], np.uint8), (2, 8, 5 + i), p=(0.4, 0.3, 0.1, 0.1, 0.1))
             for i in range(images)]  # fmt: skip
    names = NAMES[:images] if images <= 3 else [f"{i:05d}" for i in range(images)]
    for number in order or range(images):
        ids, predicted = pairs[number]
        collected.add(names[number], ids.shape, scores.add(ids, predicted), scores.class_of)
    identities = [f"family/{name}" for name in names]
    return scores, collected.in_order(names, identities, table.names, rules, OF), pairs, table


@pytest.mark.parametrize("rules", [PLAIN, VISTAS, COCOSTUFF])
def test_the_sums_are_the_confusion_matrix(rules):
    scores, found, pairs, _ = counted(rules)
    np.testing.assert_array_equal(found.confusion(), scores.confusion())
    np.testing.assert_array_equal(found.evaluated().confusion(), scores.evaluated())
    hits, labelled, predicted = found.evaluated().parts().sum(1)
    wanted = scores.evaluated()
    np.testing.assert_array_equal(hits, np.diagonal(wanted))
    np.testing.assert_array_equal(labelled, wanted.sum(1))
    np.testing.assert_array_equal(predicted, wanted[:, :-1].sum(0))
    assert found.sizes.tolist() == [[8, 5], [8, 6], [8, 7]]


def test_each_image_is_counted_as_alone():
    _, found, pairs, table = counted()
    for number, (ids, predicted) in enumerate(pairs):
        alone = Scores(table)
        alone.add(ids, predicted)
        np.testing.assert_array_equal(found.of_image(number), alone.confusion())
        hits, labelled, predicted_as = found.parts()[:, number]
        iou = hits / (labelled + predicted_as - hits)
        np.testing.assert_allclose(iou, iou_of(alone.confusion(), "union"))


def test_values_that_are_mapped_to_ids_afterwards():
    """As `segtrain score` counts them."""
    table, to_id = small_table(), np.zeros(256, np.uint8)
    to_id[[0, 1, 2]] = 7, 9, 11
    scores, collected = Scores(table), ImageCounts(3)
    ids, values = np.array([[7, 9, 12, 0]], np.uint8), np.array([[0, 0, 2, 1]], np.uint8)
    collected.add("x", ids.shape, scores.add(ids, values, None, to_id), scores.class_of)
    scores.translate(to_id)
    found = collected.in_order(["x"], ["x"], table.names, PLAIN, OF)
    np.testing.assert_array_equal(found.confusion(), scores.confusion())
    assert found.confusion().tolist() == [[1, 0, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0]]


def test_the_file_is_the_same_in_any_order_and_reads_back(tmp_path):
    _, first, _, _ = counted(VISTAS)
    _, second, _, _ = counted(VISTAS, order=(2, 0, 1))
    for folder, found in (("1", first), ("2", second)):
        assert found.write(tmp_path / folder) == tmp_path / folder / "images.npz"
    assert (tmp_path / "1/images.npz").read_bytes() == (tmp_path / "2/images.npz").read_bytes()
    again = read_image_counts(tmp_path / "1/images.npz")
    assert (again.names, again.identities) == (NAMES, [f"family/{name}" for name in NAMES])
    assert (again.about["absent_classes"], again.about["ignored_predictions"]) == ("union", "dropped")
    assert again.keys() == again.identities
    assert again._replace(identities=["family/a", "family/a", "family/b"]).keys() == NAMES
    for mine, theirs in zip(first, again, strict=True):
        np.testing.assert_array_equal(mine, theirs)
    with np.load(tmp_path / "1/images.npz") as file:
        assert {name: file[name].dtype.name for name in ("pixels", "image", "truth")} == {
            "pixels": "int64", "image": "int32", "truth": "int16",
        }  # fmt: skip


def test_processes_are_joined(monkeypatch):
    """Three ranks with every third image, joined by rank, give what one process gives."""
    _, whole, pairs, table = counted(images=7)
    ranks = []
    for rank in range(3):
        scores, collected = Scores(table), ImageCounts(3)
        for number in range(rank, 7, 3):
            ids, predicted = pairs[number]
            collected.add(whole.names[number], ids.shape, scores.add(ids, predicted), scores.class_of)
        ranks.append(collected)
    parts = [(one.names, one.sizes, one.entries, one.cells, one.pixels) for one in ranks]
    monkeypatch.setattr(image_counts, "all_gather_values", lambda mine: parts)
    ranks[1].all_gather()
    found = ranks[1].in_order(whole.names, whole.identities, table.names, PLAIN, OF)
    for mine, theirs in zip(whole, found, strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_missing_and_double_images_are_refused():
    collected = ImageCounts(3)
    collected.add("a", (1, 1), np.zeros((256, 256), np.int64), np.zeros(256, np.uint8))
    for names in (["a", "b"], ["b"]):
        with pytest.raises(DataError, match="this is a bug"):
            collected.in_order(names, names, ["x"] * 3, PLAIN, OF)
    collected.add("a", (1, 1), np.zeros((256, 256), np.int64), np.zeros(256, np.uint8))
    with pytest.raises(DataError, match="this is a bug"):
        collected.in_order(["a"], ["a"], ["x"] * 3, PLAIN, OF)


def test_memory_is_that_of_the_entries():
    """5,000 images of 20 of 150 classes take 12 bytes an entry and a name each; dense matrices would take 900 MB."""
    pixels, class_of = np.zeros((256, 256), np.int64), np.arange(256, dtype=np.uint8)
    pixels[np.arange(20), np.arange(20)] = 5
    collected = ImageCounts(150)
    tracemalloc.start()
    for number in range(5000):
        collected.add(f"{number:06d}", (4, 5), pixels, class_of)
    size = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert size < 3e6 and isinstance(collected.pixels, array)


def test_damaged_files_are_refused(tmp_path):
    _, made, _, _ = counted()
    path = made.write(tmp_path)
    good = path.read_bytes()
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    wrong = [
        {"pixels": arrays["pixels"][:-1]}, {"pixels": arrays["pixels"] * 0}, {"truth": arrays["truth"] + 3},
        {"image": arrays["image"][::-1]}, {"image": arrays["image"] + 1}, {"sizes": arrays["sizes"][1:]},
        {"names": arrays["names"][:-4]}, {"pixels": arrays["pixels"] * 1.5}, {"about": arrays["names"]},
    ]  # fmt: skip
    for change in wrong:
        np.savez_compressed(path, **(arrays | change))
        with pytest.raises(DataError, match="is damaged"):
            read_image_counts(path)
    for content in (good[: len(good) // 2], b"", b"garbage"):
        path.write_bytes(content)
        with pytest.raises(DataError, match="is damaged"):
            read_image_counts(path)
    path.unlink()
    with pytest.raises(DataError, match="is missing: .* `segtrain evaluate` writes it"):
        read_image_counts(path)
