"""In-Place ABN against ordinary autograd and against finite differences, and what it keeps in memory."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

from segtrain.abn import ABN, BatchNormAct, InPlaceABN, ScaledABN, inplace_abn
from tests.helpers.checkout import environment
from tests.helpers.networks import kept_bytes

ACTIVATIONS = [("leaky_relu", 0.01), ("leaky_relu", 0.3), ("elu", 1.0), ("elu", 0.3), ("identity", 0.0)]
SHAPES = [(4, 3, 5, 7), (6, 3), (2, 3, 4), (2, 3, 2, 3, 4)]


def pair_of_layers(activation, param, overwrite=True, channels=3):
    """A ScaledABN and an InPlaceABN with the same random float64 state, some scales negative."""
    torch.manual_seed(0)
    oracle = ScaledABN(channels, activation=activation, activation_param=param).double()
    ours = InPlaceABN(channels, activation=activation, activation_param=param, overwrite=overwrite).double()
    with torch.no_grad():
        oracle.weight.copy_(torch.linspace(-1.5, 1.2, channels))
        oracle.bias.normal_()
        oracle.running_mean.normal_()
        oracle.running_var.uniform_(0.5, 2)
    ours.load_state_dict(oracle.state_dict())
    return oracle, ours


@pytest.mark.parametrize(("activation", "param"), ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("overwrite", [True, False])
def test_equals_the_oracle_in_float64(activation, param, shape, training, overwrite):
    oracle, ours = pair_of_layers(activation, param, overwrite)
    oracle.train(training)
    ours.train(training)
    x = torch.randn(shape, dtype=torch.double)
    if len(shape) == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    first, second = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected, found = oracle(first * 1), ours(second * 1)
    dz = torch.randn(shape, dtype=torch.double)
    expected.backward(dz)
    found.backward(dz)
    for name, a, b in [
        ("z", expected, found),
        ("dx", first.grad, second.grad),
        ("dweight", oracle.weight.grad, ours.weight.grad),
        ("dbias", oracle.bias.grad, ours.bias.grad),
        ("running mean", oracle.running_mean, ours.running_mean),
        ("running variance", oracle.running_var, ours.running_var),
    ]:
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(("activation", "param"), ACTIVATIONS)
@pytest.mark.parametrize("training", [True, False])
def test_gradcheck(activation, param, training):
    torch.manual_seed(1)
    x = torch.randn(3, 2, 4, dtype=torch.double, requires_grad=True)
    weight = torch.tensor([0.8, -1.1], dtype=torch.double, requires_grad=True)
    bias = torch.tensor([0.3, -0.2], dtype=torch.double, requires_grad=True)
    mean, var = torch.tensor([0.1, -0.4]).double(), torch.tensor([0.7, 1.3]).double()

    def layer(x, weight, bias):
        return inplace_abn(
            x * 1, weight, bias, mean.clone(), var.clone(), training, activation=activation, activation_param=param
        )

    assert torch.autograd.gradcheck(layer, (x, weight, bias))


def test_hand_worked_numbers():
    # One channel with values 0 and 2: mean 1, biased variance 1; scale 3, shift 1 -> y = -2 and 4 (eps = 0).
    x = torch.tensor([[0.0], [2.0]], dtype=torch.double)
    running_mean, running_var = torch.zeros(1).double(), torch.ones(1).double()
    z = inplace_abn(
        x, torch.tensor([-3.0]).double(), torch.tensor([1.0]).double(), running_mean, running_var, True, 0.1, 0.0
    )
    assert z.flatten().tolist() == pytest.approx([-0.02, 4.0])
    assert running_mean.item() == pytest.approx(0.1)  # 0.9 * 0 + 0.1 * 1
    assert running_var.item() == pytest.approx(1.1)  # 0.9 * 1 + 0.1 * 2, the unbiased variance


def test_the_output_lives_in_the_inputs_memory():
    x = torch.randn(2, 4, 3, 3)
    version = x._version
    assert InPlaceABN(4)(x).data_ptr() == x.data_ptr()
    assert x._version > version
    y = torch.randn(2, 4, 3, 3)
    before = y.clone()
    assert InPlaceABN(4, overwrite=False)(y).data_ptr() != y.data_ptr()
    assert torch.equal(y, before)


@pytest.mark.parametrize("overwrite", [True, False])
def test_conv_abn_conv_keeps_two_maps_against_three(overwrite):
    x = torch.randn(2, 8, 16, 16)
    one_map = x.numel() * x.element_size()

    def kept(norm):
        convs = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.Conv2d(8, 8, 3, padding=1, bias=False)
        return kept_bytes(lambda: convs[1](norm(convs[0](x)))) / one_map

    assert kept(InPlaceABN(8, overwrite=overwrite)) == 2  # the input and z
    assert kept(ScaledABN(8)) == 3  # the input, the normalisation's input, z
    assert kept(BatchNormAct(8)) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_other_dtypes_follow_float64(dtype):
    oracle, _ = pair_of_layers("leaky_relu", 0.01, channels=8)
    with torch.no_grad():
        oracle.weight.copy_(torch.linspace(0.3, 1.5, 8))
    ours = InPlaceABN(8)
    ours.load_state_dict(oracle.state_dict())
    x = torch.randn(4, 8, 9, 9).to(dtype)
    exact, given = x.double().requires_grad_(), x.clone().requires_grad_()
    dz = torch.randn(4, 8, 9, 9).to(dtype)
    z = ours(given * 1)
    expected = oracle(exact * 1)
    z.backward(dz)
    expected.backward(dz.double())
    assert z.dtype == given.grad.dtype == dtype
    assert ours.weight.grad.dtype == torch.float32
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    for a, b in [(z, expected), (given.grad, exact.grad)]:
        assert (a.double() - b).norm() <= tolerance * b.norm()


@pytest.mark.parametrize("make", ["expanded", "transposed", "shared"])
def test_incoming_gradients_of_any_kind_are_right_and_left_alone(make):
    oracle, ours = pair_of_layers("leaky_relu", 0.01)
    gradient = {
        "expanded": lambda: torch.tensor(2.0).double().expand(4, 3, 6, 6),
        "transposed": lambda: torch.randn(4, 3, 6, 6).double().transpose(2, 3),
        "shared": lambda: torch.randn(4, 3, 6, 6).double(),
    }[make]()
    before = gradient.clone()
    x = torch.randn(4, 3, 6, 6).double()
    first, second = x.clone().requires_grad_(), x.clone().requires_grad_()
    oracle(first * 1).backward(gradient)
    ours(second * 1).backward(gradient)
    torch.testing.assert_close(first.grad, second.grad)
    assert torch.equal(gradient, before)


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize(
    "view", [lambda x: x[..., ::2], lambda x: x[:, 1:4], lambda x: x.transpose(2, 3), lambda x: x.permute(0, 3, 1, 2)]
)
def test_non_contiguous_input(view, overwrite):
    wide = torch.randn(4, 6, 6, 6).double()
    channels = view(wide).shape[1]
    oracle, ours = pair_of_layers("leaky_relu", 0.01, overwrite, channels)
    first, second = wide.clone().requires_grad_(), wide.clone().requires_grad_()
    expected, found = oracle(view(first * 1)), ours(view(second * 1))
    torch.testing.assert_close(found, expected)
    dz = torch.randn(expected.shape).double()
    expected.backward(dz)
    found.backward(dz)
    torch.testing.assert_close(second.grad, first.grad)


def test_no_affine_no_running_statistics_and_cumulative_average():
    x = torch.randn(5, 3, 4).double()
    bare = InPlaceABN(3, affine=False, track_running_stats=False).double()
    reference = ScaledABN(3, affine=False, track_running_stats=False).double()
    assert not list(bare.parameters())
    torch.testing.assert_close(bare(x.clone()), reference(x.clone()), rtol=1e-7, atol=0)
    bare.eval()  # without running statistics eval mode uses the batch's
    torch.testing.assert_close(bare(x.clone()), reference(x.clone()), rtol=1e-7, atol=0)
    average = InPlaceABN(3, momentum=None).double()
    batches = torch.randn(4, 5, 3).double()
    for batch in batches:
        average(batch.clone())
    torch.testing.assert_close(average.running_mean, batches.mean((0, 1)))


@pytest.mark.parametrize("frozen", ["input", "weight", "bias"])
def test_parts_that_need_no_gradient(frozen):
    oracle, ours = pair_of_layers("leaky_relu", 0.01)
    x = torch.randn(4, 3, 5).double()
    gradients = []
    for layer in (oracle, ours):
        source = x.clone().requires_grad_(frozen != "input")
        if frozen != "input":
            getattr(layer, frozen).requires_grad_(False)
        layer(source * 1).pow(2).sum().backward()
        gradients.append([source.grad, layer.weight.grad, layer.bias.grad])
    for a, b in zip(*gradients, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: InPlaceABN(3, activation="relu"), "leaky_relu with a small slope"),
        (lambda: InPlaceABN(3, activation_param=0.0), "greater than 0"),
        (lambda: ABN(3, activation="gelu"), "unknown activation"),
        (lambda: ScaledABN(3, scale="plain"), "unknown scale"),
        (lambda: InPlaceABN(3)(torch.randn(1, 3)), "more than one value per channel"),
        (lambda: InPlaceABN(3)(torch.randn(2, 3, 0, 4)), "empty"),
        (lambda: InPlaceABN(3)(torch.randn(3)), r"\(N, C\)"),
        (lambda: inplace_abn(torch.randn(4, 3), None, None, None, None, training=False), "running statistics"),
    ],
)
def test_misuse_is_explained(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_something_else_that_needs_the_input_is_autograds_error():
    x = torch.randn(4, 3, 5, requires_grad=True) * 1
    squared = x.pow(2)  # needs x in backward
    z = InPlaceABN(3)(x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (squared + z).sum().backward()


def test_double_backward_is_refused():
    x = torch.randn(4, 3, 5, requires_grad=True)
    z = InPlaceABN(3)(x * 1)
    (gradient,) = torch.autograd.grad(z.pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_state_dict_is_that_of_batch_norm_and_old_files_load():
    layer = InPlaceABN(3)
    assert list(layer.state_dict()) == list(nn.BatchNorm2d(3).state_dict())
    old = {key: value for key, value in layer.state_dict().items() if key != "num_batches_tracked"}
    copy.deepcopy(layer).load_state_dict(old)


def test_activation_can_be_changed_on_the_layer():
    layer = InPlaceABN(3).double()
    layer.activation = "identity"
    x = torch.randn(4, 3, 5).double()
    reference = ScaledABN(3, activation="identity").double()
    torch.testing.assert_close(layer(x.clone()), reference(x))


def test_batch_norm_act_is_torchs_batch_norm():
    torch.manual_seed(0)
    ours, theirs = BatchNormAct(3, activation="relu"), nn.BatchNorm2d(3)
    with torch.no_grad():
        theirs.weight.copy_(torch.tensor([-1.0, 0.5, 2.0]))
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(ours(x), theirs(x).relu())


def test_importing_the_layer_needs_torch_only():
    program = (
        "import sys, segtrain.abn; "
        "print([m for m in ('hydra', 'omegaconf', 'cv2', 'albumentations', 'PIL') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment(), capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
