"""Dropout with packed masks against torch's own, bit for bit, and what it keeps."""

import copy
import gc
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from segtrain.abn import InPlaceABN, recomputed_outputs
from segtrain.models import build_model, dropout
from segtrain.models.blocks import IdentityResidualBlock, Norm
from segtrain.models.dropout import ElementDropout
from segtrain.models.memory import Allocations, kept_bytes

KINDS = ElementDropout, nn.Dropout


def equal_bits(a, b):
    return a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a.nan_to_num(12345.0), b.nan_to_num(12345.0))


def compare(x, p=0.3, gradient=None):
    """Output, gradient and the next random number are torch's."""
    found = []
    for kind in KINDS:
        leaf = x.detach().requires_grad_()
        torch.manual_seed(4)
        out = kind(p)(leaf)
        after = torch.rand(1)
        dz = torch.randn(out.shape).to(out.dtype) if gradient is None else gradient
        out.backward(dz)
        found.append((out.detach(), leaf.grad, after))
    assert all(equal_bits(*pair) for pair in zip(*found, strict=True))
    return found[0]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=4), st.sampled_from([0.05, 0.3, 0.5, 0.9]),
    st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]), st.booleans(),
)  # fmt: skip
def test_equals_torch(shape, p, dtype, channels_last):
    torch.manual_seed(sum(shape))
    x = torch.randn(shape).to(dtype)
    compare(x.contiguous(memory_format=torch.channels_last) if channels_last and len(shape) == 4 else x, p)


@pytest.mark.parametrize(
    "view",
    [lambda x: x[..., ::2], lambda x: x.transpose(2, 3), lambda x: x[:, 1:], lambda x: x[:1].expand(3, 4, 10, 12)],
)
def test_strided_inputs_and_gradients(view):
    x = view(torch.randn(2, 4, 10, 12))
    compare(x)
    compare(x, gradient=torch.arange(x.shape[-1], dtype=torch.float32).expand(x.shape))


def test_infinities_and_nan():
    """What is dropped of an infinity is not a number, as with torch."""
    x = torch.full((2, 3, 8, 8), float("inf"))
    x[0, 0] = float("nan")
    out, dx, _ = compare(x, gradient=torch.full(x.shape, float("-inf")))
    assert out.isnan().any() and dx.isnan().any()


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_all_and_nothing_are_torchs(p):
    compare(torch.randn(2, 3, 5, 5), p)


def test_no_elements_and_no_gradient():
    compare(torch.randn(0, 3, 5, 5))
    x = torch.randn(2, 3, 5, 5)
    for module in (ElementDropout(0.3).eval(), ElementDropout(0.3, inplace=True), ElementDropout(0.3)):
        torch.manual_seed(4)
        ours = module(x.clone())
        torch.manual_seed(4)
        assert torch.equal(ours, nn.functional.dropout(x, 0.3, module.training)) and not ours.requires_grad


def test_a_packed_mask_is_read_again():
    """By a layout that a hand can follow: bit i is eighth i."""
    mask = torch.tensor([1, 0, 1, 1, 0, 0, 1, 0, 0, 1.0]).view(2, 5)
    bits = dropout.pack(mask)
    assert bits.tolist() == [[0b00001011, 0b00010010]]  # pairs 10 11 00 10 01
    again = torch.full((2, 5), 7.0)
    dropout.unpack_into(again, bits)
    assert torch.equal(again, mask)


def test_the_kernel_of_gpus_is_packed_too(monkeypatch):
    """torch has it on the CPU as well, where F.dropout does not use it."""
    monkeypatch.setattr(dropout, "one_kernel", lambda x: True)
    x = torch.randn(2, 3, 5, 7).contiguous(memory_format=torch.channels_last).requires_grad_()
    dz = torch.randn(2, 3, 5, 7)
    found = []
    for call in (ElementDropout(0.3), lambda x: torch.ops.aten.native_dropout(x, 0.3, True)[0]):
        torch.manual_seed(4)
        out = call(x)
        found.append((out.detach(), torch.autograd.grad(out, x, dz)[0]))
    assert all(equal_bits(*pair) for pair in zip(*found, strict=True))


# ------------------------------------------------------------------------------------------------ what is kept


def test_one_bit_per_element_is_kept():
    x = torch.randn(2, 8, 33, 31, requires_grad=True) * 1
    assert kept_bytes(lambda: ElementDropout(0.3)(x)) == 2 * 33 * 31
    assert kept_bytes(lambda: nn.Dropout(0.3)(x)) == x.nbytes


def bytes_after_forward(model, x):
    with Allocations() as allocations:
        with recomputed_outputs():
            out = model(x)
        gc.collect()
        return allocations.alive() - out.nbytes


