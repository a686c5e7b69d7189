"""Weights of others: the same outputs as the networks they come from, and nothing taken or left in silence."""

import hashlib
import json
import re

import numpy as np
import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from segtrain.commands.convert import options_of, write
from segtrain.data.labels import LabelTable, published_table
from segtrain.errors import DataError, UsageError
from segtrain.models import BACKBONES, build_classifier, build_model
from segtrain.models import wider_resnet as wider
from segtrain.tasks import evaluation
from segtrain.weights import checkpoint
from segtrain.weights import transfer as module
from segtrain.weights.layouts import FORMS, LEAVES, named, place
from segtrain.weights.transfer import BODIES, known_files, load_weights, provenance, read
from tests.helpers.networks import hollow, lived_in, meta, shapes, with_leaky_relu
from tests.helpers.runs import small_run

PLAIN = {"norm": "batch_norm", "activation": "relu"}
RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnext50_32x4d", "resnext101_32x8d")


def picture(*size):
    return torch.randn(2, 3, *(size or (64, 64)), generator=torch.Generator().manual_seed(1))


def saved(path, state):
    torch.save(state, path)
    return path


def network(backbone="resnet18", classes=5, **options):
    return build_model(backbone, num_classes=classes, output_stride=16, head_channels=8, **options)


@pytest.fixture(scope="module")
def cityscapes():
    return published_table("cityscapes")


# ------------------------------------------------------------------------------------------------ torchvision, timm


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
        expected = theirs(picture())
        torch.testing.assert_close(ours.eval()(picture()), expected, rtol=1e-5, atol=1e-5 * expected.abs().max())


@pytest.mark.parametrize("name", RESNETS)
@pytest.mark.parametrize("build", [lambda name: getattr(torchvision.models, name)(), timm.create_model])
def test_every_name_and_shape_has_its_place(name, build):
    theirs = {k: t.shape for k, t in meta(build, name).state_dict().items() if "num_batches" not in k}
    ours = shapes(name)
    places = {}
    for key, tensor in module.canonical(ours).items():
        (found,) = place(FORMS["torchvision"], key).names
        places[found] = tensor.shape
    assert places == theirs


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
        expected = theirs(picture(72, 104))["out"]
        torch.testing.assert_close(ours(picture(72, 104)), expected, rtol=1e-5, atol=1e-5 * expected.abs().max())


def test_deeplabv3_of_resnet101_matches_whole(tmp_path):
    theirs = meta(torchvision.models.segmentation.deeplabv3_resnet101, weights=None, weights_backbone=None)
    ours = meta(
        build_model,
        "resnet101",
        "deeplabv3_torchvision",
        21,
        8,
        backbone_options={"first_dilation": "previous"},
        **PLAIN,
    )
    assert load_weights(saved(tmp_path / "x.pth", hollow(theirs)), ours).ratio == 1


# ------------------------------------------------------------------------------------------------ norm and activation


def test_into_in_place_abn_two_differences_are_told(tmp_path):
    theirs = lived_in(torchvision.models.resnet18()).float().eval()
    path = saved(tmp_path / "x.pth", theirs.state_dict())
    ours = build_classifier("resnet18", scale="signed").eval()
    report = load_weights(path, ours)
    with torch.no_grad():
        leaky, published = with_leaky_relu(theirs)(picture()), theirs(picture())
        found = ours(picture())
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
        expected = positive(picture())
        torch.testing.assert_close(ours(picture()), expected, rtol=1e-5, atol=1e-5 * expected.abs().max())


