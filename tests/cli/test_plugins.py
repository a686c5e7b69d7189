"""Plugins: files given by plugins=, or dicts filled in a notebook."""

import sys
from dataclasses import dataclass, fields

import numpy as np
import pytest
import yaml
from hydra.core.config_store import ConfigStore
from torch import nn

import segtrain as package
from segtrain import config, losses
from segtrain.cli.commands import COMMANDS
from segtrain.cli.words import override
from segtrain.config import DATASET_CONFIGS, DatasetConfig, is_safe
from segtrain.config import plugin_files as plugins
from segtrain.config.compose import given
from segtrain.data.registry import DATASETS
from segtrain.engine.optim import OPTIMIZERS, SCHEDULES
from segtrain.errors import UsageError
from segtrain.models import BACKBONES, HEADS, build_model
from tests.helpers.own_parts import FOLDER, ODD, OWN_PARTS, PLUGINS
from tests.helpers.runs import refused, small_run


def forget():
    """Forget what a new process would not know."""
    for name in [name for name in sys.modules if name.startswith("my_")]:
        del sys.modules[name]
    for parts, names in ((BACKBONES, ("plain", "mine")), (DATASETS, ("ponds",)), (DATASET_CONFIGS, ("ponds",))):
        for name in names:
            parts.pop(name, None)
    losses.LOSSES.pop("easy_less", None)
    for group in ("model", "dataset", "loss", "optimizer", "schedule"):
        for name in ("plain.yaml", "ponds.yaml", "mine.yaml", "easy_less.yaml"):
            ConfigStore.instance().repo.get(group, {}).pop(name, None)


@pytest.fixture(autouse=True)
def afterwards():
    path = list(sys.path)
    yield
    forget()
    sys.path[:] = path


# ------------------------------------------------------------------------------------------------ files


def test_the_examples_are_short():
    for path in FOLDER.glob("*.py"):
        assert sum(bool(line.strip()) for line in path.read_text().splitlines()) <= 15, path


def test_the_examples_train_are_checked_and_evaluated(segtrain, ponds, tmp_path):
    files = f"plugins=[{','.join(map(str, PLUGINS))}]"
    answer = segtrain("train", files, *OWN_PARTS, *ponds)
    assert answer.status == 0, answer
    assert "plain + deeplabv3" in answer.out
    assert "ponds: 4 train and 2 val images, 2 classes" in answer.out
    run = next((tmp_path / "runs").iterdir())
    assert run.name.startswith("ponds_plain")
    assert "my_backbone" not in run.name  # another place of the file is no other run
    root = f"dataset.root={tmp_path / 'ponds'}"
    assert segtrain("evaluate", run / "last.pt", files, root, "device=cpu", "loader.workers=0").status == 0
    assert segtrain("predict", files, f"run={run}", f"input={tmp_path / 'ponds/val/0.jpg'}", "device=cpu").status == 0
    assert segtrain("check", files, "dataset=ponds", root).status == 0
    # The checkpoint names its plugins, and they are not imported for that.
    forget()
    refused(segtrain("evaluate", run / "last.pt", root), "dataset=ponds", "not known here", "plugins=[FILE]")
    refused(segtrain("predict", f"run={run}", f"input={tmp_path / 'ponds/val/0.jpg'}", "device=cpu"),
            "last.pt", "model.backbone=plain", "not known here", "plugins=[FILE]")  # fmt: skip
    assert "plain" not in BACKBONES


def test_unknown_parts_say_where_ones_own_come_from(segtrain):
    refused(segtrain("train", "model=plain"), "model=plain", "plugins=[FILE]")
    refused(segtrain("train", "model.backbone=plain"), "model.backbone must be one of", "got plain", "plugins=[FILE]")
    refused(segtrain("train", "dataset=ponds"), "dataset=ponds", "plugins=[FILE]")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("import math\n\nBACKBONE['x'] = 1\n", ["my_parts.py, line 3", "NameError", "BACKBONE"]),
        ("import math\ndef f(:\n    pass\n", ["my_parts.py, line 2", "SyntaxError"]),
        ("import my_other\n", ["my_other.py, line 2", "ZeroDivisionError"]),
        ("import nowhere\n", ["my_parts.py, line 1", "ModuleNotFoundError", "nowhere"]),
        ("from segtrain.data.labels import LabelTable\nLabelTable([{}], 'x')\n", ["my_parts.py, line 2", "KeyError"]),
    ],
)
def test_a_plugin_that_fails_names_file_line_and_error(segtrain, tmp_path, text, words):
    (tmp_path / "my_parts.py").write_text(text)
    (tmp_path / "my_other.py").write_text("\n1 / 0\n")
    answer = refused(segtrain("train", "plugins=[./my_parts.py]", "--cfg", "job"), "plugins=[./my_parts.py]", *words)
    assert answer.err.count("\n") == 1
    assert "my_parts" not in sys.modules


