"""Fixtures of the engine's tests."""

import pytest

from tests.helpers import zygote
from tests.helpers.checkout import TINY
from tests.helpers.runs import small_run


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


@pytest.fixture(scope="session")
def finished(scenes, tmp_path_factory):
    """The folder of a finished small run; read only."""
    folder = tmp_path_factory.mktemp("finished")
    result = zygote.call(["train", *small_run(scenes, "run=run")], folder)
    assert result.returncode == 0, result.stderr
    (folder / "output.txt").write_text(result.stdout)
    return folder / "run"