def test_published_weights_are_the_same_under_batch_norm(tmp_path):
    """Of the official files the scale is |weight| + eps, negative weights too."""
    torch.manual_seed(0)
    theirs = network(norm="abn").eval()
    for layer in module.norm_layers(theirs).values():
        nn.init.uniform_(layer.weight, -1, 1)
    path = saved(tmp_path / "x.pth.tar", {"state_dict": theirs.state_dict()})
    for options in ({"norm": "batch_norm"}, {"scale": "signed"}, {}):
        ours = network(**options).eval()
        load_weights(path, ours)
        with torch.no_grad():
            torch.testing.assert_close(ours(picture()), theirs(picture()), rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------ official files


def old(key):
    """As in the first release: norms are wrapped."""
    return re.sub(rf"(\w*bn\w*)\.{LEAVES}$", r"\1.bn.\2", key)


def sequence(key):
    return re.sub(rf"(\w*bn\w*)\.{LEAVES}$", r"\1.0.\2", key)


@pytest.mark.parametrize("renamed", [lambda key: key, old])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_every_naming_of_the_imagenet_files(tmp_path, renamed, prefix):
    torch.manual_seed(0)
    theirs = build_classifier("resnet18")
    state = {f"{prefix}{renamed(k)}": t for k, t in theirs.state_dict().items() if "num_batches" not in k}
    content = {
        "epoch": 90,
        "arch": "net",
        "state_dict": state,
        "best_prec1": np.float64(77.1),
        "optimizer": {"state": {}},
    }
    # As files of 2018 are: not a zip archive, and numpy's numbers under its module's name of then.
    path = tmp_path / "model_best.pth.tar"
    torch.save(content, path, _use_new_zipfile_serialization=prefix == "")
    if prefix:
        assert b"numpy._core.multiarray" in path.read_bytes()
        path.write_bytes(path.read_bytes().replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    ours = build_classifier("resnet18")
    assert load_weights(path, ours).ratio == 1
    for key, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], tensor), key
    segmenter = network()
    before = segmenter.head.red_conv.weight.clone()
    report = load_weights(path, segmenter)
    assert report.ratio == 1 and report.matched == 100
    assert report.explained == {"classes of whole pictures": 2}
    assert torch.equal(segmenter.body.mod5.block2.convs.conv2.weight, theirs.mod5.block2.convs.conv2.weight)
    assert torch.equal(segmenter.head.red_conv.weight, before)


def test_old_names_of_every_backbone_become_the_new_ones():
    for backbone in BACKBONES:
        keys = list(shapes(backbone).state_dict())
        one = torch.zeros(1)
        assert list(module.clean({f"module.{old(key)}": one for key in keys})) == keys


def test_nvidias_imagenet_file_is_batch_norms(tmp_path):
    ours = meta(build_classifier, "wider_resnet38_pooled", **PLAIN)
    state = {f"module.{sequence(key)}": tensor for key, tensor in hollow(ours).items()}
    report = load_weights(saved(tmp_path / "x.pth.tar", {"state_dict": state}), ours)
    assert (report.source.form, report.source.scale, report.source.activation) == ("nvidia", "signed", "relu")
    assert (report.ratio, report.matched, report.notes) == (1, 193, [])
    plus = load_weights(tmp_path / "x.pth.tar", meta(build_model, "wider_resnet38", "deeplabv3plus", **PLAIN))
    assert (plus.ratio, plus.matched) == (1, 187)


def test_what_norms_are_is_assumed_aloud_and_can_be_said(segtrain, tmp_path):
    theirs = network(norm="batch_norm").eval()
    for layer in module.norm_layers(theirs).values():
        nn.init.uniform_(layer.weight, -1, 1)
    path = saved(tmp_path / "x.pth", theirs.state_dict())
    assert "taken as In-Place ABN's" in str(load_weights(path, network()))
    assert segtrain("convert", "input=x.pth", "output=y.safetensors", "input_scale=signed").status == 0
    ours = network(norm="batch_norm").eval()
    report = load_weights(tmp_path / "y.safetensors", ours)
    assert not report.notes
    with torch.no_grad():
        assert torch.equal(ours(picture()), theirs(picture()))


def test_the_vistas_file_matches_whole(tmp_path):
    ours = meta(build_model, "wider_resnet38", num_classes=65)
    state = hollow(ours)
    parts = {part: {k.removeprefix(f"{part}."): t for k, t in state.items() if k.startswith(f"{part}.")}
             for part in ("body", "head", "cls")}  # fmt: skip
    path = saved(
        tmp_path / "wide_resnet38_deeplab_vistas.pth.tar", {"state_dict": parts, "training_meta": {"epoch": 3}}
    )
    report = load_weights(path, ours, published_table("vistas_v1.2"))
    assert (report.ratio, report.matched) == (1, 191 + 19 + 2)
    assert report.source.classes.names == published_table("vistas_v1.2").names
    assert not report.rows
    # Written here, so that neither its hash nor its normalisation is the published one's.
    (warning,) = report.notes
    assert warning.startswith("WARNING: it has the name of the published wide_resnet38_deeplab_vistas but not its hash")
    assert "913f78486a34aa1577a7cd295e8a33bb" in warning and hashlib.md5(path.read_bytes()).hexdigest() in warning
    # Nor does anything say that it is another network: what the published one forbids is taken to hold.
    assert any("wide_resnet38_deeplab_vistas: CC BY-NC-SA 4.0" in part for part in report.provenance["noncommercial"])
    assert set(report.provenance["data"]) == {"imagenet", "vistas"}


