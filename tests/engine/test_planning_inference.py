"""The planned memory of inference in batches, and what running out of it is answered with."""

from dataclasses import replace

import pytest
import torch

import segtrain
from segtrain.config import InferenceConfig
from segtrain.engine.planning import automatic
from segtrain.engine.planning.validation import InferenceTracer
from segtrain.models.ledger import Ledger
from segtrain.models.preprocess import normalise_images
from segtrain.scoring.inference import Cells, all_views, fused
from tests.helpers.checkout import TINY

CLASSES, SIZE, LARGE = 7, (128, 160), (1024, 2048)


@pytest.fixture
def config():
    words = ("experiment=toy", f"plugins=[{TINY}]", "model.backbone=tiny", "device=cpu", "model.norm=batch_norm")
    return segtrain.compose(*words)


@pytest.fixture
def tracer(config):
    return InferenceTracer(config, CLASSES)


def measured(tracer, options):
    """Most bytes alive in a real prediction of all tiles, in which nothing is only outlined."""
    ledger = Ledger(tracer.granule, tracer.there, tracer.granule == 1)
    with tracer.mode, torch.no_grad(), ledger:
        ledger.begin("inference")
        images = torch.empty(options.together(), 3, *SIZE, dtype=torch.uint8)

        def network(window):
            ready = normalise_images(window, tracer.model.mean, tracer.model.std)
            return tracer.network(ready, upsample=False)

        views = all_views(network, images, options)
        for n in range(len(images)):
            cells = [Cells(one[n], 0, one.shape[2]) for one in views]
            fused(cells, SIZE, (0, SIZE[0]))
    return ledger.peaks()["inference"][0]


@pytest.mark.parametrize("tile", [None, [64, 64]])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_planned_memory_is_that_of_all_images_and_tiles(tracer, batch, tile):
    options = InferenceConfig(batch_size=batch, tile=tile, scales=[1.0, 1.25])
    planned, found = tracer.peak(SIZE, options), measured(tracer, options)
    assert 0.97 * found < planned < 1.03 * found


def test_a_batch_takes_its_images_in_memory(tracer):
    peaks = {n: tracer.peak(LARGE, InferenceConfig(batch_size=n)) for n in (None, 1, 3, 5)}
    assert peaks[None] == peaks[1]
    assert (peaks[5] - peaks[3]) / 2 == pytest.approx(peaks[3] / 3, rel=0.05)


def test_a_batch_that_does_not_fit_is_answered_with_a_smaller_one(config, tracer, monkeypatch):
    asked = []
    monkeypatch.setattr(automatic, "largest_tile", lambda *question: asked.append(question[2]) or (64, 96))
    options = InferenceConfig(batch_size=6)
    peak = {n: tracer.peak(SIZE, replace(options, batch_size=n)) for n in (1, 3)}
    text = automatic.inference_advice(config, CLASSES, SIZE, options, peak[3])
    assert text.startswith("inference.batch_size=3 fits") and not asked
    text = automatic.inference_advice(config, CLASSES, SIZE, options, peak[3] - 1)
    assert text.startswith("inference.batch_size=1 fits") and not asked
    text = automatic.inference_advice(config, CLASSES, SIZE, options, peak[1] - 1)
    assert text.startswith("inference.batch_size=1 inference.tile=[64,96] fits")
    text = automatic.inference_advice(config, CLASSES, SIZE, InferenceConfig(), peak[1] - 1)
    assert text.startswith("inference.tile=[64,96] fits")
    assert [one.together() for one in asked] == [1, 1]
