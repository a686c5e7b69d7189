"""Synchronised In-Place ABN: several gloo processes against one process with the whole batch."""

import copy

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from segtrain.abn import InPlaceABN, InPlaceABNSync, RecomputedABN, ScaledABN, active_group, set_active_group
from segtrain.models.blocks import IdentityResidualBlock, Norm, ResidualBlock
from tests.helpers.processes import run

CHANNELS = 4
# What each process holds: different numbers of pictures of different extent; in the last case one holds nothing.
SHARES = {
    2: [[(2, CHANNELS, 5, 3), (3, CHANNELS, 2, 2)], [(1, CHANNELS, 1, 1), (4, CHANNELS, 3, 3)]],
    3: [
        [(1, CHANNELS, 1, 1), (2, CHANNELS, 4, 4), (5, CHANNELS, 2, 1)],
        [(2, CHANNELS, 3, 3), (0, CHANNELS, 3, 3), (1, CHANNELS, 2, 5)],
    ],
}


def numbers(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.double) * 2 + 1 for shape in shapes]


def layer(kind, **options):
    made = kind(CHANNELS, **options).double()
    with torch.no_grad():
        made.weight.copy_(torch.tensor([1.5, -0.7, 0.3, -1.1]))
        made.bias.copy_(torch.tensor([0.2, -0.4, 0.1, 0.6]))
    return made


KINDS = {
    "one": (InPlaceABNSync, {}),
    "two": (InPlaceABNSync, {"variant": "two"}),
    "signed": (InPlaceABNSync, {"scale": "signed"}),
    "recomputed": (RecomputedABN, {"synchronised": True}),
    "batch_norm": (RecomputedABN, {"synchronised": True, "keep": "input", "scale": "signed"}),
}


def one_rank(rank, world):
    found = {}
    for name, (kind, options) in KINDS.items():
        for i, shapes in enumerate(SHARES[world]):
            x, dz = numbers(shapes)[rank], numbers(shapes, 1)[rank]
            made = layer(kind, **options)
            source = x.clone().requires_grad_()
            z = made(source * 1)
            z.backward(dz)
            weights = torch.stack([made.weight.grad, made.bias.grad])
            dist.all_reduce(weights)
            found[name, i] = z.detach(), source.grad, weights, made.running_mean, made.running_var
    return found