def test_imagenet_weights_of_wider_resnet38_go_into_both_forms(tmp_path):
    path = saved(tmp_path / "x.pth.tar", {"state_dict": hollow(shapes("wider_resnet38_pooled"))})
    assert load_weights(path, meta(build_model, "wider_resnet38")).matched == 191
    assert load_weights(path, shapes("wider_resnet38_pooled")).matched == 193
    plus = load_weights(path, meta(build_model, "wider_resnet38", "deeplabv3plus"))
    assert plus.matched == 187
    assert plus.explained == {"classes of whole pictures": 2, "the head reads the sum before this norm": 4}


# ------------------------------------------------------------------------------------------------ NVIDIA's


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
    """The published structure, small: modules' channels and one block each."""

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
        expected = theirs(picture(64, 96))
        found = ours(picture(64, 96), upsample=False)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * expected.abs().max())
    back = named(FORMS["nvidia_deeplabv3plus"], module.canonical(ours))
    assert back.keys() == {key for key in theirs.state_dict() if "num_batches" not in key}
    assert all(torch.equal(tensor, theirs.state_dict()[key]) for key, tensor in back.items())


# ------------------------------------------------------------------------------------------------ what does not fit


def test_another_backbones_file_is_refused_and_named(tmp_path):
    path = saved(tmp_path / "x.pth", hollow(meta(torchvision.models.resnet34)))
    with pytest.raises(DataError) as error:
        load_weights(path, meta(build_model, "resnet18", **PLAIN))
    assert "without a place (layer1.2.conv1.weight, " in str(error.value)
    assert "where 100 % are asked for" in str(error.value)
    assert "model.backbone=resnet34" in str(error.value)
    with pytest.raises(DataError, match="resnet18"):
        path = saved(tmp_path / "x.pth", hollow(meta(torchvision.models.resnet18)))
        load_weights(path, meta(build_model, "resnet34", **PLAIN))


def test_a_part_is_taken_only_when_asked_for(tmp_path):
    torch.manual_seed(0)
    theirs = network(classes=5)
    state = {k: t for k, t in theirs.state_dict().items() if not k.startswith("body.mod5")}
    state["head.red_conv.weight"] = state["head.red_conv.weight"][:, :16]
    path = saved(tmp_path / "x.pth", state)
    ours = network(classes=5)
    before = {k: t.clone() for k, t in ours.state_dict().items()}
    # mod5: two blocks of two convolutions and norms of four tensors, and a projection with its norm: 25 of 121.
    with pytest.raises(DataError, match=r"25 not in the file.*1 of another shape.*model.weights_match=SHARE"):
        load_weights(path, ours)
    assert all(torch.equal(t, before[k]) for k, t in ours.state_dict().items())  # nothing was taken
    report = load_weights(path, ours, least=0.7)
    assert report.matched == 121 - 25 - 1
    assert report.ratio == pytest.approx(95 / 121)
    assert "head.red_conv.weight is (8, 16, 1, 1) there, (8, 32, 1, 1) here" in str(report)
    assert torch.equal(ours.state_dict()["body.mod5.block1.convs.conv1.weight"],
                       before["body.mod5.block1.convs.conv1.weight"])  # fmt: skip
    assert torch.equal(ours.body.mod4.block1.convs.conv1.weight, theirs.body.mod4.block1.convs.conv1.weight)


def test_backbones_are_known_by_their_numbers():
    found = {}
    for backbone in BACKBONES:
        body = {k: t for k, t in module.canonical(shapes(backbone)).items() if k.startswith("body.")}
        parameters = sum(t.numel() for k, t in body.items() if "running" not in k)
        found.setdefault((parameters, len(body)), backbone)
    assert found == BODIES


class Danger:
    def __reduce__(self):
        return (open, ("executed", "w"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"state_dict": Danger()}, r"could run code, which are never loaded \(\w*io.open\)"),
        ({"a": torch.zeros(1), "b": torch.zeros(1)}, r"no known form \(a, b, ...\).*layer1.0.conv1.weight"),
        ({"epoch": 3}, "no tensors at all"),
        ([1], "holds no named tensors but a list"),
    ],
)
def test_files_that_hold_something_else(tmp_path, content, words):
    with pytest.raises(DataError, match=words):
        read(saved(tmp_path / "x.pth", content))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
def test_damaged_files(tmp_path, name):
    path = tmp_path / name
    if name == "x.pth":
        saved(path, network().state_dict())
    else:
        write(path, network().state_dict(), {})
    path.write_bytes(path.read_bytes()[:-3000])
    with pytest.raises(DataError, match=f"{name} is damaged"):
        read(path)


