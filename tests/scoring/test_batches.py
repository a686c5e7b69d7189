"""inference.batch_size: what goes through the network together, in which order, and that no result depends on it."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from segtrain.config import InferenceConfig, ModelConfig
from segtrain.data.labels import published_table
from segtrain.models import build_model
from segtrain.scoring import predictor as predicting
from segtrain.scoring.batches import Given, equal_sizes, one_ahead, predictions
from segtrain.scoring.inference import in_batches, segment, segment_batch, windows
from segtrain.scoring.predictor import Predictor

CPU = torch.device("cpu")
CITYSCAPES = published_table("cityscapes")


def whole_numbers(x):
    """Logits at stride 8 whose sums are exact in float32, so that no order of additions changes them."""
    weight = torch.randint(-3, 4, (5, 3, 3, 3), generator=torch.Generator().manual_seed(3)).float()
    return F.avg_pool2d(F.conv2d(x.float().round(), weight, padding=1), 8, ceil_mode=True, divisor_override=4096)


class Counting(nn.Module):
    """whole_numbers, and the shapes of what it was called with."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def forward(self, x, upsample=False):
        self.shapes.append(tuple(x.shape))
        return whole_numbers(x)


def noise(*size, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)


def planes(*images):
    return torch.stack([torch.from_numpy(image.transpose(2, 0, 1).copy()) for image in images])


# ------------------------------------------------------------------------------------------------ results


@pytest.mark.parametrize(
    "options",
    [
        {}, {"flip": True}, {"scales": [0.5, 1.0], "flip": True}, {"tile": [32, 64]}, {"tile": [64, 32], "flip": True},
        {"tile": [32, 32], "overlap": 0.6, "scales": [1.0, 1.5]},
    ],
)  # fmt: skip
@pytest.mark.parametrize("together", [1, 2, 5])
def test_a_batch_changes_no_bit_of_an_exact_network(options, together):
    images = [noise(90, 131, seed=n) for n in range(3)]
    targets = [torch.from_numpy(noise(90, 131, seed=9 + n)[..., 0].astype(np.int64) % 5) for n in range(3)]
    plain = InferenceConfig(**options)
    want = [
        segment(whole_numbers, planes(one), plain, True, target=target, asked=target)
        for one, target in zip(images, targets, strict=True)
    ]
    batched = InferenceConfig(batch_size=together, **options)
    for number in range(0, 3, together):
        some = slice(number, number + together)
        found = segment_batch(
            whole_numbers, planes(*images[some]), batched, True, targets=targets[some], asked=targets[some]
        )
        for one, other in zip(found, want[some], strict=True):
            assert (one.train_ids == other.train_ids).all()
            assert (one.probability == other.probability).all() and one.loss == other.loss
            assert (one.of_asked == other.of_asked).all()


def test_rounding_of_a_real_network_moves_few_pixels():
    """oneDNN may choose another algorithm for another batch: a part in 10^5 of the largest logit, 0.1 % of pixels."""
    torch.manual_seed(0)
    network = build_model("resnet18", "deeplabv3", 19, output_stride=16, head_channels=16, norm="inplace_abn").eval()
    one = Predictor(network, CITYSCAPES, ModelConfig(), CPU)
    images = [noise(64, 64, seed=n) for n in range(4)]
    with torch.inference_mode():
        alone, together = torch.cat([one.logits(planes(image)) for image in images]), one.logits(planes(*images))
    assert (alone - together).abs().max() < 1e-5 * alone.abs().max()
    given = [Given(n, "", image) for n, image in enumerate(images)]
    ways = [InferenceConfig(batch_size=n, tile=tile) for tile in (None, [32, 32]) for n in (None, 4)]
    plain, batched, tiled, in_tiles = ([found.train_ids for _, found in predictions(one, given, way)] for way in ways)
    for want, found in ((plain, batched), (tiled, in_tiles)):
        assert np.mean([a != b for a, b in zip(want, found, strict=True)]) < 1e-3


# ------------------------------------------------------------------------------------------------ what goes together


def keys(batches):
    return [[one.key for one in batch] for batch in batches]


def test_images_of_equal_size_that_follow_each_other():
    sizes = [(8, 9), (8, 9), (8, 9), (9, 8), (8, 9), (8, 9), (4, 4)]
    items = [Given(n, "", noise(*size)) for n, size in enumerate(sizes)]
    assert keys(equal_sizes(items, 2)) == [[0, 1], [2], [3], [4, 5], [6]]
    assert keys(equal_sizes(items, 9)) == [[0, 1, 2], [3], [4, 5], [6]]
    assert keys(equal_sizes(items, 1)) == [[n] for n in range(7)]
    assert keys(equal_sizes([], 3)) == []


def test_a_full_batch_waits_for_no_further_item():
    def items():
        yield from (Given(n, "", noise(4, 4)) for n in range(2))
        raise AssertionError("asked for a third")

    assert keys([next(equal_sizes(items(), 2))]) == [[0, 1]]


