"""Loading weights into a network: every tensor taken or left is reported, and classes are mapped."""

import pytest
import torch
import torchvision

from segtrain.data.labels import LabelTable, published_table
from segtrain.errors import DataError
from segtrain.models import BACKBONES, build_model
from segtrain.weights.files import write_weights
from segtrain.weights.identify import BODIES
from segtrain.weights.matching import canonical
from segtrain.weights.transfer import load_weights
from tests.helpers.networks import hollow, meta, shapes
from tests.helpers.weights import PLAIN, network, saved


def test_another_backbones_file_is_refused_and_named(tmp_path):
    path = saved(tmp_path / "x.pth", hollow(meta(torchvision.models.resnet34)))
    with pytest.raises(DataError) as error:
        load_weights(path, meta(build_model, "resnet18", **PLAIN))
    assert "without a place (layer1.2.conv1.weight, " in str(error.value)
    assert "where 100 % are required" in str(error.value)
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
    with pytest.raises(DataError, match=r"25 not in the file.*1 of another shape.*model.weights_match=FRACTION"):
        load_weights(path, ours)
    assert all(torch.equal(t, before[k]) for k, t in ours.state_dict().items())  # nothing was taken
    report = load_weights(path, ours, minimum=0.7)
    assert report.matched == 121 - 25 - 1
    assert report.ratio == pytest.approx(95 / 121)
    assert "head.red_conv.weight is (8, 16, 1, 1) there, (8, 32, 1, 1) here" in str(report)
    assert torch.equal(ours.state_dict()["body.mod5.block1.convs.conv1.weight"],
                       before["body.mod5.block1.convs.conv1.weight"])  # fmt: skip
    assert torch.equal(ours.body.mod4.block1.convs.conv1.weight, theirs.body.mod4.block1.convs.conv1.weight)


@pytest.mark.parametrize("mapping", [True, False])
def test_a_head_of_another_width_leaves_the_classifier_as_it_was(tmp_path, cityscapes, mapping):
    """Its biases match, but mean nothing without its weights."""
    theirs = build_model("resnet18", num_classes=19, output_stride=16, head_channels=16)
    path = tmp_path / "x.pth"
    if mapping:
        saved(path, theirs.state_dict())
    else:
        write_weights(path, theirs.state_dict(), {"classes": cityscapes.as_dict()})
    ours = network(classes=19)
    before = {key: tensor.clone() for key, tensor in ours.cls.state_dict().items()}
    report = load_weights(path, ours, cityscapes, minimum=0.5)
    assert all(torch.equal(tensor, before[key]) for key, tensor in ours.cls.state_dict().items())
    assert "the classifier starts anew: the file's has another number of input channels" in str(report)
    assert torch.equal(ours.body.mod2.block1.convs.conv1.weight, theirs.body.mod2.block1.convs.conv1.weight)


def test_backbones_are_known_by_their_numbers():
    found = {}
    for backbone in BACKBONES:
        body = {k: t for k, t in canonical(shapes(backbone)).items() if k.startswith("body.")}
        parameters = sum(t.numel() for k, t in body.items() if "running" not in k)
        found.setdefault((parameters, len(body)), backbone)
    assert found == BODIES


def test_vistas_to_cityscapes_keeps_the_rows_that_the_taxonomy_maps(tmp_path, cityscapes):
    torch.manual_seed(0)
    theirs, ours = network(classes=65), network(classes=19)
    vistas = published_table("vistas_v1.2").names
    report = load_weights(saved(tmp_path / "x.pth", theirs.state_dict()), ours, cityscapes)
    assert report.ratio == 1
    assert report.rows == [
        "65 classes in the file, 19 here: 18 rows of the classifier taken, 1 the mean of several (rider)"
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
    write_weights(path, theirs.state_dict(), {"classes": table("water", "land", "air").as_dict()})
    fresh = ours.cls.weight.clone()
    (tmp_path / "t.yaml").write_text("water: sea\nland: null\nair: [sky, sea]\n")
    report = load_weights(path, ours, table("soil", "sea", "sky"), mapping=str(tmp_path / "t.yaml"))
    assert report.rows == ["3 classes in the file, 3 here: 1 rows of the classifier taken, 2 start anew (soil, sky)"]
    assert torch.equal(ours.cls.weight[1], theirs.cls.weight[0])
    assert torch.equal(ours.cls.weight[[0, 2]], fresh[[0, 2]])
    # Without one, equal names; and the same classes are copied as they are.
    report = load_weights(path, ours, table("sky", "Land", "sea"))
    assert "1 rows of the classifier taken, 2 start anew (sky, sea)" in report.rows[0]
    assert torch.equal(ours.cls.weight[1], theirs.cls.weight[1])
    assert not load_weights(path, ours, table("water", "land", "air")).rows
    assert torch.equal(ours.cls.weight, theirs.cls.weight)


def test_classes_that_nobody_named_start_anew(tmp_path, segtrain, cityscapes):
    theirs, ours = network(classes=19), network(classes=19)
    before = ours.cls.weight.clone()
    report = load_weights(saved(tmp_path / "x.pth", theirs.state_dict()), ours, cityscapes)
    (line,) = report.rows
    assert line.startswith(
        "the classifier's 19 rows start anew: the classes of the file's 19 rows are not known (`segt"
    )
    answer = segtrain("convert", "input=x.pth", "output=y.pth", "classes=cityscapes")
    assert answer.status == 0, answer.err
    again = load_weights(tmp_path / "y.pth", network(classes=19), cityscapes)
    assert not again.rows and again.source.classes.names == cityscapes.names
    answer = segtrain("convert", "input=x.pth", "output=y.pth", "classes=vistas_v1.2")
    assert answer.status == 2 and "classes=vistas_v1.2 has 65 classes, x.pth has 19" in answer.err
    answer = segtrain("convert", "input=x.pth", "output=y.pth", "classes=cityscape")
    assert (
        answer.status == 2
        and "neither a published table (cityscapes, vistas_v1.2, vistas_v2.0, cocostuff) nor an existing file"
        in answer.err
    )
    assert torch.equal(ours.cls.weight, before)