def test_a_changed_byte_is_noticed(tmp_path):
    path = saved(tmp_path / "x.pth", network().state_dict())
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match="is not what was written"):
        read(path)


def test_averaged_weights_of_a_run_are_preferred(tmp_path, cityscapes):
    state = network().state_dict()
    content = {
        "config": {"model": {"norm": "abn", "activation": "leaky_relu", "negative_slope": 0.1},
                   "dataset": {"name": "kitti"}},
        "classes": cityscapes.as_dict(), "model": state, "ema": {key: 0 * t for key, t in state.items()},
    }  # fmt: skip
    checkpoint.save(tmp_path / "last.pt", content)
    source = read(tmp_path / "last.pt")
    assert not any(tensor.any() for tensor in source.tensors.values())
    assert (source.scale, source.negative_slope, source.classes.names) == ("abs", 0.1, cityscapes.names)
    assert source.provenance["noncommercial"] == ["data kitti (CC BY-NC-SA 3.0)"]


@pytest.mark.parametrize(
    "settings",
    [[1], {"classes": {"x": 1}}, {"classes": 3}, {"scale": 3}, {"activation": "swish"}, {"negative_slope": "steep"},
     {"model": [1]}, {"provenance": 5}, {"provenance": {"weights": []}}],
)  # fmt: skip
@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
def test_settings_that_are_none_are_refused(tmp_path, settings, name):
    content = {"state_dict": network().state_dict(), "segtrain": settings}
    if name == "x.pth":
        saved(tmp_path / name, content)
    else:
        save_file(content["state_dict"], tmp_path / name, {"segtrain": json.dumps(settings)})
    with pytest.raises(DataError, match="what stands beside its tensors"):
        read(tmp_path / name)


def test_a_checkpoint_without_its_options_is_refused(tmp_path):
    checkpoint.save(tmp_path / "last.pt", {"model": network().state_dict()})
    with pytest.raises(DataError, match=r"what stands beside its tensors is not as segtrain writes it \(KeyError"):
        read(tmp_path / "last.pt")


def test_a_web_page_in_place_of_a_file_is_recognised(tmp_path):
    path = tmp_path / "resnext101_ipabn_lr_512.pth.tar"
    path.write_text("<!DOCTYPE html><html><title>Google Drive - Virus scan warning</title>")
    with pytest.raises(DataError) as error:
        read(path)
    assert "begins with '<!DOCTYPE html" in str(error.value) and "a web page was saved" in str(error.value)
    assert "3b7a221cbc076410eb12c8dd361b7e4e" in str(error.value)
    path.write_text("hello")
    with pytest.raises(DataError, match="is no file of weights, it begins with 'hello'"):
        read(path)


def test_weights_of_another_recipe_that_was_not_run():
    with pytest.raises(UsageError, match="segtrain train experiment=vistas_wider_resnet38 name=vistas_wider_resnet38"):
        read(module.Path("runs/vistas_wider_resnet38/last.pt"))


def test_a_known_file_that_is_missing_is_described():
    with pytest.raises(UsageError) as error:
        read(module.Path("weights/wide_resnet38_ipabn_lr_256.pth.tar"))
    for word in (
        "model.weights=none",
        "1c085ab70b789cc1d6c1594f7a761007",
        "mapillary/inplace_abn",
        "ImageNet",
        "79.72",
    ):
        assert word in str(error.value)
    with pytest.raises(UsageError, match="segtrain weights"):
        read(module.Path("mine.pth"))


# ------------------------------------------------------------------------------------------------ other classes


def test_vistas_to_cityscapes_keeps_the_rows_that_the_taxonomy_maps(tmp_path, cityscapes):
    torch.manual_seed(0)
    theirs, ours = network(classes=65), network(classes=19)
    vistas = published_table("vistas_v1.2").names
    report = load_weights(saved(tmp_path / "x.pth", theirs.state_dict()), ours, cityscapes)
    assert report.ratio == 1
    assert report.rows == [
        "65 classes in the file, 19 here: 18 rows of the classifier kept, 1 the mean of several (rider)"
    ]

    def of(*names):
        rows = [vistas.index(name) for name in names]
        return theirs.cls.weight[rows].mean(0), theirs.cls.bias[rows].mean(0)

    for train_id, names in {
        0: ["construction--flat--road"],  # of eight, the one of that name
        6: ["object--traffic-light"],
        12: ["human--rider--bicyclist", "human--rider--motorcyclist", "human--rider--other-rider"],
        16: ["object--vehicle--on-rails"],
    }.items():
        weight, bias = of(*names)
        assert torch.equal(ours.cls.weight[train_id], weight)
        assert torch.equal(ours.cls.bias[train_id], bias)
    assert torch.equal(ours.head.red_conv.weight, theirs.head.red_conv.weight)


