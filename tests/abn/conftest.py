"""The back ends of the CPU."""

import pytest

from segtrain import abn


@pytest.fixture(params=["native", "aten"])
def backend(request):
    abn.use_backend(request.param)
    yield request.param
    abn.use_backend("auto")
