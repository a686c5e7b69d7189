"""Outputs kept in 8 or 4 bits: the format, gradients against formulas of their own, and what nobody keeps."""

import gc
import math

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from segtrain.abn import InPlaceABN, recomputed_outputs
from segtrain.abn import coded_operators as operators
from segtrain.abn.backends.aten import LAYOUTS
from segtrain.abn.backends.codes import Coded
from segtrain.models import BACKBONES, build_model
from segtrain.models.blocks import ChannelDropout
from segtrain.models.memory import Allocations
from tests.helpers import processes

ops = torch.ops.segtrain_abn
BITS = {"8bit": 8, "4bit": 4}
LINEAR = 2, 0.0  # the number and parameter of the activation `identity`
SHAPES = [(2, 3, 5, 7), (3, 5, 4, 4), (4, 6), (2, 3, 3, 2, 5), (1, 1, 1, 9), (2, 16, 40, 33), (2, 5, 70, 61)]


def maps(shape, dtype=torch.float32, seed=0):
    """The same numbers in every memory layout of the shape."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3 + 0.5
    yield x.to(dtype)
    if len(shape) in LAYOUTS:
        yield x.to(dtype).contiguous(memory_format=LAYOUTS[len(shape)])


def coded(y, bits, activation=LINEAR):
    """(z, Coded) of a map y, which is not changed."""
    one = torch.ones(y.shape[1], dtype=torch.float64 if y.dtype == torch.float64 else torch.float32)
    z, codes, ranges = ops.encode(y, one, torch.zeros_like(one), *activation, None, bits)
    return z, Coded(codes, ranges, bits, list(z.shape), list(z.stride()))


def rebuilt(found, dtype=torch.float32, activation=LINEAR):
    return ops.decode(*found, dtype, *activation)


# ------------------------------------------------------------------------------------------------ the format


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rebuilt_values_are_within_half_a_cell_and_keep_their_sign(backend, shape, bits, dtype):
    for y in maps(shape, dtype):
        z, found = coded(y, bits)
        assert found.codes.numel() == math.prod(found.codes.shape[:1]) * math.ceil(
            (y.numel() / found.codes.shape[0]) * bits / 8
        )
        back = rebuilt(found, torch.float64 if dtype == torch.float64 else torch.float32)
        assert back.stride() == y.stride() and torch.equal(z, y)
        apart = bits == 4 and y[0, 0].numel() >= 64
        axes = [axis for axis in range(y.dim()) if axis != 1 and not (apart and axis == 0)]
        wide = y.double().amax(axes, keepdim=True) - y.double().amin(axes, keepdim=True)
        assert ((back.double() - y.double()).abs() <= 0.5001 * wide / (2**bits - 1)).all()
        inside = (y.amin(axes, keepdim=True) < 0) & (y.amax(axes, keepdim=True) > 0) & (y != 0)
        assert (back.sign() == y.sign())[inside].all()
        assert max(len(plane.unique()) for image in back for plane in image[:, None]) <= 2**bits


@pytest.mark.parametrize("bits", [8, 4])
def test_both_back_ends_write_the_same_codes(bits):
    from segtrain import abn

    for y in maps((2, 5, 17, 9)):
        found = []
        for backend in ("aten", "native"):
            abn.use_backend(backend)
            found.append(coded(y, bits)[1])
        abn.use_backend("auto")
        assert torch.equal(found[0].codes, found[1].codes)
        torch.testing.assert_close(found[0].ranges, found[1].ranges, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bits", [8, 4])
def test_degenerate_ranges(backend, bits):
    """Constants come back exactly, ranges far from zero as finely as others, nan and infinity as nan."""
    y = torch.randn(2, 8, 9, 8)
    y[:, 0] = 7.25
    y[:, 1] = 0
    y[:, 2] = y[:, 2].abs() + 1000
    y[:, 3] = -y[:, 3].abs() - 1000
    y[0, 4, 1, 1], y[0, 5, 2, 2], y[0, 6, 0, 0] = math.inf, math.nan, -math.inf
    y[:, 7] *= 1e-42
    for x in (y, y.contiguous(memory_format=torch.channels_last)):
        back = rebuilt(coded(x, bits)[1])
        assert torch.equal(back[:, :2], y[:, :2])
        for c in (2, 3):
            wide = y[:, c].max() - y[:, c].min()
            assert (back[:, c] - y[:, c]).abs().max() <= 0.51 * wide / (2**bits - 1) + 2 * 1000 * 2**-23
        planes = slice(None) if bits == 8 else slice(0, 1)  # a sample has ranges of its own in 4 bits
        assert back[planes, 4:7].isnan().all()
        assert back[1:, 4:7].isfinite().all() == (bits == 4)
        assert (back[:, 7] - y[:, 7]).abs().max() <= 1e-38


def test_what_a_half_type_cannot_hold_is_rebuilt_as_it_was(backend):
    """y beyond float16's range: z is infinite, and so is the rebuilt one, or (aten, which codes rounded values) nan."""
    x = torch.linspace(-4, 4, 64).view(1, 1, 8, 8).half().repeat(2, 2, 1, 1)
    scale = torch.tensor([1e5, 1.0])
    z, codes, ranges = ops.encode(x, scale, torch.zeros(2), 0, 0.01, None, 8)
    back = ops.decode(codes, ranges, 8, list(z.shape), list(z.stride()), torch.float16, 0, 0.01)
    assert z[:, 0].isinf().any() and back[:, 1].isfinite().all()
    if backend == "native":
        assert not back.isnan().any() and torch.equal(back.isinf(), z.isinf())
    else:
        assert back[:, 0].isnan().all()


