"""Conversion between BatchNorm and In-Place ABN, on networks of other packages and on small ones with traps."""

import copy
import io

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from segtrain.abn import ABN, InPlaceABN, InPlaceABNSync
from segtrain.abn.convert import fold, to_batch_norm, to_inplace
from segtrain.models.memory import kept_bytes
from tests.helpers.networks import lived_in, with_leaky_relu


def picture(size=64, batch=2):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def gradients(model, x):
    """(outputs, all gradients by name), in training mode."""
    model = copy.deepcopy(model).train()
    x = x.clone().requires_grad_()
    out = model(x)
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    return out.detach(), {"x": x.grad, **{name: p.grad for name, p in model.named_parameters()}}, model.state_dict()


def assert_same_training(model, expected, x, tolerance=1e-10):
    """Assert equal outputs, gradients and running statistics after one step."""
    (out, grads, state), (out2, grads2, state2) = gradients(model, x), gradients(expected, x)
    torch.testing.assert_close(out, out2, rtol=tolerance, atol=tolerance)
    assert grads.keys() == grads2.keys()
    largest = max(grad.abs().max().item() for grad in grads2.values())  # a bias before a norm has only roundings
    for name, grad in grads.items():
        torch.testing.assert_close(grad, grads2[name], rtol=1e-7, atol=tolerance * largest)
    assert state.keys() == state2.keys()
    for name, value in state.items():
        torch.testing.assert_close(value, state2[name], rtol=tolerance, atol=tolerance)


class Small(nn.Module):
    """convolution - norm - activation - convolution - norm."""

    def __init__(self, act):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.act = act
        self.conv2 = nn.Conv2d(8, 6, 1)
        self.bn2 = nn.BatchNorm2d(6)

    def forward(self, x):
        return self.bn2(self.conv2(self.act(self.bn1(self.conv1(x)))))


# ------------------------------------------------------------------------------------------------------ to_inplace


