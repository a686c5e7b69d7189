"""Does a back end compute what it should? Cases, and a float64 reference in plain torch operations and autograd.

failures = [r for r in run(cupy_ops, "cuda") if not r.good]
failures += [r for r in device_checks() if not r.good]  # what only a CUDA device can show
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segtrain.abn.backends.aten import LAYOUTS, Activation, per_channel, statistics_dtype
from segtrain.abn.modules import InPlaceABN

EPS, MOMENTUM = 1e-5, 0.1
# Largest error, in units of max(1, largest value wanted): rounding to the storage type, and float32 arithmetic. Inputs
# of the reference are the very numbers that the back end had, so nothing else separates the two.
STORED = {torch.float64: 1e-12, torch.float32: 4e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}
COMPUTED = {torch.float64: 1e-12, torch.float32: 3e-6}
LEAKY, ELU, IDENTITY = Activation("leaky_relu", 0.01), Activation("elu", 1.0), Activation("identity", 0.0)


class Case(NamedTuple):
    """kept: "output", or "input" of the affine map, which a layer without shortcut can keep."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    channels_last: bool
    activation: Activation
    kept: str = "output"
    shortcut: bool = False
    offset: int = 0  # elements by which the tensors miss the alignment of an allocation
    mean: float = 1.5  # of the input, whose deviation is 2

    def __str__(self) -> str:
        parts = [str(self.dtype).removeprefix("torch."), "x".join(map(str, self.shape)), self.activation.name]
        parts += ["channels_last"] * self.channels_last + ["kept_input"] * (self.kept == "input")
        parts += ["shortcut"] * self.shortcut + [f"offset{self.offset}"] * bool(self.offset)
        return "-".join([*parts, *([f"mean{self.mean:g}"] if self.mean != 1.5 else [])])


class Result(NamedTuple):
    case: Case | str
    what: str
    error: float
    bound: float

    @property
    def good(self) -> bool:
        return self.error <= self.bound  # False for NaN

    def __str__(self) -> str:
        return f"{self.case}: {self.what} off by {self.error:.1e}, bound {self.bound:.1e}"


SHAPES = [
    (2, 16, 8, 8),  # wide accesses in both layouts
    (3, 5, 7, 9),  # none possible
    (2, 40, 5, 5),  # planes too odd for them, channels not
    (1, 1, 41, 81),  # many stripes of one channel
    (6, 24),
    (5, 7),
    (2, 3, 2, 6, 4),
]