# ------------------------------------------------------------------------------------------------ gradients


def expected(x, dz, layer, decoded, shortcut):
    """(dx, dweight, dbias, dshortcut) in float64 by the formulas of the paper's section 3.2, from rounded y."""
    axes = [axis for axis in range(x.dim()) if axis != 1]
    view = (1, -1, *(1,) * (x.dim() - 2))
    x, dz, y = x.double(), dz.double(), decoded.double()
    gamma, beta = (layer.weight.abs() + layer.eps).double().view(view), layer.bias.double().view(view)
    rstd = (x.var(axes, correction=0, keepdim=True) + layer.eps).rsqrt()
    param = layer.activation_param
    slope = {"leaky_relu": param, "identity": 1.0}.get(layer.activation, param * y.exp())
    dy = torch.where(y > 0, dz, dz * slope)
    xhat = (y - beta - (0 if shortcut is None else shortcut.double())) / gamma
    dgamma, dbeta = (dy * xhat).sum(axes, keepdim=True), dy.sum(axes, keepdim=True)
    count = x.numel() / x.shape[1]
    dx = gamma * rstd * (dy - dbeta / count - xhat * dgamma / count)
    return dx, (dgamma.flatten() * layer.weight.sign()), dbeta.flatten(), dy


@pytest.mark.parametrize("with_shortcut", [False, True])
@pytest.mark.parametrize("activation", ["leaky_relu", "elu", "identity"])
@pytest.mark.parametrize("keep", BITS)
def test_gradients_are_those_of_the_rounded_map(backend, keep, activation, with_shortcut):
    torch.manual_seed(0)
    for shape in ((3, 5, 9, 7), (4, 5), (2, 5, 64, 48)):
        for x in maps(shape):
            layer = InPlaceABN(5, activation=activation, activation_param=0.3, keep=keep)
            with torch.no_grad():
                layer.weight.copy_(torch.tensor([1.2, -0.6, 0.3, -1.4, 0.7]))
                layer.bias.copy_(torch.linspace(-1, 1, 5))
            leaf = x.clone().requires_grad_()
            shortcut = torch.randn_like(x).requires_grad_() if with_shortcut else None
            with recomputed_outputs() as recipes:
                z = layer(leaf * 1, shortcut)
                recipe = recipes.find(z)
            dz = torch.randn_like(z)
            decoded = ops.decode(*recipe.coded, torch.float64 if x.dtype == torch.float64 else torch.float32, *LINEAR)
            z.backward(dz)
            wanted = expected(x, dz, layer, decoded, shortcut)
            found = leaf.grad, layer.weight.grad, layer.bias.grad, None if shortcut is None else shortcut.grad
            for one, other in zip(found, wanted, strict=True):
                if one is not None:
                    assert (one - other).norm() <= 2e-5 * other.norm()


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
        both = whole.clone()
        leaf = torch.zeros(1, requires_grad=True)
        with recomputed_outputs():
            part = both[:2]
            out = conv(both[2:] + leaf).sum() + conv(InPlaceABN(8, keep=keep)(part + 0)).sum()
        out.backward()
        found.append(conv.weight.grad)
    assert (found[0] - found[1]).norm() < 0.01 * found[0].norm()


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


def test_operators_are_well_defined(backend):
    """Schemas, fake counterparts and autograd registration, by torch's own check."""
    x = torch.randn(2, 4, 6, 6)
    one, zero = torch.ones(4), torch.zeros(4)
    _, codes, ranges = ops.encode(x, one, zero, 0, 0.01, None, 4)
    where = codes, ranges, 4, list(x.shape), list(x.stride())
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    for name, arguments in {
        "encode": (x, one, zero, 0, 0.01, None, 4),
        "encode_": (x.clone(), one, zero, 0, 0.01, None, 8),
        "decode": (*where, torch.float32, 0, 0.01),
        "coded_sums": (*where, x, zero, one, 0, 0.01, None),
        "coded_gradient": (*where, x, zero, one, 0, 0.01, x.clone(), one, torch.zeros(2, 4), True),
        "coded_backward": (*where, x, zero, one, 0, 0.01, None, one, False),
    }.items():
        torch.library.opcheck(getattr(ops, name).default, arguments, test_utils=tests)


@pytest.mark.parametrize(
    "backbone", sorted(set(BACKBONES) & {"resnet18", "resnext50", "wider_resnet38", "densenet264"})
)
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


def test_operators_module():
    assert operators.library.ns == "segtrain_abn"
