"""Tensors that do not fit the input give a ValueError before any kernel, or the right result; never foreign memory."""

import random

import pytest
import torch

from segtrain.abn import (
    ABN,
    BatchNormAct,
    InPlaceABN,
    InPlaceABNSync,
    RecomputedABN,
    ScaledABN,
    abn,
    inplace_abn,
    inplace_abn_sync,
    operators,
)

LAYERS = [ABN, BatchNormAct, InPlaceABN, InPlaceABNSync, RecomputedABN, ScaledABN]
FUNCTIONS = [abn, inplace_abn, inplace_abn_sync]
VECTORS = ["weight", "bias", "running_mean", "running_var"]
FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


@pytest.fixture(params=["native", "aten"])
def backend(request):
    before = operators.chosen
    operators.use_backend(request.param)
    yield request.param
    operators.use_backend(before)


def vectors(channels):
    """weight, bias, running_mean and running_var, float32."""
    return {
        "weight": torch.linspace(-1, 2, channels), "bias": torch.linspace(0, 1, channels),
        "running_mean": torch.linspace(-1, 1, channels), "running_var": torch.linspace(0.5, 2, channels),
    }  # fmt: skip


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(("features", "channels"), [(1, 3), (8, 64), (64, 8)])
@pytest.mark.parametrize("training", [True, False])
def test_a_layer_refuses_another_number_of_channels(backend, layer, features, channels, training):
    module = layer(features).train(training)
    x = torch.randn(2, channels, 4, 4)
    before = x.clone()
    with pytest.raises(ValueError, match=rf"weight of shape \({channels},\).*{features},.*num_features={channels}"):
        module(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("name", VECTORS)
@pytest.mark.parametrize("training", [True, False])
def test_a_function_refuses_vectors_of_another_length(backend, function, name, training):
    for wrong in (torch.ones(1), torch.ones(4), torch.ones(0), torch.ones(5, 1), torch.tensor(1.0)):
        with pytest.raises(ValueError, match=rf"{name} of shape \(5,\)"):
            function(torch.randn(2, 5, 3), **{**vectors(5), name: wrong}, training=training)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("name", [*VECTORS, "shortcut"])
def test_a_function_refuses_tensors_of_another_device(backend, function, name):
    given = {**vectors(5), "shortcut": torch.randn(2, 5, 3)}
    with pytest.raises(ValueError, match=r"on the input's device, cpu, found meta: move one of them"):
        function(torch.randn(2, 5, 3), **{**given, name: given[name].to("meta")})


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_refuses_a_shortcut_that_does_not_fit(backend, layer):
    for wrong in (torch.randn(2, 5, 2), torch.randn(1, 5, 3), torch.randn(2, 5, 3, device="meta")):
        with pytest.raises(ValueError, match="shortcut"):
            layer(5)(torch.randn(2, 5, 3), wrong)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_function_refuses_integers_and_halves_of_statistics(backend, function):
    for name in VECTORS:
        with pytest.raises(ValueError, match=f"{name} of a floating-point dtype, found torch.int32"):
            function(torch.randn(2, 5, 3), **{**vectors(5), name: torch.ones(5, dtype=torch.int32)})
    with pytest.raises(ValueError, match="found torch.int64"):
        function(torch.ones(2, 5, 3, dtype=torch.int64), **vectors(5))
    with pytest.raises(ValueError, match="both or neither"):
        function(torch.randn(2, 5, 3), **{**vectors(5), "running_var": None})
    with pytest.raises(
        ValueError, match="running_mean is updated in training, but its 5 channels share memory: clone it"
    ):
        function(torch.randn(2, 5, 3), **{**vectors(5), "running_mean": torch.zeros(1).expand(5)})


@pytest.mark.parametrize("function", [inplace_abn, inplace_abn_sync])
def test_an_overwritten_input_shares_memory_with_nothing(backend, function):
    x = torch.randn(2, 5, 3)
    with pytest.raises(ValueError, match="the shortcut is the input"):
        function(x, **vectors(5), shortcut=x)
    with pytest.raises(ValueError, match="expanded view"):
        function(torch.randn(1, 5, 3).expand(2, 5, 3), **vectors(5))


@pytest.mark.parametrize("stride", [0, 2, 3])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_vectors_of_any_stride_give_the_numbers_of_contiguous_ones(backend, function, stride, training):
    def laid(v, kept):
        """v with this stride; with stride 0 its first value stands for all, if nothing writes to it."""
        if stride == 0:
            return v.clone() if kept else v[:1].expand(v.shape)
        return torch.full((len(v) * stride,), 77.0)[::stride].copy_(v)

    x = torch.randn(2, 5, 4, 4)
    odd = {name: laid(v, training and "running" in name) for name, v in vectors(5).items()}
    plain = {name: v.clone().contiguous() for name, v in odd.items()}
    want, found = (function(x.clone().requires_grad_() * 1, **given, training=training) for given in (plain, odd))
    for name, a, b in [("z", found, want), *((name, odd[name], plain[name]) for name in VECTORS)]:
        # torch's own batch norm adds up in another order where vectors have gaps
        assert torch.equal(a, b) or (function is abn and torch.allclose(a, b, rtol=1e-5, atol=1e-6)), name


def test_every_float_dtype_of_parameters_and_statistics_is_taken(backend):
    for x_dtype in FLOATS:
        for dtype in FLOATS:
            given = {name: v.to(dtype) for name, v in vectors(5).items()}
            x = torch.randn(4, 5, 3).to(x_dtype)
            for training in (True, False):
                want = abn(x.double(), **{n: v.double() for n, v in given.items()}, training=training)
                found = inplace_abn(x.clone(), **{n: v.clone() for n, v in given.items()}, training=training)
                assert found.dtype == x_dtype
                torch.testing.assert_close(found.double(), want, rtol=0.02, atol=0.03)


def test_the_reference_names_the_dtypes_it_does_not_combine():
    with pytest.raises(ValueError, match=r"all of the input's dtype, torch.float32, .* found torch.float16"):
        abn(torch.randn(2, 5, 3), **{name: v.half() for name, v in vectors(5).items()})


# ------------------------------------------------------------------------------------------------------- operators


def operator_arguments(x, channels):
    """Arguments of every operator, for an input x of `channels` channels."""
    c = [torch.rand(channels) + 0.5 for _ in range(6)]
    means, other = torch.rand(2, channels), torch.randn_like(x)
    kept = (other, c[0], c[1], 0, 0.01)
    return {
        "forward": [x, *c[:4], 0.1, 1e-5, 0, 0.01, other],
        "forward_": [x, *c[:4], 0.1, 1e-5, 0, 0.01, other],
        "normalise": [x, c[0], c[1], 0, 0.01, other],
        "normalise_": [x, c[0], c[1], 0, 0.01, other],
        "sums": [x, *kept, other, c[2], c[3]],
        "gradient": [x, *kept, other, c[2], c[3], c[4], means, True],
        "backward": [x, *kept, other, c[2], c[3], c[4], True],
    }


@pytest.mark.parametrize("name", ["forward", "forward_", "normalise", "normalise_", "sums", "gradient", "backward"])
def test_operators_refuse_what_does_not_fit(backend, name):
    operator = getattr(torch.ops.segtrain_abn, name)
    operator(*operator_arguments(torch.randn(2, 5, 3), 5)[name])
    given = operator_arguments(torch.randn(2, 5, 3), 5)[name]
    for place in (i for i, t in enumerate(given) if i > 0 and isinstance(t, torch.Tensor)):
        t = given[place]
        dtypes = [torch.float64, torch.float16, torch.int32]
        if name in ("sums", "gradient", "backward") and place == 1:
            dtypes = []  # dz is converted
        for wrong in (t[..., :1], torch.cat([t, t], -1), t[:1], *(t.to(dtype) for dtype in dtypes)):
            with pytest.raises(ValueError, match="expected"):
                operator(*given[:place], wrong, *given[place + 1 :])
        odd = torch.full((*t.shape[:-1], 2 * t.shape[-1]), 77.0)[..., ::2].copy_(t)
        fresh = [g.clone() if isinstance(g, torch.Tensor) else g for g in given]
        same = [g.clone() if isinstance(g, torch.Tensor) else g for g in given]
        found, want = operator(*fresh[:place], odd, *fresh[place + 1 :]), operator(*same)
        for a, b in zip(
            *((out,) if isinstance(out, torch.Tensor) else out or () for out in (found, want)), strict=True
        ):
            assert torch.equal(a, b)


# ------------------------------------------------------------------------------------------------------------ fuzz


def odd_tensor(rng, shape):
    """A tensor that may miss the right shape, dtype, device or stride, and whether it is right."""
    shape = list(shape)
    kind = rng.choice(["fine"] * 20 + ["length", "dtype", "device", "stride", "expanded", "dim", "empty"])
    if kind == "length":
        shape[rng.randrange(len(shape))] = rng.choice([1, 2, 7, 40])
    if kind == "empty":
        shape[rng.randrange(len(shape))] = 0
    if kind == "dim":
        shape = shape[:-1] if rng.random() < 0.5 else [*shape, 1]
    t = torch.rand(shape) + 0.5
    if kind == "dtype":
        t = t.to(rng.choice([*FLOATS, torch.int32, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn]))
    if kind == "device":
        t = t.to("meta")
    if kind == "stride" and t.dim():
        t = (t.repeat_interleave(2, -1)[..., ::2], t.transpose(0, -1).contiguous().transpose(0, -1))[rng.random() < 0.5]
    if kind == "expanded":
        t = t[:1].expand(t.shape)
    return t


def right(found, given, x, options):
    """Whether the result equals the float64 reference."""
    wide = {name: None if t is None else t.double() for name, t in given.items()}
    want = abn(x.double(), **wide, **options)
    return torch.allclose(found.detach().double(), want, rtol=0.05, atol=0.1)


@pytest.mark.parametrize("entry", [*LAYERS, *FUNCTIONS])
def test_odd_tensors_are_refused_or_give_the_right_result(backend, entry):
    rng = random.Random(f"{entry.__name__} {backend}")
    refused = 0
    for _ in range(300):
        channels = rng.choice([1, 3, 5, 16])
        shape = rng.choice([(4, channels), (2, channels, 3), (2, channels, 4, 4), (2, channels, 2, 2, 2)])
        x = odd_tensor(rng, shape)
        given = {name: odd_tensor(rng, (channels,)) for name in VECTORS}
        given["shortcut"] = odd_tensor(rng, shape) if rng.random() < 0.5 else None
        if rng.random() < 0.1:
            given[rng.choice(VECTORS)] = None
        options = {"training": rng.random() < 0.5}
        before, start = x.clone(), {name: None if t is None else t.clone() for name, t in given.items()}
        try:
            found = call_entry(entry, x, given, options)
            if found.device.type != "meta" and found.requires_grad:
                found.backward(torch.ones_like(found))
        except RuntimeError as error:  # autograd's own rule, on the CPU or elsewhere
            assert entry is RecomputedABN and x._is_view() and "view of another Tensor" in str(error)
            continue
        except ValueError:
            refused += 1
            assert x.device.type == "meta" or torch.equal(x, before), "written to before the check"
            continue
        if found.numel() and found.device.type != "meta":
            start["weight"] = signed(entry, start["weight"])
            assert right(found, start, before, options), (shape, given, options)
    assert 100 < refused < 290


def signed(entry, weight):
    """The weight by which the reference multiplies like this entry."""
    return weight if entry is not BatchNormAct or weight is None else weight - 1e-5


def call_entry(entry, x, given, options):
    if entry in FUNCTIONS:
        return entry(x, **given, **options)
    layer = entry(3).train(options["training"])
    for name in VECTORS[:2]:
        t = given[name]
        trained = t is not None and t.is_floating_point()
        layer._parameters[name] = None if t is None else torch.nn.Parameter(t, requires_grad=trained)
    for name in VECTORS[2:]:
        layer._buffers[name] = given[name]
    return layer(x, given["shortcut"])
