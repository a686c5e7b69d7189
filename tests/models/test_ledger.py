"""The ledger of allocations: hand-worked peaks, freed memory, modules, and what it reads out of fake tensors."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from segtrain.models.ledger import OUTSIDE, Ledger, bytes_of, on_fake_tensors


def test_peaks_by_hand():
    """Sizes in elements of 4 bytes: a = 10, b = 20, their freed sum leaves the peak of its phase behind."""
    with FakeTensorMode(), Ledger(granule=1) as ledger:
        ledger.begin("first")
        a = torch.empty(10)
        b = torch.empty(20)  # 30 alive
        del a  # 20
        ledger.begin("second")
        c = torch.empty(5)  # 25, a view adds nothing
        d = c.view(5, 1).add_(1)
        ledger.begin("first")  # 25 at its beginning
        del b, c, d
    assert {name: size for name, (size, _) in ledger.peaks().items()} == {"first": 30 * 4, "second": 25 * 4}
    assert ledger.alive_after(len(ledger.events) - 1) == set()
    assert ledger.size(ledger.alive_after(ledger.peaks()["second"][1])) == 25 * 4


def test_sizes_are_rounded_up_to_the_granule():
    with FakeTensorMode(), Ledger(granule=512) as ledger:
        ledger.begin("all")
        held = [torch.empty(1), torch.empty(128), torch.empty(129)]  # 4, 512 and 516 bytes
    assert len(held) == 3
    assert ledger.peaks()["all"][0] == 512 + 512 + 1024


def test_what_was_there_before_is_not_followed():
    with FakeTensorMode():
        before = torch.empty(100)
        with Ledger(1, [before]) as ledger:
            ledger.begin("all")
            before.add_(1)
            new = before + 1
    assert ledger.peaks()["all"][0] == bytes_of([new, new.view(10, 10)], 1) == 400


def test_numbers_read_out_are_bounds_of_counts():
    with FakeTensorMode(), Ledger():
        mask = torch.empty(30, dtype=torch.bool)
        assert int(mask.sum()) == 30
        assert int(torch.empty(30, dtype=torch.int64).max()) == 0
        assert torch.empty(30).topk(int(mask.sum())).values.shape == (30,)


def test_real_and_fake_tensors_give_the_same_ledger():
    """A network on fake tensors allocates what it does on real ones, and frees it in the same order."""
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.LeakyReLU(0.1, inplace=True), nn.Conv2d(8, 4, 1))

    def step(model):
        with Ledger(1, [*model.parameters(), *model.buffers()]) as ledger:
            ledger.begin("forward")
            with ledger.attributing(model):
                out = model(torch.zeros(2, 3, 16, 16))
            ledger.begin("backward")
            out.sum().backward()
        model.zero_grad()
        return ledger

    real = step(network)
    with FakeTensorMode():
        on_fake_tensors(network)
        fake = step(network)
    assert [block.size for block in fake.blocks] == [block.size for block in real.blocks]
    assert fake.peaks() == real.peaks()
    assert fake.peaks()["forward"][0] >= 2 * 3 * 16 * 16 * 4 + 2 * 2 * 8 * 14 * 14 * 4  # image, two maps


def test_contents_belong_to_the_last_layer_that_wrote_them():
    network = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(inplace=True), nn.Sequential(nn.Conv2d(8, 4, 1)))
    with FakeTensorMode():
        on_fake_tensors(network)
        with Ledger(1, list(network.parameters())) as ledger:
            image = torch.empty(1, 3, 4, 4)
            with ledger.attributing(network):
                hidden = network[1](network[0](image))
                out = network[2](hidden)
            numbers = ledger.numbers([image, hidden, out])
    found = ledger.by_module(numbers, network)
    assert found == {
        (OUTSIDE, "loss"): 3 * 16 * 4, ("1", "ReLU output"): 8 * 16 * 4, ("2.0", "Conv2d output"): 4 * 16 * 4,
    }  # fmt: skip


@pytest.mark.parametrize("shared", [False, True])
def test_a_network_on_fake_tensors_keeps_its_ties(shared):
    with torch.device("meta"):
        network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    if shared:
        network[1].weight = network[0].weight
    with FakeTensorMode():
        on_fake_tensors(network)
        assert (network[0].weight is network[1].weight) == shared
        assert len(list(network.parameters())) == 4 - shared
        assert network(torch.empty(2, 4)).shape == (2, 4)