def test_resnet_keeps_its_relus_unless_asked():
    model = lived_in(torchvision.models.resnet18())
    before = copy.deepcopy(model.state_dict())
    conversion = to_inplace(model, picture())
    assert sorted(conversion.converted) == [f"layer{k}.0.downsample.1" for k in (2, 3, 4)]
    assert len(conversion.left) == 17
    assert "followed by ReLU, which cannot be inverted: replace_relu=0.01" in conversion.left["bn1"]
    assert not conversion.replaced_relu
    assert conversion.relative_difference < 1e-12
    # The given model is as it was.
    assert not any(isinstance(module, ABN) for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_resnet_with_leaky_relu_is_exact_and_fused():
    model = lived_in(torchvision.models.resnet18())
    conversion = to_inplace(model, picture(), replace_relu=0.01)
    assert len(conversion.converted) == 20
    assert not conversion.left
    assert conversion.converted["layer1.0.bn2"] == "leaky_relu, adds the shortcut, in place"
    assert conversion.converted["layer2.0.downsample.1"] == "identity, in place"
    assert len(conversion.replaced_relu) == 17
    assert conversion.relative_difference < 1e-12
    assert conversion.relu_difference > 1e-3
    assert "ReLU replaced by LeakyReLU behind 17 layers" in str(conversion)
    assert list(conversion.model.state_dict()) == list(model.state_dict())
    assert_same_training(conversion.model, with_leaky_relu(model), picture())


def test_timms_resnet_is_fused_too():
    model = lived_in(timm.create_model("resnet18", num_classes=10))
    conversion = to_inplace(model, picture(), replace_relu=0.01)
    assert len(conversion.converted) == 20
    assert conversion.converted["layer1.0.bn2"] == "leaky_relu, adds the shortcut, in place"
    assert conversion.relative_difference < 1e-12
    assert_same_training(conversion.model, with_leaky_relu(model), picture())


@pytest.mark.parametrize(("name", "most"), [("resnet50", 0.57), ("resnext50_32x4d", 0.57)])
def test_what_residual_fusion_saves(name, most):
    """It saves 43 to 48 % of the kept bytes of ResNet-50; the published layer, which cannot fuse, saves 17 %."""
    model = getattr(torchvision.models, name)()
    x = picture().float()
    conversion = to_inplace(model, x, replace_relu=0.01)
    assert not conversion.left
    standard = kept_bytes(lambda: model.train()(x))
    assert kept_bytes(lambda: conversion.model.train()(x)) <= most * standard


@pytest.mark.parametrize("name", ["densenet121", "mobilenet_v2", "efficientnet_b0", "regnet_y_400mf", "googlenet"])
def test_other_networks_convert_what_can_be(name):
    """Every layer that is left has a reason, and the rest is exact, in training too."""
    torch.manual_seed(0)
    options = {"init_weights": False} if name == "googlenet" else {}
    model = lived_in(getattr(torchvision.models, name)(**options))
    for module in model.modules():
        if isinstance(module, nn.Dropout | torchvision.ops.StochasticDepth):
            module.p = 0.0
    x = picture(96 if name == "googlenet" else 64, 3)
    conversion = to_inplace(model, x)
    norms = [n for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert sorted([*conversion.converted, *conversion.left]) == sorted(norms)
    assert all(conversion.left.values())
    assert conversion.relative_difference < 1e-12
    if conversion.converted and name != "googlenet":  # whose outputs in training are three
        assert_same_training(conversion.model, model, x, 1e-8)


@pytest.mark.parametrize(
    ("act", "form"),
    [
        (nn.LeakyReLU(0.1), "leaky_relu, in place"), (nn.LeakyReLU(0.1, inplace=True), "leaky_relu, in place"),
        (nn.ELU(0.7), "elu, in place"), (nn.Identity(), "identity, in place"), (nn.SiLU(), "identity, in place"),
    ],
    ids=lambda value: str(value),
)  # fmt: skip
def test_activations(act, form):
    model = lived_in(Small(act))
    conversion = to_inplace(model, picture(9))
    assert conversion.converted == {"bn1": form, "bn2": "identity, in place"}
    assert isinstance(conversion.model.bn1, InPlaceABN)
    assert conversion.relative_difference < 1e-12
    assert_same_training(conversion.model, model, picture(9))


def test_functions_are_seen_as_modules_are():
    class Net(Small):
        def forward(self, x):
            x = F.leaky_relu(self.bn1(self.conv1(x)), 0.2, inplace=True)
            return F.elu(self.bn2(self.conv2(x)))

    model = lived_in(Net(None))
    conversion = to_inplace(model, picture(9))
    assert conversion.converted == {"bn1": "leaky_relu, in place", "bn2": "elu, in place"}
    assert (conversion.model.bn1.activation_param, conversion.model.bn2.activation_param) == (0.2, 1.0)
    assert_same_training(conversion.model, model, picture(9))
    # A rewritten module is still a module: it can be copied and keeps its attributes.
    assert_same_training(copy.deepcopy(conversion.model), model, picture(9))
    assert conversion.model.conv1.kernel_size == (3, 3)


class UsedTwice(Small):
    def forward(self, x):
        x = self.conv1(x)
        return self.conv2(self.act(self.bn1(x)) + x)


class Shared(Small):
    def forward(self, x):
        return self.bn1(self.conv2(self.bn1(self.conv1(x)))[:, [0, 1, 2, 3, 4, 5, 0, 1]])


class Looped(Small):
    def forward(self, x):
        for conv, norm in ((self.conv1, self.bn1), (self.conv2, self.bn2)):
            x = F.leaky_relu(norm(conv(x)) if conv is self.conv1 else norm(conv(x)), 0.1)
            if x.mean() > 1e9:  # depends on the numbers: no graph of this forward
                x = -x
        return x


class First(Small):
    """A norm whose input is that of the network."""

    def __init__(self, act):
        super().__init__(act)
        self.bn0 = nn.BatchNorm2d(3)

    def forward(self, x):
        return self.bn2(self.conv2(self.conv1(self.bn0(x))))


@pytest.mark.parametrize(
    ("kind", "converted", "left"),
    [
        (UsedTwice, {"bn1": "leaky_relu, writes elsewhere"}, {"bn2": "not called by the probe"}),
        (Shared, {}, {"bn1": "called 2 times", "bn2": "not called by the probe"}),
        (Looped, {}, {"bn1": "cannot be rewritten", "bn2": "cannot be rewritten"}),
        (First, {"bn0": "identity, writes elsewhere", "bn2": "identity, in place"}, {"bn1": "not called by the probe"}),
    ],
)
def test_traps(kind, converted, left):
    model = lived_in(kind(nn.LeakyReLU(0.1)))
    x = picture(9)
    conversion = to_inplace(model, x)
    assert conversion.converted == converted
    assert conversion.left.keys() == left.keys()
    for name, words in left.items():
        assert words in conversion.left[name]
        assert f"{name} left: " in str(conversion)
    assert conversion.relative_difference < 1e-12
    assert torch.equal(x, picture(9))
    if converted:
        trained, same = (copy.deepcopy(m).train() for m in (conversion.model, model))
        torch.testing.assert_close(trained(picture(9)), same(picture(9)), rtol=1e-10, atol=1e-10)


def test_hooks_and_half_precision_are_left():
    model = lived_in(Small(nn.LeakyReLU(0.1)))
    model.bn1.register_forward_hook(lambda *_: None)
    assert "has hooks" in to_inplace(model, picture(9)).left["bn1"]
    half = Small(nn.LeakyReLU(0.1)).bfloat16()
    assert "convert before casting" in to_inplace(half, picture(9).bfloat16()).left["bn1"]


def test_published_scale():
    """scale="abs" is exact for positive weights, and refuses others by name."""
    model = lived_in(Small(nn.LeakyReLU(0.1)), positive=True)
    conversion = to_inplace(model, picture(9), scale="abs")
    assert conversion.relative_difference < 1e-12
    assert (conversion.model.bn1.weight + 1e-5 - model.bn1.weight).abs().max() < 1e-15
    with pytest.raises(ValueError, match=r"weights below eps: bn1 \(3 of 8\), bn2 \(2 of 6\)\. Use scale=\"signed\""):
        to_inplace(lived_in(Small(nn.LeakyReLU(0.1))), picture(9), scale="abs")
    with pytest.raises(ValueError, match="scale"):
        to_inplace(model, picture(9), scale="positive")


def test_near_zero_scales_are_counted_and_trained_through():
    """With zero-initialised scales, as torchvision's zero_init_residual makes them."""
    model = torchvision.models.resnet18(zero_init_residual=True).double()
    conversion = to_inplace(model, picture(), replace_relu=0.01)
    assert conversion.near_zero == {f"layer{k}.{j}.bn2": 64 * 2 ** (k - 1) for k in (1, 2, 3, 4) for j in (0, 1)}
    assert "layer1.0.bn2: 64 channels of scale below 0.001" in str(conversion)
    assert conversion.relative_difference < 1e-4  # 0 became eps
    _, grads, _ = gradients(conversion.model, picture())
    assert all(grad.isfinite().all() for grad in grads.values())


def test_synchronised_layers_stay_synchronised():
    model = lived_in(nn.SyncBatchNorm.convert_sync_batchnorm(Small(nn.LeakyReLU(0.1))))
    conversion = to_inplace(model, picture(9))
    assert isinstance(conversion.model.bn1, InPlaceABNSync)
    assert conversion.relative_difference < 1e-12


def test_pictures_of_other_dimensions():
    model = lived_in(nn.Sequential(nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), nn.ELU(), nn.Conv1d(8, 4, 1)))
    assert to_inplace(model, picture(9)[..., 0]).converted == {"1": "elu, in place"}
    model = lived_in(nn.Sequential(nn.Linear(9, 8), nn.BatchNorm1d(8), nn.LeakyReLU()))
    assert to_inplace(model, picture(9)[:, 0, 0]).converted == {"1": "leaky_relu, in place"}


def test_it_can_be_saved(tmp_path):
    """The state_dict, which equals the original's, and a complete module if no forward was rewritten."""
    model = lived_in(Small(nn.LeakyReLU(0.1)))
    conversion = to_inplace(model, picture(9))
    model.load_state_dict(conversion.model.state_dict())
    sequence = to_inplace(lived_in(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ELU())), picture(9)).model
    buffer = io.BytesIO()
    torch.save(sequence, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False).eval()
    assert torch.equal(again(picture(9)), sequence.eval()(picture(9)))


