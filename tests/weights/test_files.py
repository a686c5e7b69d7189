"""Files of weights: containers, settings beside the tensors, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from segtrain.errors import DataError, UsageError
from segtrain.weights import checkpoint
from segtrain.weights.files import read_weights, write_weights
from tests.helpers.weights import network, saved


class Danger:
    def __reduce__(self):
        return (open, ("executed", "w"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"state_dict": Danger()}, r"could run code, which are never loaded \(\w*io.open\)"),
        (
            {"a": torch.zeros(1), "b": torch.zeros(1)},
            r"the names of no known layout \(a, b, ...\).*layer1.0.conv1.weight",
        ),
        ({"epoch": 3}, "no tensors at all"),
        ([1], "holds no named tensors but a list"),
    ],
)
def test_files_that_hold_something_else(tmp_path, content, words):
    with pytest.raises(DataError, match=words):
        read_weights(saved(tmp_path / "x.pth", content))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
def test_damaged_files(tmp_path, name):
    path = tmp_path / name
    if name == "x.pth":
        saved(path, network().state_dict())
    else:
        write_weights(path, network().state_dict(), {})
    path.write_bytes(path.read_bytes()[:-3000])
    with pytest.raises(DataError, match=f"{name} is damaged"):
        read_weights(path)


def test_a_changed_byte_is_noticed(tmp_path):
    path = saved(tmp_path / "x.pth", network().state_dict())
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match="is not what was written"):
        read_weights(path)


def test_averaged_weights_of_a_run_are_preferred(tmp_path, cityscapes):
    state = network().state_dict()
    content = {
        "config": {"model": {"norm": "abn", "activation": "leaky_relu", "negative_slope": 0.1},
                   "dataset": {"name": "kitti"}},
        "classes": cityscapes.as_dict(), "step": 1, "model": state, "ema": {key: 0 * t for key, t in state.items()},
    }  # fmt: skip
    checkpoint.save(tmp_path / "last.pt", content)
    source = read_weights(tmp_path / "last.pt")
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
    with pytest.raises(DataError, match="what it stores beside its tensors"):
        read_weights(tmp_path / name)


def test_a_checkpoint_without_its_options_is_refused(tmp_path):
    checkpoint.save(tmp_path / "last.pt", {"model": network().state_dict(), "step": 1})
    with pytest.raises(DataError, match=r"not hold what segtrain writes \(there is no classes; there is no config\)"):
        read_weights(tmp_path / "last.pt")


def test_a_web_page_in_place_of_a_file_is_recognised(tmp_path):
    path = tmp_path / "resnext101_ipabn_lr_512.pth.tar"
    path.write_text("<!DOCTYPE html><html><title>Google Drive - Virus scan warning</title>")
    with pytest.raises(DataError) as error:
        read_weights(path)
    assert "begins with '<!DOCTYPE html" in str(error.value) and "a web page was saved" in str(error.value)
    assert "3b7a221cbc076410eb12c8dd361b7e4e" in str(error.value)
    path.write_text("hello")
    with pytest.raises(DataError, match="is no file of weights, it begins with 'hello'"):
        read_weights(path)


def test_weights_of_another_recipe_that_was_not_run():
    with pytest.raises(UsageError, match="segtrain train experiment=vistas_wider_resnet38 name=vistas_wider_resnet38"):
        read_weights(Path("runs/vistas_wider_resnet38/last.pt"))


def test_a_run_folder_is_no_file_of_weights_but_holds_one(tmp_path):
    (tmp_path / "last.pt").touch()
    with pytest.raises(UsageError) as error:
        read_weights(tmp_path)
    assert str(error.value) == f"{tmp_path} is a run folder, not a weights file: give {tmp_path / 'last.pt'}"


def test_a_known_file_that_is_missing_is_described():
    with pytest.raises(UsageError) as error:
        read_weights(Path("weights/wide_resnet38_ipabn_lr_256.pth.tar"))
    for word in (
        "model.weights=none",
        "1c085ab70b789cc1d6c1594f7a761007",
        "mapillary/inplace_abn",
        "ImageNet",
        "79.72",
    ):
        assert word in str(error.value)
    with pytest.raises(UsageError, match="segtrain weights"):
        read_weights(Path("mine.pth"))
