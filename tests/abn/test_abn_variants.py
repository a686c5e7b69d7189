"""Every form of the layer: back ends, the paper's variants, signed scale, added shortcut, recomputed outputs."""

import functools

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from segtrain import abn
from segtrain.abn import ABN, BatchNormAct, InPlaceABN, RecomputedABN, ScaledABN, operators, recomputed_outputs
from segtrain.abn.autograd import effective_scale
from segtrain.models import build_model
from segtrain.models.blocks import Norm, ResidualBlock
from tests.helpers.networks import kept_bytes

FORMS = {
    "one": lambda **o: InPlaceABN(5, **o),
    "two": lambda **o: InPlaceABN(5, variant="two", **o),
    "one, elsewhere": lambda **o: InPlaceABN(5, overwrite=False, **o),
    "input": lambda **o: RecomputedABN(5, keep="input", **o),
    "normalised": lambda **o: RecomputedABN(5, keep="normalised", **o),
    "normalised, elsewhere": lambda **o: RecomputedABN(5, keep="normalised", overwrite=False, **o),
}
ACTIVATIONS = [("leaky_relu", 0.01), ("elu", 0.7), ("identity", 0.0)]


def prepared(layer):
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([1.2, -0.6, 0.3, -1.4, 0.05]))
        layer.bias.copy_(torch.tensor([0.3, -0.2, 0.0, 0.7, -0.5]))
        layer.running_mean.copy_(torch.linspace(-1, 1, 5))
        layer.running_var.copy_(torch.linspace(0.5, 2, 5))
    return layer.double()


def outcome(layer, shape, channels_last=False, shortcut=False, frozen=False):
    """All results of a call: output, gradients and running statistics."""
    generator = torch.Generator().manual_seed(3)
    x, dz, s = (torch.randn(shape, generator=generator, dtype=torch.double) for _ in range(3))
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    layer.train(not frozen)
    x.requires_grad_()
    s.requires_grad_()
    with recomputed_outputs():
        z = layer(x * 1, s * 1) if shortcut else layer(x * 1)
    z.backward(dz)
    found = {"z": z, "dx": x.grad, "dweight": layer.weight.grad, "dbias": layer.bias.grad}
    if shortcut:
        found["dshortcut"] = s.grad
    return found | {"mean": layer.running_mean, "var": layer.running_var, "batches": layer.num_batches_tracked}


def assert_same(found, expected, tolerance=1e-12):
    for name, value in expected.items():
        error = (found[name].double() - value.double()).norm() / value.double().norm().clamp(min=1e-30)
        assert error <= tolerance, f"{name}: {error:.1e}"


@pytest.mark.parametrize("scale", ["abs", "signed"])
@pytest.mark.parametrize(("activation", "param"), ACTIVATIONS)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_equals_the_oracle(backend, form, activation, param, scale):
    options = {"activation": activation, "activation_param": param, "scale": scale}
    for shape, channels_last in [((3, 5, 4, 6), False), ((3, 5, 4, 6), True), ((7, 5), False), ((2, 5, 2049), False)]:
        for frozen in (False, True):
            for shortcut in (False, True):
                how = {"channels_last": channels_last, "frozen": frozen, "shortcut": shortcut}
                expected = outcome(prepared(ScaledABN(5, **options)), shape, **how)
                assert_same(outcome(prepared(FORMS[form](**options)), shape, **how), expected)


def test_many_rows_and_threads(backend):
    """Tensors that several threads and several blocks of the sums share."""
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            for channels_last in (False, True):
                shape = (3, 5, 61, 67)
                expected = outcome(prepared(ScaledABN(5)), shape, channels_last)
                assert_same(outcome(prepared(InPlaceABN(5)), shape, channels_last), expected)
        finally:
            torch.set_num_threads(before)


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_large_mean_costs_no_digits(backend, channels_last):
    torch.manual_seed(0)
    torch.set_num_threads(2)  # by one, torch's channels-last sums are 32.6 units off: its errors grow with their length
    x = torch.randn(4, 3, 40, 40, dtype=torch.double) + torch.tensor([1e4, -300.0, 0.0]).double()[:, None, None]
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    layer = InPlaceABN(3, activation="identity")
    z = layer(x.float())
    exact = ScaledABN(3, activation="identity").double()(x.float().double())
    errors = (z.double() - exact).pow(2).mean((0, 2, 3)).sqrt()
    # The mean itself is a float32: at most two units in its last place. torch's channels-last sums are less exact.
    units = 32 if backend == "aten" and channels_last else 2
    assert (errors < units * torch.tensor([1e4, 300, 1]) * 2**-24).all(), errors


