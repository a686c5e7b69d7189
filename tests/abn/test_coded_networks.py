"""Outputs kept in 8 or 4 bits inside networks: what nobody keeps, and what the layer is combined with."""

import gc

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from segtrain.abn import InPlaceABN, recomputed_outputs
from segtrain.abn.operators import primitives
from segtrain.models import build_model
from segtrain.models.dropout import ChannelDropout
from segtrain.models.memory import Allocations
from tests.helpers import processes

BITS = {"8bit": 8, "4bit": 4}


def chain(keep, seed=0, **options):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), InPlaceABN(8, keep=keep, **options), nn.Conv2d(8, 8, 3, bias=False),
        InPlaceABN(8, keep=keep, **options), nn.Conv2d(8, 2, 1),
    )  # fmt: skip


def run(model, x, recipes=None):
    model.zero_grad()
    with recomputed_outputs() as recipes:
        out = model(x)
    out.pow(2).sum().backward()
    return out.detach(), torch.cat([p.grad.flatten() for p in model.parameters()]), recipes


@pytest.mark.parametrize(("keep", "most"), [("8bit", 0.01), ("4bit", 0.15)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_output_is_exact_and_only_backward_sees_rounded_maps(backend, keep, most, dtype):
    x = torch.randn(2, 3, 24, 24)
    found = {}
    for kind in ("exact", keep):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            found[kind] = run(chain(kind), x)[:2]
    torch.testing.assert_close(
        found[keep][0], found["exact"][0], rtol=1e-4 if dtype == torch.float32 else 0.1, atol=1e-2
    )
    away = (found[keep][1] - found["exact"][1]).norm() / found["exact"][1].norm()
    assert 0 < away < most + (0.05 if dtype == torch.bfloat16 else 0)


def test_two_runs_are_equal_to_the_bit(backend):
    x = torch.randn(2, 3, 24, 24)
    (one, first, _), (other, second, _) = (run(chain("4bit"), x) for _ in range(2))
    assert torch.equal(one, other) and torch.equal(first, second)


# ------------------------------------------------------------------------------------------------ what is kept


def alive_after_forward(function) -> int:
    with Allocations() as allocations:
        out = function()
        gc.collect()
        return allocations.alive() - out.nbytes


@pytest.mark.parametrize(("keep", "share"), [("exact", 1), ("8bit", 1 / 4), ("4bit", 1 / 8)])
def test_an_output_is_kept_once_in_its_codes(keep, share):
    x = torch.randn(1, 8, 64, 64)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(8, 8, 1), InPlaceABN(8, keep=keep), nn.Conv2d(8, 8, 1), InPlaceABN(8, keep=keep), nn.Conv2d(8, 8, 1)
    )

    def forward():
        with recomputed_outputs():
            return model(x)

    one = x.nbytes
    assert alive_after_forward(forward) == pytest.approx(2 * share * one, abs=0.01 * one)


def kept_share(backbone, batch, crop, keep, norm="inplace_abn", **options):
    with FakeTensorMode():
        model = build_model(backbone, norm=norm, keep=keep, **options)
        images = torch.randn(batch, 3, crop, crop).contiguous(memory_format=torch.channels_last)
        return alive_after_forward(lambda: model(images, upsample=False)) + images.nbytes


@pytest.mark.parametrize(("keep", "most"), [("8bit", 0.17), ("4bit", 0.1)])
def test_a_network_keeps_no_map_in_full(keep, most):
    """But the images, and the classifier's logits."""
    assert kept_share("resnet18", 2, 256, keep) <= most * kept_share("resnet18", 2, 256, "exact", "batch_norm")


def test_deeplabv3plus_keeps_no_concatenation(backend):
    """Backward joins the fine and the coarse map again, the first from the early map's codes."""
    found = []
    for keep in ("exact", "8bit"):
        torch.manual_seed(0)
        options = {"head": "deeplabv3plus", "head_channels": 8, "output_stride": 16}
        model = build_model("resnet18", num_classes=3, keep=keep, **options)
        joined = []
        model.head.conv1.register_forward_pre_hook(
            lambda _, inputs, joined=joined: joined.append(StorageWeakRef(inputs[0].untyped_storage()))
        )
        out = model(torch.randn(2, 3, 64, 96), upsample=False)
        gc.collect()
        assert joined[0].expired() == (keep != "exact")
        out.pow(2).sum().backward()
        found.append(model.head.conv1.weight.grad)
    assert 0 < (found[0] - found[1]).norm() < 0.03 * found[0].norm()


def test_maps_that_several_layers_read_are_rebuilt_once(backend):
    """As the head's input is, which five branches read, one after the other."""
    torch.manual_seed(0)
    branches = [nn.Conv2d(8, 4, 3, padding=1) for _ in range(5)]
    first, norm = nn.Conv2d(3, 8, 3), InPlaceABN(8, keep="8bit")
    with recomputed_outputs() as recipes:
        z = norm(first(torch.randn(1, 3, 16, 16)))
        out = torch.cat([branch(z) for branch in branches], 1)
        del z
    out.sum().backward()
    assert recipes.latest.count == 1
    assert recipes.latest.made is None, "it is freed by the layer's own backward"
    assert recipes.known == {}


class Searching:
    """The operators, but with ranges searched for in the sum, as if the shortcut's were not known."""

    def __init__(self, x):
        self.ops = primitives(x)

    def __getattr__(self, name):
        function = getattr(self.ops, name)
        return (lambda *arguments: function(*arguments[:8])) if name.startswith("encode") else function


@pytest.mark.parametrize("activation", ["leaky_relu", "elu"])
@pytest.mark.parametrize("keep", BITS)
def test_a_coded_shortcut_is_read_from_its_codes(backend, keep, activation, monkeypatch):
    """As in a residual block. The layer's backward does not rebuild it; the gradients are the same as if it did."""
    from segtrain.abn import coded

    x = torch.randn(2, 3, 16, 18)
    found = []
    monkeypatch.setattr(coded, "primitives", Searching)
    for read in (coded.read_from_codes, lambda *_: None):
        monkeypatch.setattr(coded, "read_from_codes", read)
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 4, 1)]
        norms = [InPlaceABN(8, keep=keep, activation=activation) for _ in range(2)]
        with recomputed_outputs() as recipes:
            z = norms[0](layers[0](x))
            out = layers[2](norms[1](layers[1](z), z))
            del z
        out.pow(2).sum().backward()
        gradients = [p.grad.flatten() for layer in (*layers, *norms) for p in layer.parameters()]
        found.append((recipes.latest.count, torch.cat(gradients)))
    assert [count for count, _ in found] == [2, 3]
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-5, atol=1e-5)


