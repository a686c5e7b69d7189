"""Tiled inference row by row: the answer of the whole image, and no more of it in memory than a row of tiles needs."""

import numpy as np
import pytest
import torch

from segtrain.config import InferenceConfig
from segtrain.data.class_mapping import ClassMapping
from segtrain.data.labels import LabelTable
from segtrain.native import compile as compiling
from segtrain.native import pixels
from segtrain.scoring.inference import Cells, best_classes, segment
from segtrain.scoring.row_stream import predict_rows

CPU = torch.device("cpu")
TABLE = LabelTable([{"id": i, "name": str(i), "color": [i, i, i], "train_id": i} for i in range(2)], "a test")
MAPPING = ClassMapping(TABLE, list("abcde"), ((0, 3), (1,)), (2, 4), False, "a test")


class Rows:
    """An array as the source of rows, which notes what is read."""

    def __init__(self, array):
        self.array, self.size, self.read = array, array.shape[:2], []

    def band(self, top, bottom):
        assert 0 <= top < bottom <= self.size[0]
        self.read.append((top, bottom))
        return self.array[top:bottom]


def network(stride, seed=0):
    """Its receptive field is larger than a cell, so that neighbouring tiles disagree."""
    convolution = torch.nn.Conv2d(3, 5, 2 * stride + 1, stride, stride, bias=False)
    generator = torch.Generator().manual_seed(seed)
    convolution.weight.data = torch.randn(convolution.weight.shape, generator=generator) / stride
    return lambda image: convolution(image.float() / 50 - 2)


def photograph(height, width):
    return np.random.default_rng(1).integers(0, 256, (height, width, 3), np.uint8)


def as_tensor(image):
    return torch.from_numpy(image.transpose(2, 0, 1).copy())[None]


def choose(loops, monkeypatch):
    if loops == "OpenCV":
        monkeypatch.setattr(pixels, "library", lambda loop: None)
    elif compiling.unavailable():
        pytest.skip("no C++ compiler")


CASES = [
    (4, (201, 150), {"tile": [64, 96]}), (32, (201, 150), {"tile": [64, 96], "flip": True}),
    (8, (500, 97), {"tile": [128, 64], "overlap": 0.0}), (8, (500, 97), {"tile": [128, 128], "overlap": 0.6}),
    (16, (100, 90), {"tile": [128, 64]}), (8, (100, 90), {"tile": [128, 128], "flip": True}),
]  # fmt: skip


@pytest.mark.parametrize("loops", ["compiled", "OpenCV"])
@pytest.mark.parametrize(("stride", "size", "options"), CASES, ids=str)
def test_the_answer_of_the_whole_image_bit_for_bit(monkeypatch, loops, stride, size, options):
    """One network, two averaged, and a taxonomy; also from a row in the middle on. By OpenCV, up to ties."""
    choose(loops, monkeypatch)
    image, inference = photograph(*size), InferenceConfig(**options)
    both = [network(stride), network(8, 1)]
    for networks, mapping in ((both[:1], None), (both, None), (both[:1], MAPPING)):
        whole = segment(networks, as_tensor(image), inference, True, mapping)
        for start in (0, 96):
            found = list(predict_rows(networks, Rows(image), inference, CPU, 32, start, True, mapping))
            assert [rows for rows, _ in found] == [(top, min(top + 32, size[0])) for top in range(start, size[0], 32)]
            classes = np.concatenate([one.train_ids for _, one in found])
            certain = np.concatenate([one.probability for _, one in found])
            assert np.array_equal(certain, whole.probability[start:])
            differ = (classes != whole.train_ids[start:]).mean()
            assert differ == 0 if loops == "compiled" or mapping is not None else differ < 1e-3


def test_other_scales_equal_the_whole_image_within_rounding():
    image = photograph(201, 150)
    for scales in ([0.7], [1.0, 1.3]):
        inference = InferenceConfig(tile=[64, 96], scales=scales, flip=True)
        sees = network(8)
        whole = segment(sees, as_tensor(image), inference, True)
        found = [one for _, one in predict_rows([sees], Rows(image), inference, CPU, 32, 0, True)]
        assert (np.concatenate([one.train_ids for one in found]) != whole.train_ids).mean() < 1e-3
        assert np.abs(np.concatenate([one.probability for one in found]) - whole.probability).max() < 1e-5


def test_far_from_the_edges_of_tiles_the_answer_is_that_of_the_whole_image():
    """A network that sees 8 pixels beyond each cell, and an enlargement that sees a cell more. Nearer to an edge, the
    logits of a tile that ends there count half, as they do in memory."""
    image, inference, sees = photograph(416, 160), InferenceConfig(tile=[160, 160], overlap=0.4), network(8)
    whole = segment(sees, as_tensor(image), InferenceConfig(), True)
    found = predict_rows([sees], Rows(image), inference, CPU, 32, 0, True)
    certain = np.concatenate([one.probability for _, one in found])
    edges = [edge for top in (0, 96, 192, 256) for edge in (top, top + 160) if 0 < edge < 416]
    far = np.array([all(not -24 <= row - edge < 24 for edge in edges) for row in range(416)])
    assert far.mean() > 0.3 and np.abs(certain - whole.probability)[far].max() < 1e-5
    assert np.abs(certain - whole.probability)[~far].max() > 1e-3


def test_only_what_is_needed_is_read_and_kept():
    """Each row of tiles once; a start in the middle begins with the row of tiles that reaches it."""
    rows = Rows(photograph(800, 96))
    inference = InferenceConfig(tile=[128, 96], overlap=0.25)
    stream = predict_rows([network(8)], rows, inference, CPU, 64)
    next(stream)
    assert rows.read == [(0, 128)]
    for _ in stream:
        pass
    assert rows.read == [(top, top + 128) for top in range(0, 672, 96)] + [(672, 800)]
    rows.read.clear()
    next(predict_rows([network(8)], rows, inference, CPU, 64, 512))
    assert rows.read == [(384, 512), (480, 608), (576, 704)]


@pytest.mark.parametrize("loops", ["compiled", "OpenCV"])
def test_rows_of_a_prediction_need_only_the_logits_beside_them(monkeypatch, loops):
    choose(loops, monkeypatch)
    logits = torch.randn(4, 20, 13, generator=torch.Generator().manual_seed(0))
    whole = best_classes([Cells(logits, 0, 20)], (155, 100), (0, 155), True)
    part = best_classes([Cells(logits[:, 4:9], 4, 20)], (155, 100), (40, 62), True)
    assert np.array_equal(part.probability, whole.probability[40:62])
    assert (part.train_ids != whole.train_ids[40:62]).mean() <= (0 if loops == "compiled" else 1e-3)