# ------------------------------------------------------------------------------------------------- the paper's own


def test_the_printed_sign_of_variant_two_is_wrong():
    """Section 3.3 prints (dbeta + (beta / gamma) dgamma); float64 data show that it must be a minus."""
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(4096, dtype=torch.double, generator=generator) for _ in range(2))
    gamma, beta, m = 0.7, 0.4, 4096
    leaf = x.clone().requires_grad_()
    y = (leaf - leaf.mean()) / leaf.var(correction=0).sqrt() * gamma + beta
    y.backward(dy)
    y = y.detach()
    dbeta = dy.sum()
    dgamma = ((dy * y).sum() - beta * dbeta) / gamma
    factor = gamma / x.var(correction=0).sqrt()
    minus, plus = (
        (dy - dgamma * y / (gamma * m) - (dbeta + sign * beta / gamma * dgamma) / m) * factor for sign in (-1, 1)
    )
    assert (minus - leaf.grad).abs().max() < 1e-14
    assert (plus - leaf.grad).abs().max() > 1e-3


def test_kept_maps_of_all_five_between_two_convolutions():
    """Figure 2 of the paper: (a) keeps input and output, the others one of them; the first input comes on top."""
    x = torch.randn(2, 8, 16, 16)

    def maps(norm):
        first, second = (nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(2))
        return kept_bytes(lambda: second(norm(first(x)))) / x.nbytes

    assert maps(BatchNormAct(8)) == 3
    assert maps(InPlaceABN(8)) == 2
    assert maps(InPlaceABN(8, variant="two")) == 2
    for keep in ("input", "normalised"):
        assert maps(RecomputedABN(8, keep=keep)) == 3  # nobody watches
        # Recomputed outputs have no bytes to count; what their recipe holds is the layer's own saved tensor.
        norm, holders = RecomputedABN(8, keep=keep), []
        first, second = (nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(2))
        with recomputed_outputs():
            z = norm(first(x))
            holders.append(torch.multiprocessing.reductions.StorageWeakRef(z.untyped_storage()))
            out = second(z)
        assert not holders[0].expired()
        del z
        assert holders[0].expired(), "the next convolution keeps the output"
        out.sum().backward()
        assert first.weight.grad.abs().sum() > 0