def test_pooling_and_dropout_keep_nothing_beside_the_codes(backend):
    from segtrain.models.pooling import MaxPool2d

    for extra in (MaxPool2d(3, 2, 1), ChannelDropout(0.5)):
        found = []
        for keep in ("exact", "8bit"):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Conv2d(3, 8, 3), InPlaceABN(8, keep=keep), extra, nn.Conv2d(8, 8, 1))
            x = torch.randn(2, 3, 34, 34)
            found.append(run(model, x)[:2])
            assert run(model, x)[2].latest.count == (keep == "8bit")
        torch.testing.assert_close(*(out for out, _ in found), rtol=1e-4, atol=1e-5)
        assert (found[0][1] - found[1][1]).norm() < 0.01 * found[0][1].norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_channel_dropout_is_torchs_to_the_bit(dtype):
    x = torch.randn(3, 8, 5, 5).to(dtype).requires_grad_()
    for keep in ("exact", "8bit"):
        made = []
        with recomputed_outputs() as recipes:
            z = InPlaceABN(8, keep=keep)(x * 1)
            for dropout in (nn.Dropout2d(0.3), ChannelDropout(0.3)):
                torch.manual_seed(5)
                out = dropout(z)
                made.append((out, torch.rand(1)))
                assert (recipes.find(out) is not None) == (keep == "8bit" and type(dropout) is ChannelDropout)
        (plain, after), (ours, later) = made
        assert torch.equal(plain, ours) and torch.equal(after, later)
        assert torch.equal(*(torch.autograd.grad(one.sum(), x, retain_graph=True)[0] for one in (plain, ours)))


