import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from segtrain.config import InferenceConfig
from segtrain.errors import UsageError
from segtrain.models.preprocess import normalise_images
from segtrain.native import compile as compiling
from segtrain.native import pixels
from segtrain.scoring import inference
from segtrain.scoring.inference import enlarged, segment, spans, windows


def predict(network, image, options):
    return segment(network, image, options).train_ids


def pointwise(x):
    """A network of independent pixels: 3 channels -> 5 logits."""
    weight = torch.randn(5, 3, 1, 1, generator=torch.Generator().manual_seed(3))
    return torch.nn.functional.conv2d(x, weight)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(1, 600), st.integers(1, 8), st.floats(0, 0.9))
def test_windows_cover_everything_and_overlap_enough(extent, tiles, overlap):
    tile = 32 * tiles
    found = list(spans(extent, tile, overlap))
    assert found[0][0] == 0
    assert found[-1][1] == extent
    assert all(start % 32 == 0 for start, _ in found)
    assert all(stop - start < tile + 32 for start, stop in found)
    assert all(stop - start >= min(tile, extent) for start, stop in found)
    for (start, stop), (after, _) in zip(found, found[1:], strict=False):
        assert start < after <= stop
        assert stop - after >= overlap * tile - 1 or tile == 32 or after - start == 32


@pytest.mark.parametrize("size", [(40, 70), (33, 32), (20, 100)])
def test_windows_equal_the_whole_for_a_pointwise_network(size):
    image = torch.randn(1, 3, *size)
    tiled = windows(pointwise, image, InferenceConfig(tile=[32, 32]))
    torch.testing.assert_close(tiled, pointwise(image))
    whole = predict(pointwise, image, InferenceConfig())
    assert whole.dtype == np.uint8
    assert whole.shape == size
    assert (predict(pointwise, image, InferenceConfig(tile=[32, 32], overlap=0.5)) == whole).all()


@pytest.mark.parametrize("size", [(200, 333), (96, 70), (65, 64)])
def test_windows_of_a_network_with_cells_equal_the_whole(size):
    """Cells of 8 x 8 pixels are independent, so every tiling gives the same logits."""

    def network(x):
        padded = torch.nn.functional.pad(x, (0, -x.shape[3] % 8, 0, -x.shape[2] % 8))
        return torch.nn.functional.avg_pool2d(pointwise(padded), 8)

    image = torch.randn(1, 3, *size)
    whole = predict(network, image, InferenceConfig())
    expected = torch.nn.functional.interpolate(network(image), size=size, mode="bilinear").argmax(1)[0].numpy()
    assert (whole != expected).mean() < 1e-4
    for tile, overlap in (([64, 96], 0.25), ([32, 32], 0.0), ([96, 64], 0.6)):
        assert (predict(network, image, InferenceConfig(tile=tile, overlap=overlap)) == whole).all()


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.sampled_from([1, 2, 4, 8, 16, 32]), st.integers(1, 400), st.integers(1, 400), st.integers(1, 5),
    st.integers(1, 5), st.sampled_from([0.0, 0.25, 0.6]), st.sampled_from([1.0, 0.7, 1.3]),
)  # fmt: skip
def test_windows_of_every_stride_and_size_equal_the_whole(stride, height, width, down, across, overlap, scale):
    """Logits of every cell, also of the last ones that the image's edge cuts off."""
    image = torch.rand(1, 3, max(1, round(height * scale)), max(1, round(width * scale)))

    def network(x):
        return torch.nn.functional.avg_pool2d(pointwise(x), stride, ceil_mode=True)

    tiled = windows(network, image, InferenceConfig(tile=[32 * down, 32 * across], overlap=overlap))
    torch.testing.assert_close(tiled, network(image))


@pytest.mark.parametrize(("size", "tile", "stride"), [(2090, 1024, 32), (545, 256, 16), (257, 256, 16)])
def test_sizes_whose_stride_looks_like_another(size, tile, stride):
    """The last window of 257 pixels has 17 cells of 16, not of 15."""
    image = torch.rand(1, 1, size, 40)

    def network(x):
        return torch.nn.functional.avg_pool2d(x, stride, ceil_mode=True)

    tiled = windows(network, image, InferenceConfig(tile=[tile, tile]))
    torch.testing.assert_close(tiled, network(image))


def test_cells_that_cannot_meet_are_refused():
    def network(x):  # without padding, as a plugin's may be
        return torch.nn.functional.avg_pool2d(x, 16, stride=12)

    with pytest.raises(UsageError, match=r"for 64x64 pixels: strides of 1, 2, 4, 8, 16, 32 do, rounded up"):
        windows(network, torch.rand(1, 3, 200, 200), InferenceConfig(tile=[64, 64]))


