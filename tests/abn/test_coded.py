"""Outputs kept in 8 or 4 bits: the format, and gradients against formulas of their own."""

import math

import pytest
import torch

from segtrain.abn import InPlaceABN, ScaledABN, recomputed_outputs
from segtrain.abn.backends.aten import LAYOUTS, Activation
from segtrain.abn.backends.codes import Coded, unsqueeze_

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


@pytest.mark.parametrize(("slope", "negative"), [(0.01, 2), (-0.5, 2), (0.6, 1), (-0.6, 1)])
@pytest.mark.parametrize("bits", [8, 4])
def test_cells_of_negative_values_are_twice_as_wide(backend, bits, slope, negative):
    """By hand: y in [-2, 1] takes the cells of w in [-1, 1], or of [-2, 1] where negative values matter as much."""
    values = torch.linspace(-2, 1, 3001).expand(1, 2, -1).contiguous()
    cell = (1 + 2 / negative) / (2**bits - 1)
    for y in (values, values.mT.contiguous().mT):
        z, found = coded(y, bits, (0, slope))
        assert torch.equal(z, torch.where(y > 0, y, y * slope))
        back = rebuilt(found, activation=(0, slope))
        back = torch.where(y > 0, back, back / slope)
        away, below = (back - y).abs(), y < 0
        assert 0.49 * cell < away[~below & (y > 0)].max() <= 0.51 * cell
        assert 0.49 * cell * negative < away[below].max() <= 0.51 * cell * negative
        assert (back * y >= 0).all()


@pytest.mark.parametrize("activation", [LINEAR, (0, 0.01)])
@pytest.mark.parametrize("bits", [8, 4])
def test_both_back_ends_write_the_same_codes(bits, activation):
    from segtrain import abn

    for y in maps((2, 5, 17, 9)):
        found = []
        for backend in ("aten", "native"):
            abn.use_backend(backend)
            found.append(coded(y, bits, activation)[1])
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


@pytest.mark.parametrize("scale", [1, -1])
@pytest.mark.parametrize("slope", [0.01, 1.0, -0.5])
@pytest.mark.parametrize("bits", [8, 4])
def test_the_ranges_of_a_sum_are_bounded_by_those_of_its_parts(backend, bits, slope, scale):
    """By hand: x in [-1, 1], and a coded shortcut act(y) with y in [-4, 2]."""
    x = torch.linspace(-1, 1, 512).view(1, 1, 16, 32).repeat(2, 2, 1, 1)
    y = torch.linspace(-4, 2, 512).view(1, 1, 32, 16).mT.reshape(1, 1, 16, 32).repeat(2, 2, 1, 1)
    x[1], y[1] = x[1] / 2, y[1] / 2
    activation, one = (0, slope), torch.ones(2)
    shortcut, added = coded(y, bits, activation)
    known = added.ranges, *activation
    z, codes, ranges = ops.encode(x, one * scale, torch.zeros(2), *LINEAR, shortcut, bits, None, *known)
    assert torch.equal(z, x * scale + shortcut)
    ends = {0.01: (-0.04, 2), 1.0: (-4, 2), -0.5: (0, 2)}[slope]
    cell = (ends[1] - ends[0] + 2) / (2**bits - 1)
    for sample, factor in enumerate((1, 0.5) if bits == 4 else (1, 1)):
        origin, zero, step = ranges[:, min(sample, ranges.shape[1] - 1)]
        # The ranges of y end on borders of cells, one cell beyond its values at most.
        assert (cell * factor * 0.999 <= step).all()
        assert (step <= cell * factor + 2 * added.ranges[2, 0] / (2**bits - 1) * (2 if slope <= 0.5 else 1)).all()
        assert ((origin - zero * step) <= (ends[0] - 1) * factor).all()
    back = ops.decode(codes, ranges, bits, list(z.shape), list(z.stride()), torch.float32, *LINEAR)
    steps = ranges[2][:, :, None, None]
    assert ((back - z).abs() <= 0.501 * steps).all()


