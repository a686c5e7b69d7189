"""model.in_channels: networks for images of any number of channels, and the weights of RGB networks in them."""

import numpy as np
import pytest
import timm
import torch
from torch import nn

from segtrain.config import ModelConfig, TrainConfig
from segtrain.engine.normalisation import take_normalisation
from segtrain.errors import DataError, UsageError
from segtrain.models import BACKBONES, build_classifier, build_model, from_config
from segtrain.models.deployed import Deployed, trace
from segtrain.models.preprocess import normalise_images
from segtrain.weights.matching import spread_rgb
from segtrain.weights.timm_weights import load_timm
from segtrain.weights.transfer import load_weights
from tests.helpers.networks import meta
from tests.helpers.runs import refused
from tests.helpers.weights import network, saved

BUILT_IN = (
    "resnet18",
    "resnet50",
    "resnext50_32x4d",
    "resnext50",
    "wider_resnet38",
    "wider_resnet38_pooled",
    "densenet264",
)
FIRST = "body.mod1.conv1.weight"


@pytest.mark.parametrize("backbone", BUILT_IN)
def test_the_first_convolution_alone_differs(backbone):
    stride = 32 if backbone == "wider_resnet38_pooled" else 8
    shapes = [
        {
            key: tuple(t.shape)
            for key, t in meta(build_model, backbone, output_stride=stride, **more).state_dict().items()
        }
        for more in ({}, {"in_channels": 5})
    ]
    assert shapes[0][FIRST][1] == 3
    first = shapes[0][FIRST]
    assert shapes[1] == shapes[0] | {FIRST: (first[0], 5, *first[2:])}


def test_every_built_in_backbone_takes_channels():
    for name in ModelConfig.__dataclass_fields__["backbone"].metadata["option"].choices:
        model = meta(build_classifier, name, output_stride=32, in_channels=2)
        assert model.state_dict()["mod1.conv1.weight"].shape[1] == 2, name


def test_a_plugin_that_takes_rgb_only_is_refused_by_name(monkeypatch):
    def plain(norm, output_stride, width=4):
        body = nn.Conv2d(3, width, 1)
        body.out_channels = width
        return body

    monkeypatch.setitem(BACKBONES, "plain", plain)
    assert build_model("plain", num_classes=2).body.in_channels == 3
    with pytest.raises(UsageError, match=r"model.in_channels=4 is not possible with plain.*argument in_channels"):
        build_model("plain", num_classes=2, in_channels=4)
    with pytest.raises(UsageError, match=r"backbone_options.in_channels=4.*give model.in_channels"):
        build_model("resnet18", backbone_options={"in_channels": 4})


def test_weights_by_hand():
    """Red 1, green 2 and blue 6 have the sum 9: each of four channels has 9/4, each of two 9/2."""
    weight = torch.tensor([1.0, 2.0, 6.0]).view(1, 3, 1, 1)
    assert spread_rgb(weight, 4).flatten().tolist() == [2.25] * 4
    assert spread_rgb(weight, 2).flatten().tolist() == [4.5] * 2
    assert spread_rgb(weight, 1).flatten().tolist() == [9.0]


def test_weights_of_rgb_in_four_channels(tmp_path):
    """An image whose channels are all the same has the outputs that it had, and the report says what was done."""
    torch.manual_seed(0)
    theirs, ours = network(), network(in_channels=4)
    report = load_weights(saved(tmp_path / "x.pth", theirs.state_dict()), ours)
    assert report.ratio == 1
    assert f"{FIRST} is of RGB images in the file and takes 4 channels here: each has the mean over red" in str(report)
    assert "times 3/4" in str(report)
    grey = torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted, found = (net.eval()(grey.expand(1, n, -1, -1)) for net, n in ((theirs, 3), (ours, 4)))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_weights_of_four_channels_are_taken_as_they_are(tmp_path):
    theirs, ours = network(in_channels=4), network(in_channels=4)
    path = saved(tmp_path / "x.pth", theirs.state_dict())
    report = load_weights(path, ours)
    assert torch.equal(ours.state_dict()[FIRST], theirs.state_dict()[FIRST])
    assert "takes 4" not in str(report)
    for other in (3, 5):
        with pytest.raises(DataError, match=r"body.mod1.conv1.weight is \(64, 4, 7, 7\) there"):
            load_weights(path, network(in_channels=other))


def test_timms_weights_in_other_channels(tmp_path, capsys):
    torch.manual_seed(5)
    published = timm.create_model("test_resnet")
    torch.save(published.state_dict(), tmp_path / "model.pth")
    config = ModelConfig(
        backbone="timm:test_resnet", scale="signed", output_stride=32, head_channels=4, in_channels=2,
        mean=[0.1, 0.2], std=[1.0, 1.0],
    )  # fmt: skip
    ours = from_config(config, 3)
    report = load_timm(config, ours, tmp_path / "model.pth")
    first, wanted = ours.body.state_dict()["features.conv1.0.weight"], published.state_dict()["conv1.0.weight"]
    torch.testing.assert_close(first, wanted.sum(1, keepdim=True).expand(-1, 2, -1, -1) / 2)
    assert "takes 2 channels here" in str(report)
    assert not take_normalisation(TrainConfig(model=config), report.normalised)
    assert config.mean == [0.1, 0.2] and "add model.mean" not in capsys.readouterr().out


def test_images_are_normalised_by_channel_and_exported_so():
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 2, 65, 97), np.uint8))
    mean, std = [0.5, 0.25], [0.5, 2.0]
    wanted = torch.stack([(pixels[:, 0] / 255 - 0.5) / 0.5, (pixels[:, 1] / 255 - 0.25) / 2], 1)
    torch.testing.assert_close(normalise_images(pixels, mean, std), wanted)
    net = build_model(
        "resnet18", num_classes=3, output_stride=16, head_channels=8, in_channels=2, norm="batch_norm"
    ).eval()
    program = trace(Deployed(net, mean, std, True, False), 2, None, 16)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(pixels), net(wanted, upsample=False), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("key", ["mean", "std"])
def test_a_number_for_each_channel(segtrain, key):
    refused(
        segtrain("train", "experiment=toy", f"model.{key}=[0.5,0.5]"),
        f"model.{key} must be [red,green,blue]",
        "[0.5, 0.5]",
    )
    three = {"mean": [0.5] * 4, "std": [0.5] * 4} | {key: [0.5] * 3}
    with pytest.raises(
        UsageError, match=rf"model.{key} must be 4 numbers, as model.in_channels, got \[0.5, 0.5, 0.5\]"
    ):
        ModelConfig(in_channels=4, **three).check()


def test_a_plan_counts_the_channels(segtrain, tmp_path, monkeypatch):
    """The images of a step are larger by a channel; nothing is read."""
    from segtrain.engine.planning.trace import fake_batch

    config = TrainConfig(model=ModelConfig(in_channels=4))
    config.dataset.name = "folder"
    assert fake_batch(config, 2, (8, 16)).images.shape == (2, 4, 8, 16)
