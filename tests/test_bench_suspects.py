"""scripts/bench_suspects.py: what it plants, and how it counts, on images made by hand."""

import runpy
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from tests.helpers.checkout import ROOT

ROAD, CAR, PERSON = 7, 26, 24
NAME = "streets_000000_000019"


@pytest.fixture(scope="module")
def bench():
    return runpy.run_path(str(ROOT / "scripts" / "bench_suspects.py"), run_name="bench_suspects")


@pytest.fixture
def truth():
    """Road with a car and a person of 400 and 200 pixels, and a car that is too small to get an error."""
    label = np.full((100, 120), ROAD, np.uint8)
    label[40:60, 50:70], label[30:50, 90:100], label[5:10, 5:10] = CAR, PERSON, CAR
    return label


def test_objects_and_their_errors(bench, truth):
    things = bench["objects_of"](truth)
    assert [int(thing.sum()) for thing in things] == [200, 400]
    kinds, relabelled = Counter(), set()
    for seed in range(40):
        label = truth.copy()
        kind = bench["plant_error"](label, truth, things[1], np.random.default_rng(seed))
        kinds[kind] += 1
        if kind == "shifted":
            rows, columns = np.nonzero(label == CAR)
            inside = rows > 10  # not of the small car
            assert inside.sum() == 400
            assert 8 <= abs(rows[inside].min() - 40) < 25 and 8 <= abs(columns[inside].min() - 50) < 25
            assert (label[things[1] & (label != CAR)] == ROAD).all()
            continue
        assert (label[~things[1]] == truth[~things[1]]).all()
        (value,) = np.unique(label[things[1]])
        assert value == ROAD if kind == "erased" else value in set(bench["THINGS"]) - {CAR}
        relabelled |= {value} if kind == "relabelled" else set()
    assert min(kinds[kind] for kind in ("relabelled", "shifted", "erased")) > 5 and len(relabelled) > 4


def test_planting_again_gives_the_same(bench, truth, tmp_path):
    for split in ("train", "val"):
        folder = tmp_path / "data" / "gtFine" / split / "streets"
        folder.mkdir(parents=True)
        Image.fromarray(truth).save(folder / f"{NAME}_gtFine_labelIds.png")
    roots = tmp_path / "data", tmp_path / "truths"
    counts = bench["plant_errors"](*roots, 1.0, 3)
    files = sorted(roots[0].rglob("*.png"))
    first = [np.array(Image.open(path)) for path in files]
    assert counts["objects"] == 4 == counts.total() - counts["objects"] and len(files) == 2
    assert all((label != truth).any() for label in first)
    assert bench["plant_errors"](*roots, 1.0, 3) == counts
    assert all(np.array_equal(np.array(Image.open(path)), label) for path, label in zip(files, first, strict=True))
    assert bench["plant_errors"](*roots, 0.0, 3) == {"objects": 4}
    assert all(np.array_equal(np.array(Image.open(path)), truth) for path in files)


def test_right_suspects(bench, truth, tmp_path):
    """A planted error under its own box and label is right; another label, place or image is not."""
    label = truth.copy()
    label[40:60, 50:70] = PERSON
    for root, image in (("data", label), ("truths", truth)):
        for split, saved in (("train", image), ("val", truth)):
            folder = tmp_path / root / "gtFine" / split / "streets"
            folder.mkdir(parents=True)
            Image.fromarray(saved).save(folder / f"{NAME}_gtFine_labelIds.png")
    train, val = (f"leftImg8bit/{split}/streets/{NAME}_leftImg8bit.png" for split in ("train", "val"))
    rows = [
        (train, 50, 40, 20, 20, "person", "car", 0.9, 400),
        (train, 55, 40, 15, 20, "person", "road", 0.9, 300),
        (train, 60, 40, 20, 20, "person", "road", 0.9, 400),  # half of the box, so half of the area
        (train, 61, 40, 20, 20, "person", "road", 0.9, 400),
        (train, 50, 40, 20, 20, "road", "car", 0.9, 400),
        (train, 90, 30, 10, 20, "person", "car", 0.9, 200),
        (val, 50, 40, 20, 20, "person", "car", 0.9, 400),
    ]
    table = ["file,x,y,w,h,label,predicted,confidence,area", *(",".join(map(str, row)) for row in rows)]
    (tmp_path / "suspects.csv").write_text("\n".join(table) + "\n")
    right, splits = bench["right_suspects"](tmp_path / "suspects.csv", tmp_path / "data", tmp_path / "truths")
    assert right.tolist() == [True, True, True, False, False, False, False]
    assert splits.tolist() == ["train"] * 6 + ["val"]