def test_nan_and_overflow_of_a_shortcut_with_known_ranges(backend):
    """A shortcut that is nan makes the range of the sum nan. One that a half type holds as infinity is rebuilt so."""
    x, one = torch.randn(2, 3, 8, 8), torch.ones(3)
    y = torch.randn(2, 3, 8, 8)
    y[0, 1, 2, 3] = math.nan
    shortcut, added = coded(y, 8, (0, 0.01))
    z, codes, ranges = ops.encode(x, one, one * 0, 0, 0.01, shortcut, 8, None, added.ranges, 0, 0.01)
    back = ops.decode(codes, ranges, 8, list(z.shape), list(z.stride()), torch.float32, 0, 0.01)
    assert back[:, 1].isnan().all() and back[:, [0, 2]].isfinite().all()
    if backend == "aten":
        return  # it codes rounded values
    y = torch.linspace(-4, 4, 64).view(1, 1, 8, 8).half().repeat(2, 3, 1, 1)
    shortcut, codes, known = ops.encode(y, one * 1e5, one * 0, 0, 0.01, None, 8)
    z, codes, ranges = ops.encode(x.half(), one, one * 0, 0, 0.01, shortcut, 8, None, known, 0, 0.01)
    back = ops.decode(codes, ranges, 8, list(z.shape), list(z.stride()), torch.float16, 0, 0.01)
    assert z.isinf().any() and not back.isnan().any() and back[z.isinf()].isinf().all()


def test_ranges_without_their_shortcut_are_refused(backend):
    x, one = torch.randn(2, 3, 8, 8), torch.ones(3)
    z, codes, ranges = ops.encode(x, one, one * 0, *LINEAR, None, 8)
    extremes = torch.stack([x.amin((0, 2, 3)), x.amax((0, 2, 3))])[:, None]
    for shortcut, ends, known, said in (
        (None, None, ranges, "but no shortcut"), (None, extremes, ranges, "but no shortcut"),
        (x, extremes, None, "need the ranges of the shortcut"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            ops.encode(x, one, one * 0, *LINEAR, shortcut, 8, ends, known)
    with pytest.raises(ValueError, match=r"expected ranges \[3, 1, 3\] of the shortcut, not \[3, 2, 3\]"):
        ops.encode(x, one, one * 0, *LINEAR, x, 8, None, ranges.repeat(1, 2, 1))


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
            decoded = unsqueeze_(decoded, Activation(activation, 0.3))
            z.backward(dz)
            wanted = expected(x, dz, layer, decoded, shortcut)
            found = leaf.grad, layer.weight.grad, layer.bias.grad, None if shortcut is None else shortcut.grad
            for one, other in zip(found, wanted, strict=True):
                if one is not None:
                    assert (one - other).norm() <= 2e-5 * other.norm()


def residual_gradients(gamma, keep, double=False):
    """Gradients of a residual block whose last norm multiplies with gamma; exact, or of coded maps."""
    torch.manual_seed(0)
    layers = torch.nn.ModuleList([torch.nn.Conv2d(3, 16, 3), torch.nn.Conv2d(16, 16, 1), torch.nn.Conv2d(16, 4, 1)])
    norms = torch.nn.ModuleList([ScaledABN(16) if keep is None else InPlaceABN(16, keep=keep) for _ in range(2)])
    torch.nn.init.constant_(norms[1].weight, gamma)
    x, target = torch.randn(4, 3, 40, 40), torch.randn(4, 4, 38, 38)
    if double:
        layers, norms, x, target = layers.double(), norms.double(), x.double(), target.double()
    with recomputed_outputs():
        z = norms[0](layers[0](x))
        out = layers[2](norms[1](layers[1](z), z))
        del z
    (out - target).square().mean().backward()
    return [torch.cat([p.grad.flatten() for p in m.parameters()]).double() for m in (*layers, *norms)]


@pytest.mark.parametrize(("gamma", "most"), [(1, 0.002), (0.1, 0.002), (0.01, 0.02), (0, 0.04)])
def test_small_scales_of_the_last_norm(backend, gamma, most):
    """The codes of y and of the shortcut do not get finer as gamma does. The error in xhat = (y - shortcut) / gamma is
    bounded: without that, 8 bits are off by 10 times the gradient, and 4 bits by 300 times, where gamma is 0."""
    wanted = residual_gradients(gamma, None, double=True)
    for keep, bound in (("8bit", most), ("4bit", 0.09)):
        found = residual_gradients(gamma, keep)
        distance = torch.cat(found).sub(torch.cat(wanted)).norm() / torch.cat(wanted).norm()
        assert distance <= bound, (keep, distance)
        assert (found[1] - wanted[1]).norm() <= 0.5 * wanted[1].norm(), "the last convolution of the branch, that of dx"


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
        "coded_sums": (*where, x, zero, one, 0, 0.01, None, None, 0, 0.0),
        "coded_gradient": (*where, x, zero, one, 0, 0.01, codes, ranges, 1, 0.3, one, torch.zeros(2, 4), True),
        "coded_backward": (*where, x, zero, one, 0, 0.01, x.clone(), None, 0, 0.0, one, False),
        "statistics_extremes": (x, 4),
    }.items():
        torch.library.opcheck(getattr(ops, name).default, arguments, test_utils=tests)