# --------------------------------------------------------------------------------------------------- to_batch_norm


@pytest.mark.parametrize("scale", ["abs", "signed"])
def test_there_and_back(scale):
    model = lived_in(torchvision.models.resnet18(), positive=scale == "abs")
    there = to_inplace(model, picture(), replace_relu=0.01, scale=scale)
    back = to_batch_norm(there.model, picture())
    assert len(back.converted) == 20
    assert not any(isinstance(module, ABN) for module in back.model.modules())
    assert back.converted["layer1.0.bn2"] == "batch norm, addition, leaky_relu"
    assert back.relative_difference < 1e-12
    expected = with_leaky_relu(model).eval()(picture())
    torch.testing.assert_close(back.model.eval()(picture()), expected, rtol=1e-9, atol=1e-9)


# ------------------------------------------------------------------------------------------------------------ fold


def test_fold_leaves_no_norm_in_a_resnet():
    model = lived_in(torchvision.models.resnet18())
    for start in (model, to_inplace(model, picture(), replace_relu=0.01).model):
        conversion = fold(start, picture())
        assert len(conversion.converted) == 20
        assert not conversion.left
        kinds = {type(module) for module in conversion.model.modules()}
        assert not kinds & {nn.BatchNorm2d, InPlaceABN}
        assert conversion.relative_difference < 1e-12
        assert not conversion.model.training


