"""Drawings: the matrix says what its axes and figures are, and rows of images carry the names of their files."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from segtrain.data.labels import LabelTable
from segtrain.scoring import figures


@pytest.fixture
def table():
    rows = [{"id": i, "name": f"class {i}", "color": [40 * i, 90, 200], "train_id": i} for i in range(4)]
    return LabelTable(rows, "the test")


def cell(drawn, row, column):
    """The cell of a matrix of four classes in its drawing: 28 pixels each, below two lines, beside the names."""
    top, left = 2 * 16 + 8 + 4 + 28 * row, 4 + 150 + 28 * column
    return drawn[top : top + 28, left : left + 28]


def test_a_confusion_has_figures_where_it_matters(table):
    matrix = np.array([[80, 20, 0, 0, 0], [1, 96, 3, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 40, 60]])
    drawn = figures.confusion(matrix, table)
    with_figures = [
        [len(np.unique(cell(drawn, row, column).reshape(-1, 3), axis=0)) > 1 for column in range(5)] for row in range(4)
    ]
    assert with_figures == [
        [True, True, False, False, False],
        [False, True, False, False, False],  # 1 and 3 %
        [False, False, False, False, False],
        [False, False, False, True, True],  # most was predicted as another id
    ]
    assert (cell(drawn, 2, 2) == 225).all()
    assert (drawn[:40, :300] < 128).any() and (drawn[-56:, :200] < 128).any()  # what is above and below


def test_many_classes_are_explained_too():
    rows = [{"id": i, "name": f"c{i}", "color": [i, i, i], "train_id": i} for i in range(171)]
    drawn = figures.confusion(np.eye(171, 172, dtype=np.int64), LabelTable(rows, "the test"))
    assert (drawn[:40, :300] < 128).any() and (drawn[-56:, :200] < 128).any()


def test_captions_have_a_line_and_only_ascii():
    panel = np.full((20, 140, 3), 255, np.uint8)
    plain, odd, long = (figures.captioned(panel, text) for text in ("a_?.png", "a_\u00e9.png", "b" * 200))
    assert plain.shape == long.shape == (38, 140, 3)
    assert (plain == odd).all() and (plain[20:] < 128).any() and not (plain == long).all()


@pytest.mark.parametrize("shape", [(40, 60), (40, 60, 3)])
def test_a_png_that_is_written_quickly_has_the_same_pixels(shape):
    rng = np.random.default_rng(0)
    pixels = np.repeat(rng.integers(0, 4, shape, dtype=np.uint8), 3, axis=0) + rng.integers(0, 2, dtype=np.uint8)
    colors = rng.integers(0, 256, (6, 3), dtype=np.uint8)
    for palette in [None] if len(shape) == 3 else [None, colors]:
        for quick in (False, True):
            figures.write_png(Path(f"{quick}.png"), pixels, palette, quick)
        with Image.open("True.png") as fast, Image.open("False.png") as usual:
            assert fast.mode == usual.mode and (np.asarray(fast) == pixels).all()
            assert palette is None or fast.getpalette() == usual.getpalette()
    assert Path("True.png").read_bytes() != Path("False.png").read_bytes()