def test_a_taxonomy_of_ones_own(tmp_path):
    def table(*names):
        return LabelTable(
            [{"name": n, "id": i, "color": [0, 0, 0], "train_id": i} for i, n in enumerate(names)], "mine"
        )

    theirs, ours = network(classes=3), network(classes=3)
    path = tmp_path / "x.safetensors"
    write(path, theirs.state_dict(), {"classes": table("water", "land", "air").as_dict()})
    fresh = ours.cls.weight.clone()
    (tmp_path / "t.yaml").write_text("water: sea\nland: null\nair: [sky, sea]\n")
    report = load_weights(path, ours, table("soil", "sea", "sky"), mapping=str(tmp_path / "t.yaml"))
    assert report.rows == ["3 classes in the file, 3 here: 1 rows of the classifier kept, 2 start anew (soil, sky)"]
    assert torch.equal(ours.cls.weight[1], theirs.cls.weight[0])
    assert torch.equal(ours.cls.weight[[0, 2]], fresh[[0, 2]])
    # Without one, equal names; and the same classes are copied whole.
    report = load_weights(path, ours, table("sky", "Land", "sea"))
    assert "1 rows of the classifier kept, 2 start anew (sky, sea)" in report.rows[0]
    assert torch.equal(ours.cls.weight[1], theirs.cls.weight[1])
    assert not load_weights(path, ours, table("water", "land", "air")).rows
    assert torch.equal(ours.cls.weight, theirs.cls.weight)


def test_classes_that_nobody_named_start_anew(tmp_path, segtrain, cityscapes):
    theirs, ours = network(classes=19), network(classes=19)
    before = ours.cls.weight.clone()
    report = load_weights(saved(tmp_path / "x.pth", theirs.state_dict()), ours, cityscapes)
    (told,) = report.rows
    assert told.startswith("the classifier's 19 rows start anew: what the file's 19 rows stand for is not known (`segt")
    answer = segtrain("convert", "input=x.pth", "output=y.pth", "classes=cityscapes")
    assert answer.status == 0, answer.err
    again = load_weights(tmp_path / "y.pth", network(classes=19), cityscapes)
    assert not again.rows and again.source.classes.names == cityscapes.names
    answer = segtrain("convert", "input=x.pth", "output=y.pth", "classes=vistas_v1.2")
    assert answer.status == 2 and "classes=vistas_v1.2 has 65 classes, x.pth tells 19 apart" in answer.err
    answer = segtrain("convert", "input=x.pth", "output=y.pth", "classes=cityscape")
    assert answer.status == 2 and "choose cityscapes, vistas_v1.2, vistas_v2.0, cocostuff or a file" in answer.err
    assert torch.equal(ours.cls.weight, before)


# ------------------------------------------------------------------------------------------------ table, provenance


def test_the_table_of_known_files():
    terms = json.loads((module.Path(module.__file__).parents[1] / "data/tables/weights.json").read_text())["data"]
    hashes = [known[key] for known in known_files() for key in ("md5", "md5_old") if known[key]]
    assert len(hashes) == len(set(hashes)) == 16
    assert all(re.fullmatch("[0-9a-f]{32}", md5) for md5 in hashes)
    for known in known_files():
        assert known["backbone"] in BACKBONES
        assert known["form"] in FORMS
        assert set(known["data"]) <= set(terms)
        assert known["page"].startswith("https://") and known["licence"] and known["published"]
    assert len({known["name"] for known in known_files()}) == len(known_files())


def test_listing_and_verifying(segtrain, tmp_path, monkeypatch):
    answer = segtrain("weights")
    assert answer.status == 0
    for known in known_files():
        assert known["name"] in answer.out
    assert "53.42" in answer.out and "CC BY-NC-SA 4.0" in answer.out
    path = saved(tmp_path / "resnext101_ipabn_lr_512.pth.tar", {"state_dict": hollow(shapes("resnext101"))})
    answer = segtrain("weights", f"verify={path}")
    assert answer.status == 1
    assert "has the name of a published file but not its content" in answer.err
    assert "by their number resnext101" in answer.out
    path.rename(tmp_path / "mine.pth")
    answer = segtrain("weights", "mine.pth")
    assert answer.status == 0 and "none of the files" in answer.out
    known = next(one for one in known_files() if one["name"] == "resnext101_ipabn_lr_512")
    monkeypatch.setitem(known, "md5_old", hashlib.md5((tmp_path / "mine.pth").read_bytes()).hexdigest())
    answer = segtrain("weights", "mine.pth")
    assert answer.status == 0
    assert "resnext101_ipabn_lr_512: resnext101" in answer.out and "(first release)" in answer.out
    assert "not for commercial use" in answer.out