@pytest.mark.parametrize("groups", [1, 2])
def test_fold_into_what_follows(groups):
    """Pre-activation norms go into the next convolution, unless that pads with zeros, which they do not shift."""
    padded = lived_in(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding=1, groups=groups)))
    plain = lived_in(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, groups=groups)))
    x = torch.randn(2, 4, 7, 7, dtype=torch.float64)
    assert "pads with zeros" in fold(padded, x).left["1"]
    conversion = fold(plain, x)
    assert conversion.converted == {"1": "folded into 2, behind it"}
    assert conversion.relative_difference < 1e-12


@pytest.mark.parametrize(
    "layer",
    [
        nn.ConvTranspose2d(3, 8, 3, groups=1), nn.Conv2d(3, 8, 3, bias=False), nn.Conv2d(3, 9, 3, groups=3),
        nn.ConvTranspose2d(3, 9, 2, stride=2, groups=3),
    ],
    ids=str,
)  # fmt: skip
def test_fold_into_what_comes_before(layer):
    model = lived_in(nn.Sequential(layer, nn.BatchNorm2d(layer.out_channels), nn.LeakyReLU()))
    conversion = fold(model, picture(9))
    assert conversion.converted == {"1": "folded into 0, before it"}
    assert conversion.relative_difference < 1e-12


def test_fold_does_not_touch_shared_weights():
    conv = nn.Conv2d(3, 3, 1)
    model = lived_in(nn.Sequential(conv, nn.BatchNorm2d(3), conv))
    conversion = fold(model, picture(9))
    assert conversion.left == {"1": "no convolution next to it that nothing else uses"}
    assert conversion.relative_difference == 0


@pytest.mark.parametrize("last", [nn.ReLU(inplace=True), nn.LeakyReLU(0.01, inplace=True)])
def test_the_last_layer_of_a_network_may_work_in_place(last):
    block = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), last)
    images = torch.randn(2, 3, 8, 8)
    if isinstance(last, nn.ReLU):
        assert "1 left: followed by ReLU, which cannot be inverted: replace_relu=0.01" in str(to_inplace(block, images))
    found = to_inplace(block, images, replace_relu=0.01)
    assert list(found.converted) == ["1"]
    expected = nn.functional.leaky_relu(block[1].eval()(block[0](images)), 0.01)
    torch.testing.assert_close(found.model.eval()(images), expected, rtol=1e-4, atol=1e-5)


def test_a_layer_whose_output_is_written_over_names_what_can_be_converted():
    block = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU6(inplace=True))
    text = str(to_inplace(block, torch.randn(2, 3, 8, 8), replace_relu=0.01))
    assert "1 left: what follows writes over its output" in text and "is converted with replace_relu=0.01" in text
