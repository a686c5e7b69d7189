"""Networks with the weights of other packages give the outputs of the original networks."""

import re

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from segtrain.errors import DataError
from segtrain.models import build_classifier, build_model
from segtrain.models import wider_resnet as wider
from segtrain.weights.layouts import LAYOUTS, to_layout
from segtrain.weights.matching import canonical, norm_layers
from segtrain.weights.transfer import load_weights
from tests.helpers.networks import lived_in, with_leaky_relu
from tests.helpers.weights import PLAIN, images, network, saved


@pytest.mark.parametrize(
    ("library", "name"),
    [("torchvision", "resnet18"), ("torchvision", "resnext50_32x4d"), ("timm", "resnet50")],
)
def test_classifiers_give_the_same_logits(tmp_path, library, name):
    theirs = getattr(torchvision.models, name)() if library == "torchvision" else timm.create_model(name)
    theirs = lived_in(theirs).float().eval()
    ours = build_classifier(name, **PLAIN)
    report = load_weights(saved(tmp_path / "x.pth", theirs.state_dict()), ours)
    assert report.ratio == 1 and not report.notes and report.rounding is None
    with torch.no_grad():
        expected = theirs(images())
        torch.testing.assert_close(ours.eval()(images()), expected, rtol=1e-5, atol=1e-5 * expected.abs().max())


def test_deeplabv3_gives_the_same_logits(tmp_path):
    theirs = lived_in(torchvision.models.segmentation.deeplabv3_resnet50(
        weights=None, weights_backbone=None, aux_loss=True)).float().eval()  # fmt: skip
    ours = build_model(
        "resnet50",
        "deeplabv3_torchvision",
        21,
        output_stride=8,
        backbone_options={"first_dilation": "previous"},
        **PLAIN,
    ).eval()
    report = load_weights(saved(tmp_path / "x.pth", theirs.state_dict()), ours)
    assert report.ratio == 1
    assert report.explained == {"a second head, used in training only": 7}
    with torch.no_grad():
        expected = theirs(images(72, 104))["out"]
        torch.testing.assert_close(ours(images(72, 104)), expected, rtol=1e-5, atol=1e-5 * expected.abs().max())


def bn_relu(channels):
    return nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU())


class Block(nn.Module):
    """Pre-activation block as in NVIDIA's code: norm and ReLU are a sequence."""

    def __init__(self, before, channels, stride, dilation):
        super().__init__()
        self.bn1 = bn_relu(before)
        sizes = (3, 3) if len(channels) == 2 else (1, 3, 1)
        self.convs = nn.Sequential()
        for i, (into, out, size) in enumerate(zip((before, *channels), channels, sizes, strict=False), 1):
            if i > 1:
                self.convs.add_module(f"bn{i}", bn_relu(into))
            d = dilation if size == 3 else 1
            self.convs.add_module(
                f"conv{i}", nn.Conv2d(into, out, size, stride if i == 1 else 1, d * (size // 2), d, bias=False)
            )
        if stride != 1 or before != channels[-1]:
            self.proj_conv = nn.Conv2d(before, channels[-1], 1, stride, bias=False)

    def forward(self, x):
        active = self.bn1(x)
        return self.convs(active) + (self.proj_conv(active) if hasattr(self, "proj_conv") else x)


class DeepWV3Plus(nn.Module):
    """The published structure in small: few channels and one block per module."""

    def __init__(self, channels, classes):
        super().__init__()
        self.mod1 = nn.Sequential()
        self.mod1.add_module("conv1", nn.Conv2d(3, 64, 3, padding=1, bias=False))
        before = 64
        for i, widths in enumerate(channels, 2):
            stride, dilation = (2 if i == 4 else 1), {5: 2, 6: 4, 7: 4}.get(i, 1)
            setattr(self, f"mod{i}", nn.Sequential())
            getattr(self, f"mod{i}").add_module("block1", Block(before, widths, stride, dilation))
            before = widths[-1]
        self.aspp = nn.Module()
        self.aspp.features = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(before, 256, 3 if d else 1, padding=d, dilation=d or 1, bias=False), *bn_relu(256)
            ) for d in (0, 12, 24, 36)
        )  # fmt: skip
        self.aspp.img_conv = nn.Sequential(nn.Conv2d(before, 256, 1, bias=False), *bn_relu(256))
        self.bot_fine = nn.Conv2d(channels[0][-1], 48, 1, bias=False)
        self.bot_aspp = nn.Conv2d(1280, 256, 1, bias=False)
        self.final = nn.Sequential(
            nn.Conv2d(304, 256, 3, padding=1, bias=False), *bn_relu(256),
            nn.Conv2d(256, 256, 3, padding=1, bias=False), *bn_relu(256), nn.Conv2d(256, classes, 1, bias=False),
        )  # fmt: skip

    def forward(self, x):
        m2 = self.mod2(F.max_pool2d(self.mod1(x), 3, 2, 1))
        x = self.mod3(F.max_pool2d(m2, 3, 2, 1))
        for i in (4, 5, 6, 7):
            x = getattr(self, f"mod{i}")(x)
        image = self.aspp.img_conv(x.mean((2, 3), keepdim=True)).expand(-1, -1, *x.shape[2:])
        x = self.bot_aspp(torch.cat([image, *(branch(x) for branch in self.aspp.features)], 1))
        x = F.interpolate(x, m2.shape[2:], mode="bilinear", align_corners=True)
        return self.final(torch.cat([self.bot_fine(m2), x], 1))


