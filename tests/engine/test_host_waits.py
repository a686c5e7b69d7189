"""Nothing in a step makes the host wait for the device: the loss of a step is read when the next one is under way.

On the CPU nothing waits, so the tests list what would. Named exceptions: loss=lovasz, which asks for the classes that
an image has, fp16's loss scale, averaged weights, whose count torch keeps on the CPU, and on_bad_step=skip, which
decides at once.
"""

import pytest
import torch

from segtrain import config, device
from segtrain.abn import sync
from segtrain.distributed.group import World
from segtrain.engine.learner import Learner
from segtrain.losses import build_loss
from segtrain.models.blocks import Norm
from segtrain.models.deeplabv3 import DeepLabV3
from segtrain.models.segmenter import Segmenter
from tests.helpers import processes
from tests.helpers.steps import batch
from tests.helpers.waits import CONSTANT, Calls, Operators, waits_of


def network(norm):
    from tests.helpers.tiny import Tiny  # which adds itself to the backbones, for this test

    torch.manual_seed(0)
    made = Norm(norm)
    return Segmenter(Tiny(made, 8, 0.2), DeepLabV3(8, 8, made, 8), 8, 3)


def learner_of(loss, norm="inplace_abn", world=None, groups=(), **trainer):
    options = config.TrainConfig()
    options.trainer = config.TrainerConfig(batch_size=4, max_steps=9, **trainer)
    options.model.norm = norm
    for key, value in loss.items():
        setattr(options.loss, key, value)
    made = build_loss(options.loss, 3, groups)
    return Learner(network(norm), made, options, world or World(), torch.device("cpu"))


class Steps:
    """Steps of a learner; calling it takes the next one."""

    def __init__(self, learner):
        self.learner, self.step, self.results = learner, 0, []
        self.parts = [batch([n, n + 1]) for n in range(0, 4, 2)][: learner.config.trainer.accumulation]
        self.divisor = learner.count(self.parts)

    def __call__(self):
        self.results.append(self.learner.step(self.parts, self.divisor, self.step, self.step / 9))
        self.step += 1


LOSSES = {
    "the default": {},
    "bootstrapped": {"name": "bootstrapped", "hardest": 0.25},
    "seamseg": {"name": "bootstrapped", "hardest": 0.25, "normalisation": "seamseg"},
    "max_pooling": {"name": "max_pooling", "hardest": 0.3, "p": 1.7},
    "max_pooling, p = 1": {"name": "max_pooling", "hardest": 0.3, "p": 1.0},
    "focal": {"name": "focal", "gamma": 2.0},
    "dice": {"name": "dice"},
    "weights": {"name": "cross_entropy", "class_weights": [1.0, 2.0, 0.5], "label_smoothing": 0.1},
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_step_reads_nothing_of_the_device(name):
    device.constants.clear()
    steps = Steps(learner_of(LOSSES[name]))
    steps()  # makes the constants
    assert not waits_of(steps)
    assert all(result.losses for result in steps.results)


@pytest.mark.parametrize(
    "trainer", [{"accumulation": 2}, {"precision": "bf16"}, {"spike_factor": 0.0}], ids=lambda t: next(iter(t))
)
def test_nor_do_other_ways_of_training(trainer):
    steps = Steps(learner_of({}, **trainer))
    steps()
    assert not waits_of(steps)


def test_nor_do_labels_that_leave_classes_open():
    steps = Steps(learner_of({}, groups=((0, 1), (1, 2))))
    steps()
    assert not waits_of(steps)


def test_what_waits_is_seen():
    """The list is not empty where it should not be: the loss that is an exception, the first step, and by hand."""
    steps = Steps(learner_of({"name": "lovasz"}))
    steps()
    assert {"tolist", "unique", "aten::_unique2"} <= {name for name, _ in waits_of(steps)}
    device.constants.clear()
    first = waits_of(Steps(learner_of({})))
    assert ("tensor", CONSTANT) in first
    t = torch.arange(3.0)
    for read in (
        lambda: t[t > 1], lambda: bool(t[0]), lambda: float(t.sum()), lambda: t.cpu(), lambda: t.numpy(),
        lambda: t[t.argmax()], lambda: t.to("cpu"),
    ):  # fmt: skip
        calls, operators = Calls(), Operators()
        with operators, calls:
            read()
        assert calls.found or operators.found


def test_one_read_a_step_and_a_step_late():
    """`values` is the only read of a step's result; the monitor asks for it when the next step has begun."""
    steps = Steps(learner_of({}))
    steps()
    calls = Calls()
    with calls:
        assert len(steps.results[0].values()) == 3
    assert [name for name, _ in calls.found] == ["tolist"]


def synchronised(rank, world):
    sync.reading_waits = lambda t: True  # as on a device
    steps = Steps(learner_of({}, "inplace_abn_sync", World(rank, world)))
    calls = Calls()
    with calls:
        steps()
    first = [place for name, place in calls.found if name == "tolist"]
    found = waits_of(steps)
    # A change of shape is checked again, once.
    steps.parts = [batch([rank, 5, 6])]
    calls = Calls()
    with calls:
        steps()
    changed = [place for name, place in calls.found if name == "tolist"]
    with calls:
        calls.found.clear()
        steps()
    return first, found, changed, calls.found


def test_synchronised_norms_check_each_other_in_the_first_step_and_after_a_change(tmp_path):
    for first, found, changed, after in processes.run(synchronised, 2, tmp_path):
        layers = sum(type(m).__name__ == "InPlaceABNSync" for m in network("inplace_abn_sync").modules())
        assert len(first) == len(changed) == 2 * layers
        assert all(place.startswith("abn/sync.py") for place in first)
        assert not found
        assert not after


def in_another_mode(rank, world):
    sync.reading_waits = lambda t: True
    layer = Norm("inplace_abn_sync")(4)
    for _ in range(2):
        layer(torch.randn(2, 4, 3, 3, requires_grad=True) * 1).sum().backward()
    try:
        with torch.no_grad():
            layer(torch.randn(2 + rank, 4, 3, 3))
        with torch.set_grad_enabled(rank == 0):
            layer(torch.randn(2, 4, 3, 3, requires_grad=True) * 1)
    except RuntimeError as error:
        return str(error)
    return "no error"


def test_a_change_of_mode_is_checked(tmp_path):
    for found in processes.run(in_another_mode, 2, tmp_path):
        assert "processes [0] of the group will run backward, [1] will not" in found