def test_plugins_that_are_not_there(segtrain, tmp_path):
    refused(segtrain("train", "plugins=[./none.py]", "--cfg", "job"), "plugins=[./none.py]: no such file")
    refused(segtrain("train", "plugins=[my_none.parts]", "--cfg", "job"), "there is no module my_none", "./NAME.py")
    (tmp_path / "json.py").touch()
    refused(segtrain("train", "plugins=[./json.py]", "--cfg", "job"), "another module is called json", "another name")
    (tmp_path / "timm.py").touch()
    refused(segtrain("train", "plugins=[./timm.py]", "--cfg", "job"), "another module is called timm", "another name")


def test_modules_and_recipes(segtrain, tmp_path, monkeypatch):
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "parts.py").write_text((FOLDER / "my_backbone.py").read_text())
    monkeypatch.syspath_prepend(str(tmp_path))
    assert segtrain("train", "plugins=[my_package.parts]", "model=plain", "--cfg", "job").status == 0
    forget()
    recipes = tmp_path / "mine" / "experiment"
    recipes.mkdir(parents=True)
    (recipes / "a.yaml").write_text(
        f"# @package _global_\nplugins: [{FOLDER / 'my_backbone.py'}]\nmodel: {{backbone: plain}}\n"
    )
    options = package.compose("experiment=a", config_dir=str(tmp_path / "mine"))
    assert options.model.backbone == "plain"
    assert "plain" in BACKBONES


@pytest.mark.parametrize("value", ODD)
def test_paths_of_plugins_arrive_as_typed(value):
    for word, wanted in ((f"plugins={value}", [value]), (f"plugins=[{value},b.py]", [value, "b.py"])):
        if wanted != [value] and set(value) & set(",'\""):
            continue  # in a list those need quotes
        found = given([override("train", COMMANDS["train"], word)], "plugins")
        assert [str(item) for item in found["plugins"]] == wanted
    for word in ("plugins=['a b.py',\"c'd.py\"]", "plugins=[]"):
        found = given([override("train", COMMANDS["train"], word)], "plugins")
        assert [str(item) for item in found["plugins"]] == (["a b.py", "c'd.py"] if "a b" in word else [])


def test_every_command_that_needs_parts_takes_plugins():
    takes = {verb for verb, command in COMMANDS.items() if "plugins" in {f.name for f in fields(command.schema)}}
    assert takes >= {"train", "evaluate", "predict", "score", "submit", "check"}
    assert is_safe("plugins")


# ------------------------------------------------------------------------------------------------ options of a builder


class Mine(nn.Conv2d):
    def __init__(self, norm, output_stride, depth, width=4):
        super().__init__(3, width, 3, output_stride, 1)
        self.out_channels = width


def test_options_are_checked_against_the_signature(segtrain, monkeypatch):
    monkeypatch.setitem(BACKBONES, "mine", Mine)
    assert build_model("mine", backbone_options={"depth": 1, "width": 6}).body.out_channels == 6
    for options, words in (
        ({"widht": 1, "depth": 2}, ["model.backbone_options.widht", "mine", "did you mean width?", "depth, width"]),
        ({"norm": 1, "depth": 2}, ["model.backbone_options.norm", "depth, width"]),
        ({}, ["model.backbone=mine needs model.backbone_options={depth: ...}"]),
    ):
        with pytest.raises(UsageError) as caught:
            build_model("mine", backbone_options=options)
        for word in words:
            assert word in str(caught.value)
    with pytest.raises(UsageError, match=r"backbone_options\.depth: resnext50 has no such option\. Available: none"):
        build_model("resnext50", backbone_options={"depth": 1})
    monkeypatch.setitem(BACKBONES, "mine", lambda norm, output_stride, **rest: Mine(norm, output_stride, **rest))
    assert build_model("mine", backbone_options={"depth": 1}).body.out_channels == 4
    monkeypatch.setitem(BACKBONES, "mine", lambda norm, output_stride: nn.Identity())
    with pytest.raises(UsageError, match="model.backbone=mine: the module lacks out_channels"):
        build_model("mine")
    refused(
        segtrain("train", "model=resnext50", "model.backbone_options.depth=1"),
        "model.backbone_options.depth",
        "no such option. Available: none",
    )


def test_options_from_the_command_line(monkeypatch):
    monkeypatch.setitem(BACKBONES, "mine", Mine)
    for words in (["model.backbone_options={depth: 3, width: 5}"],
                  ["model.backbone_options.depth=3", "model.backbone_options.width=5"]):  # fmt: skip
        assert package.compose("model=mine", *words).model.backbone_options == {"depth": 3, "width": 5}
    assert package.compose().model.backbone_options == {}


# ------------------------------------------------------------------------------------------------ notebooks


