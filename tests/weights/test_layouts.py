"""Key layouts: every name in every known kind of file has a place in segtrain's networks."""

import re

import numpy as np
import pytest
import timm
import torch
import torchvision

from segtrain.models import BACKBONES, build_classifier, build_model
from segtrain.weights.files import unwrap
from segtrain.weights.layouts import LAYOUTS, LEAVES, locate
from segtrain.weights.matching import canonical
from segtrain.weights.transfer import load_weights
from tests.helpers.networks import hollow, meta, shapes
from tests.helpers.weights import PLAIN, network, saved

RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnext50_32x4d", "resnext101_32x8d")


def old(key):
    """Names of the first release, in which norms are wrapped."""
    return re.sub(rf"(\w*bn\w*)\.{LEAVES}$", r"\1.bn.\2", key)


def sequence(key):
    return re.sub(rf"(\w*bn\w*)\.{LEAVES}$", r"\1.0.\2", key)


@pytest.mark.parametrize("name", RESNETS)
@pytest.mark.parametrize("build", [lambda name: getattr(torchvision.models, name)(), timm.create_model])
def test_every_name_and_shape_has_its_place(name, build):
    theirs = {k: t.shape for k, t in meta(build, name).state_dict().items() if "num_batches" not in k}
    ours = shapes(name)
    places = {}
    for key, tensor in canonical(ours).items():
        (found,) = locate(LAYOUTS["torchvision"], key).keys
        places[found] = tensor.shape
    assert places == theirs


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
    assert report.explained == {"classifier of images": 2}
    assert torch.equal(segmenter.body.mod5.block2.convs.conv2.weight, theirs.mod5.block2.convs.conv2.weight)
    assert torch.equal(segmenter.head.red_conv.weight, before)


def test_old_names_of_every_backbone_become_the_new_ones():
    for backbone in BACKBONES:
        keys = list(shapes(backbone).state_dict())
        one = torch.zeros(1)
        assert list(unwrap({f"module.{old(key)}": one for key in keys})) == keys


def test_nvidias_imagenet_file_is_batch_norms(tmp_path):
    ours = meta(build_classifier, "wider_resnet38_pooled", **PLAIN)
    state = {f"module.{sequence(key)}": tensor for key, tensor in hollow(ours).items()}
    report = load_weights(saved(tmp_path / "x.pth.tar", {"state_dict": state}), ours)
    assert (report.source.layout, report.source.scale, report.source.activation) == ("nvidia", "signed", "relu")
    assert (report.ratio, report.matched, report.notes) == (1, 193, [])
    plus = load_weights(tmp_path / "x.pth.tar", meta(build_model, "wider_resnet38", "deeplabv3plus", **PLAIN))
    assert (plus.ratio, plus.matched) == (1, 187)


def test_imagenet_weights_of_wider_resnet38_go_into_both_forms(tmp_path):
    path = saved(tmp_path / "x.pth.tar", {"state_dict": hollow(shapes("wider_resnet38_pooled"))})
    assert load_weights(path, meta(build_model, "wider_resnet38")).matched == 191
    assert load_weights(path, shapes("wider_resnet38_pooled")).matched == 193
    plus = load_weights(path, meta(build_model, "wider_resnet38", "deeplabv3plus"))
    assert plus.matched == 187
    assert plus.explained == {"classifier of images": 2, "the head reads the sum before this norm": 4}


def test_torchvisions_dilations_are_reported(tmp_path):
    previous = {"backbone_options": {"first_dilation": "previous"}}
    theirs = hollow(meta(torchvision.models.segmentation.deeplabv3_resnet50, weights=None, weights_backbone=None))
    path = saved(tmp_path / "x.pth", theirs)
    for options, noted in (({}, True), (previous, False), (previous | {"output_stride": 16}, True)):
        report = load_weights(path, meta(build_model, "resnet50", "deeplabv3_torchvision", 21, **PLAIN, **options))
        assert any("{first_dilation:previous}" in note for note in report.notes) == noted, options
