"""How much work it is to list many files, and to look up what is known of them."""

import importlib.util
import os
from collections import Counter

import pytest

from segtrain.data.registry import label_table, split_samples
from segtrain.data.verify import file_facts
from segtrain.data.verify.files import check_samples
from tests.helpers.checkout import ROOT


def bench():
    """scripts/bench_index.py, which measures the time."""
    spec = importlib.util.spec_from_file_location("bench_index", ROOT / "scripts/bench_index.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("layout", ["folder", "cityscapes"])
def test_listing_many_files_asks_the_disk_once_for_a_folder_and_the_second_check_once_for_a_file(
    tmp_path, monkeypatch, layout
):
    (tmp_path / "data").mkdir()
    script = bench()
    script.make(tmp_path / "data", layout, 60)
    config = script.dataset(tmp_path / "data", layout)
    table = label_table(config)
    calls = Counter()

    def count(module, name):
        function = getattr(module, name)

        def counted(*args, **options):
            calls[name] += 1
            return function(*args, **options)

        monkeypatch.setattr(module, name, counted)

    count(os, "stat")
    count(os, "scandir")
    samples = split_samples(config, "train")
    assert len(samples) == 60 and calls["stat"] < 20 and calls["scandir"] < 10, calls
    count(file_facts, "read_bytes")
    count(file_facts, "read_label")
    check_samples(samples, table, tmp_path / "cache", print)
    assert calls["read_bytes"] == 120 and calls["read_label"] == 60, calls
    (tmp_path / "data/more.png").touch()
    calls.clear()
    check_samples(samples, table, tmp_path / "cache", print)
    assert calls["read_bytes"] == calls["read_label"] == 0
    assert 120 <= calls["stat"] <= 3 * 60 + 10, calls  # and once more for the values of a label