@pytest.mark.parametrize(
    ("cells", "size"), [((5, 7), (40, 56)), ((5, 7), (37, 55)), ((9, 3), (9, 3)), ((1, 4), (30, 9))]
)
def test_strips_equal_torchs_enlargement(cells, size):
    logits = torch.randn(6, *cells)
    expected = torch.nn.functional.interpolate(logits[None], size=size, mode="bilinear")[0]
    found = torch.cat([enlarged(logits, size, top, min(top + 7, size[0])) for top in range(0, size[0], 7)], 1)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("loops", ["compiled", "OpenCV"])
@pytest.mark.parametrize("channels", [1, 2, 19, 171, 255])
@pytest.mark.parametrize(
    ("cells", "size"),
    [((6, 9), (48, 72)), ((6, 9), (45, 67)), ((7, 1), (20, 8)), ((8, 8), (8, 8)), ((20, 30), (9, 11))],
)
def test_streamed_argmax_equals_torchs(monkeypatch, loops, channels, cells, size):
    if loops == "OpenCV":
        monkeypatch.setattr(pixels, "library", lambda loop: None)
    elif compiling.unavailable():
        pytest.skip("no C++ compiler")
    logits = torch.randn(channels, *cells, generator=torch.Generator().manual_seed(channels))
    scores = torch.nn.functional.interpolate(logits[None].double(), size=size, mode="bilinear")[0]
    found = pixels.upsampled_argmax(logits, size)
    lost = scores.max(0).values - scores.gather(0, torch.from_numpy(found).long()[None])[0]
    assert lost.max() < 1e-5  # the best, or as good within rounding
    assert (found == scores.argmax(0).numpy()).mean() > 0.999


def test_mirrored_view_comes_back_the_right_way_round():
    image = torch.randn(1, 3, 8, 9)
    assert (predict(pointwise, image, InferenceConfig(flip=True)) == predict(pointwise, image, InferenceConfig())).all()


def test_several_views_average_probabilities():
    image = torch.randn(1, 3, 8, 8)
    seen = []

    def left_or_right(x):
        """Predicts class 0 with high confidence, and class 1 with less in the mirrored image."""
        seen.append(x)
        mirrored = not torch.equal(x, image)
        return torch.tensor([0.0, 1.0] if mirrored else [3.0, 0.0]).view(1, 2, 1, 1).expand(1, 2, 8, 8)

    assert (predict(left_or_right, image, InferenceConfig(flip=True)) == 0).all()
    assert len(seen) == 2


@pytest.mark.parametrize("flip", [False, True])
def test_probabilities_of_the_classes_asked_for(monkeypatch, flip):
    """Against float64, in strips; 255 and 7 are no classes of this network."""
    monkeypatch.setattr(inference, "STRIP", 5 * 9 * 3)
    image = torch.randn(1, 3, 8, 9)
    asked = torch.randint(0, 5, (8, 9))
    wanted = pointwise(image)[0].double().softmax(0).gather(0, asked[None])[0]
    asked[0, 0], asked[7, 8] = 255, 7
    wanted[0, 0] = wanted[7, 8] = 0
    options = InferenceConfig(flip=flip)  # every pixel is alone, so the mirrored view has the same answers
    found = segment(pointwise, image, options, asked=asked)
    assert found.probability is None and found.of_asked is not None and found.of_asked.dtype == np.float32
    np.testing.assert_allclose(found.of_asked, wanted, rtol=1e-5)
    best = segment(pointwise, image, options, True, asked=torch.from_numpy(found.train_ids).long())
    assert np.array_equal(best.probability, best.of_asked)
    assert segment(pointwise, image, options, True).of_asked is None


def test_scales_give_the_pictures_own_size():
    image = torch.randn(1, 3, 21, 34)
    sizes = []

    def network(x):
        sizes.append(tuple(x.shape[2:]))
        return pointwise(x)

    assert predict(network, image, InferenceConfig(scales=[0.5, 1.0, 2.0])).shape == (21, 34)
    assert sizes == [(10, 17), (21, 34), (42, 68)]


def test_normalise_images():
    image = torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)
    out = normalise_images(image, [0.5, 0.0, 1.0], [0.5, 0.25, 1.0])
    torch.testing.assert_close(out[0, :, 0, 0], torch.tensor([1.0, 4.0, 0.0]))


def test_a_tile_that_would_part_cells_is_refused():
    with pytest.raises(UsageError, match=r"inference\.tile=\[100, 128\].*multiples of 32"):
        InferenceConfig(tile=[100, 128]).check()