def test_nvidias_deeplabv3plus_gives_the_same_logits(tmp_path, monkeypatch, cityscapes):
    channels = ((8, 8), (8, 8), (12, 12), (12, 16), (8, 16, 32), (16, 32, 40))
    monkeypatch.setattr(wider, "CHANNELS", channels)
    monkeypatch.setattr(wider, "STRUCTURE", (1,) * 6)
    theirs = lived_in(DeepWV3Plus(channels, 19)).float().eval()
    content = {"state_dict": {f"module.{k}": t for k, t in theirs.state_dict().items()}, "mean_iu": np.float64(0.8)}
    path = saved(tmp_path / "kitti_best.pth", content)
    ours = build_model("wider_resnet38", "deeplabv3plus", 19, 8, **PLAIN).eval()
    report = load_weights(path, ours, cityscapes)
    assert report.ratio == 1 and not report.rows
    (note,) = report.notes
    assert "corners aligned" in note
    with torch.no_grad():
        expected = theirs(images(64, 96))
        found = ours(images(64, 96), upsample=False)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * expected.abs().max())
    back = to_layout(LAYOUTS["nvidia_deeplabv3plus"], canonical(ours))
    assert back.keys() == {key for key in theirs.state_dict() if "num_batches" not in key}
    assert all(torch.equal(tensor, theirs.state_dict()[key]) for key, tensor in back.items())


def test_into_in_place_abn_two_differences_are_reported(tmp_path):
    theirs = lived_in(torchvision.models.resnet18()).float().eval()
    path = saved(tmp_path / "x.pth", theirs.state_dict())
    ours = build_classifier("resnet18", scale="signed").eval()
    report = load_weights(path, ours)
    with torch.no_grad():
        leaky, published = with_leaky_relu(theirs)(images()), theirs(images())
        found = ours(images())
    assert (found - leaky).abs().max() < 1e-5 * leaky.abs().max()
    assert (found - published).abs().max() > 1e-3 * published.abs().max()
    assert report.rounding < 1e-5 and report.as_published > 1e-3
    text = str(report)
    assert "its activation relu is leaky_relu(0.01) here, a real change" in text
    assert "exact" not in text
    assert re.search(r"differ by \S+e-0[6-9] \(relative\) .* and by \S+e-0[1-3] from the file's as published", text)


def test_layers_that_cannot_hold_negative_weights_refuse_them(tmp_path):
    path = saved(tmp_path / "x.pth", lived_in(torchvision.models.resnet18()).float().state_dict())
    with pytest.raises(
        DataError, match=r"negative or 0 in 20 layers \(body.mod1.bn1.weight \(22 of 64\).*scale=signed"
    ):
        load_weights(path, build_classifier("resnet18"))
    positive = lived_in(torchvision.models.resnet18(), positive=True).float().eval()
    ours = build_classifier("resnet18", norm="abn", activation="relu").eval()
    report = load_weights(saved(path, positive.state_dict()), ours)
    assert report.notes == ["norm layers multiplied with the weight, here with |weight| + eps: converted"]
    assert report.as_published < 1e-5
    with torch.no_grad():
        expected = positive(images())
        torch.testing.assert_close(ours(images()), expected, rtol=1e-5, atol=1e-5 * expected.abs().max())


def test_published_weights_are_the_same_under_batch_norm(tmp_path):
    """The scale of the official files is |weight| + eps, also for negative weights."""
    torch.manual_seed(0)
    theirs = network(norm="abn").eval()
    for layer in norm_layers(theirs).values():
        nn.init.uniform_(layer.weight, -1, 1)
    path = saved(tmp_path / "x.pth.tar", {"state_dict": theirs.state_dict()})
    for options in ({"norm": "batch_norm"}, {"scale": "signed"}, {}):
        ours = network(**options).eval()
        load_weights(path, ours)
        with torch.no_grad():
            torch.testing.assert_close(ours(images()), theirs(images()), rtol=1e-5, atol=1e-5)