def test_torchvisions_names_carry_a_hash_that_is_checked(tmp_path, monkeypatch):
    path = saved(tmp_path / "x.pth", hollow(meta(torchvision.models.resnet18)))
    known = next(one for one in known_files() if one["backbone"] == "resnet18")
    monkeypatch.setitem(known, "sha256", hashlib.sha256(path.read_bytes()).hexdigest()[:8])
    assert read(path).known["name"] == "torchvision_resnet18-f37072fd"


def test_how_the_vistas_model_saw_its_pictures_is_told(tmp_path, monkeypatch):
    ours = meta(build_model, "wider_resnet38", num_classes=65)
    path = saved(tmp_path / "x.pth", hollow(ours))
    known = next(one for one in known_files() if one["classes"] == 65)
    monkeypatch.setitem(known, "md5", hashlib.md5(path.read_bytes()).hexdigest())
    report = load_weights(path, ours, published_table("vistas_v1.2"))
    assert report.normalised[0] == [0.41738699, 0.45732192, 0.46886091] and report.normalised[1][0] == 0.25685097
    assert "not for commercial use: weights x.pth (CC BY-NC-SA 4.0)" in str(report)
    options = options_of(report.source)
    assert (options.backbone, options.head, options.norm) == ("wider_resnet38", "deeplabv3", "inplace_abn")
    assert (options.pooling_size, options.head_channels, options.output_stride) == ([672, 672], 256, 8)


def test_files_of_which_no_hash_is_published_are_known_by_name_and_tensors(tmp_path, segtrain, cityscapes):
    ours = meta(build_model, "wider_resnet38", "deeplabv3plus", 19)
    state = named(FORMS["nvidia_deeplabv3plus"], hollow(ours))
    path = saved(tmp_path / "kitti_best.pth", {"state_dict": state})
    report = load_weights(path, meta(build_model, "wider_resnet38", "deeplabv3plus", 19, **PLAIN), cityscapes)
    assert report.source.known["name"] == "nvidia_kitti_best"
    assert "taken for the published nvidia_kitti_best by its name and tensors: no hash is published" in report.notes
    assert list(provenance(["streets"], report)["data"]) == ["imagenet", "vistas", "cityscapes", "kitti", "streets"]
    assert report.provenance["noncommercial"][0] == "weights kitti_best.pth (CC BY-NC-SA 4.0)"
    answer = segtrain("weights", path)
    assert "published  nvidia_kitti_best: wider_resnet38 + deeplabv3plus" in answer.out
    assert "hash       none is published: known by its name and its tensors" in answer.out
    with pytest.raises(DataError) as error:  # the other head: the backbone is right
        load_weights(path, meta(build_model, "wider_resnet38", num_classes=19, **PLAIN))
    assert "Its head is model.head=deeplabv3plus model.head_channels=256." in str(error.value)
    assert "model.backbone=" not in str(error.value)
    path.rename(tmp_path / "mine.pth")  # may be any of three, or another
    answer = segtrain("weights", "mine.pth")
    assert answer.status == 0 and "none of the files" in answer.out
    licence = "not known; its tensors are those of nvidia_cityscapes_best, nvidia_kitti_best, cityscapes_cv0_"
    assert "not for commercial use: data vistas (" in answer.out
    assert f"not for commercial use: weights mine.pth ({licence}" in answer.out
    assert "data kitti" not in answer.out
    rest = {key: tensor for key, tensor in state.items() if not key.startswith("mod4")}
    assert read(saved(tmp_path / "kitti_best.pth", rest)).known is None


def test_torchvisions_dilations_are_told(tmp_path):
    previous = {"backbone_options": {"first_dilation": "previous"}}
    theirs = hollow(meta(torchvision.models.segmentation.deeplabv3_resnet50, weights=None, weights_backbone=None))
    path = saved(tmp_path / "x.pth", theirs)
    for options, told in (({}, True), (previous, False), (previous | {"output_stride": 16}, True)):
        report = load_weights(path, meta(build_model, "resnet50", "deeplabv3_torchvision", 21, **PLAIN, **options))
        assert any("{first_dilation:previous}" in note for note in report.notes) == told, options


