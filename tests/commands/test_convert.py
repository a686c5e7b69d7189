"""`segtrain convert`: there and back, to and from a run's checkpoint, with the kind of the norm layers recorded."""

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from segtrain import load
from segtrain.commands.convert import official_arch
from segtrain.models import build_classifier, build_model
from segtrain.weights import checkpoint
from segtrain.weights.files import read_weights
from segtrain.weights.matching import norm_layers
from segtrain.weights.transfer import load_weights
from tests.helpers.networks import hollow, lived_in, meta, shapes, with_leaky_relu
from tests.helpers.runs import small_run
from tests.helpers.weights import images, network, saved


def test_torchvision_there_and_back(segtrain, tmp_path):
    theirs = lived_in(torchvision.models.resnet18()).float()
    saved(tmp_path / "a.pth", theirs.state_dict())
    answer = segtrain("convert", "input=a.pth", "output=b.safetensors")
    assert answer.status == 0, answer.err
    assert answer.out.splitlines()[-1] == "b.safetensors"
    middle = read_weights(tmp_path / "b.safetensors")
    assert (middle.layout, middle.activation, middle.scale) == ("official", "relu", "signed")
    assert segtrain("convert", "b.safetensors", "output=c.pth", "form=torchvision").status == 0
    back = torch.load(tmp_path / "c.pth", weights_only=True)["state_dict"]
    assert back.keys() == {key for key in theirs.state_dict() if "num_batches" not in key}
    assert all(torch.equal(tensor, theirs.state_dict()[key]) for key, tensor in back.items())


def test_official_weights_as_torchvisions(segtrain, tmp_path):
    torch.manual_seed(0)
    ours = build_classifier("resnet18", norm="abn").eval()
    for layer in norm_layers(ours).values():
        nn.init.uniform_(layer.weight, -1, 1)
    saved(tmp_path / "a.pth.tar", {"state_dict": ours.state_dict()})
    answer = segtrain("convert", "input=a.pth.tar", "output=b.pth", "form=torchvision")
    assert "the activation stays leaky_relu" in answer.out
    theirs = torchvision.models.resnet18()
    theirs.load_state_dict(torch.load(tmp_path / "b.pth", weights_only=True)["state_dict"], strict=False)
    with torch.no_grad():
        found = with_leaky_relu(theirs).eval()(images())
        torch.testing.assert_close(found, ours(images()), rtol=1e-5, atol=1e-5)


def test_a_body_alone_is_converted(tmp_path, segtrain):
    """A body without classifier, as timm's num_classes=0 gives."""
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
    assert answer.status == 2 and "are those of no known backbone" in answer.err


def test_what_norms_are_is_assumed_aloud_and_can_be_said(segtrain, tmp_path):
    theirs = network(norm="batch_norm").eval()
    for layer in norm_layers(theirs).values():
        nn.init.uniform_(layer.weight, -1, 1)
    path = saved(tmp_path / "x.pth", theirs.state_dict())
    assert "taken as In-Place ABN's" in str(load_weights(path, network()))
    assert segtrain("convert", "input=x.pth", "output=y.safetensors", "input_scale=signed").status == 0
    ours = network(norm="batch_norm").eval()
    report = load_weights(tmp_path / "y.safetensors", ours)
    assert not report.notes
    with torch.no_grad():
        assert torch.equal(ours(images()), theirs(images()))


@pytest.mark.parametrize("name", ["y.pth", "y.pth.tar", "y.safetensors"])
def test_what_is_written_tells_what_its_norms_are(tmp_path, segtrain, name):
    """In every container; a file without a record is taken for In-Place ABN's."""
    theirs = lived_in(torchvision.models.resnet18()).float()
    path = saved(tmp_path / "x.pth", theirs.state_dict())
    assert segtrain("convert", f"input={path}", f"output={name}").status == 0
    first, again = read_weights(path), read_weights(tmp_path / name)
    for one in (first, again):
        assert (one.activation, one.scale, one.provenance) == ("relu", "signed", first.provenance)
    report = load_weights(tmp_path / name, build_model("resnet18", scale="signed"))
    assert any("a real change" in note for note in report.notes) and report.as_published > 1e-3
    back = segtrain("convert", f"input={name}", f"output={name}")
    assert back.status == 2 and "is the input itself" in back.err
    plain = torch.load(tmp_path / name, weights_only=True) if name != "y.safetensors" else None
    assert plain is None or plain.keys() == {"state_dict", "segtrain"}


def test_a_run_becomes_safetensors_and_a_run_again(segtrain, scenes, tmp_path):
    short = ("trainer.max_steps=1", "name=first")
    assert segtrain("train", *small_run(scenes, *short)).status == 0
    assert segtrain("convert", "runs/first/last.pt", "output=a.safetensors").status == 0
    answer = segtrain("convert", "a.safetensors", "output=b.pt", "form=run")
    assert answer.status == 0, answer.err
    image = np.random.default_rng(0).integers(0, 255, (64, 96, 3), np.uint8)
    first, again = (load(tmp_path / path, "cpu") for path in ("runs/first/last.pt", "b.pt"))
    assert np.array_equal(first.predict(image), again.predict(image))
    assert checkpoint.load(tmp_path / "b.pt")["provenance"]["data"] == {"streets": "built in, MIT"}
    answer = segtrain("train", *small_run(scenes, *short[:1], "name=second", "model.weights=a.safetensors"))
    assert answer.status == 0, answer.err
    assert "121 tensors matched (100 %)" in answer.out
    answer = segtrain("train", *small_run(scenes, *short[:1], "name=third", "model.weights=a.safetensors",
                                          "model.backbone=resnet34"))  # fmt: skip
    assert answer.status == 1
    assert "model.backbone=resnet18" in answer.err


