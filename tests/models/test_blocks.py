"""The convolutions of the blocks: the replacement of a kernel of torch that corrupts the heap."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

from segtrain.abn.convert.fold import CONVOLUTIONS
from segtrain.models import BACKBONES
from segtrain.models.blocks import VECTOR, NarrowConv2d, Norm, conv
from tests.helpers.checkout import environment

# The case of torch 2.14.1: a strided 1x1 convolution of few channels, channels last. A child process for each kind.
BACKWARDS = """
import os, sys, torch
from torch import nn
from segtrain.models.blocks import conv
torch.set_num_threads(1)
for make in sys.argv[1:]:
    child = os.fork()
    if not child:
        os.close(2)
        for turn in range(20):
            channels = (3, 8, 12, 15)[turn % 4]
            layer = eval(make)(channels, 16, 1, 2).to(memory_format=torch.channels_last)
            x = torch.randn(2, channels, 128, 128).contiguous(memory_format=torch.channels_last).requires_grad_()
            layer(x).square().sum().backward()
            assert x.grad.isfinite().all() and layer.weight.grad.isfinite().all()
        os._exit(0)
    print(make, os.waitpid(child, 0)[1])
"""


def test_twenty_backward_passes_of_the_case_that_kills_torch():
    done = subprocess.run(
        [sys.executable, "-c", BACKWARDS, "conv"], env=environment(), capture_output=True, text=True, timeout=120,
        check=True,
    )  # fmt: skip
    assert done.stdout == "conv 0\n"


@pytest.mark.parametrize("channels", [3, 8, 12, 15])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("extent", [(8, 12), (16, 24), (17, 23), (1, 1)])  # too small for torch's own to go wrong
def test_narrow_convolution_equals_torchs(channels, memory_format, extent):
    torch.manual_seed(0)
    plain = nn.Conv2d(channels, 16, 1, 2, bias=False).to(memory_format=memory_format)
    ours = conv(channels, 16, 1, 2).to(memory_format=memory_format)
    assert type(ours) is NarrowConv2d
    assert ours.load_state_dict(plain.state_dict())
    images = torch.randn(2, channels, *extent).contiguous(memory_format=memory_format)
    first, second = images.clone().requires_grad_(), images.clone().requires_grad_()
    want, found = plain(first), ours(second)
    gradient = torch.randn_like(want)
    want.backward(gradient)
    found.backward(gradient)
    assert found.stride() == want.stride()
    assert torch.equal(found, want)
    assert torch.equal(second.grad, first.grad)
    torch.testing.assert_close(ours.weight.grad, plain.weight.grad, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(ours(images), plain(images))


def test_a_narrow_convolution_differentiates_as_torchs():
    layer = conv(3, 4, 1, 2)
    x = torch.randn(2, 3, 5, 4, requires_grad=True)
    found = []
    for forward in (layer, lambda x: nn.functional.conv2d(x, layer.weight, None, 2)):
        (first,) = torch.autograd.grad(forward(x).pow(3).sum(), layer.weight, create_graph=True)
        found.append([first.detach(), *torch.autograd.grad(first.pow(2).sum(), [x, layer.weight])])
    torch.testing.assert_close(*found)
    layer.weight.requires_grad_(False)
    (dx,) = torch.autograd.grad(layer(x).sum(), x)
    assert torch.equal(dx, torch.autograd.grad(nn.functional.conv2d(x, layer.weight, None, 2).sum(), x)[0])
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
        layer(x).sum().backward()


@pytest.mark.parametrize("name", sorted(BACKBONES))
def test_published_networks_have_no_narrow_convolution(name):
    with torch.device("meta"):
        body = BACKBONES[name](Norm(), 32)
    assert not [module for module in body.modules() if isinstance(module, NarrowConv2d)]


def test_only_narrow_strided_convolutions_are_replaced():
    kinds = {
        (8, 16, 1, 2): NarrowConv2d, (VECTOR - 1, 16, 1, 2): NarrowConv2d, (VECTOR, 16, 1, 2): nn.Conv2d,
        (8, 16, 1, 1): nn.Conv2d, (8, 16, 3, 2): nn.Conv2d,
    }  # fmt: skip
    for arguments, kind in kinds.items():
        assert type(conv(*arguments)) is kind
    layer, plain = conv(8, 16, 1, 2), nn.Conv2d(8, 16, 1, 2, bias=False)
    assert repr(layer) == repr(plain)
    assert isinstance(layer, nn.Conv2d)
    assert layer.stands_for in CONVOLUTIONS
    assert list(layer.state_dict()) == list(plain.state_dict())
    assert type(copy.deepcopy(layer)) is NarrowConv2d


def test_a_narrow_convolution_compiles_and_exports():
    layer, x = conv(8, 16, 1, 2), torch.randn(2, 8, 9, 9)
    want = layer(x)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), want)
    torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), want)
