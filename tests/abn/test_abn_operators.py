"""What torch requires of an operator: compilation, schemas, fake tensors, autocast, half-precision parameters."""

import pytest
import torch
from torch import nn

from segtrain.abn import InPlaceABN


def network():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), InPlaceABN(8), nn.Conv2d(8, 8, 3, bias=False), InPlaceABN(8, variant="two"),
        nn.Conv2d(8, 2, 1),
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
def test_torch_compile_of_a_block_without_a_break(training):
    torch.manual_seed(0)
    model = network().train(training)
    compiled = torch.compile(model, fullgraph=True)
    x = torch.randn(2, 3, 12, 12)
    found = []
    for module in (model, compiled):
        model.zero_grad()
        state = {k: v.clone() for k, v in model.state_dict().items()}
        out = module(x.clone())
        out.pow(2).sum().backward()
        found.append(
            [out.detach(), *(p.grad.clone() for p in model.parameters()), *(b.clone() for b in model.buffers())]
        )
        model.load_state_dict(state)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


OPCHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("channels_last", [False, True])
def test_opcheck(backend, channels_last):
    def t():
        made = torch.randn(2, 3, 4, 5)
        return made.contiguous(memory_format=torch.channels_last) if channels_last else made

    c = [torch.rand(3) + 0.5 for _ in range(6)]
    ops = torch.ops.segtrain_abn
    for operator, arguments in [
        (ops.forward, (t(), c[0], c[1], c[2], c[3], 0.1, 1e-5, 0, 0.01, None)),
        (ops.forward_, (t(), c[0], c[1], None, None, 0.1, 1e-5, 1, 0.5, t())),
        (ops.statistics, (t(),)),
        (ops.normalise, (t(), c[0], c[1], 0, 0.01, None)),
        (ops.normalise_, (t(), c[0], c[1], 2, 0.0, t())),
        (ops.sums, (t(), t(), c[0], c[1], 0, 0.01, None, c[2], c[3])),
        (ops.gradient, (t(), t(), c[0], c[1], 0, 0.01, t(), None, None, c[2], torch.rand(2, 3), True)),
        (ops.backward, (t(), t(), c[0], c[1], 0, 0.01, None, None, None, c[2], False)),
    ]:
        torch.library.opcheck(operator.default, arguments, test_utils=OPCHECKS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(backend, dtype):
    torch.manual_seed(0)
    model = network()
    x = torch.randn(2, 3, 12, 12)
    exact = model(x)
    with torch.autocast("cpu", dtype):
        out = model(x)
        assert out.dtype == dtype
    out.float().pow(2).sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    assert (out - exact).norm() < 0.05 * exact.norm()


def test_an_empty_gradient_and_halves_of_parameters():
    layer = InPlaceABN(4).to(torch.bfloat16)  # parameters and statistics in bfloat16 too
    z = layer(torch.randn(3, 4, 5).bfloat16().requires_grad_() * 1)
    z.sum().backward()
    assert layer.weight.grad.dtype == layer.running_mean.dtype == torch.bfloat16
    assert layer.running_mean.abs().sum() > 0
