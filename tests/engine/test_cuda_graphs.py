"""trainer.cuda_graphs: which buffers are static, what is copied when, and what is refused.

A stand-in for torch's graphs records a function of Python and calls it at each replay. Like a graph, recording changes
no tensor, its results are not there before the first replay, and a replay writes to the memory of the recording.
"""

import contextlib

import pytest
import torch

from segtrain import config
from segtrain.distributed.group import World
from segtrain.engine import graphs
from segtrain.engine.graphs import MOST_GRAPHS, WARM_UP, StepGraphs, not_capturable
from segtrain.engine.learner import Learner
from segtrain.losses import build_loss
from tests.helpers.steps import batch, small_network


class Recorder:
    """See above. log: what has happened, in order."""

    def __init__(self, network):
        self.network, self.log = network, []

    @contextlib.contextmanager
    def aside(self):
        self.log.append("aside")
        yield

    def record(self, work):
        self.log.append("record")
        buffers = [(t, t.clone()) for t in self.network.buffers()]
        parameters = list(self.network.parameters())
        before = [(None if p.grad is None else p.grad.clone()) for p in parameters]
        adds = any(t is not None for t in before)
        with torch.random.fork_rng(devices=()):  # recording draws no number
            sums = work()
        made = [p.grad for p in parameters]
        for t, value in buffers:
            t.copy_(value)
        for t, value in zip(made, before, strict=True):
            if t is not None:
                t.copy_(value) if adds else t.fill_(torch.nan)
        sums.fill_(torch.nan)

        def replay():
            self.log.append("replay")
            now = [p.grad for p in parameters]
            for p, t in zip(parameters, made, strict=True):
                p.grad = t if adds else None
            sums.copy_(work())
            for p, t, own in zip(parameters, now, made, strict=True):
                if own is not None and not adds:
                    own.copy_(p.grad)
                p.grad = t

        return replay, sums


def learner_of(captured, device="cpu", **trainer):
    options = config.TrainConfig()
    options.trainer = config.TrainerConfig(batch_size=4, max_steps=9, **trainer)
    options.model.norm = "inplace_abn"
    options.loss.name = "cross_entropy"
    network = small_network("inplace_abn")
    network.unused = torch.nn.Parameter(torch.ones(3, dtype=torch.double))  # whose gradient stays None
    options.trainer.cuda_graphs = captured and device == "cuda"
    learner = Learner(network.to(device), build_loss(options.loss, 3), options, World(), torch.device(device))
    if captured and device == "cpu":
        capture = Recorder(network)
        learner.graphs = StepGraphs(learner.add_gradient, list(network.parameters()), capture, torch.device("cpu"))
    return learner


def trained(captured, sizes, device="cpu", **trainer):
    """(learner, all that nine steps give), for micro-batches of these sizes in turn."""
    learner, found = learner_of(captured, device, accumulation=len(sizes[0]), **trainer), []
    place = 0
    for step in range(9):
        parts = []
        for size in sizes[step % len(sizes)]:
            parts.append(batch(range(place, place + size)))
            place += size
        result = learner.step(parts, learner.count(parts), step, step / 9)
        found += [result.losses, result.norm]
    return learner, [found, *(t.detach().clone() for t in (*learner.network.parameters(), *learner.network.buffers()))]


