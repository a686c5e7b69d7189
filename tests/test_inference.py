import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from segtrain.config import InferenceConfig
from segtrain.inference import normalise, predict, starts, windows


def pointwise(x):
    """A network that looks at each pixel alone: 3 channels -> 5 logits."""
    weight = torch.randn(5, 3, 1, 1, generator=torch.Generator().manual_seed(3))
    return torch.nn.functional.conv2d(x, weight)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(1, 400), st.integers(1, 200), st.floats(0, 0.9))
def test_windows_cover_everything_and_overlap_enough(extent, tile, overlap):
    tile = min(tile, extent)
    first = list(starts(extent, tile, overlap))
    assert first[0] == 0
    assert first[-1] == extent - tile
    assert all(b - a <= max(1, int(tile * (1 - overlap))) + 1 for a, b in zip(first, first[1:], strict=False))
    assert all(b > a for a, b in zip(first, first[1:], strict=False))


@pytest.mark.parametrize("size", [(40, 70), (33, 32), (20, 100)])
def test_windows_equal_the_whole_for_a_pointwise_network(size):
    image = torch.randn(1, 3, *size)
    tiled = windows(pointwise, image, InferenceConfig(tile=[32, 32]))
    torch.testing.assert_close(tiled, pointwise(image))
    whole = predict(pointwise, image, InferenceConfig())
    assert whole.dtype == np.uint8
    assert whole.shape == size
    assert (predict(pointwise, image, InferenceConfig(tile=[32, 32], overlap=0.5)) == whole).all()


def test_mirrored_view_comes_back_the_right_way_round():
    image = torch.randn(1, 3, 8, 9)
    assert (predict(pointwise, image, InferenceConfig(flip=True)) == predict(pointwise, image, InferenceConfig())).all()


def test_several_views_average_probabilities():
    image = torch.randn(1, 3, 8, 8)
    seen = []

    def left_or_right(x):
        """Sure of class 0 in the picture as it is, of class 1, but less, in the mirrored one."""
        seen.append(x)
        mirrored = not torch.equal(x, image)
        return torch.tensor([0.0, 1.0] if mirrored else [3.0, 0.0]).view(1, 2, 1, 1).expand(1, 2, 8, 8)

    assert (predict(left_or_right, image, InferenceConfig(flip=True)) == 0).all()
    assert len(seen) == 2


def test_scales_give_the_pictures_own_size():
    image = torch.randn(1, 3, 21, 34)
    sizes = []

    def network(x):
        sizes.append(tuple(x.shape[2:]))
        return pointwise(x)

    assert predict(network, image, InferenceConfig(scales=[0.5, 1.0, 2.0])).shape == (21, 34)
    assert sizes == [(10, 17), (21, 34), (42, 68)]


def test_normalise():
    image = torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)
    out = normalise(image, [0.5, 0.0, 1.0], [0.5, 0.25, 1.0])
    torch.testing.assert_close(out[0, :, 0, 0], torch.tensor([1.0, 4.0, 0.0]))
