"""Checks of the layer that only a CUDA device can run: streams, graphs, a second device, more than 2^31 elements."""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from segtrain.abn.modules import InPlaceABN, ScaledABN
from segtrain.abn.selftest import EPS, LEAKY, STORED, Result, error, inverted, reference_activation


def layer_and_step(device: str, channels: int = 16) -> tuple[nn.Module, Callable[[Tensor, Tensor], tuple[Tensor, ...]]]:
    """A small layer, and a function of x and dz that gives its z and dx."""
    layer = InPlaceABN(channels).to(device)

    def step(x: Tensor, dz: Tensor) -> tuple[Tensor, ...]:
        leaf = x.detach().requires_grad_()
        z = layer(leaf * 1)
        return z.detach(), *torch.autograd.grad(z, leaf, dz)

    return layer, step


def check_layer(device: str) -> Iterator[Result]:
    """The layer in training as it is called, with weights of both signs, against float64 by ordinary autograd."""
    random = torch.Generator().manual_seed(0)
    for shape, scale in (((4, 16, 12, 12), "abs"), ((4, 10, 7, 5), "signed")):
        x, added, dz = (torch.randn(shape, generator=random) for _ in range(3))
        weight, bias = (torch.randn(shape[1], generator=random) for _ in range(2))
        outcomes = []
        for kind, dtype, where in ((ScaledABN, torch.float64, "cpu"), (InPlaceABN, torch.float32, device)):
            layer = kind(shape[1], scale=scale).to(where, dtype)
            assert layer.weight is not None
            assert layer.bias is not None
            with torch.no_grad():
                layer.weight.copy_(weight)
                layer.bias.copy_(bias)
            leaves = [t.to(where, dtype).requires_grad_() for t in (x, added)]
            z = layer(leaves[0] * 1, leaves[1])
            wanted = [*leaves, layer.weight, layer.bias]
            outcomes.append([z.detach(), *torch.autograd.grad(z, wanted, dz.to(where, dtype)), layer.running_var])
        names = "z", "dx", "dshortcut", "dweight", "dbias", "running_var"
        for name, want, got in zip(names, *outcomes, strict=True):
            # The gradient of a weight near 0 loses digits, as 1 / weight does.
            bound = 1e-4 if name in ("dx", "dweight") else 2e-5
            yield Result(f"the layer, scale={scale}", name, error(got.cpu(), want), bound)


def same(what: str, got: Iterable[Tensor], want: Iterable[Tensor]) -> Result:
    """Whether the tensors are equal bit for bit."""
    errors = [0.0 if torch.equal(a.cpu(), b.cpu()) else float("inf") for a, b in zip(got, want, strict=True)]
    return Result(what, "z, dx", max(errors), 0.0)


def check_device() -> Iterator[Result]:
    """The layer against float64, on a stream of its own, in a CUDA graph, on another device, beyond 2^31 elements.

    On the current CUDA device, by the back end in use. The last two where there is a second device and 32 GiB free.
    """
    yield from check_layer("cuda")
    random = torch.Generator().manual_seed(0)
    x, dz, other = (torch.randn(4, 16, 64, 64, generator=random).cuda() for _ in range(3))
    _, step = layer_and_step("cuda")
    want, want_other = step(x, dz), step(other, dz)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        slow = torch.randn(4096, 4096, device="cuda")
        for _ in range(20):
            slow = slow @ slow * 1e-3
        late = other + slow.mean().nan_to_num() * 0  # not there yet when the layer is called
        got = step(late, dz)
        for _ in range(3):
            step(x, dz)  # and warmed up for the graph
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    yield same("a stream of its own", got, want_other)

    graph, input_of_graph = torch.cuda.CUDAGraph(), x.clone()
    with torch.cuda.graph(graph):
        got = step(input_of_graph, dz)
    for numbers, expected in ((other, want_other), (x, want)):
        input_of_graph.copy_(numbers)
        graph.replay()
        torch.cuda.synchronize()
        yield same("a CUDA graph", got, expected)

    for index in range(torch.cuda.device_count()):
        if index != torch.cuda.current_device():
            device = f"cuda:{index}"
            _, there = layer_and_step(device)
            for here, wanted in zip(there(x.to(device), dz.to(device)), want, strict=True):
                off = error(here, wanted.double())
                yield Result(f"{device} while {torch.cuda.current_device()} is current", "z, dx", off, 1e-5)

    for layout in (torch.contiguous_format, torch.channels_last):
        if torch.cuda.mem_get_info()[0] >= 32 << 30:
            yield from beyond_32_bits(layout)


def beyond_32_bits(layout: torch.memory_format) -> Iterator[Result]:
    """A layer on 2^31 + 2^26 elements; compares the first and last images of the last channels."""
    shape = (33, 64, 1024, 1024)
    x = torch.empty(shape, dtype=torch.float16, device="cuda", memory_format=layout).normal_(0.5, 2)
    few = slice(60, 64)
    x64 = x[:, few].double()
    y64 = (x64 - x64.mean((0, 2, 3), keepdim=True)) / (x64.var((0, 2, 3), keepdim=True, unbiased=False) + EPS).sqrt()
    want = reference_activation(y64[[0, -1]], LEAKY)
    del x64, y64
    layer = InPlaceABN(64).cuda()
    leaf = x.requires_grad_()
    z = layer(leaf * 1)
    where = f"{' x '.join(map(str, shape))}, {'NCHW' if layout == torch.contiguous_format else 'channels last'}"
    yield Result(where, "z", error(z.detach()[[0, -1]][:, few], want.cpu()), STORED[torch.float16])
    # Against a constant gradient: dz = 1 wherever z > 0, and its sums from z itself.
    (dx,) = torch.autograd.grad(z, leaf, torch.ones_like(z))
    z64 = z.detach()[:, few].double()
    dy64 = torch.where(z64 > 0, 1.0, LEAKY.param)
    xhat64 = inverted(z64, LEAKY, 0)
    means = dy64.mean((0, 2, 3), keepdim=True), (dy64 * xhat64).mean((0, 2, 3), keepdim=True)
    rstd = 1 / (x.detach()[:, few].double().var((0, 2, 3), keepdim=True, unbiased=False) + EPS).sqrt()
    expected = (rstd * (dy64 - means[0] - xhat64 * means[1]))[[0, -1]]
    yield Result(where, "dx", error(dx[[0, -1]][:, few], expected.cpu()), 2 * STORED[torch.float16])
