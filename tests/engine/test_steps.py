"""One training step: division of the batch, accumulation and processes, clipping, averaged weights."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from segtrain import config
from segtrain.data.order import MicroBatches
from segtrain.distributed.group import World, chunks
from segtrain.engine.learner import Learner
from segtrain.losses import build_loss
from tests.helpers import processes
from tests.helpers.steps import batch, small_network

# ------------------------------------------------------------------------------------------------ division of a batch


@settings(deadline=None, derandomize=True)
@given(st.integers(1, 40), st.integers(1, 12))
def test_a_batch_is_divided_whole_in_order_and_evenly(batch, parts):
    pieces = chunks(batch, parts)
    assert [place for piece in pieces for place in piece] == list(range(batch))
    assert len(pieces) == parts
    assert max(map(len, pieces)) - min(map(len, pieces)) <= 1


@pytest.mark.parametrize(("size", "accumulation"), [(4, 1), (2, 2), (1, 4), (3, 2), (1, 1)])
def test_positions_do_not_depend_on_how_many_read_them(size, accumulation):
    every = [list(MicroBatches(10, 3, 6, rank, size, accumulation)) for rank in range(size)]
    for number, step in enumerate(range(3, 6)):
        mine = [every[rank][number * accumulation + part] for part in range(accumulation) for rank in range(size)]
        assert [position for piece in mine for position in piece] == list(range(10 * step, 10 * step + 10))


def test_a_training_by_the_clock_has_no_last_step():
    parts = iter(MicroBatches(2, 5, None))
    assert [next(parts) for _ in range(3)] == [[10, 11], [12, 13], [14, 15]]


# ------------------------------------------------------------------------------------------------ one step, exactly


def three_steps(world, norm, batch_size, accumulation, prepare=lambda network: None, **trainer):
    """Losses, gradient norm, parameters and buffers of three steps."""
    options = config.TrainConfig()
    options.trainer = config.TrainerConfig(batch_size=batch_size, accumulation=accumulation, max_steps=3, **trainer)
    options.optimizer.lr = 0.05
    options.loss.hardest = 1.0
    options.loss.name = "cross_entropy"
    options.model.norm = norm or "abn"
    network = small_network(norm)
    prepare(network)
    learner = Learner(network, build_loss(options.loss, 3), options, world, torch.device("cpu"))
    parts = iter(MicroBatches(batch_size, 0, 3, world.rank, world.size, accumulation))
    losses, outcome = [], None
    for step in range(3):
        mine = [batch(next(parts)) for _ in range(accumulation)]
        divisor = world.all_reduce(learner.count(mine))[0]
        outcome = learner.step(mine, divisor, step, step / 3)
        losses.append(world.all_reduce(outcome.loss)[0])
    parameters = {name: t.detach() for name, t in learner.network.named_parameters()}
    return losses, outcome.norm, parameters, dict(learner.network.named_buffers())


def agree(one, other, tolerance):
    assert other[0] == pytest.approx(one[0], rel=tolerance)
    assert other[1] == pytest.approx(one[1], rel=tolerance)
    for name, value in one[2].items():
        assert (other[2][name] - value).norm() <= tolerance * max(value.norm(), 1e-3), name


def no_dropout(network):
    for module in network.modules():
        if isinstance(module, nn.Dropout2d):
            module.p = 0.0


def sync_of_5(rank, world):
    return three_steps(World(rank, world), "inplace_abn_sync", 5, 1, no_dropout)


def sync_of_7(rank, world):
    return three_steps(World(rank, world), "inplace_abn_sync", 7, 1, no_dropout)


def groups_of_one(rank, world):
    return three_steps(World(rank, world), "inplace_abn_sync", 8, 1, sync_group="1")


def own_of_8(rank, world):
    return three_steps(World(rank, world), "inplace_abn", 8, 1)


@pytest.mark.parametrize(("function", "world", "size"), [(sync_of_5, 2, 5), (sync_of_7, 3, 7)])
def test_several_processes_are_one_to_float_tolerance(function, world, size, tmp_path):
    """With synchronised statistics, and a batch and labelled pixels that do not divide evenly."""
    alone = three_steps(World(), "inplace_abn_sync", size, 1, no_dropout)
    for found in processes.run(function, world, tmp_path):
        agree(alone, found, 1e-9)


def test_processes_and_accumulated_parts_are_the_same(tmp_path):
    """Statistics are per micro-batch, so 2 processes equal one with 2 micro-batches; dropout is the same too."""
    accumulated = three_steps(World(), "inplace_abn", 8, 2)
    for function in (own_of_8, groups_of_one):  # who is synchronised with nobody
        for found in processes.run(function, 2, tmp_path):
            agree(accumulated, found, 1e-9)
            # A process updates its running statistics once a step, accumulation once a micro-batch.
            name = next(name for name in found[3] if name.endswith("running_mean"))
            assert not torch.allclose(found[3][name], accumulated[3][name], rtol=1e-3)


def test_accumulation_equals_the_larger_batch_but_for_statistics():
    whole = three_steps(World(), None, 7, 1)
    for parts in (2, 3, 7):
        agree(whole, three_steps(World(), None, 7, parts), 1e-12)
    with_norms = three_steps(World(), "inplace_abn", 8, 1)
    assert three_steps(World(), "inplace_abn", 8, 2)[0][1] != pytest.approx(with_norms[0][1], rel=1e-6)


def test_the_gradient_is_clipped_as_a_whole():
    options = config.TrainConfig()
    options.optimizer.clip_norm, options.optimizer.lr, options.optimizer.momentum = 0.01, 1.0, 0.0
    options.optimizer.weight_decay = 0.0
    learner = Learner(small_network(None), build_loss(options.loss, 3), options, World(), torch.device("cpu"))
    before = [p.detach().clone() for p in learner.network.parameters()]
    part = batch([0, 1])
    outcome = learner.step([part], learner.loss.count(part.targets), 0, 0.0)
    moved = torch.cat([(b - p).flatten() for b, p in zip(before, learner.network.parameters(), strict=True)])
    assert outcome.norm > 0.01
    assert float(moved.norm().detach()) == pytest.approx(0.01, rel=1e-3)


def test_averaged_weights_follow_the_formula():
    options = config.TrainConfig()
    options.trainer = config.TrainerConfig(max_steps=3, ema_decay=0.9)
    learner = Learner(small_network("abn"), build_loss(options.loss, 3), options, World(), torch.device("cpu"))
    weights, part = [], batch(range(4))
    for step in range(3):
        learner.step([part], learner.loss.count(part.targets), step, step / 3)
        weights.append({k: v.clone() for k, v in learner.network.state_dict().items()})
    for name, value in learner.average.module.state_dict().items():
        if value.is_floating_point():  # the first update takes the weights as they are
            expected = 0.9 * (0.9 * weights[0][name] + 0.1 * weights[1][name]) + 0.1 * weights[2][name]
            torch.testing.assert_close(value, expected)
    assert learner.evaluation_model() is learner.average.module