@pytest.mark.parametrize(("keep", "more"), [("exact", 1 + 1 / 32), ("8bit", 1 / 32), ("4bit", 1 / 32)])
def test_beside_the_layers_output_the_bits_alone_are_kept(keep, more):
    """In fractions of a float32 map. Where the layer's output is kept in codes, dropout's output is made of those."""
    x = torch.randn(2, 8, 32, 32)
    found = []
    for extra in ([ElementDropout(0.3)], []):
        torch.manual_seed(0)
        found.append(
            bytes_after_forward(
                nn.Sequential(nn.Conv2d(8, 8, 1), InPlaceABN(8, keep=keep), *extra, nn.Conv2d(8, 8, 1)), x
            )
        )
    assert found[0] - found[1] == pytest.approx(more * x.nbytes, abs=0.005 * x.nbytes)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"backbone": "wider_resnet38", "backbone_options": {"drops": "element"}}, ["body.mod6", "body.mod7"]),
        ({"backbone": "resnet18", "head": "deeplabv3_torchvision"}, ["head"]),
    ],
)
def test_a_networks_masks_are_bits(options, names):
    """The parts with dropout keep a 32nd of a float32 map more than without, where outputs are kept in codes."""
    found, maps = [], []
    for p in (None, 0.0):
        with FakeTensorMode():
            model = build_model(keep="8bit", **options)
            drops = {n: m for n, m in model.named_modules() if isinstance(m, ElementDropout)}
            assert {n.removesuffix(".dropout").removesuffix(".block1.convs") for n in drops} == set(names)
            for module in drops.values():
                module.p = module.p if p is None else p
                module.register_forward_hook(lambda _, inputs, out: maps.append(out.numel()))
            images = torch.randn(2, 3, 64, 64).contiguous(memory_format=torch.channels_last)
            with Allocations() as allocations:
                out = model(images, upsample=False)
                gc.collect()
                found.append(allocations.alive())
            assert out.requires_grad
    assert found[0] - found[1] == sum(-(-size // 8) for size in maps[: len(names)]) > 0


# ------------------------------------------------------------------------------------------------ other uses


def gradients(kind, run, recompute="none", keep="exact", dtype=torch.float32):
    torch.manual_seed(0)
    norm = Norm("inplace_abn" if recompute == "none" else "abn", recompute=recompute, keep=keep)
    first = nn.Conv2d(3, 8, 3)
    block = IdentityResidualBlock(8, (8, 8), norm, dropout=0.3, drops="element")
    block.convs.dropout = kind(0.3)
    x = torch.randn(2, 3, 16, 18)
    torch.manual_seed(9)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32), recomputed_outputs():
        out = run(block, first(x))
    out.float().pow(2).sum().backward()
    return out.detach(), *(p.grad for module in (first, block) for p in module.parameters())


RUNS = {
    "plain": lambda block, x: block(x),
    "checkpoint": lambda block, x: checkpoint(block, x, use_reentrant=False),
    "reentrant checkpoint": lambda block, x: checkpoint(block, x, use_reentrant=True),
}


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recompute", ["none", "norm", "norm_proposed"])
def test_a_block_trains_as_with_torchs(recompute, dtype, run):
    """Also where backward computes dropout's output again, of the same mask."""
    ours, torchs = (gradients(kind, RUNS[run], recompute, dtype=dtype) for kind in KINDS)
    assert all(torch.equal(a, b) for a, b in zip(ours, torchs, strict=True))


@pytest.mark.parametrize(("keep", "most"), [("8bit", 0.01), ("4bit", 0.15)])
def test_with_codes_the_output_is_exact_and_the_mask_is_the_same(keep, most):
    ours, torchs = gradients(ElementDropout, RUNS["plain"], keep=keep), gradients(nn.Dropout, RUNS["plain"])
    torch.testing.assert_close(ours[0], torchs[0], rtol=1e-4, atol=1e-4)
    away, size = (torch.cat([t.flatten() for t in group]) for group in (ours[1:], torchs[1:]))
    assert (away - size).norm() < most * size.norm()


def test_backward_twice():
    x = torch.randn(2, 3, 5, 5, requires_grad=True)
    out = ElementDropout(0.5)(x).sum()
    first, second = (torch.autograd.grad(out, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second) and 0 < (first != 0).sum() < first.numel()


def test_copies_and_names():
    module = ElementDropout(0.5)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(other) is ElementDropout and repr(other) == repr(nn.Dropout(0.5))


def test_a_graph_has_torchs_dropout():
    torch.compiler.reset()
    x = torch.randn(2, 3, 6, 6, requires_grad=True)
    found = []
    for call in (nn.Dropout(0.3), torch.compile(ElementDropout(0.3), fullgraph=True, backend="aot_eager")):
        torch.manual_seed(4)
        out = call(x)
        found.append((out.detach(), torch.autograd.grad(out.pow(2).sum(), x)[0]))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    torch.compiler.reset()