@pytest.mark.parametrize("world", [2, 3])
def test_processes_equal_the_whole_batch(world, tmp_path):
    ranks = run(one_rank, world, tmp_path)
    for name, (_, options) in KINDS.items():
        for i, shapes in enumerate(SHARES[world]):
            # All values of all processes as one (values, channels) input of the ordinary layer
            whole, dz = (torch.cat([x.transpose(0, 1).flatten(1).T for x in numbers(shapes, seed)]) for seed in (0, 1))
            oracle = layer(ScaledABN, scale=options.get("scale", "abs"))
            whole.requires_grad_()
            z = oracle(whole * 1)
            z.backward(dz)
            expected = z.detach(), whole.grad, torch.stack([oracle.weight.grad, oracle.bias.grad])
            found = [torch.cat([r[name, i][k].transpose(0, 1).flatten(1).T for r in ranks]) for k in (0, 1)]
            for a, b in zip([*found, ranks[0][name, i][2]], expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
            for rank in ranks:
                torch.testing.assert_close(rank[name, i][3], oracle.running_mean, rtol=1e-12, atol=1e-12)
                torch.testing.assert_close(rank[name, i][4], oracle.running_var, rtol=1e-12, atol=1e-12)


def count_collectives(rank, world):
    calls = []
    for name in ("all_gather", "all_reduce"):
        real = getattr(dist, name)
        setattr(dist, name, lambda *a, real=real, name=name, **k: (calls.append(name), real(*a, **k))[1])
    z = layer(InPlaceABNSync)(numbers([(2, CHANNELS, 3, 3)])[0].requires_grad_() * 1)
    forward = list(calls)
    z.sum().backward()
    return forward, calls[len(forward) :]


def test_one_collective_forward_and_one_backward(tmp_path):
    for forward, backward in run(count_collectives, 2, tmp_path):
        assert forward == ["all_gather"]
        assert backward == ["all_reduce"]


def errors(rank, world):
    found = []
    x = numbers([(2, CHANNELS, 3, 3)])[0]
    try:  # one process without a gradient
        with torch.set_grad_enabled(rank == 0):
            layer(InPlaceABNSync)(x.clone())
    except RuntimeError as error:
        found.append(str(error))
    try:  # one value per channel in all
        layer(InPlaceABNSync)(x[:1, :, :1, :1] if rank == 0 else x[:0])
    except ValueError as error:
        found.append(str(error))
    # one value per channel here, more elsewhere
    found.append(layer(InPlaceABNSync)(x[:1, :, :1, :1].clone()).shape)
    return found


def test_all_processes_raise_the_same_error(tmp_path):
    first, second = run(errors, 2, tmp_path)
    assert first == second
    assert "processes [0] of the group will run backward, [1] will not" in first[0]
    assert "more than one value per channel over all processes" in first[1]


def groups(rank, world):
    group = active_group(rank != 1)
    model = nn.Sequential(InPlaceABNSync(CHANNELS), nn.Sequential(InPlaceABNSync(CHANNELS, overwrite=False))).double()
    set_active_group(model, group)
    assert model[0].group is group is model[1][0].group
    assert active_group(True) is dist.group.WORLD
    copy.deepcopy(model)
    x = numbers([(2, CHANNELS, 3, 3)], seed=rank)[0]
    if rank == 1:
        return None
    model(x.clone())
    return model[0].running_mean


def test_a_part_of_the_processes(tmp_path):
    ranks = run(groups, 3, tmp_path)
    assert ranks[1] is None
    both = torch.cat([numbers([(2, CHANNELS, 3, 3)], seed=rank)[0] for rank in (0, 2)])
    for rank in (0, 2):
        torch.testing.assert_close(ranks[rank], 0.1 * both.mean((0, 2, 3)))


def test_without_processes_it_is_the_plain_layer():
    x = numbers([(2, CHANNELS, 3, 3)])[0]
    assert torch.equal(layer(InPlaceABNSync)(x.clone()), layer(InPlaceABN)(x.clone()))


# --------------------------------------------------------------------- blocks that are run again, or sharded


def blocks():
    norm = Norm("inplace_abn_sync")
    return {
        "identity basic": IdentityResidualBlock(8, (8, 8), norm),
        "identity projection": IdentityResidualBlock(8, (4, 4, 16), norm, stride=2, groups=2),
        "identity bottleneck": IdentityResidualBlock(8, (4, 4, 8), norm, dropout=0.1).eval().train(),
        "basic": ResidualBlock(8, (8, 8), norm),
        "projection": ResidualBlock(8, (4, 4, 16), norm, stride=2),
        "bottleneck": ResidualBlock(8, (4, 4, 8), norm),
    }


def make(name):
    torch.manual_seed(0)
    return blocks()[name].double()


def trained(rank, how, name):
    """(output, input gradient, parameter gradients, buffers) of a block on this process's part of the batch."""
    block = make(name)
    if how == "shard":
        fully_shard(block)
    elif how.startswith("ddp"):
        block = DistributedDataParallel(block)
    torch.manual_seed(rank)
    x = torch.randn(2, 8, 6, 6, dtype=torch.double, requires_grad=True)
    before = x.detach().clone()
    source = x * 1
    torch.manual_seed(7)
    if how.endswith("checkpoint"):
        z = checkpoint(block, source, use_reentrant=False)
    elif how.endswith("reentrant"):
        z = checkpoint(block, source, use_reentrant=True)
    else:
        z = block(source)
    z.pow(2).sum().backward()
    assert torch.equal(source.detach(), before), "the block has overwritten its own input"
    gradients = []
    for parameter in block.parameters():
        gradient = parameter.grad.full_tensor() if how == "shard" else parameter.grad
        if how in ("plain", "checkpoint", "reentrant"):
            gradient = gradient.clone()
            dist.all_reduce(gradient)
            gradient /= dist.get_world_size()
        gradients.append(gradient)
    return z.detach(), x.grad, gradients, [buffer.clone() for buffer in block.buffers()]


def all_ways(rank, world):
    return {
        (name, how): trained(rank, how, name)
        for name in blocks()
        for how in ("plain", "checkpoint", "reentrant", "shard", "ddp", "ddp checkpoint")
    }


def test_blocks_under_checkpoint_ddp_and_fully_shard(tmp_path):
    for found in run(all_ways, 2, tmp_path):
        for name in blocks():
            expected = found[name, "plain"]
            for how in ("checkpoint", "reentrant", "shard", "ddp", "ddp checkpoint"):
                for a, b in zip(found[name, how], expected, strict=True):
                    torch.testing.assert_close(
                        a, b, rtol=1e-12, atol=1e-12, msg=lambda t, how=how, name=name: f"{name} {how}: {t}"
                    )


class Bare(nn.Module):
    """A block that overwrites its own input."""

    def __init__(self):
        super().__init__()
        self.norm = InPlaceABN(8)
        self.conv = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        return self.conv(self.norm(x))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_block_that_overwrites_its_input_is_an_error(reentrant):
    x = torch.randn(2, 8, 4, 4, requires_grad=True) * 1
    with pytest.raises(RuntimeError, match="block under torch.utils.checkpoint.*overwrite=False"):
        checkpoint(Bare(), x, use_reentrant=reentrant).sum().backward()


def bare_sharded(rank, world):
    block = Bare()
    fully_shard(block)
    try:
        block(torch.randn(2, 8, 4, 4, requires_grad=True) * 1).sum().backward()
    except RuntimeError as error:
        return str(error)
    return "no error"


def test_a_sharded_block_that_overwrites_its_input_is_an_error(tmp_path):
    for message in run(bare_sharded, 2, tmp_path):
        assert "overwrite=False" in message