@pytest.mark.parametrize("longest", [None, 64])
def test_predictions_come_in_order_and_equal_those_of_one_image(longest):
    network = Counting()
    one = Predictor(network, CITYSCAPES, ModelConfig(mean=[0.0] * 3, std=[1 / 255] * 3), CPU)
    sizes = [(40, 56), (40, 56), (40, 56), (56, 40), (40, 56)]
    classes = [noise(*size, seed=20 + n)[..., 0] % 20 for n, size in enumerate(sizes)]
    items = [Given(f"k{n}", "", noise(*size, seed=n), asked=classes[n]) for n, size in enumerate(sizes)]
    options = InferenceConfig(longest_side=longest)
    want = [one.segment(item.image, options, probability=True, asked=item.asked) for item in items]
    network.shapes.clear()
    batched = InferenceConfig(longest_side=longest, batch_size=2)
    found = list(predictions(one, items, batched, probability=True))
    assert [key for key, _ in found] == [item.key for item in items]
    assert [shape[0] for shape in network.shapes] == [2, 1, 1, 1]
    for (_, answer), other, item in zip(found, want, items, strict=True):
        assert answer.train_ids.shape == item.image.shape[:2]
        assert (answer.train_ids == other.train_ids).all() and (answer.probability == other.probability).all()
        assert answer.of_asked is not None and (answer.of_asked == other.of_asked).all()
        assert answer.of_asked.shape == item.image.shape[:2] and (answer.of_asked[item.asked == 19] == 0).all()
        same = item.asked == answer.train_ids
        assert same.any() and (longest or (answer.of_asked[same] == answer.probability[same]).all())


def test_tiles_of_one_size_go_together_and_come_in_order():
    network, image = Counting(), planes(noise(96, 110))
    options = InferenceConfig(tile=[32, 32], overlap=0.0, batch_size=4)
    found = windows(network, image, options)
    # 3 rows of two windows of 32 pixels and one of 46, as 110 = 32 + 32 + 46.
    assert network.shapes == [(4, 3, 32, 32), (3, 3, 32, 46), (2, 3, 32, 32)]
    network.shapes.clear()
    assert torch.equal(found, windows(network, image, InferenceConfig(tile=[32, 32], overlap=0.0)))
    assert [shape[0] for shape in network.shapes] == [1] * 9
    places = [((0, 32), (0, 32)), ((0, 32), (32, 78)), ((32, 64), (0, 32)), ((32, 64), (32, 78))]
    assert [place for place, _ in in_batches(network, image, places, 3)] == places


def test_no_call_of_the_network_has_more_than_a_batch():
    network = Counting()
    options = InferenceConfig(tile=[32, 32], overlap=0.0, batch_size=5, flip=True)
    windows(network, planes(noise(96, 96), noise(96, 96)), options)
    assert [shape[0] for shape in network.shapes] == [4, 4, 4, 4, 2]  # two tiles of two images each


# ------------------------------------------------------------------------------------------------ one batch ahead


class Copies:
    """Stands for copies on a stream: an image is black until its copy is waited for."""

    ahead = True

    def __init__(self):
        self.log, self.begun = [], 0

    def begin(self, images):
        self.begun += 1
        self.log.append(f"begin {self.begun - 1}")
        return self.begun - 1, torch.zeros_like(images), images.clone()

    def finish(self, begun):
        number, copy, images = begun
        self.log.append(f"finish {number}")
        return copy.copy_(images)


def test_the_next_batch_begins_before_this_one_is_computed(monkeypatch):
    copies = Copies()

    class Logged(Counting):
        def forward(self, x, upsample=False):
            copies.log.append("compute")
            return super().forward(x)

    one = Predictor(Logged(), CITYSCAPES, ModelConfig(), CPU)
    items = [Given(n, "", noise(16, 24, seed=n)) for n in range(5)]
    options = InferenceConfig(batch_size=2)
    found = list(predictions(one, items, options, transfer=copies))
    assert copies.log == [
        "begin 0", "begin 1", "finish 0", "compute", "begin 2", "finish 1", "compute", "finish 2", "compute",
    ]  # fmt: skip
    for (key, answer), (wanted, other) in zip(found, predictions(one, items, options), strict=True):
        assert key == wanted and (answer.train_ids == other.train_ids).all()


def test_without_a_stream_no_image_is_read_ahead():
    one, read = Predictor(Counting(), CITYSCAPES, ModelConfig(), CPU), []

    def items():
        for n in range(3):
            read.append(n)
            yield Given(n, "", noise(8, 8))

    answers = predictions(one, items(), InferenceConfig())
    assert next(answers)[0] == 0 and read == [0]
    assert list(one_ahead("", str)) == [] and list(one_ahead("ab", str.upper)) == [("a", "A"), ("b", "B")]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_copies_on_a_stream_of_a_device():
    device = torch.device("cuda")
    one = Predictor(Counting(), CITYSCAPES, ModelConfig(mean=[0.0] * 3, std=[1 / 255] * 3), device)
    items = [Given(n, "", noise(512, 1024, seed=n)) for n in range(9)]
    found = list(predictions(one, items, InferenceConfig(batch_size=2), probability=True))
    for (_, answer), item in zip(found, items, strict=True):
        want = one._replace(device=CPU).segment(item.image, probability=True)
        assert (answer.train_ids != want.train_ids).mean() < 1e-3


# ------------------------------------------------------------------------------------------------ memory


def test_running_out_of_memory_names_the_batch(monkeypatch):
    def full(*arguments):
        raise MemoryError

    monkeypatch.setattr(predicting, "segment_batch", full)
    one = Predictor(Counting(), CITYSCAPES, ModelConfig(), CPU)
    items = [Given(n, f"{n}.png", noise(16, 24)) for n in range(3)]
    with pytest.raises(Exception, match=r"while predicting 0.png, 24x16 \(width x height\), with 2 more in its batch"):
        list(predictions(one, items, InferenceConfig(batch_size=4)))
    with pytest.raises(Exception, match=r"while predicting 0.png, 24x16 \(width x height\)$"):
        list(predictions(one, items, InferenceConfig()))