def test_a_body_alone_is_converted(tmp_path, segtrain):
    """As timm's num_classes=0 and many others hand it on."""
    whole = lived_in(torchvision.models.resnet18()).float().state_dict()
    body = {key: tensor for key, tensor in whole.items() if not key.startswith("fc.")}
    saved(tmp_path / "x.pth", body)
    assert segtrain("convert", "input=x.pth", "output=y.safetensors").status == 0
    answer = segtrain("convert", "input=y.safetensors", "output=z.pth", "form=torchvision")
    assert answer.status == 0, answer.err
    back = torch.load(tmp_path / "z.pth", weights_only=True)["state_dict"]
    assert back.keys() == {key for key in body if "num_batches" not in key}
    assert all(torch.equal(tensor, body[key]) for key, tensor in back.items())
    del body["layer1.0.conv1.weight"], body["bn1.weight"]
    body["layer1.0.conv1.weight"] = whole["layer1.0.conv1.weight"]
    answer = segtrain("convert", f"input={saved(tmp_path / 'x.pth', body)}", "output=w.pth")
    assert answer.status == 2 and "is of no backbone of this package" in answer.err


@pytest.mark.parametrize("name", ["y.pth", "y.pth.tar", "y.safetensors"])
def test_what_is_written_tells_what_its_norms_are(tmp_path, segtrain, name):
    """In each container: a file that says nothing is taken for In-Place ABN's."""
    theirs = lived_in(torchvision.models.resnet18()).float()
    path = saved(tmp_path / "x.pth", theirs.state_dict())
    assert segtrain("convert", f"input={path}", f"output={name}").status == 0
    first, again = read(path), read(tmp_path / name)
    for one in (first, again):
        assert (one.activation, one.scale, one.provenance) == ("relu", "signed", first.provenance)
    report = load_weights(tmp_path / name, build_model("resnet18", scale="signed"))
    assert any("a real change" in note for note in report.notes) and report.as_published > 1e-3
    back = segtrain("convert", f"input={name}", f"output={name}")
    assert back.status == 2 and "is the input itself" in back.err
    plain = torch.load(tmp_path / name, weights_only=True) if name != "y.safetensors" else None
    assert plain is None or plain.keys() == {"state_dict", "segtrain"}


def test_info_tells_where_weights_come_from(tmp_path, segtrain, cityscapes):
    config = {"model": {"norm": "abn", "activation": "leaky_relu", "negative_slope": 0.01, "backbone": "resnet18",
                        "head": "deeplabv3"}, "dataset": {"name": "kitti"}}  # fmt: skip
    content = {"config": config, "classes": cityscapes.as_dict(), "model": {}, "step": 3, "best": {"miou": 0.5},
               "provenance": provenance(["kitti"], None)}  # fmt: skip
    checkpoint.save(tmp_path / "last.pt", content)
    answer = segtrain("info", "checkpoint=last.pt")
    assert "not for commercial use: data kitti (CC BY-NC-SA 3.0)" in answer.out


def test_provenance_is_inherited(tmp_path, monkeypatch):
    path = saved(tmp_path / "x.pth", hollow(shapes("resnet50")))
    known = next(one for one in known_files() if one["name"] == "resnet50_ipabn-sync_lr_512")
    monkeypatch.setitem(known, "md5", hashlib.md5(path.read_bytes()).hexdigest())
    first = load_weights(path, meta(build_model, "resnet50"))
    found = provenance(["vistas"], first)
    assert found["weights"] == [
        {"file": "x.pth", "known": "resnet50_ipabn-sync_lr_512", "licence": known["licence"], "noncommercial": True}
    ]
    assert list(found["data"]) == ["imagenet", "vistas"]
    assert found["noncommercial"] == [
        f"weights x.pth ({known['licence']})", f"data imagenet ({known['licence']})",
        "data vistas (CC BY-NC-SA 4.0, registration)",
    ]  # fmt: skip
    write(tmp_path / "y.safetensors", hollow(meta(build_model, "resnet50")), {"provenance": found})
    second = provenance(["streets", "vistas"], load_weights(tmp_path / "y.safetensors", meta(build_model, "resnet50")))
    assert list(second["data"]) == ["imagenet", "vistas", "streets"]
    assert second["weights"] == found["weights"] and second["noncommercial"] == found["noncommercial"]
    for began, name, matched in ((found["start"], "x.pth", 265), (second["start"], "y.safetensors", 286)):
        digest = hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
        assert began == {"file": str(tmp_path / name), "sha256": digest, "matched": matched, "share": 1.0}
    assert provenance(["streets"], None) == {
        "weights": [], "data": {"streets": "built in, MIT"}, "noncommercial": [],
    }  # fmt: skip
    parts = {"kitti": {}, "mine": {"dataset": "folder", "weight": 1}, "vistas": {"weight": 0}}
    assert module.data_names({"name": "mixture", "parts": parts}) == ["kitti", "folder"]