def loads_as_officially(content, ours):
    """What the official scripts do with a file: strict, into modules whose state has the names of our networks'.

    A segmentation network's parts are loaded one by one; a classifier stands inside a wrapper named `module`.
    """
    if "body" in content["state_dict"]:
        for part in ("body", "head", "cls"):
            getattr(ours, part).load_state_dict(content["state_dict"][part])
    else:
        nn.ModuleDict({"module": ours}).load_state_dict(content["state_dict"])
    return ours.eval()


@pytest.mark.parametrize("norm", ["inplace_abn", "batch_norm"])
def test_a_segmentation_network_in_the_official_structure(segtrain, tmp_path, norm):
    theirs = lived_in(network(norm=norm)).float().eval()
    for layer in norm_layers(theirs).values():
        nn.init.uniform_(layer.weight, 0.1, 1)
    scale = "signed" if norm == "batch_norm" else "abs"
    path = saved(tmp_path / "x.pth", theirs.state_dict())
    answer = segtrain("convert", path, "output=official.pth.tar", "form=official", f"input_scale={scale}")
    assert answer.status == 0, answer.err
    assert ("BatchNorm's weight written as that less eps" in answer.out) == (norm == "batch_norm")
    assert "its script needs net_resnet18, a head of 8 channels, 5 classes, activation leaky_relu" in answer.out
    content = torch.load(tmp_path / "official.pth.tar", weights_only=True)
    assert content["state_dict"].keys() == {"body", "head", "cls"}
    found = loads_as_officially(content, network(norm="inplace_abn"))
    with torch.no_grad():
        torch.testing.assert_close(found(images()), theirs(images()), rtol=1e-4, atol=1e-5)
    again = read_weights(tmp_path / "official.pth.tar")
    assert (again.layout, again.scale, again.num_tensors()) == ("segmenter", "abs", read_weights(path).num_tensors())


def test_a_classifier_in_the_official_structure(segtrain, tmp_path):
    theirs = lived_in(build_classifier("resnet18", 7)).float().eval()
    path = saved(tmp_path / "x.pth", theirs.state_dict())
    answer = segtrain("convert", path, "output=official.pth.tar", "form=official")
    assert answer.status == 0, answer.err
    assert "arch resnet18, bn_mode inplace, activation leaky_relu" in answer.out
    content = torch.load(tmp_path / "official.pth.tar", weights_only=True)
    assert content["arch"] == "resnet18"
    found = loads_as_officially(content, build_classifier("resnet18", 7))
    with torch.no_grad():
        assert torch.equal(found(images()), theirs(images()))
    again = read_weights(tmp_path / "official.pth.tar")
    assert (again.layout, again.scale, again.arch) == ("official", "abs", "resnet18")


@pytest.mark.parametrize(
    ("model", "arch"),
    [({}, "wider_resnet38"), ({"backbone": "wider_resnet38_pooled"}, "wider_resnet38"),
     ({"backbone": "wider_resnet38"}, "wider_resnet38_a2")],
)  # fmt: skip
def test_both_forms_of_wider_resnet38_by_their_official_names(tmp_path, model, arch):
    source = read_weights(saved(tmp_path / "x.pth", {"state_dict": hollow(shapes("wider_resnet38_pooled"))}))
    source.model = model
    assert official_arch(source) == arch


def test_what_the_official_structure_cannot_hold(segtrain, tmp_path):
    ours = network(norm="batch_norm")
    ours.head.red_bn.weight.data[:2] = torch.tensor([-1.0, 0.0])
    saved(tmp_path / "x.pth", ours.state_dict())
    answer = segtrain("convert", "x.pth", "output=y.pth", "form=official", "input_scale=signed")
    assert answer.status == 1 and "head.red_bn.weight (2 of 8)" in answer.err and "|weight| + eps" in answer.err
    answer = segtrain("convert", "x.pth", "output=y.safetensors", "form=official")
    assert answer.status == 2 and "end it in .pth.tar, .pth or .pt" in answer.err
    plus = network(backbone="resnet18", head="deeplabv3plus")
    answer = segtrain("convert", saved(tmp_path / "z.pth", plus.state_dict()), "output=y.pth", "form=official")
    assert answer.status == 2 and "has the head deeplabv3 only, and so no place for head." in answer.err
    assert not (tmp_path / "y.pth").exists()


@pytest.mark.parametrize(
    ("arguments", "words", "status"),
    [
        (["input=a.pth"], "output=null is not possible: give input=FILE and output=FILE", 2),
        (["input=a.pth", "output=b.zip"], "output must end in .safetensors, .pt, .pth or .pth.tar, got b.zip", 2),
        (["input=a.pth", "output=b.pt", "form=keras"], "form must be one of segtrain, official, torchvision, ", 2),
        (["input=none.pth", "output=b.pt"], "no weights file none.pth: give the file that is to be converted", 2),
    ],
)
def test_conversions_that_cannot_be(segtrain, tmp_path, arguments, words, status):
    saved(tmp_path / "a.pth", hollow(meta(torchvision.models.resnet18)))
    answer = segtrain("convert", *arguments)
    assert answer.status == status and words in answer.err