def test_recomputed_outputs_inside_a_network():
    """With two consumers of one output, a concatenation and a strided view, gradients equal the plain network's."""

    class Net(nn.Module):
        def __init__(self, norm):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.c = (nn.Conv2d(4, 4, 3, padding=1, bias=False) for _ in range(3))
            self.n1, self.n2 = norm(), norm()

        def forward(self, x):
            z = self.n1(self.a(x))
            return self.n2(torch.cat([self.b(z), self.c(z[..., 1:-1, 1:-1].clone()).mul(2).sum((2, 3), True) + z], 2))

    x = torch.randn(2, 4, 6, 6, dtype=torch.double)
    gradients = []
    for norm in (ScaledABN, lambda c: RecomputedABN(c, keep="input"), lambda c: RecomputedABN(c, keep="normalised")):
        net = Net(lambda norm=norm: norm(4)).double()
        with recomputed_outputs():
            out = net(x.clone())
        out.pow(2).sum().backward()
        gradients.append([p.grad for p in net.parameters()])
    for other in gradients[1:]:
        for a, b in zip(other, gradients[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@functools.cache
def after_a_step(backbone, norm, recompute):
    """Gradients, buffers and counts of batches of a network."""
    x = torch.randn(2, 3, 64, 64, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    model = build_model(backbone, head_channels=8, output_stride=32, norm=norm, recompute=recompute).double()
    model(x, upsample=False).pow(2).sum().backward()
    found = [p.grad for p in model.parameters()]
    found += [b.double() for b in model.buffers()]
    return [*found, torch.tensor([m.num_batches_tracked for m in model.modules() if isinstance(m, ABN)])]


@pytest.mark.parametrize(
    ("norm", "recompute"),
    [("abn", "norm"), ("abn", "norm_proposed"), ("inplace_abn", "blocks"), ("abn", "blocks"), ("batch_norm", "blocks")],
)
@pytest.mark.parametrize("backbone", ["resnet18", "resnext50"])
def test_recomputing_models_train_as_the_plain_one(backbone, norm, recompute):
    for a, b in zip(after_a_step(backbone, norm, "none"), after_a_step(backbone, norm, recompute), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


# ------------------------------------------------------------------------------------------------ added shortcuts


def test_the_fused_sum_keeps_the_branch_output_only():
    """Norm, addition and activation in one operation; the published layer keeps its output and that of the sum."""
    x = torch.randn(2, 8, 16, 16)
    block = ResidualBlock(8, (4, 4, 8), Norm())
    # the block's input, two branch outputs of half the channels, the block's output
    assert kept_bytes(lambda: block(x)) / x.nbytes == 1 + 0.5 + 0.5 + 1

    def separate(x):
        *convs, last = block.convs
        for layer in convs:
            x = layer(x)
        last.activation = "identity"
        return x

    unfused = ResidualBlock(8, (4, 4, 8), Norm())
    unfused.convs.bn3.activation = "identity"
    assert kept_bytes(lambda: nn.functional.leaky_relu_(unfused.convs(x) + x, 0.01)) / x.nbytes == 4


def test_a_zero_scale_is_inverted_too():
    """Zero-initialised last scales: gamma = |0| + eps."""
    oracle, ours = (prepared(layer(5)) for layer in (ScaledABN, InPlaceABN))
    for layer in (oracle, ours):
        nn.init.constant_(layer.weight, 1e-30)  # 0 itself: by torch's convention abs() has gradient 0 there
    # xhat is known to the shortcut's rounding over eps: 1e-16 / 1e-5
    assert_same(outcome(ours, (3, 5, 4, 6), shortcut=True), outcome(oracle, (3, 5, 4, 6), shortcut=True), 1e-9)


def test_precision_of_the_fused_sum_falls_with_the_shortcut_over_the_scale():
    """dgamma is known to about 2e-8 |shortcut| / |gamma| in float32 (facts of the method, not of the code)."""
    for size, gamma, bound in [(1, 1, 1e-6), (100, 0.1, 1e-4), (100, 0.01, 1e-3)]:
        torch.manual_seed(0)
        x, s, dz = (torch.randn(8, 16, 24, 24) for _ in range(3))
        s = s * size
        exact, ours = ScaledABN(16).double(), InPlaceABN(16)
        for layer in (exact, ours):
            nn.init.constant_(layer.weight, gamma)
        exact(x.double(), s.double()).backward(dz.double())
        ours(x.clone().requires_grad_() * 1, s).backward(dz)
        error = (ours.weight.grad - exact.weight.grad).norm() / exact.weight.grad.norm()
        assert error < bound, (size, gamma, error)


# ------------------------------------------------------------------------------------------------------- precision


def errors(dtype, scale, shift, correlated, theirs=False):
    """Norm-wise relative errors of z, dx, dweight and dbias against float64."""
    torch.manual_seed(0)
    shape = (8, 16, 24, 24)
    x = torch.randn(shape).to(dtype)
    xhat = nn.functional.batch_norm(x.float(), None, None, training=True)
    dz = (torch.randn(shape) + (xhat if correlated else 0)).to(dtype)
    found = []
    for exact in (True, False):
        layer = ScaledABN(16).double() if exact else (BatchNormAct(16) if theirs else InPlaceABN(16))
        with torch.no_grad():
            layer.weight.fill_(scale if exact or not theirs else scale + layer.eps)
            layer.bias.copy_(torch.linspace(-shift, shift, 16))
        leaf = (x.double() if exact else x.clone()).requires_grad_()
        z = layer(leaf * 1)
        z.backward(dz.to(z.dtype))
        found.append([t.double() for t in (z, leaf.grad, layer.weight.grad, layer.bias.grad)])
    return [((b - a).norm() / a.norm()).item() for a, b in zip(*found, strict=True)]


@pytest.mark.parametrize("correlated", [False, True])
@pytest.mark.parametrize("scale", [1, 0.3, 0.1, 0.01])
def test_float32_follows_float64(backend, scale, correlated):
    assert max(errors(torch.float32, scale, 0.5, correlated)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1, 0.3, 0.1, 0.01])
def test_half_types_are_at_most_twice_as_far_off_as_torch(backend, dtype, scale):
    """Output, input gradient and shift gradient. The input gradient for a gradient that xhat does not explain: where it
    does, and the scale is small, its error is that of xhat, which is the output's rounding over the scale."""
    ours, theirs = (errors(dtype, scale, 0.5, False, theirs) for theirs in (False, True))
    for i in (0, 1, 3):
        assert ours[i] <= 2 * theirs[i], (i, ours[i], theirs[i])
    if scale >= 0.3:
        correlated, reference = (errors(dtype, scale, 0.5, True, theirs) for theirs in (False, True))
        assert correlated[1] <= 2 * reference[1]
        bound = {torch.float16: 1e-3, torch.bfloat16: 1e-2}[dtype]
        assert max(ours[2], correlated[2]) <= bound


# ---------------------------------------------------------------------------------------------- signed scale, misuse


def test_signed_scale_is_an_ordinary_batch_norm():
    theirs = nn.Sequential(nn.BatchNorm2d(5), nn.LeakyReLU(0.01)).double()
    ours = InPlaceABN(5, scale="signed").double()
    with torch.no_grad():
        theirs[0].weight.copy_(torch.tensor([1.0, -0.5, 0.3, -2.0, 0.01]))
        theirs[0].running_mean.normal_()
    ours.load_state_dict(theirs[0].state_dict())
    x = torch.randn(3, 5, 4, 4, dtype=torch.double)
    for training in (True, False):
        torch.testing.assert_close(ours.train(training)(x.clone()), theirs.train(training)(x), rtol=1e-13, atol=1e-13)


def test_a_weight_of_zero_or_nearly_so_is_kept_away_from_zero():
    for weight, abs_scale, signed_scale in [(0.0, 1e-5, 1e-5), (-1e-7, 1.01e-5, -1e-5), (2e-3, 2.01e-3, 2e-3)]:
        w = torch.tensor([weight], dtype=torch.double)
        assert effective_scale(w, 1e-5, "abs").item() == pytest.approx(abs_scale)
        assert effective_scale(w, 1e-5, "signed").item() == pytest.approx(signed_scale)


def test_in_place_neighbours_are_refused_at_once():
    two = nn.Sequential(InPlaceABN(3), InPlaceABN(3))
    x = torch.randn(4, 3, 5, requires_grad=True)
    with pytest.raises(RuntimeError, match="layer before it.*overwrite=False"):
        two(x * 1)
    with torch.no_grad():
        two(x * 1)  # nothing is needed later
    two[1].overwrite = False
    two(x * 1).sum().backward()


def test_an_activation_in_place_behind_the_layer_is_autograds_error():
    z = InPlaceABN(3)(torch.randn(4, 3, 5, requires_grad=True) * 1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.relu_().sum().backward()


def test_a_shortcut_of_another_shape_is_explained():
    with pytest.raises(ValueError, match="must match the input"):
        InPlaceABN(3)(torch.randn(4, 3, 5), torch.randn(4, 3, 1))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: InPlaceABN(3, variant="three"), "choose one, two"),
        (lambda: InPlaceABN(3, scale="square"), "choose abs, signed"),
        (lambda: RecomputedABN(3, keep="output"), "choose input, normalised"),
        (lambda: abn.use_backend("opencl"), "choose auto, cupy, native, aten"),
    ],
)
def test_unknown_names_are_listed(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_a_back_end_that_cannot_run_says_why(monkeypatch):
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="back end cupy cannot run here: "):
            abn.use_backend("cupy")
    monkeypatch.setattr(operators.native_ops, "available", lambda: "no compiler, say")
    operators.resolved.clear()
    assert abn.describe_backend("cpu") == "aten (native cannot run: no compiler, say)"
    operators.resolved.clear()


@pytest.mark.parametrize("form", FORMS)
def test_shapes_alone(form):
    """Fake tensors: the whole of forward and backward without a byte of data."""
    with FakeTensorMode():
        layer = FORMS[form]()
        x = torch.randn(2, 5, 300, 400).contiguous(memory_format=torch.channels_last).requires_grad_()
        with recomputed_outputs():
            z = layer(x * 1, x * 2)
        assert z.shape == x.shape
        assert z.stride() == x.stride()
        z.sum().backward()
        assert x.grad.shape == x.shape
