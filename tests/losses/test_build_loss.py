"""Losses built from options, with groups of classes, and a plugin's loss."""

import math
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from segtrain.config import IGNORE_INDEX, LossConfig
from segtrain.errors import UsageError
from segtrain.losses import LOSSES, Loss, build_loss
from tests.helpers.losses import WEIGHTS, C, drawn, enlarged, gradient, off, step_loss, three


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (LossConfig(hardest=0.5), ["loss.hardest=0.5", "bootstrapped or max_pooling", "loss=cross_entropy"]),
        (LossConfig("dice", class_weights=[1.0]), ["loss.class_weights=[1.0]", "leave it at null"]),
        (LossConfig("lovasz", label_smoothing=0.1), ["loss.label_smoothing=0.1", "lovasz does not read it"]),
        (LossConfig("focal", label_smoothing=0.1), ["loss.label_smoothing"]),
        (LossConfig("dice", gamma=1), ["loss.gamma=1", "loss=focal"]),
        (LossConfig("dice", options={"a": 1}), ["loss.options={'a': 1}", "plugins"]),
        (LossConfig("bootstrapped", normalisation="mean"), ["loss.normalisation must be", "chosen, seamseg, got mean"]),
        (LossConfig("bootstrapped", select="all"), ["loss.select must be one of image, batch, got all"]),
        (LossConfig("bootstrapped", 0.5, "seamseg", "batch"), ["loss.select=batch"]),
        (LossConfig("max_pooling", p=0.5), ["loss.p must be at least 1, got 0.5"]),
        (LossConfig("max_pooling", p=math.nan), ["loss.p must be at least 1, got nan"]),
        (LossConfig("focal", gamma=-1), ["loss.gamma must be at least 0, got -1"]),
        (LossConfig(label_smoothing=1), ["loss.label_smoothing must be at least 0 and less than 1, got 1"]),
        (LossConfig(class_weights=[0.0, 0.0]), ["loss.class_weights=[0.0, 0.0]"]),
        (LossConfig(class_weights="inverse"), ["loss.class_weights must be auto or", "got inverse"]),
        (LossConfig(class_weights=2.0), ["loss.class_weights=2.0", "one number for each class"]),
        (LossConfig(class_weights=["a"]), ["loss.class_weights must be auto or", "got ['a']"]),
        (LossConfig("lovasz", class_weights="auto"), ["loss.class_weights=auto", "focal or bootstrapped"]),
        (
            LossConfig(class_weights=[1.0, -1.0]),
            ["loss.class_weights must", "at least 0", "got [1.0, -1.0]"],
        ),
    ],
)
def test_impossible_options(config, words):
    with pytest.raises(UsageError) as caught:
        config.check()
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("config", "groups", "words"),
    [
        (LossConfig("dise"), [], ["loss.name=dise", "cross_entropy, bootstrapped, max_pooling, focal, dice, lovasz"]),
        (LossConfig(class_weights=[1.0, 2.0]), [], ["loss.class_weights=[1.0, 2.0]", "give 5 numbers"]),
        (LossConfig(class_weights="auto"), [], ["loss.class_weights=auto"]),
        (LossConfig("dice"), [(1, 2)], ["loss.name=dice", "cross_entropy"]),
        (LossConfig("lovasz"), [(1, 2)], ["loss.name=lovasz"]),
        (LossConfig(class_weights=WEIGHTS), [(1, 2)], ["loss.class_weights"]),
        (LossConfig(label_smoothing=0.1), [(1, 2)], ["loss.label_smoothing"]),
    ],
)
def test_losses_that_cannot_be_built(config, groups, words):
    with pytest.raises(UsageError) as caught:
        build_loss(config, C, groups)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("config", [LossConfig("max_pooling", 0.4, p=1.7), LossConfig("focal")])
def test_groups_in_other_losses(config):
    """The loss of a group's pixel equals that of a network with one class for the group; the gradient does too."""
    logits, target = drawn(C, (3, 4), (3, 4))

    def merged(logits, target):
        either = logits[:, [1, 3]].logsumexp(1, keepdim=True)
        return step_loss(build_loss(config, 4), torch.cat([logits[:, [0, 2, 4]], either], 1), target)

    only = torch.where(target == 1, C, torch.where(target == 3, C, target))  # labels 0, 2, 4 and the group
    value, got = gradient(partial(step_loss, build_loss(config, C, [(1, 3)])), logits, only)
    renamed = torch.full_like(only, IGNORE_INDEX)
    for new, old in enumerate((0, 2, 4, C)):
        renamed[only == old] = new
    expected, want = gradient(merged, logits, renamed)
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    assert off(got, want) < 1e-12


@pytest.mark.parametrize("config", [LossConfig("max_pooling", 0.4, p=1.7), LossConfig("focal", gamma=0.5)])
def test_a_group_of_all_classes_costs_nothing(config):
    """Its probability may round to more than 1, and a power of a negative number is NaN."""
    logits = drawn(C, (20, 20), (20, 20), torch.float32)[0]
    value, got = gradient(partial(step_loss, build_loss(config, C, [range(C)])), logits, torch.full((2, 20, 20), C))
    assert 0 <= value < 1e-3
    assert got.isfinite().all()


class Squares(Loss):
    """A plugin's loss: Brier's."""

    def __init__(self, power):
        self.power = power

    def __call__(self, logits, target):
        known = target != IGNORE_INDEX
        wanted = F.one_hot(target.where(known, 0), logits.shape[1]).movedim(3, 1)
        missed = (enlarged(logits, target).softmax(1) - wanted).abs() ** self.power
        return (missed.sum(1) * known).sum((1, 2))


def test_a_loss_without_its_sums_is_refused_when_it_is_built():
    with pytest.raises(TypeError, match="abstract.*__call__"):
        type("Nothing", (Loss,), {})()


def test_a_loss_of_ones_own(monkeypatch):
    monkeypatch.setitem(LOSSES, "squares", lambda config, num_classes, groups, power=2: Squares(power))
    logits, target = three()
    for options, power in (({}, 2), ({"power": 3}, 3)):
        config = LossConfig("squares", options=options)
        config.check()
        value = step_loss(build_loss(config, C), logits, target)
        assert value == Squares(power)(logits, target).sum() / (target != IGNORE_INDEX).sum()
    for wrong in ({"pwer": 3}, {"config": 3}):
        with pytest.raises(UsageError, match=r"loss.options=.*loss.name=squares takes power") as caught:
            build_loss(LossConfig("squares", options=wrong), C)
        assert next(iter(wrong)) in str(caught.value)
    with pytest.raises(UsageError, match="loss.name=squares"):
        build_loss(LossConfig("squares"), C, [(1, 2)])
