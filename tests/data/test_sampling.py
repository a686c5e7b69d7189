"""Class-uniform sampling."""

import numpy as np
import pytest

from segtrain.data.labels import published_table
from segtrain.data.loader import TrainingData
from segtrain.data.sampling import class_index, random_pixel
from segtrain.data.verify.file_facts import FileFacts
from tests.helpers.samples import augmentation, rare


def test_classes_are_drawn_uniformly_and_shown(tmp_path):
    samples, table = rare(tmp_path), published_table("cityscapes")
    index = class_index(samples, table, FileFacts(tmp_path / "cache", samples))
    assert index.classes == [0, 18]
    assert [len(index.images[k]) for k in (0, 18)] == [10, 1]
    for share, least, most in ((1.0, 0.4, 0.6), (0.5, 0.15, 0.4), (0.0, 0.0, 0.1)):
        data = TrainingData(samples, table, augmentation(crop_size=[32, 32], scale=[0.8, 1.2]), 0, index=index,
                            class_uniform=share)  # fmt: skip
        items = [data[position] for position in range(200)]
        shown = np.mean([(target == 18).any() for _, target, *_ in items])
        assert least <= shown <= most
        again = [data[position] for position in range(200)]
        assert all((a[1] == b[1]).all() for a, b in zip(items, again, strict=True))


def test_the_index_is_kept_and_read_by_nobody_twice(tmp_path, monkeypatch):
    samples, table = rare(tmp_path), published_table("cityscapes")
    class_index(samples, table, FileFacts(tmp_path / "cache", samples))
    monkeypatch.setattr("segtrain.data.verify.file_facts.read_label", lambda path: pytest.fail("read again"))
    class_index(samples, table, FileFacts(tmp_path / "cache", samples))


def test_a_pixel_of_a_class_is_uniform():
    target = np.zeros((4, 5), np.uint8)
    target[1, 2] = target[3, 4] = 6
    rng = np.random.default_rng(0)
    found = [random_pixel(target, 6, rng) for _ in range(200)]
    assert set(found) == {(1, 2), (3, 4)}
    assert 60 < found.count((1, 2)) < 140
    assert random_pixel(target, 9, rng) is None