def test_from_a_notebook(scenes, tmp_path):
    BACKBONES["mine"] = lambda norm, output_stride: Mine(norm, output_stride, 1, width=8)
    words = small_run(scenes, "trainer.max_steps=1", "name=notebook")
    composed = package.compose("model=mine", *words)
    assert isinstance(composed, config.TrainConfig)
    assert composed.model.backbone == package.compose("model.backbone=mine").model.backbone == "mine"
    assert package.train(composed) == tmp_path.relative_to(tmp_path) / "runs/notebook"
    assert yaml.safe_load((tmp_path / "runs/notebook/config.yaml").read_text())["model"]["backbone"] == "mine"
    assert package.load("runs/notebook/last.pt", device="cpu").predict(np.zeros((64, 64, 3), np.uint8)).shape == (
        64,
        64,
    )


def test_compose_says_what_the_command_line_says():
    with pytest.raises(UsageError, match=r"there is no option optimizer\.lrr; did you mean optimizer\.lr\? Available"):
        package.compose("optimizer.lrr=1")
    with pytest.raises(UsageError, match=r"optimizer\.lr must be greater than 0, got -1"):
        package.compose("optimizer.lr=-1")
    with pytest.raises(UsageError, match="no flags"):
        package.compose("-m")
    assert package.compose("experiment=toy", "optimizer.lr=0.5").name == "toy-optimizer.lr=0.5"


# ------------------------------------------------------------------------------------------------ data sets


@dataclass
class PondsConfig(DatasetConfig):
    depth: int = 1  # no help text: users need none


def test_a_data_set_with_options_of_its_own(segtrain):
    plugins.load_plugin(str(FOLDER / "my_dataset.py"))
    DATASET_CONFIGS["ponds"] = PondsConfig
    made = package.compose("dataset=ponds", "dataset.depth=3").dataset
    assert (made.name, made.depth, type(made)) == ("ponds", 3, PondsConfig)
    refused(
        segtrain("train", "dataset=ponds", "dataset.dept=3"), "no option dataset.dept", "did you mean dataset.depth?"
    )
    refused(segtrain("train", "dataset=ponds", "dataset.depth=deep"), "dataset.depth", "'deep'", "whole number")
    refused(segtrain("train", "dataset=cityscapes", "dataset.depth=3"), "no option dataset.depth")


OWN_OPTIONS = """
from dataclasses import dataclass
from segtrain.config import DatasetConfig, option
from segtrain.data.registry import DATASETS

@dataclass
class Options(DatasetConfig):
    depth: int = option(1, "depth [m]", low=1)
    shore: str = option("sand", "shore", choices=("sand", "reed"))
    names: str | None = option(None, "file with names", path=True)
    shifts: dict[str, int] = option({}, "shift of each month [days]")

DATASETS["ponds"] = DATASETS["folder"]._replace(options=Options)
"""


def test_options_of_a_plugins_data_set_describe_themselves_too(segtrain, tmp_path):
    (tmp_path / "my_ponds.py").write_text(OWN_OPTIONS)
    words = ["plugins=[./my_ponds.py]", "dataset=ponds"]
    made = package.compose(*words, "dataset.names=a (1).txt", "dataset.shifts.may=3", "dataset.shore=reed").dataset
    assert (made.names, made.shifts, made.shore) == ("a (1).txt", {"may": 3}, "reed")
    refused(segtrain("train", *words, "dataset.depth=0"), "dataset.depth must be at least 1, got 0")
    refused(segtrain("train", *words, "dataset.shore=seed"), "dataset.shore must be one of sand, reed, got seed")
    refused(segtrain("train", *words, "dataset.shift=3"), "no option dataset.shift", "did you mean dataset.shifts?")


def test_optimizers_and_schedules_too(monkeypatch):
    monkeypatch.setitem(OPTIMIZERS, "mine", OPTIMIZERS["sgd"])
    monkeypatch.setitem(SCHEDULES, "mine", SCHEDULES["poly"])
    for words in (["optimizer=mine", "schedule=mine"], ["optimizer.name=mine", "schedule.name=mine"]):
        made = package.compose(*words, "optimizer.momentum=0.5", "optimizer.betas=[0.5,0.5]")  # it may read all options
        assert (made.optimizer.name, made.schedule.name) == ("mine", "mine")
    for group, known in (("optimizer", "sgd, adamw, mine"), ("schedule", "constant, mine")):
        with pytest.raises(UsageError, match=rf"{group}.name must be one of .*{known}, got mien; did you mean mine"):
            package.compose(f"{group}.name=mien")


def test_a_data_set_of_ones_own_in_a_mixture(ponds, tmp_path):
    from segtrain.data.registry import training_mixture

    plugins.load_plugin(str(FOLDER / "my_dataset.py"))
    words = ["dataset=mixture", "dataset.target=ponds", f"dataset.parts.ponds.root={tmp_path / 'ponds'}"]
    assert len(training_mixture(package.compose(*words).dataset).samples) == 4


def test_heads_too(monkeypatch):
    monkeypatch.setitem(HEADS, "mine", lambda channels, width, norm, stride, pooling: nn.Conv2d(channels, width, 1))
    assert isinstance(build_model("resnet18", head="mine").head, nn.Conv2d)
