"""Run all Python code of the pages: plugins, a command and a back end."""

import json
import re
import shutil
import sys
import types

import pytest
import torch
from hydra.core.config_store import ConfigStore

from segtrain import abn, config
from segtrain.abn import selftest
from segtrain.cli import commands as command_table
from segtrain.config import DATASET_CONFIGS
from segtrain.data.datasets import DATASETS
from segtrain.engine.optim import OPTIMIZERS, SCHEDULES
from segtrain.losses import LOSSES
from segtrain.metrics import METRICS
from segtrain.models import BACKBONES, HEADS, build_model
from tests.helpers import pages
from tests.helpers.checkout import ROOT
from tests.helpers.own_parts import FOLDER
from tests.helpers.pages import PAGES

CONFIGS = ROOT / "configs"


@pytest.fixture
def own_configs(tmp_path, monkeypatch):
    """A copy of the YAML files, to which a test may add."""
    folder = tmp_path / "configs"
    shutil.copytree(CONFIGS, folder)
    for name, module in list(sys.modules.items()):
        if name.startswith("segtrain.") and getattr(module, "CONFIGS", None) == CONFIGS:
            monkeypatch.setattr(module, "CONFIGS", folder)
    return folder


@pytest.fixture
def forgotten(monkeypatch):
    """Remove parts of plugins, commands and configurations after a test."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    repo = ConfigStore.instance().repo
    stored = {group: set(repo.get(group, ())) for group in STORED}
    before = [dict(table) for table in TABLES]
    yield
    for group, names in stored.items():
        for name in set(repo.get(group, ())) - names:
            del repo[group][name]
    for table, parts in zip(TABLES, before, strict=True):
        table.clear()
        table.update(parts)
    for name in [name for name in sys.modules if name.startswith("my_")]:
        del sys.modules[name]


STORED = ("model", "loss", "dataset", "optimizer", "schedule")
TABLES = (BACKBONES, HEADS, LOSSES, DATASETS, DATASET_CONFIGS, OPTIMIZERS, SCHEDULES, METRICS)
PLUGINS = sorted(path.name for path in FOLDER.glob("*.py"))


class Encoder(torch.nn.Module):
    """A stand-in for what segmentation_models_pytorch gives: maps of all strides, with BatchNorm."""

    def __init__(self, output_stride):
        super().__init__()
        self.conv, self.norm = torch.nn.Conv2d(3, 6, 3, output_stride, 1), torch.nn.BatchNorm2d(6)
        torch.nn.init.constant_(self.conv.bias, 0.125)
        self.out_channels = (3, 6)

    def forward(self, x):
        return [x, self.norm(self.conv(x)).relu()]


@pytest.fixture
def smp(monkeypatch):
    """The package segmentation_models_pytorch, as far as my_encoder.py needs it."""
    module = types.ModuleType("segmentation_models_pytorch.encoders")
    module.get_encoder = lambda name, weights, output_stride: Encoder(output_stride)
    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch", types.ModuleType("segmentation_models_pytorch"))
    monkeypatch.setitem(sys.modules, module.__name__, module)


def test_an_encoder_of_ones_own_keeps_its_weights(smp, forgotten):

    exec((FOLDER / "my_encoder.py").read_text(), {})
    model = build_model("smp", output_stride=16)
    assert (model.body.encoder.conv.bias == 0.125).all()


@pytest.mark.parametrize("name", PLUGINS)
def test_a_plugin_of_the_page_does_what_its_first_line_says(name, segtrain, ponds, forgotten, smp, tmp_path):
    """The command in the first line trains two steps, on a dataset like that of my_dataset.py."""
    text = (FOLDER / name).read_text()
    line = text.splitlines()[0]
    words = [word.rstrip('.;"') for word in re.findall(r"[a-z_.]+=\S+", line)]
    plugins = f"plugins=[{name},my_dataset.py]"
    for file in (name, "my_dataset.py"):
        shutil.copy(FOLDER / file, tmp_path)
    own = [word for word in words if not word.startswith(("plugins=", "dataset"))]
    assert own or name in ("my_dataset.py", "my_metric.py")
    answer = segtrain("train", plugins, "dataset=ponds", *own, *ponds, "name=own")
    assert answer.status == 0, answer
    assert (tmp_path / "runs/own/evaluation.json").exists()
    if "segtrain evaluate" in line:
        answer = segtrain("evaluate", "run=runs/own", plugins, ponds[0], "device=cpu", "loader.workers=0")
        assert answer.status == 0, answer
        assert json.loads((tmp_path / "runs/own/evaluations/ponds-val-whole/evaluation.json").read_text())["metrics"]


def test_the_plugins_stand_on_the_page_as_they_are_tested():
    text = PAGES["segtrain/README.md"]
    for path in sorted((ROOT / "tests/fixtures/plugins").glob("*.py")):
        assert path.read_text().strip() in text, path


def test_the_other_python_of_the_page_is_run_here():
    """By the two tests below."""
    assert len(examples()) == 4


def examples():
    """Python blocks of the page other than plugins: options, function and row of a command; a back end."""
    plugins = {(FOLDER / name).read_text().strip() for name in PLUGINS}
    return [block for block in pages.blocks("segtrain/README.md", "python") if block.strip() not in plugins]


def test_the_command_of_the_page_runs(segtrain, own_configs, scenes, forgotten, monkeypatch):
    options, function, row, _ = examples()
    scope = vars(config.commands)
    for name in set(re.findall(r"class (\w+)", options)):
        monkeypatch.setitem(scope, name, None)
        exec(options, scope)
        monkeypatch.setattr(config, name, scope[name], raising=False)
    module = types.ModuleType("segtrain.commands.count")
    exec(function, vars(module))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for verb, command in eval(f"{{{row}}}", vars(command_table)).items():
        monkeypatch.setitem(command_table.COMMANDS, verb, command)
    (group,) = (block for block in pages.blocks("segtrain/README.md", "yaml") if "schema/count" in block)
    (own_configs / "count.yaml").write_text(group)
    words = "dataset=streets", f"dataset.root={scenes}", "dataset.scenes=6", "dataset.val_scenes=3"
    assert segtrain("count", *words).out == "3 images in val\n"
    assert segtrain("count", *words, "split=train").out == "6 images in train\n"
    assert "split=null" in segtrain("count", "--help").out
    for example in command_table.COMMANDS["count"].examples:
        assert segtrain(*example.split()[1:], "--cfg", "job").status == 0


def test_the_back_end_of_the_page_passes_the_selftest(monkeypatch):
    if abn.operators.native_ops.available():
        pytest.skip("no C++ compiler")
    module = types.ModuleType("segtrain.abn.backends.mine")
    exec(examples()[3], vars(module))
    results = selftest.check_backend(module, "cpu", [case for case in selftest.cases() if case.dtype == torch.float32])
    assert len(results) > 100
    assert not [str(result) for result in results if not result.good]
    monkeypatch.setitem(abn.operators.BACKENDS, "mine", module)
    monkeypatch.setitem(abn.operators.DEVICES, "mine", "cpu")
    before = abn.operators.chosen
    try:
        abn.use_backend("mine")
        assert abn.describe_backend("cpu") == "mine, as chosen"
        x = torch.randn(2, 8, 4, 4, requires_grad=True)
        abn.InPlaceABN(8)(x * 1).sum().backward()
        assert x.grad is not None
    finally:
        abn.use_backend(before)