WAYS = {
    "one batch": ([[3]], {}),
    "parts": ([[2, 3, 2]], {}),
    "equal parts": ([[2, 2, 2]], {}),
    "shapes in turn": ([[2], [3]], {}),
    "parts and shapes": ([[2, 3], [3, 2]], {}),
    "one shape after two others": ([[2, 3], [4, 3]], {}),  # adds to the memory of either's graph
    "another shape begins": ([[2, 2, 2]] * 3 + [[3, 2, 2]], {}),  # outside of graphs, where no graph may add
    "clipped, averaged": ([[2, 2]], {"ema_decay": 0.9}),
    "bad steps skipped": ([[2]], {"on_bad_step": "skip"}),
    "bf16": ([[2]], {"precision": "bf16"}),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_replayed_training_equals_an_ordinary_one_to_the_bit(way):
    sizes, trainer = WAYS[way]
    _, want = trained(False, sizes, **trainer)
    learner, found = trained(True, sizes, **trainer)
    assert found[0] == want[0]
    for a, b in zip(found[1:], want[1:], strict=True):
        assert torch.equal(a, b)
    assert learner.network.unused.grad is None
    assert learner.graphs.capture.log.count("replay") >= 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("way", WAYS)
def test_the_same_on_a_device(way):
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        sizes, trainer = WAYS[way]
        _, want = trained(False, sizes, "cuda", **trainer)
        learner, found = trained(True, sizes, "cuda", **trainer)
    finally:
        torch.use_deterministic_algorithms(False)
    assert learner.graphs.recorded
    assert found[0] == want[0]
    for a, b in zip(found[1:], want[1:], strict=True):
        assert torch.equal(a, b)


def test_warm_up_then_one_capture_for_each_shape_and_replays():
    learner, _ = trained(True, [[3]])
    assert learner.graphs.capture.log == ["aside"] * WARM_UP + ["record"] + ["replay"] * (9 - WARM_UP)
    learner, _ = trained(True, [[2, 2]])
    # The second part waits for the first: it adds to the memory of its graph.
    log = learner.graphs.capture.log
    assert log.count("record") == 2
    assert log.count("replay") == 2 * 9 - log.count("aside")
    assert log[: 2 * WARM_UP] == ["aside"] * 2 * WARM_UP


def test_the_number_of_graphs_is_bounded(monkeypatch):
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 1)
    assert MOST_GRAPHS > 1
    _, want = trained(False, [[2], [3]])
    learner, found = trained(True, [[2], [3]])
    assert learner.graphs.capture.log.count("record") == 1
    assert found[0] == want[0]


def test_the_given_batch_is_not_the_buffer():
    learner = learner_of(True)
    parts = [batch(range(3))]
    for step in range(WARM_UP + 1):
        learner.step(parts, learner.count(parts), step, 0.1)
    (recorded,) = learner.graphs.recorded.values()
    for static, given in ((recorded.images, parts[0].images), (recorded.target, parts[0].targets)):
        assert static.data_ptr() != given.data_ptr()
        assert torch.equal(static, given)
    addresses = [t.data_ptr() for t in recorded[1:5]]
    other = [batch(range(5, 8))]
    learner.step(other, 77.0, WARM_UP + 1, 0.1)
    assert [t.data_ptr() for t in recorded[1:5]] == addresses
    assert torch.equal(recorded.images, other[0].images)
    assert float(recorded.factor) == 1 / 77.0


# ------------------------------------------------------------------------------------------------------- refusals


def options_of(**changes):
    options = config.TrainConfig()
    options.loss.name = "cross_entropy"
    for key, value in changes.items():
        group, name = key.split("__")
        setattr(getattr(options, group), name, value)
    return options


REFUSALS = {
    "graphs are CUDA's": ({}, World(), "cpu"),
    "several processes": ({}, World(0, 2), "cuda"),
    "trainer.compile=true has graphs of its own": ({"trainer__compile": True}, World(), "cuda"),
    "loss=lovasz": ({"loss__name": "lovasz"}, World(), "cuda"),
    "loss=max_pooling": ({"loss__name": "max_pooling"}, World(), "cuda"),
    "loss=mine": ({"loss__name": "mine"}, World(), "cuda"),
    "model.recompute=blocks": ({"model__recompute": "blocks"}, World(), "cuda"),
    "model.keep=8bit": ({"model__keep": "8bit"}, World(), "cuda"),
}


@pytest.mark.parametrize("reason", REFUSALS)
def test_what_cannot_be_captured_is_refused_by_name(reason):
    changes, world, kind = REFUSALS[reason]
    assert reason in not_capturable(options_of(**changes), world, torch.device(kind))
    assert not_capturable(options_of(), World(), torch.device("cuda")) == ""


def test_the_option_on_a_cpu(segtrain):
    answer = segtrain("train", "experiment=toy", "trainer.cuda_graphs=true", "device=cpu")
    assert answer.status == 2
    assert "trainer.cuda_graphs=true is not possible: the device is cpu" in answer.err