# ------------------------------------------------------------------------------------------------ other uses


def test_without_interception_the_layer_is_the_exact_one(backend):
    x = torch.randn(2, 3, 24, 24)
    out = chain("8bit")(x)
    wanted = chain("exact")(x)
    assert torch.equal(out, wanted)
    with torch.no_grad(), recomputed_outputs():
        assert torch.equal(chain("8bit")(x), wanted)


def test_an_output_that_is_written_to_is_kept(backend):
    """The rebuilt map would be that of before."""
    torch.manual_seed(0)
    x, second = torch.randn(2, 8, 12, 12), nn.Conv2d(8, 4, 1)
    found = []
    for keep in ("exact", "4bit"):
        second.zero_grad()
        with recomputed_outputs():
            z = InPlaceABN(8, keep=keep)(x.clone().requires_grad_() * 1)
            z = z.detach().mul_(3)
            out = second(z)
        out.sum().backward()
        found.append(second.weight.grad.clone())
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


def test_a_part_of_a_larger_tensor_is_not_taken_for_the_whole(backend):
    """Recipes go by memory: an output written over a part of a tensor is not coded."""
    torch.manual_seed(0)
    whole = torch.randn(4, 8, 12, 12)
    found = []
    for keep in ("exact", "8bit"):
        torch.manual_seed(0)
        conv = nn.Conv2d(8, 4, 1)
        both = whole.clone().requires_grad_() * 1
        with recomputed_outputs() as recipes:
            z = InPlaceABN(8, keep=keep)(both[:2])
            assert recipes.find(z) is None
            out = conv(both[2:]).pow(2).sum() + conv(z).pow(2).sum()
        out.backward()
        found.append(conv.weight.grad)
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-6)


def test_backward_twice_and_in_parts(backend):
    x = torch.randn(2, 3, 24, 24)
    model = chain("8bit")
    with recomputed_outputs():
        out = model(x).pow(2).sum()
    parameters = list(model.parameters())
    whole = torch.autograd.grad(out, parameters, retain_graph=True)
    again = torch.autograd.grad(out, parameters, retain_graph=True)
    last = torch.autograd.grad(out, parameters[-1:], retain_graph=True)
    middle = torch.autograd.grad(out, parameters[3:4])
    for one, other in ((whole, again), (whole[-1:], last), (whole[3:4], middle)):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("keep", ["exact", *BITS])