# ------------------------------------------------------------------------------------------------ convert, train


def test_torchvision_there_and_back(segtrain, tmp_path):
    theirs = lived_in(torchvision.models.resnet18()).float()
    saved(tmp_path / "a.pth", theirs.state_dict())
    answer = segtrain("convert", "input=a.pth", "output=b.safetensors")
    assert answer.status == 0, answer.err
    assert answer.out.splitlines()[-1] == "b.safetensors"
    middle = read(tmp_path / "b.safetensors")
    assert (middle.form, middle.activation, middle.scale) == ("official", "relu", "signed")
    assert segtrain("convert", "b.safetensors", "output=c.pth", "form=torchvision").status == 0
    back = torch.load(tmp_path / "c.pth", weights_only=True)["state_dict"]
    assert back.keys() == {key for key in theirs.state_dict() if "num_batches" not in key}
    assert all(torch.equal(tensor, theirs.state_dict()[key]) for key, tensor in back.items())


def test_official_weights_as_torchvisions(segtrain, tmp_path):
    torch.manual_seed(0)
    ours = build_classifier("resnet18", norm="abn").eval()
    for layer in module.norm_layers(ours).values():
        nn.init.uniform_(layer.weight, -1, 1)
    saved(tmp_path / "a.pth.tar", {"state_dict": ours.state_dict()})
    answer = segtrain("convert", "input=a.pth.tar", "output=b.pth", "form=torchvision")
    assert "the activation stays leaky_relu" in answer.out
    theirs = torchvision.models.resnet18()
    theirs.load_state_dict(torch.load(tmp_path / "b.pth", weights_only=True)["state_dict"], strict=False)
    with torch.no_grad():
        found = with_leaky_relu(theirs).eval()(picture())
        torch.testing.assert_close(found, ours(picture()), rtol=1e-5, atol=1e-5)


def test_a_run_becomes_safetensors_and_a_run_again(segtrain, scenes, tmp_path):
    short = ("trainer.max_steps=1", "name=first")
    assert segtrain("train", *small_run(scenes, *short)).status == 0
    assert segtrain("convert", "runs/first/last.pt", "output=a.safetensors").status == 0
    answer = segtrain("convert", "a.safetensors", "output=b.pt", "form=run")
    assert answer.status == 0, answer.err
    image = np.random.default_rng(0).integers(0, 255, (64, 96, 3), np.uint8)
    first, again = (evaluation.load(tmp_path / path, "cpu") for path in ("runs/first/last.pt", "b.pt"))
    assert np.array_equal(first.predict(image), again.predict(image))
    assert checkpoint.load(tmp_path / "b.pt")["provenance"]["data"] == {"streets": "built in, MIT"}
    answer = segtrain("train", *small_run(scenes, *short[:1], "name=second", "model.weights=a.safetensors"))
    assert answer.status == 0, answer.err
    assert "121 tensors matched (100 %)" in answer.out
    answer = segtrain("train", *small_run(scenes, *short[:1], "name=third", "model.weights=a.safetensors",
                                          "model.backbone=resnet34"))  # fmt: skip
    assert answer.status == 1
    assert "model.backbone=resnet18" in answer.err


@pytest.mark.parametrize(
    ("arguments", "words", "status"),
    [
        (["input=a.pth"], "output=null is not possible: give input=FILE and output=FILE", 2),
        (["input=a.pth", "output=b.zip"], "end the name in .safetensors", 2),
        (
            ["input=a.pth", "output=b.pt", "form=keras"],
            "form must be one of segtrain, torchvision, ",
            2,
        ),
        (["input=none.pth", "output=b.pt"], "no weights file none.pth: give the file that is to be converted", 2),
    ],
)
def test_conversions_that_cannot_be(segtrain, tmp_path, arguments, words, status):
    saved(tmp_path / "a.pth", hollow(meta(torchvision.models.resnet18)))
    answer = segtrain("convert", *arguments)
    assert answer.status == status and words in answer.err