def cases() -> Iterator[Case]:
    """All that run together in under a minute on one slow core."""
    forms = [("output", False), ("output", True), ("input", False)]
    # Where several shapes, activations and forms meet each other once, not all with all.
    for dtype in STORED:
        for number, (shape, (activation, (kept, shortcut))) in enumerate(
            itertools.product(SHAPES, zip((LEAKY, ELU, IDENTITY), forms, strict=True))
        ):
            turned = forms[(number // 3 + number) % 3]
            for last in (False, True) if len(shape) > 2 else (False,):
                kept, shortcut = turned
                yield Case(dtype, shape, last, activation, kept, shortcut)
        yield Case(dtype, (2, 16, 8, 8), False, LEAKY, "output", True, 1)  # no address fit for wide accesses
        yield Case(dtype, (2, 16, 8, 8), True, LEAKY, "output", True, 1)
        yield Case(dtype, (2, 16, 8, 8), False, Activation("leaky_relu", 1.7), "output", True)
        yield Case(dtype, (2, 16, 8, 8), True, Activation("elu", 0.4), "output", True)
    for last in (False, True):
        yield Case(torch.float32, (4, 8, 16, 16), last, LEAKY, mean=1000.0)
        yield Case(torch.float64, (4, 8, 16, 16), last, LEAKY, mean=1000.0)


def activate(y: Tensor, activation: Activation) -> Tensor:
    if activation.name == "leaky_relu":
        return torch.where(y > 0, y, y * activation.param)
    return F.elu(y, activation.param) if activation.name == "elu" else y


def inverted(z: Tensor, activation: Activation, least: float) -> Tensor:
    """y with z = act(y). least: of z / alpha that ELU inverts."""
    if activation.name == "leaky_relu":
        return torch.where(z > 0, z, z / activation.param)
    if activation.name == "elu":
        return torch.where(z > 0, z, torch.log1p((z / activation.param).clamp(min=least)))
    return z


class Inputs(NamedTuple):
    x: Tensor
    dz: Tensor
    shortcut: Tensor | None
    gamma: Tensor
    beta: Tensor
    running_mean: Tensor
    running_var: Tensor


def placed(values: Tensor, case: Case, device: torch.device) -> Tensor:
    """A copy on the device, in the case's type, layout and alignment."""
    memory = torch.empty(values.numel() + 16, dtype=case.dtype, device=device)[case.offset :][: values.numel()]
    if case.channels_last:
        strides = torch.empty(values.shape, device="meta", memory_format=LAYOUTS[values.dim()]).stride()
    else:
        strides = torch.empty(values.shape, device="meta").stride()
    return memory.as_strided(values.shape, strides).copy_(values)


def inputs(case: Case, device: torch.device) -> Inputs:
    random = torch.Generator().manual_seed(len(str(case)) + sum(case.shape))

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64)

    channels = case.shape[1]
    gamma, beta = draw(channels).abs() + 0.3, draw(channels)
    x, dz = draw(*case.shape) * 2 + case.mean, draw(*case.shape)
    shortcut = draw(*case.shape) if case.shortcut else None
    # An activation's kink is no place to compare derivatives at: whoever lies closer to it than roundings move.
    axes = [axis for axis in range(x.dim()) if axis != 1]
    y = (x - per_channel(x.mean(axes), x)) / per_channel(x.std(axes), x) * per_channel(gamma, x) + per_channel(beta, x)
    x = torch.where((y if shortcut is None else y + shortcut).abs() < 0.02, x + 0.1, x)
    dtype = statistics_dtype(torch.empty(0, dtype=case.dtype))
    gamma, beta, running_mean = (v.to(dtype).to(device) for v in (gamma, beta, draw(channels)))
    return Inputs(
        placed(x, case, device), placed(dz, case, device),
        None if shortcut is None else placed(shortcut, case, device), gamma, beta, running_mean, torch.ones_like(gamma),
    )  # fmt: skip


def error(got: Tensor, want: Tensor, scale: Tensor | None = None) -> float:
    """Largest difference, in units of `scale` or of max(1, largest value wanted)."""
    if got.shape != want.shape:
        return float("inf")
    difference = (got.detach().double().cpu() - want.detach().cpu()).abs()
    unit = want.detach().abs().max().clamp(min=1) if scale is None else scale
    return float((difference / unit.detach().cpu()).max())


def run_case(ops: ModuleType, case: Case, device: torch.device) -> Iterator[Result]:
    """Forward in place and beside, running statistics, the reducing pass and the gradient, and what they must leave."""
    x, dz, shortcut, gamma, beta, running_mean, running_var = inputs(case, device)
    stored, computed = STORED[case.dtype], COMPUTED[gamma.dtype]
    axes = [axis for axis in range(x.dim()) if axis != 1]
    count = x.numel() // x.shape[1]
    least = torch.finfo(case.dtype).eps - 1
    far = max(1.0, abs(case.mean) / 100)  # the mean itself is rounded

    def check(what: str, got: Tensor, want: Tensor, bound: float, scale: Tensor | None = None) -> Result:
        return Result(case, what, error(got, want, scale), bound)

    def wide(t: Tensor) -> Tensor:
        return t.detach().to("cpu", torch.float64, copy=True)

    # -- statistics and forward, against plain operations on the numbers the back end has
    x64 = wide(x).requires_grad_()
    gamma64, beta64, rm64, rv64 = (wide(v) for v in (gamma, beta, running_mean, running_var))
    gamma64.requires_grad_()
    beta64.requires_grad_()
    mean64, var64 = x64.mean(axes), x64.var(axes, unbiased=False)
    rstd64 = 1 / (var64 + EPS).sqrt()
    xhat64 = (x64 - per_channel(mean64, x)) * per_channel(rstd64, x)
    y64 = xhat64 * per_channel(gamma64, x) + per_channel(beta64, x)
    if shortcut is not None:
        y64 = y64 + wide(shortcut)
    z64 = activate(y64, case.activation)

    found = ops.statistics(x)
    yield check("mean", found[0], mean64, computed, mean64.abs().clamp(min=1))
    yield check("variance", found[1], var64, computed * 2, var64)
    backup = x.clone()
    beside = torch.empty_like(x)
    mean, rstd = ops.forward(x, beside, gamma, beta, None, None, MOMENTUM, EPS, case.activation, shortcut)
    yield check("z written elsewhere", beside, z64, stored * far)
    yield check("x left alone", x, wide(backup), 0.0)
    z = x.clone()
    if case.offset:
        z = placed(x, case, device)
    ops.forward(z, z, gamma, beta, running_mean, running_var, MOMENTUM, EPS, case.activation, shortcut)
    yield check("z in place", z, wide(beside), 0.0)
    yield check("mean of forward", mean, mean64, computed, mean64.abs().clamp(min=1))
    yield check("rstd", rstd, rstd64, computed * 2, rstd64)
    unbiased = var64 * count / (count - 1)
    yield check("running mean", running_mean, rm64 + MOMENTUM * (mean64 - rm64), computed)
    yield check("running variance", running_var, rv64 + MOMENTUM * (unbiased - rv64), computed * 2)
    scale, shift = gamma * rstd, beta - mean * gamma * rstd
    affine64 = activate(
        x64 * per_channel(wide(scale), x) + per_channel(wide(shift), x) + (0 if shortcut is None else wide(shortcut)),
        case.activation,
    )
    out = torch.empty_like(x)
    ops.normalise(x, out, scale, shift, case.activation, shortcut)
    yield check("normalise", out, affine64, stored * far)

    # -- backward, from the numbers that were kept
    if case.kept == "input":
        kept, affine, center, inverse, added = x, (scale, shift), mean, rstd, None
        t64 = wide(kept)
        y = (t64 * per_channel(wide(scale), x) + per_channel(wide(shift), x)).requires_grad_()
    else:
        kept, affine, center, inverse, added = z, None, beta, 1 / gamma, shortcut
        y = inverted(wide(kept), case.activation, least).requires_grad_()
        t64 = y.detach() if added is None else y.detach() - wide(added)
    (dy64,) = torch.autograd.grad(activate(y, case.activation), y, wide(dz))
    if case.activation.name == "elu" and case.kept == "output":  # where z was rounded below the least, y is not act^-1
        dy64 = wide(dz) * torch.where(wide(kept) > 0, 1.0, wide(kept) + case.activation.param)
    xhat = (t64 - per_channel(wide(center), x)) * per_channel(wide(inverse), x)
    sums64 = torch.stack([dy64.sum(axes), (dy64 * xhat).sum(axes)])
    weight = torch.stack([dy64.abs().sum(axes), (dy64 * xhat).abs().sum(axes)]).clamp(min=1)
    # What is large in t and center cancels in xhat: kept in float32 it is exact, the vectors' roundings are not.
    lost = computed * 4 + (1e-7 * abs(case.mean) if gamma.dtype == torch.float32 and case.kept == "input" else 0)
    factor = gamma * rstd
    arguments = kept, dz, center, inverse, case.activation, added, affine
    before = kept.clone(), dz.clone()
    sums = ops.sums(*arguments)
    yield check("sums", sums, sums64, lost, weight)
    dshortcut = torch.full_like(kept, float("nan")) if added is not None else None
    dx, fused_sums = ops.backward(*arguments, factor, dshortcut)
    yield check("sums of backward", fused_sums, sums64, lost, weight)
    means64 = sums64 / count
    f64 = per_channel(wide(factor), x)

    def gradient64(means: Tensor) -> Tensor:
        return f64 * (dy64 - per_channel(means[0], x) - xhat * per_channel(means[1], x))

    yield check("dx", dx, gradient64(means64), stored + lost)
    if dshortcut is not None:
        yield check("dshortcut", dshortcut, dy64, stored)
    other = torch.linspace(-1, 1, 2 * x.shape[1], dtype=gamma.dtype).view(2, -1).to(device)
    found = ops.gradient(*arguments, factor, other, dshortcut)
    yield check("gradient of given means", found, gradient64(wide(other)), stored + lost)
    yield check("kept and dz left alone", torch.stack([kept, dz]), torch.stack([wide(t) for t in before]), 0.0)
    yield Result(case, "memory layout", float(dx.stride() != kept.stride() or found.stride() != kept.stride()), 0.0)

    # -- and through both, against autograd, where storing z loses nothing
    if case.dtype in COMPUTED and case.mean == 1.5:
        dx64, dgamma64, dbeta64 = torch.autograd.grad(z64, (x64, gamma64, beta64), wide(dz))
        steep = 4 / float(gamma.min()) if case.activation.name != "elu" else 40 / float(gamma.min())
        yield check("dx of the layer", dx, dx64, stored * steep)
        yield check("dgamma, dbeta of the layer", sums, torch.stack([dbeta64, dgamma64]), stored * steep, weight)


def run(ops: ModuleType, device: torch.device | str, which: Iterable[Case] | None = None) -> list[Result]:
    """Every check of every case (all of `cases()` by default) by the back end module `ops` on a device."""
    chosen = cases() if which is None else which
    return [
        result for case in chosen if case.dtype in getattr(ops, "DTYPES", STORED)
        for result in run_case(ops, case, torch.device(device))
    ]  # fmt: skip


# ------------------------------------------------------------------------------------- what only a device can show


def layer_and_step(device: str, channels: int = 16) -> tuple[nn.Module, Callable[[Tensor, Tensor], tuple[Tensor, ...]]]:
    """A small layer, and a function of x and dz that gives its z and dx."""
    layer = InPlaceABN(channels).to(device)

    def step(x: Tensor, dz: Tensor) -> tuple[Tensor, ...]:
        leaf = x.detach().requires_grad_()
        z = layer(leaf * 1)
        return z.detach(), *torch.autograd.grad(z, leaf, dz)

    return layer, step


def same(what: str, got: Iterable[Tensor], want: Iterable[Tensor]) -> Result:
    """Bit for bit."""
    errors = [0.0 if torch.equal(a.cpu(), b.cpu()) else float("inf") for a, b in zip(got, want, strict=True)]
    return Result(what, "z, dx", max(errors), 0.0)


def device_checks() -> Iterator[Result]:
    """The layer on a stream of its own, in a CUDA graph, on a device that is not current, and beyond 2^31 elements.

    On the current CUDA device, by the back end in use. The last two where there is a second device and 32 GiB free.
    """
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
    """2^31 + 2^26 elements; the first and last pictures of the last channels are looked at."""
    shape = (33, 64, 1024, 1024)
    x = torch.empty(shape, dtype=torch.float16, device="cuda", memory_format=layout).normal_(0.5, 2)
    few = slice(60, 64)
    x64 = x[:, few].double()
    y64 = (x64 - x64.mean((0, 2, 3), keepdim=True)) / (x64.var((0, 2, 3), keepdim=True, unbiased=False) + EPS).sqrt()
    want = activate(y64[[0, -1]], LEAKY)
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
