"""A network sharded by FSDP2 against the same network under DDP, on two gloo processes."""

import copy

import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from segtrain.models import Segmenter, sharded
from segtrain.models.blocks import IdentityResidualBlock, Norm, ResidualBlock, stage
from segtrain.models.deeplabv3 import DeepLabV3
from tests.helpers.processes import run

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def network(norm):
    torch.manual_seed(0)
    layers = Norm(norm)
    body = stage(
        IdentityResidualBlock(3, (4, 4), layers, stride=2), IdentityResidualBlock(4, (4, 4, 8), layers),
        ResidualBlock(8, (4, 4, 8), layers, stride=2), ResidualBlock(8, (8, 8), layers),
    )  # fmt: skip
    return Segmenter(body, DeepLabV3(8, 4, layers, 16), 4, 3).double()


def trained(model, optimizer, seed, steps=2):
    """Logits of the last of several steps on this process's images."""
    for step in range(steps):
        x = torch.randn(2, 3, 32, 32, dtype=torch.double, generator=torch.Generator().manual_seed(10 * step + seed))
        optimizer.zero_grad()
        out = model(x, upsample=False)
        out.square().mean().backward()
        optimizer.step()
    return out.detach()


def sgd(model):
    return torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-3)


def both(rank, world):
    found = {}
    for norm in ("inplace_abn_sync", "inplace_abn"):
        plain, model = network(norm), network(norm)
        ddp = DistributedDataParallel(plain)
        keys = list(model.state_dict())
        sharded(model)
        assert list(model.state_dict()) == keys
        parameters = list(model.parameters())
        assert all(isinstance(parameter, DTensor) for parameter in parameters)
        assert sum(p.to_local().numel() for p in parameters) < 0.6 * sum(p.numel() for p in parameters)
        first, second = sgd(plain), sgd(model)
        logits = trained(ddp, first, rank), trained(model, second, rank)
        state = get_model_state_dict(model, options=WHOLE)
        moments = get_optimizer_state_dict(model, second, options=WHOLE)
        want = get_model_state_dict(plain, options=WHOLE), get_optimizer_state_dict(plain, first, options=WHOLE)
        state, moments, want = copy.deepcopy((state, moments, want))  # on the CPU torch gives the live tensors
        # and back, into a fresh sharded model on every process from rank 0's file, which then goes the same way on
        again = network(norm)
        sharded(again)
        third = sgd(again)
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        # copies: torch puts its shards into the dictionaries that it is given
        set_model_state_dict(again, copy.deepcopy(state), options=options)
        set_optimizer_state_dict(again, third, copy.deepcopy(moments), options=options)
        went_on = trained(ddp, first, rank + 5), trained(again, third, rank + 5)
        found[norm] = keys, logits, (state, want[0]), (moments, want[1]), went_on
    return found


def flat(state):
    return {(name, key): value for name, entry in state.items() for key, value in entry.items()}


def test_a_sharded_network_trains_as_ddp_does_and_its_state_is_the_plain_one(tmp_path):
    for rank, found in enumerate(run(both, 2, tmp_path)):
        for keys, logits, states, moments, went_on in found.values():
            torch.testing.assert_close(*logits, rtol=1e-9, atol=1e-10)
            torch.testing.assert_close(*went_on, rtol=1e-9, atol=1e-10)
            if rank == 0:  # the others get nothing
                assert list(states[0]) == list(states[1]) == keys
                assert moments[0]["state"].keys() == moments[1]["state"].keys()
                for found_, want in (states, [flat(m["state"]) for m in moments]):
                    for name, a in want.items():
                        torch.testing.assert_close(found_[name], a, rtol=1e-9, atol=1e-10)
