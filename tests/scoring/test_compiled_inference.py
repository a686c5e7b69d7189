"""inference.compile: the network's own numbers for images of any size, few graphs, and what is refused."""

import importlib

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from segtrain.config import InferenceConfig, ModelConfig
from segtrain.data.labels import published_table
from segtrain.errors import SegtrainError, UsageError
from segtrain.models import build_model, execution
from segtrain.models.execution import require_inference_compile
from segtrain.scoring.batches import Given, predictions
from segtrain.scoring.predictor import Predictor
from tests.helpers.runs import refused

CPU = torch.device("cpu")
CITYSCAPES = published_table("cityscapes")
COMPILED = InferenceConfig(compile=True)


@pytest.fixture
def graphs(monkeypatch):
    """torch.compile makes graphs and no code; the graphs."""
    made = []

    def keep(graph, inputs):
        made.append(graph)
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(execution, "INFERENCE_BACKEND", keep)
    yield made
    execution.answering.cache_clear()
    torch._dynamo.reset()


class Pooled(nn.Module):
    """Logits at stride 4 that depend on the whole image, as with DeepLabV3's pooled branch."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Conv2d(3, 8, 3, 4, 1), nn.Conv2d(8, 19, 1)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x, upsample=False):
        maps = F.leaky_relu(self.norm(self.first(x)))
        return self.last(maps + F.interpolate(F.adaptive_avg_pool2d(maps, 1), maps.shape[-2:]))


def predictor(network=None, **options):
    return Predictor((network or Pooled()).eval(), CITYSCAPES, ModelConfig(**options), CPU)


def noise(*size, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)


SIZES = [(40, 56), (56, 40), (40, 40), (97, 131), (64, 30), (33, 35), (80, 80), (81, 79), (120, 44), (50, 51)]


def test_graphs_serve_all_sizes_and_batches(graphs):
    """Ten sizes, flips, scales and batches: a graph for one image and one for several, and as many more where torch
    convolves few pixels in another way."""
    one = predictor()
    items = [Given(n, "", noise(*size, seed=n)) for n, size in enumerate(SIZES)]
    for views in ({}, {"flip": True}, {"scales": [0.5, 1.3]}):
        for item in items:
            found = one.segment(item.image, InferenceConfig(compile=True, **views), probability=True)
            want = one.segment(item.image, InferenceConfig(**views), probability=True)
            assert (found.train_ids == want.train_ids).all() and (found.probability == want.probability).all()
    assert len(graphs) <= 2
    pairs = [Given(n, "", noise(*SIZES[n // 3], seed=n)) for n in range(12)]
    batched = [list(predictions(one, pairs, InferenceConfig(batch_size=3, compile=flag))) for flag in (True, False)]
    assert all((a.train_ids == b.train_ids).all() for (_, a), (_, b) in zip(*batched, strict=True))
    assert len(graphs) <= 4


def test_weights_that_change_and_other_networks_are_seen(graphs):
    one, image = predictor(), noise(40, 56)
    for change in range(3):
        with torch.no_grad():
            one.network.last.weight.mul_(-1 - change)
            one.network.norm.running_mean.add_(0.1)
        assert (one.segment(image, COMPILED).train_ids == one.segment(image).train_ids).all()
    other = predictor()
    with torch.no_grad():
        other.network.last.bias.copy_(torch.randn(19))
    assert (other.segment(image, COMPILED).train_ids == other.segment(image).train_ids).all()
    both = one._replace(others=(other,))
    assert (both.segment(image, COMPILED).train_ids == both.segment(image).train_ids).all()


def test_half_precision_is_compiled_too(graphs):
    one, seen = predictor(), set()
    one.segment(noise(40, 56), InferenceConfig(compile=True, precision="bf16"))
    for node in graphs[0].graph.nodes:
        value = node.meta.get("example_value")
        if isinstance(value, torch.Tensor) and "conv" in node.name:
            seen.add(value.dtype)
    assert seen == {torch.bfloat16}


def test_too_many_graphs_are_an_error_and_no_silent_change(graphs, monkeypatch):
    monkeypatch.setattr(execution, "MOST_GRAPHS", 1)
    one = predictor()
    one.segment(noise(40, 56), COMPILED)
    pair = torch.zeros(2, 3, 40, 56, dtype=torch.uint8)
    with pytest.raises(SegtrainError, match=r"inference.compile=true: 1 graphs did not suffice .*inference.tile="):
        one.logits(pair, compile=True)


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"recompute": "norm"}, "model.recompute=norm"), ({"norm": "inplace_abn", "keep": "8bit"}, "model.keep=8bit"),
        ({"backbone": "timm:resnet18"}, "encoders of timm are not tested"),
    ],
)  # fmt: skip
def test_what_a_graph_cannot_hold_is_refused(options, reason):
    with pytest.raises(UsageError, match=f"inference.compile=true is not possible: .*{reason}"):
        require_inference_compile(ModelConfig(**options), CPU)
    with pytest.raises(UsageError, match="inference.compile=true is not possible"):
        predictor(**options).segment(noise(8, 8), COMPILED)
    require_inference_compile(ModelConfig(norm="inplace_abn_sync"), CPU)


def test_without_a_compiler_every_command_refuses_it(segtrain, folder_data, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    answer = segtrain("train", *folder_data[1], "inference.compile=true", "model.backbone=resnet18", "run=r")
    refused(answer, "inference.compile=true is not possible", "no C++ compiler 'no-such-compiler'")


def test_it_is_printed_and_on_the_card():
    both = InferenceConfig(compile=True, batch_size=4)
    assert str(both) == "inference whole in fp32, in batches of 4, compiled"
    assert both.execution() == {"batch_size": 4, "compiled": True} and InferenceConfig().execution() == {}
    assert both.stated() == InferenceConfig().stated()


@pytest.mark.slow
def test_the_code_of_a_network_gives_its_numbers():
    """In-Place ABN and DeepLabV3, by Inductor's C++ code."""
    importlib.import_module("tests.helpers.tiny")  # adds its backbone, for this test
    torch._dynamo.reset()
    torch.manual_seed(0)
    network = build_model("tiny", "deeplabv3", 19, output_stride=16, head_channels=8, norm="inplace_abn")
    one = predictor(network, norm="inplace_abn")
    with torch.inference_mode():
        for size in ((97, 131), (150, 200)):
            images = torch.from_numpy(noise(*size).transpose(2, 0, 1).copy())[None]
            plain, found = one.logits(images), one.logits(images, compile=True)
            assert (plain - found).abs().max() < 1e-5 * plain.abs().max()
