"""Label tables that several tests of weights use."""

import pytest

from segtrain.data.labels import published_table


@pytest.fixture(scope="session")
def cityscapes():
    return published_table("cityscapes")
