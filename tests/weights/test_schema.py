"""What a checkpoint holds is checked as a whole, before anything of it is used."""

import copy

import pytest
import torch

from segtrain.weights import checkpoint
from segtrain.weights.files import read_weights
from tests.helpers.runs import refused, state


@pytest.fixture
def content(made):
    return copy.deepcopy(made)


@pytest.fixture(scope="module")
def made():
    """The content of a checkpoint, of a network without a backbone's size."""
    from dataclasses import asdict

    from segtrain.config import StreetsConfig, TrainConfig

    options = TrainConfig(dataset=StreetsConfig(name="streets"))
    classes = {
        "names": ["a", "b"],
        "ids": [0, 1],
        "colors": [[0, 0, 0], [1, 1, 1]],
        "ignored_ids": [255],
        "source": "x",
    }
    return {
        "config": asdict(options), "classes": classes, "step": 3, "validated": 3, "best": {"miou": 0.5, "step": 3},
        "model": {"a": torch.zeros(2)}, "optimizer": {}, "trained_on": torch.zeros(3, dtype=torch.int64),
        "elapsed": 1.5, "environment": {"processes": 2, "accumulation": 1}, "recent": [1.0],
        "provenance": {"weights": [], "data": {"streets": "MIT"}, "noncommercial": []},
    }  # fmt: skip


def put(content, key, value):
    *inner, last = key.split("/")
    for name in inner:
        content = content[name]
    content[last] = value


@pytest.mark.parametrize(
    ("key", "values", "message"),
    [
        ("step", (-1, 1.5, "3", True, 10**30, None), "step is none"),
        ("elapsed", (float("nan"), float("inf"), -1, "x"), "elapsed is none"),
        ("best", ([], {"step": "x"}, {1: 2}), "best is none"),
        ("model", ([], {"a": 1}, {1: torch.zeros(1)}, {"a": torch.zeros(1, device="meta")}), "model is none"),
        ("trained_on", (torch.zeros(2), torch.zeros(1, 1, dtype=torch.int64), [1]), "trained_on is none"),
        ("environment", ([], {"processes": 0}, {"accumulation": "x"}, {"a": torch.zeros(1)}), "environment is none"),
        ("provenance", ("x", {"weights": [1], "data": {}, "noncommercial": []}), "provenance is none"),
        ("classes/names", ("ab", ["a"], ["a", 1], []), "classes is none"),
        ("classes/ids", ([0, 256], [0, 0], [0, -1], [0, 1.5], None), "classes is none"),
        ("classes/colors", ([[0, 0], [1, 1]], [[0, 0, 256], [0, 0, 0]]), "classes is none"),
        ("config", ([], {}, None, {"model": {}}), "config is none"),
        ("config/model", ("x", [], None), "config is none"),
        ("config/loss", ("x", {1: 2}), "config.loss is none"),
        ("config/model/head_channels", ("x", 1.5, -1, 10**30, None), "config.model.head_channels="),
        ("config/model/mean", ([1], ["a", "b", "c"], [float("nan")] * 3, 3), "config.model.mean="),
        ("config/model/no_such", (1,), "config.model.no_such is no option of this version"),
        ("config/trainer/epochs", (float("inf"), [1]), "config.trainer.epochs="),
        ("config/dataset/root", (3, ["x"]), "config.dataset.root="),
        ("format", ("2", None, 2.0), "format is none"),
    ],
)
def test_an_entry_of_another_type_is_named(tmp_path, content, key, values, message):
    path = tmp_path / "a.pt"
    for value in values:
        put(content, key, value)
        torch.save({"kind": checkpoint.KIND, "format": checkpoint.FORMAT, **content}, path)
        for read in (checkpoint.load, read_weights):
            with pytest.raises(checkpoint.Damaged) as caught:
                read(path)
            assert str(caught.value).startswith(f"{path} does not hold what segtrain writes ({message}"), value


def test_an_entry_that_nests_too_deeply_is_refused(content):
    for _ in range(3000):
        content["environment"] = {"deeper": content["environment"]}
    assert list(checkpoint.wrong_content(content)) == ["environment is none"]


@pytest.mark.parametrize("key", ["config", "classes", "model", "step"])
def test_what_every_checkpoint_has_may_not_be_missing(tmp_path, content, key):
    del content[key]
    checkpoint.save(tmp_path / "a.pt", content)
    with pytest.raises(checkpoint.Damaged, match=f"there is no {key}"):
        checkpoint.load(tmp_path / "a.pt")


def test_what_came_later_may_be_missing_and_a_plugin_may_have_its_own(tmp_path, content):
    for key in ("validated", "best", "optimizer", "trained_on", "elapsed", "environment", "recent", "provenance"):
        del content[key]
    content["config"]["dataset"] = {"name": "of a plugin", "own": 1}
    content["config"]["model"]["backbone"] = "of a plugin"
    del content["config"]["inference"]
    checkpoint.save(tmp_path / "a.pt", content)
    assert checkpoint.load(tmp_path / "a.pt")["step"] == 3


def test_strings_of_a_checkpoint_are_neither_paths_nor_variables(segtrain, finished_network, monkeypatch):
    monkeypatch.setenv("SECRET", "hunter2")
    content = state(finished_network)
    content["config"]["inference"]["name"] = "/../../../../ESCAPED"
    torch.save(content, "escaping.pt")
    refused(segtrain("evaluate", "checkpoint=escaping.pt", "device=cpu"), "inference.name must be a name for a file")
    content["config"]["inference"]["name"] = "${oc.env:SECRET}"
    torch.save(content, "reading.pt")
    shown = segtrain("evaluate", "checkpoint=reading.pt", "--cfg", "job")
    assert shown.status == 0
    assert "hunter2" not in shown.out + segtrain("evaluate", "checkpoint=reading.pt", "device=tpu").err
    content["classes"]["names"][0] = "road\x1b[31m\nEXACT"
    del content["best"]["miou"]
    torch.save(content, "naming.pt")
    answer = segtrain("info", "checkpoint=naming.pt")
    assert answer.status == 0 and "never validated" in answer.out
    assert "\x1b" not in answer.out and "road\\x1b[31m\\nEXACT" in answer.out


@pytest.fixture(scope="module")
def finished_network(tmp_path_factory):
    """A checkpoint of the smallest network, as a run writes it."""
    from dataclasses import asdict

    from segtrain.config import StreetsConfig, TrainConfig
    from segtrain.data.registry import label_table
    from segtrain.models import from_config

    options = TrainConfig(dataset=StreetsConfig(name="streets"))
    options.model.head_channels = 8
    table = label_table(options.dataset)
    path = tmp_path_factory.mktemp("network") / "last.pt"
    weights = from_config(options.model, table.num_classes).state_dict()
    content = {"config": asdict(options), "classes": table.as_dict(), "step": 0, "best": {"miou": -1.0, "step": 0}}
    checkpoint.save(path, {**content, "model": weights, "trained_on": None})
    return path
