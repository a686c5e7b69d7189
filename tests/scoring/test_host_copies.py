"""What comes back from the device to the host in a prediction: classes, asked-for probabilities, losses; never logits.

A mode stands in for a device: tensors, which are on the CPU, say that they are on cuda, `.cpu()` gives one of the host,
and every read of a tensor's values by the host is counted.
"""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, resolve_name

from segtrain import device as devices
from segtrain.config import InferenceConfig, ModelConfig
from segtrain.data.class_mapping import ClassMapping
from segtrain.data.labels import published_table
from segtrain.scoring.batches import Given, PlainTransfer, predictions
from segtrain.scoring.predictor import Predictor

CUDA = torch.device("cuda")
CITYSCAPES = published_table("cityscapes")
SIZE = (90, 131)
PIXELS = SIZE[0] * SIZE[1]
READS = {"item", "tolist", "numpy", "__array__", "__float__", "__int__", "__bool__", "__index__", "__len__"}


class Aboard(TorchFunctionMode):
    """See above. moved: (name of the function, dtype, bytes) of every read by the host."""

    def __init__(self):
        super().__init__()
        self.moved, self.host = [], []

    def is_host(self, tensor):
        return any(tensor is one for one in self.host)

    def __torch_function__(self, function, types, arguments=(), options=None):
        options, name = dict(options or {}), (resolve_name(function) or "").rpartition(".")[2]
        if getattr(function, "__name__", "") == "__get__" and function == torch.Tensor.device.__get__:
            return torch.device("cpu") if self.is_host(arguments[0]) else CUDA
        target = [one for one in (*arguments[1:], options.get("device")) if isinstance(one, str | torch.device)]
        if name == "cpu" or (name == "to" and target and torch.device(target[0]).type == "cpu"):
            self.read("cpu", arguments[0])
            self.host.append(arguments[0].clone())
            return self.host[-1]
        if name in READS - {"__len__"} and not self.is_host(arguments[0]):
            assert name not in ("numpy", "__array__"), "a device refuses that"
            self.read(name, arguments[0])
        if "device" in options:
            options["device"] = "cpu"
        if name == "to":
            arguments = tuple("cpu" if isinstance(one, torch.device) else one for one in arguments)
        return function(*arguments, **options)

    def read(self, name, tensor):
        self.moved.append((name, tensor.dtype, tensor.numel() * tensor.element_size()))


class Cells(nn.Conv2d):
    def forward(self, x, upsample=False):
        return super().forward(x)


def network(seed=0):
    torch.manual_seed(seed)
    made = Cells(3, 19, 11, 8, 5).eval()
    return Predictor(made, CITYSCAPES, ModelConfig(), CUDA)


def noise(seed):
    return np.random.default_rng(seed).integers(0, 256, (*SIZE, 3), np.uint8)


@pytest.fixture
def aboard(monkeypatch):
    monkeypatch.setattr(devices, "constants", {})  # of this stand-in, which no later test may see
    return Aboard()


def halves():
    """The classes of Cityscapes as two, and void for the last one."""
    sources = (tuple(range(9)), tuple(range(9, 18)))
    return ClassMapping(CITYSCAPES, CITYSCAPES.names, sources, (18,), False, "a test")


VIEWS = {
    "one": {}, "flip": {"flip": True}, "scales": {"scales": [0.5, 1.0, 1.25], "flip": True},
    "tiles": {"tile": [32, 64]}, "tiles and flip": {"tile": [64, 64], "flip": True, "batch_size": 3},
    "batch": {"batch_size": 2, "flip": True},
}  # fmt: skip


@pytest.mark.parametrize("views", VIEWS)
@pytest.mark.parametrize("probability", [False, True])
def test_classes_and_probabilities_alone_come_back(aboard, views, probability):
    one, options = network(), InferenceConfig(**VIEWS[views])
    items = [Given(n, "", noise(n)) for n in range(3)]
    with aboard:
        found = list(predictions(one, items, options, probability, PlainTransfer(CUDA)))
    expected = [("cpu", torch.uint8, PIXELS)] + [("cpu", torch.float32, 4 * PIXELS)] * probability
    assert aboard.moved == expected * 3
    on_cpu = one._replace(device=torch.device("cpu"))
    for (_, answer), item in zip(found, items, strict=True):
        assert (answer.train_ids != on_cpu.segment(item.image, options).train_ids).mean() < 1e-3


def test_several_networks_are_averaged_on_the_device(aboard):
    one = network()._replace(others=(network(1), network(2)))
    with aboard:
        one.segment(noise(0), InferenceConfig(flip=True))
    assert aboard.moved == [("cpu", torch.uint8, PIXELS)]


def test_classes_of_a_taxonomy_are_added_up_on_the_device(aboard):
    one = network()._replace(mapping=halves())
    with aboard:
        one.segment(noise(0), InferenceConfig(scales=[1.0, 1.5]))
    assert aboard.moved == [("cpu", torch.uint8, PIXELS)]


@pytest.mark.parametrize("options", [{}, {"flip": True}])
def test_a_loss_is_a_few_numbers(aboard, options):
    target = noise(1)[..., 0] % 19
    with aboard:
        found = network().segment(noise(0), InferenceConfig(**options), target=target)
    assert sum(size for _, _, size in aboard.moved) <= PIXELS + 8 and found.loss > 0
    assert [one for one in aboard.moved if one[0] == "cpu"] == [("cpu", torch.uint8, PIXELS)]


def test_the_stand_in_counts_what_comes_back(aboard):
    logits = torch.randn(2, 3)
    with aboard:
        assert logits.device == CUDA and torch.empty(2, device=CUDA).device == CUDA
        assert logits.cpu().device.type == "cpu" and logits.cpu().numpy().shape == (2, 3)
        logits.to("cpu")
        assert logits.to(CUDA).device == CUDA
        float(logits.sum())
        bool((F.relu(logits) >= 0).all())
        with pytest.raises(AssertionError, match="a device refuses that"):
            logits.numpy()
    sizes = [("cpu", 24)] * 3 + [("__float__", 4), ("__bool__", 1)]
    assert [(name, size) for name, _, size in aboard.moved] == sizes
