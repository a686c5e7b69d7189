"""Batches: their order and content depend on seed and step only."""

import pytest

from segtrain.data.loader import evaluation_samples, training_batches
from segtrain.data.order import MicroBatches
from segtrain.errors import DataError
from tests.helpers.samples import steps, training_data


def test_batches_depend_on_seed_and_step_only(scenes):
    data = training_data(scenes)
    alone = steps(data, 0, 5, workers=0)
    assert steps(data, 0, 5, workers=2) == alone
    assert steps(data, 3, 5, workers=1) == alone[3:]
    assert steps(training_data(scenes, seed=1), 0, 5, workers=0) != alone


@pytest.mark.parametrize(("size", "accumulation"), [(4, 1), (2, 2), (1, 4), (3, 1)])
def test_pixels_do_not_depend_on_how_many_processes_read_them(scenes, size, accumulation):
    """1x4 = 2x2 = 4x1, and three processes for a batch of four."""
    data = training_data(scenes)
    parts = [
        list(training_batches(data, MicroBatches(4, 1, 3, rank, size, accumulation), rank % 2, pin_memory=False))
        for rank in range(size)
    ]
    for step, (names, images, targets) in enumerate(steps(data, 1, 3, workers=0)):
        pieces = [parts[rank][step][part] for part in range(accumulation) for rank in range(size)]
        assert [name for piece in pieces for name in piece.names] == names
        assert b"".join(piece.images.contiguous().numpy().tobytes() for piece in pieces) == images
        assert b"".join(piece.targets.numpy().tobytes() for piece in pieces) == targets


def test_every_sample_comes_once_per_pass(scenes):
    names = [name for batch in steps(training_data(scenes), 0, 6, workers=0) for name in batch[0]]
    for i in range(0, 24, 6):
        assert len(set(names[i : i + 6])) == 6
    assert names[:6] != names[6:12]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_file_met_later_is_one_clear_error(scenes, tmp_path, workers):
    data = training_data(scenes)
    data.samples = [sample._replace(image=tmp_path / "gone.png") for sample in data.samples]
    with pytest.raises(DataError, match=r"^the batch of step 1: \S*gone\.png cannot be read") as caught:
        steps(data, 0, 1, workers)
    assert "Traceback" not in str(caught.value)
    with pytest.raises(DataError, match=r"gone\.png"):
        list(evaluation_samples(data.samples, data.table, workers))