def test_under_checkpointing_the_block_input_alone_is_kept(backend, keep):
    """Inside a checkpointed block nothing is coded, in forward as in its repetition; its input is."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 24, 24)
    first = nn.Sequential(nn.Conv2d(3, 8, 3), InPlaceABN(8, keep=keep))
    block = nn.Sequential(nn.Conv2d(8, 8, 3), InPlaceABN(8, keep=keep), nn.Conv2d(8, 8, 1))
    gradients = []
    for call in (lambda z: checkpoint(block, z, use_reentrant=False), block):
        for module in (first, block):
            module.zero_grad()
        with recomputed_outputs() as recipes:
            out = call(first(x))
        out.pow(2).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for m in (first, block) for p in m.parameters()]))
        if keep != "exact":
            assert recipes.latest.count >= 1
    assert (gradients[0] - gradients[1]).norm() <= (0 if keep == "exact" else 0.15) * gradients[1].norm()


def test_frozen_layers_keep_no_codes(backend):
    """Without a gradient to compute, the layer is the exact one, and nothing is kept."""
    model = chain("8bit")
    for p in model[:4].parameters():
        p.requires_grad_(False)
    out, gradient, recipes = run_last(model)
    assert recipes.latest.count == 0 and gradient.abs().sum() > 0


@pytest.mark.parametrize(("used", "frozen", "rebuilt"), [(3, (), 1), (1, (0,), 0), (2, (0, 1), 0), (3, (0, 2), 1)])
def test_frozen_convolutions_do_not_rebuild_their_input(backend, used, frozen, rebuilt):
    """Their gradient needs only its layout. Another convolution that reads the same map rebuilds it, once."""
    torch.manual_seed(0)
    first, norm = nn.Conv2d(3, 8, 3), InPlaceABN(8, keep="8bit")
    convs = [nn.Conv2d(8, 4, 3, padding=1) for _ in range(used)]
    trained = [first.weight, norm.weight, norm.bias, *(conv.bias for conv in convs)]
    x = torch.randn(2, 3, 16, 18).contiguous(memory_format=torch.channels_last)
    for half in (False, True):
        gradients = []
        for without in ((), frozen):
            for number, conv in enumerate(convs):
                conv.weight.requires_grad_(number not in without)
            with recomputed_outputs() as recipes, torch.autocast("cpu", torch.bfloat16, enabled=half):
                z = norm(first(x))
                out = sum(conv(z).float().pow(2).sum() for conv in convs)
                del z
            gradients.append(torch.autograd.grad(out, [*trained, *(c.weight for c in convs if c.weight.requires_grad)]))
        assert recipes.latest.count == rebuilt
        assert all(torch.equal(a, b) for a, b in zip(*(found[: len(trained)] for found in gradients), strict=True))


def run_last(model):
    with recomputed_outputs() as recipes:
        out = model(torch.randn(2, 3, 24, 24))
    out.sum().backward()
    return out, model[-1].weight.grad, recipes


def test_frozen_statistics_with_gradients(backend):
    """In eval mode the ranges are those of the map at hand."""
    x = torch.randn(2, 3, 24, 24)
    found = []
    for keep in ("exact", "8bit"):
        model = chain(keep)
        for layer in (model[1], model[3]):
            layer.running_mean.fill_(0.2)
            layer.running_var.fill_(0.5)
        found.append(run(model.eval(), x)[1])
    assert 0 < (found[0] - found[1]).norm() < 0.01 * found[0].norm()


def in_two_processes(rank, world):
    from torch.nn.parallel import DistributedDataParallel

    from segtrain.abn import InPlaceABNSync

    found = {}
    for keep in ("exact", "8bit"):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3, bias=False), InPlaceABNSync(8, keep=keep), nn.Conv2d(8, 8, 3),
            InPlaceABNSync(8, keep=keep), nn.Conv2d(8, 2, 1),
        )  # fmt: skip
        wrapped = DistributedDataParallel(model)
        x = torch.randn(2 * world, 3, 16, 16, generator=torch.Generator().manual_seed(1))[rank::world]
        with recomputed_outputs():
            out = wrapped(x)
        out.pow(2).sum().backward()
        found[keep] = torch.cat([p.grad.flatten() for p in model.parameters()])
    return found


def test_synchronised_and_data_parallel(tmp_path):
    first, second = processes.run(in_two_processes, 2, tmp_path)
    assert torch.equal(first["8bit"], second["8bit"])
    assert 0 < (first["8bit"] - first["exact"]).norm() < 0.01 * first["exact"].norm()


@pytest.mark.parametrize("backbone", ["resnet18", "resnext50", "wider_resnet38", "densenet264"])
@pytest.mark.slow
def test_every_family_trains_a_step(backbone):
    torch.manual_seed(0)
    found = []
    for keep in ("exact", "8bit"):
        torch.manual_seed(0)
        model = build_model(backbone, num_classes=3, keep=keep, head_channels=16).train()
        torch.manual_seed(1)
        model(torch.randn(2, 3, 64, 64)).pow(2).sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert (found[0] - found[1]).norm() < 0.2 * found[0].norm()
