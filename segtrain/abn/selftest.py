"""Check a back end, case by case, against a float64 reference in plain torch operations and autograd.

    failures = [result for result in check_backend(cupy, "cuda") if not result.good]

What only a CUDA device can show is in device_checks.py.
"""

import itertools
from collections.abc import Generator, Iterable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from segtrain.abn.backends.aten import LAYOUTS, Activation, per_channel, statistics_dtype

EPS, MOMENTUM = 1e-5, 0.1
# Largest error, in units of max(1, largest expected value): rounding to the storage type, and float32 arithmetic. The
# reference has the same rounded inputs as the back end, so that nothing else differs.
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
    (3, 5, 7, 9),  # wide accesses in neither
    (2, 40, 5, 5),  # wide accesses in channels last only
    (1, 1, 41, 81),  # many stripes of one channel
    (6, 24),
    (5, 7),
    (2, 3, 2, 6, 4),
]


def cases() -> Iterator[Case]:
    """All cases, which together take less than a minute on one slow core."""
    forms = [("output", False), ("output", True), ("input", False)]
    for dtype in STORED:
        # Every shape with every activation once, in alternating forms: all combinations would take too long.
        for number, (shape, activation) in enumerate(itertools.product(SHAPES, (LEAKY, ELU, IDENTITY))):
            kept, shortcut = forms[(number // 3 + number) % 3]
            for last in (False, True) if len(shape) > 2 else (False,):
                yield Case(dtype, shape, last, activation, kept, shortcut)
        yield Case(dtype, (2, 16, 8, 8), False, LEAKY, "output", True, 1)  # addresses not aligned for wide accesses
        yield Case(dtype, (2, 16, 8, 8), True, LEAKY, "output", True, 1)
        yield Case(dtype, (2, 16, 8, 8), False, Activation("leaky_relu", 1.7), "output", True)
        yield Case(dtype, (2, 16, 8, 8), True, Activation("elu", 0.4), "output", True)
    for last in (False, True):
        yield Case(torch.float32, (4, 8, 16, 16), last, LEAKY, mean=1000.0)
        yield Case(torch.float64, (4, 8, 16, 16), last, LEAKY, mean=1000.0)


def reference_activation(y: Tensor, activation: Activation) -> Tensor:
    if activation.name == "leaky_relu":
        return torch.where(y > 0, y, y * activation.param)
    return F.elu(y, activation.param) if activation.name == "elu" else y


def inverted(z: Tensor, activation: Activation, least: float) -> Tensor:
    """y from z = act(y). least: the lowest z / alpha that ELU inverts."""
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
    # Derivatives cannot be compared at an activation's kink: move the elements that lie within rounding of it.
    axes = channel_axes(x)
    y = (x - per_channel(x.mean(axes), x)) / per_channel(x.std(axes), x) * per_channel(gamma, x) + per_channel(beta, x)
    x = torch.where((y if shortcut is None else y + shortcut).abs() < 0.02, x + 0.1, x)
    dtype = statistics_dtype(torch.empty(0, dtype=case.dtype))
    gamma, beta, running_mean = (v.to(dtype).to(device) for v in (gamma, beta, draw(channels)))
    return Inputs(
        placed(x, case, device), placed(dz, case, device),
        None if shortcut is None else placed(shortcut, case, device), gamma, beta, running_mean, torch.ones_like(gamma),
    )  # fmt: skip


def channel_axes(x: Tensor) -> list[int]:
    """All axes but that of the channels."""
    return [axis for axis in range(x.dim()) if axis != 1]


def error(got: Tensor, want: Tensor, scale: Tensor | None = None) -> float:
    """Largest difference, in units of `scale` or of max(1, largest expected value)."""
    if got.shape != want.shape:
        return float("inf")
    difference = (got.detach().double().cpu() - want.detach().cpu()).abs()
    unit = want.detach().abs().max().clamp(min=1) if scale is None else scale
    return float((difference / unit.detach().cpu()).max())


def result_of(case: Case, what: str, got: Tensor, want: Tensor, bound: float, scale: Tensor | None = None) -> Result:
    return Result(case, what, error(got, want, scale), bound)


def wide(t: Tensor) -> Tensor:
    """A float64 copy on the CPU."""
    return t.detach().to("cpu", torch.float64, copy=True)


class Reference(NamedTuple):
    """The forward pass in float64 by plain, differentiable operations, on the inputs that the back end gets."""

    x: Tensor
    gamma: Tensor
    beta: Tensor
    mean: Tensor
    var: Tensor
    z: Tensor

    @property
    def rstd(self) -> Tensor:
        return 1 / (self.var + EPS).sqrt()


def forward_reference(given: Inputs, case: Case) -> Reference:
    x, gamma, beta = (wide(t).requires_grad_() for t in (given.x, given.gamma, given.beta))
    axes = channel_axes(x)
    mean, var = x.mean(axes), x.var(axes, unbiased=False)
    xhat = (x - per_channel(mean, x)) * per_channel(1 / (var + EPS).sqrt(), x)
    y = xhat * per_channel(gamma, x) + per_channel(beta, x)
    if given.shortcut is not None:
        y = y + wide(given.shortcut)
    return Reference(x, gamma, beta, mean, var, reference_activation(y, case.activation))


class Forward(NamedTuple):
    """Results of a back end's forward pass; scale and shift: of the affine map from x to y."""

    z: Tensor
    mean: Tensor
    rstd: Tensor
    scale: Tensor
    shift: Tensor


def check_forward(
    ops: ModuleType, case: Case, given: Inputs, want: Reference, device: torch.device
) -> Generator[Result, None, Forward]:
    """Statistics, forward in place and elsewhere, running statistics, and `normalise`."""
    x, _, shortcut, gamma, beta, running_mean, running_var = given
    stored, computed = STORED[case.dtype], COMPUTED[gamma.dtype]
    far = max(1.0, abs(case.mean) / 100)  # the mean itself is rounded
    before_mean, before_var = wide(running_mean), wide(running_var)
    found = ops.statistics(x)
    yield result_of(case, "mean", found[0], want.mean, computed, want.mean.abs().clamp(min=1))
    yield result_of(case, "variance", found[1], want.var, computed * 2, want.var)
    backup = x.clone()
    beside = torch.empty_like(x)
    mean, rstd = ops.forward(x, beside, gamma, beta, None, None, MOMENTUM, EPS, case.activation, shortcut)
    yield result_of(case, "z written elsewhere", beside, want.z, stored * far)
    yield result_of(case, "x left alone", x, wide(backup), 0.0)
    z = placed(x, case, device) if case.offset else x.clone()
    ops.forward(z, z, gamma, beta, running_mean, running_var, MOMENTUM, EPS, case.activation, shortcut)
    yield result_of(case, "z in place", z, wide(beside), 0.0)
    yield result_of(case, "mean of forward", mean, want.mean, computed, want.mean.abs().clamp(min=1))
    yield result_of(case, "rstd", rstd, want.rstd, computed * 2, want.rstd)
    count = x.numel() // x.shape[1]
    unbiased = want.var * count / (count - 1)
    yield result_of(case, "running mean", running_mean, before_mean + MOMENTUM * (want.mean - before_mean), computed)
    yield result_of(
        case, "running variance", running_var, before_var + MOMENTUM * (unbiased - before_var), computed * 2
    )
    scale, shift = gamma * rstd, beta - mean * gamma * rstd
    affine = wide(x) * per_channel(wide(scale), x) + per_channel(wide(shift), x)
    affine = affine if shortcut is None else affine + wide(shortcut)
    out = torch.empty_like(x)
    ops.normalise(x, out, scale, shift, case.activation, shortcut)
    yield result_of(case, "normalise", out, reference_activation(affine, case.activation), stored * far)
    return Forward(z, mean, rstd, scale, shift)


class Kept(NamedTuple):
    """What a backward pass works from, and what it must recover from that, in float64."""

    arguments: tuple[Any, ...]  # of `sums`, `gradient` and `backward`
    xhat: Tensor
    dy: Tensor


def kept_reference(case: Case, given: Inputs, got: Forward) -> Kept:
    x, dz, shortcut, gamma, beta, *_ = given
    if case.kept == "input":
        kept, affine, center, inverse, added = x, (got.scale, got.shift), got.mean, got.rstd, None
        t = wide(kept)
        y = (t * per_channel(wide(got.scale), x) + per_channel(wide(got.shift), x)).requires_grad_()
    else:
        kept, affine, center, inverse, added = got.z, None, beta, 1 / gamma, shortcut
        y = inverted(wide(kept), case.activation, torch.finfo(case.dtype).eps - 1).requires_grad_()
        t = y.detach() if added is None else y.detach() - wide(added)
    (dy,) = torch.autograd.grad(reference_activation(y, case.activation), y, wide(dz))
    if case.activation.name == "elu" and case.kept == "output":
        # Where z was rounded below the least value, y is not act^-1(z).
        dy = wide(dz) * torch.where(wide(kept) > 0, 1.0, wide(kept) + case.activation.param)
    xhat = (t - per_channel(wide(center), x)) * per_channel(wide(inverse), x)
    return Kept((kept, dz, center, inverse, case.activation, added, affine), xhat, dy)


def check_backward(
    ops: ModuleType, case: Case, gamma: Tensor, kept: Kept, rstd: Tensor
) -> Generator[Result, None, tuple[Tensor, Tensor]]:
    """Check `sums` and `gradient`, separate and fused, and that they change no input. Returns (sums, dx)."""
    tensor, dz, *_, added, _ = kept.arguments
    axes, count = channel_axes(tensor), tensor.numel() // tensor.shape[1]
    stored, computed = STORED[case.dtype], COMPUTED[gamma.dtype]
    want = torch.stack([kept.dy.sum(axes), (kept.dy * kept.xhat).sum(axes)])
    weight = sums_scale(kept)
    # A large mean cancels in xhat = (t - center) * inverse, but the rounding of center to float32 remains.
    lost = computed * 4 + (1e-7 * abs(case.mean) if gamma.dtype == torch.float32 and case.kept == "input" else 0)
    factor = gamma * rstd
    before = tensor.clone(), dz.clone()
    sums = ops.sums(*kept.arguments)
    yield result_of(case, "sums", sums, want, lost, weight)
    dshortcut = torch.full_like(tensor, float("nan")) if added is not None else None
    dx, fused_sums = ops.backward(*kept.arguments, factor, dshortcut)
    yield result_of(case, "sums of backward", fused_sums, want, lost, weight)

    def gradient(means: Tensor) -> Tensor:
        inner = kept.dy - per_channel(means[0], tensor) - kept.xhat * per_channel(means[1], tensor)
        return per_channel(wide(factor), tensor) * inner

    yield result_of(case, "dx", dx, gradient(want / count), stored + lost)
    if dshortcut is not None:
        yield result_of(case, "dshortcut", dshortcut, kept.dy, stored)
    other = torch.linspace(-1, 1, 2 * tensor.shape[1], dtype=gamma.dtype).view(2, -1).to(tensor.device)
    found = ops.gradient(*kept.arguments, factor, other, dshortcut)
    yield result_of(case, "gradient of given means", found, gradient(wide(other)), stored + lost)
    unchanged = torch.stack([wide(t) for t in before])
    yield result_of(case, "kept and dz left alone", torch.stack([tensor, dz]), unchanged, 0.0)
    same_layout = dx.stride() == found.stride() == tensor.stride()
    yield Result(case, "memory layout", float(not same_layout), 0.0)
    return sums, dx


def sums_scale(kept: Kept) -> Tensor:
    """(2, C): the size of the sums of dy and dy * xhat, the unit of their errors."""
    axes = channel_axes(kept.dy)
    return torch.stack([kept.dy.abs().sum(axes), (kept.dy * kept.xhat).abs().sum(axes)]).clamp(min=1)


def run_case(ops: ModuleType, case: Case, device: torch.device) -> Iterator[Result]:
    """Check the primitives of a back end one by one, then forward and backward together against autograd."""
    given = inputs(case, device)
    reference = forward_reference(given, case)
    got = yield from check_forward(ops, case, given, reference, device)
    kept = kept_reference(case, given, got)
    sums, dx = yield from check_backward(ops, case, given.gamma, kept, got.rstd)
    if case.dtype in COMPUTED and case.mean == 1.5:  # where storing z loses no digits
        arguments = reference.x, reference.gamma, reference.beta
        dx64, dgamma, dbeta = torch.autograd.grad(reference.z, arguments, wide(given.dz))
        bound = STORED[case.dtype] * ((4 if case.activation.name != "elu" else 40) / float(given.gamma.min()))
        yield result_of(case, "dx of the layer", dx, dx64, bound)
        want = torch.stack([dbeta, dgamma])
        yield result_of(case, "dgamma, dbeta of the layer", sums, want, bound, sums_scale(kept))


def check_backend(ops: ModuleType, device: torch.device | str, which: Iterable[Case] | None = None) -> list[Result]:
    """Every check of every case (all of `cases()` by default) by the back end module `ops` on a device."""
    chosen = cases() if which is None else which
    return [
        result for case in chosen if case.dtype in getattr(ops, "DTYPES", STORED)
        for result in run_case(ops, case, torch.device(device))
    ]  # fmt: skip
