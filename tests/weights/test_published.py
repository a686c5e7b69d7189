"""Published files: recognition, known facts, and what networks inherit from them."""

import hashlib
import json
import re
from pathlib import Path

import pytest
import torchvision

import segtrain
from segtrain.data.labels import published_table
from segtrain.errors import DataError
from segtrain.models import BACKBONES, build_model
from segtrain.weights import checkpoint
from segtrain.weights.files import read_weights, write_weights
from segtrain.weights.layouts import LAYOUTS, LEAVES, to_layout
from segtrain.weights.network_file import options_of
from segtrain.weights.provenance import data_names, provenance
from segtrain.weights.published import known_files
from segtrain.weights.transfer import load_weights
from tests.helpers.networks import hollow, meta, shapes
from tests.helpers.weights import PLAIN, saved


def test_the_table_of_known_files():
    terms = json.loads((Path(segtrain.__file__).parent / "data/tables/weights.json").read_text())["data"]
    hashes = [known[key] for known in known_files() for key in ("md5", "md5_old") if known[key]]
    assert len(hashes) == len(set(hashes)) == 16
    assert all(re.fullmatch("[0-9a-f]{32}", md5) for md5 in hashes)
    for known in known_files():
        assert known["backbone"] in BACKBONES
        assert known["form"] in LAYOUTS
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


def test_torchvisions_names_carry_a_hash_that_is_checked(tmp_path, monkeypatch):
    path = saved(tmp_path / "x.pth", hollow(meta(torchvision.models.resnet18)))
    known = next(one for one in known_files() if one["backbone"] == "resnet18")
    monkeypatch.setitem(known, "sha256", hashlib.sha256(path.read_bytes()).hexdigest()[:8])
    assert read_weights(path).known["name"] == "torchvision_resnet18-f37072fd"


def test_how_the_vistas_model_normalised_its_images_is_reported(tmp_path, monkeypatch):
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
    state = to_layout(LAYOUTS["nvidia_deeplabv3plus"], hollow(ours))
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
    assert read_weights(saved(tmp_path / "kitti_best.pth", rest)).known is None


def test_the_tensors_decide_between_files_of_one_name(tmp_path):
    """NVIDIA's ImageNet file is called wider_resnet38.pth.tar, as an official one might be."""
    state = hollow(shapes("wider_resnet38_pooled"))
    nvidias = {re.sub(rf"((?:^|\.)bn\w*)\.{LEAVES}$", r"\1.0.\2", key): tensor for key, tensor in state.items()}
    path = saved(tmp_path / "wider_resnet38.pth.tar", {"state_dict": nvidias})
    found = read_weights(path)
    assert (found.known["name"], found.layout, found.scale, found.activation) == (
        "nvidia_wider_resnet38", "nvidia", "signed", "relu",
    )  # fmt: skip
    assert "CC BY-NC-SA 4.0" in str(found.provenance)
    official = read_weights(saved(path, {"state_dict": {f"module.{key}": tensor for key, tensor in state.items()}}))
    assert (official.known, official.layout, official.scale, official.activation) == (
        None, "official", "abs", "leaky_relu",
    )  # fmt: skip


def test_every_known_form_has_the_activation_and_scale_of_its_layout():
    """Unless its hash tells otherwise: what no hash identifies is read by its layout."""
    for known in known_files():
        layout = LAYOUTS[known["form"]]
        same = (known["activation"], known["scale"]) == (layout.activation, layout.scale)
        assert same or known["md5"] or known.get("sha256"), known["name"]


@pytest.mark.parametrize(
    ("arch", "backbone"),
    [("wider_resnet38", "wider_resnet38_pooled"), ("wider_resnet38_a2", "wider_resnet38"),
     (None, "wider_resnet38_pooled"), ("net_wider_resnet38_a2", "wider_resnet38"), (7, "wider_resnet38_pooled")],
)  # fmt: skip
def test_arch_tells_the_form_where_tensors_do_not(tmp_path, arch, backbone):
    content = {"epoch": 90, "arch": arch, "state_dict": hollow(shapes("wider_resnet38_pooled")), "best_prec1": 79.7}
    options = options_of(read_weights(saved(tmp_path / "checkpoint.pth.tar", content)))
    assert (options.backbone, options.head, options.output_stride) == (backbone, "classifier", 32)


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
    write_weights(tmp_path / "y.safetensors", hollow(meta(build_model, "resnet50")), {"provenance": found})
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
    assert data_names({"name": "mixture", "parts": parts}) == ["kitti", "folder"]
