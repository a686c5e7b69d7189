"""Fixtures of the engine's tests."""

import pytest

from tests.helpers.checkout import TINY


@pytest.fixture
def words(folder_data):
    return [
        *folder_data[1],
        f"plugins=[{TINY}]",
        "model.backbone=tiny",
        "trainer.batch_size=4",
        "trainer.max_steps=6",
        "logging.every=1",
        "loss=cross_entropy",
    ]
