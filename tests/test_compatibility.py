"""Runs, checkpoints, plugins and command lines of users, from before the modules moved into packages, still work.

They are in tests/fixtures/compatibility, whose make.py made them.
"""

import importlib
import json
import re
import shutil
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from segtrain.cli.commands import COMMANDS as VERBS
from segtrain.cli.help import option_lines
from tests.helpers import zygote
from tests.helpers.checkout import ROOT

FOLDER = ROOT / "tests" / "fixtures" / "compatibility"
MADE = json.loads((FOLDER / "made.json").read_text())
STOP, COMMANDS = MADE["stopped_at"], MADE["commands"]
PLUGIN = "plugins=[plugins/my_small_backbone.py]"
CPUS = Path("/proc/cpuinfo")
VENDOR = re.search(r"vendor_id\s*: (\w+)", CPUS.read_text() if CPUS.exists() else "")
HERE = {"torch": torch.__version__, "opencv": cv2.__version__, "numpy": np.__version__,
        "instructions": torch.backends.cpu.get_cpu_capability(), "vendor": VENDOR and VENDOR[1]}  # fmt: skip
SAME_MACHINE = MADE["by"] == HERE
# Where torch, OpenCV, NumPy, the instruction set or the maker of the CPU, by which MKL chooses, is another than that of
# the record, sums are rounded otherwise.
ELSEWHERE = 1e-5


@pytest.fixture(autouse=True)
def search_path(monkeypatch):
    """Restore the search path, to which a plugin's folder is added."""
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.fixture
def home(tmp_path):
    """A copy of the fixtures, in which the tests train."""
    for name in ("plugins", "runs", "water"):
        shutil.copytree(FOLDER / name, tmp_path / name)
    return tmp_path


def close(expected, found, tolerance=None):
    """Whether nested dicts, lists, tensors and numbers are equal, bit for bit on a machine like the recording one."""
    tolerance = (0 if SAME_MACHINE else ELSEWHERE) if tolerance is None else tolerance
    if isinstance(expected, dict):
        return expected.keys() == found.keys() and all(close(v, found[k], tolerance) for k, v in expected.items())
    if isinstance(expected, list | tuple):
        pairs = zip(expected, found, strict=False)
        return len(expected) == len(found) and all(close(a, b, tolerance) for a, b in pairs)
    if isinstance(expected, torch.Tensor):
        same_kind = (expected.dtype, expected.shape) == (found.dtype, found.shape)
        if tolerance and same_kind and expected.is_floating_point():
            return torch.allclose(found, expected, rtol=tolerance, atol=tolerance)
        return same_kind and torch.equal(found, expected)
    if isinstance(expected, float):
        return found == pytest.approx(expected, rel=tolerance, abs=tolerance)
    return type(expected) is type(found) and expected == found


CLOCK = ("train/images_per_s", "train/data_wait", "train/memory_gb")  # other figures in every session


def lines(run, name):
    found = [json.loads(line) for line in Path(run, name).read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in CLOCK} for line in found]


def checkpoint(path):
    """Read a checkpoint without the package, as users do."""
    return torch.load(path, map_location="cpu", weights_only=True)


# ------------------------------------------------------------------------------------------------ the interrupted run


@pytest.mark.parametrize("moved", [False, True])
def test_the_interrupted_run_goes_on_to_the_bit(home, moved):
    words, run = list(COMMANDS["interrupted"]), Path("runs/interrupted")
    before = checkpoint(run / "last.pt")
    assert (before["kind"], before["format"], before["step"]) == ("segtrain checkpoint", 2, STOP)
    if moved:  # the run, the images and the plugin, each to another place
        shutil.move(run, "elsewhere")
        run = Path("elsewhere")
        shutil.move("water", "lake")
        shutil.move("plugins", "parts")
        words = [w for w in words if not w.startswith(("run=", "dataset.root=", "plugins="))]
        words += [f"run={run}", f"dataset.root={home / 'lake'}", f"plugins=[{home}/parts/my_small_backbone.py]"]
    answer = zygote.call(words)
    assert answer.returncode == 0, answer
    assert f"run        {run}, going on at step {STOP}\n" in answer.stdout
    for complaint in ("WARNING    ", "damaged", "moved the old run", "instead of"):
        assert complaint not in answer.stdout + answer.stderr
    assert not list(Path().rglob("*.old-*")) and not (run / "requeue").exists()
    found, expected = checkpoint(run / "last.pt"), checkpoint("runs/whole/last.pt")
    assert len(found.pop("contents")) == len(found["trained_on"])  # of the images, which came later
    assert found.keys() == expected.keys() and found["step"] == expected["step"] == 12
    if moved:
        assert found["classes"].pop("source").endswith("lake/classes.csv")
        del expected["classes"]["source"]
    for key in expected.keys() - {"config", "elapsed", "environment"}:
        assert close(expected[key], found[key]), key
    assert found["elapsed"] > before["elapsed"]
    assert sorted(path.name for path in run.glob("*.pt")) == [
        "best.pt", "last.pt", "step_0000010.pt", "step_0000012.pt",
    ]  # fmt: skip
    assert json.loads((run / "state.json").read_text())["state"] == "finished"
    assert len(json.loads((run / "environment.json").read_text())) == 2  # sessions
    for name in ("metrics.jsonl", "blackbox/rank0.jsonl"):
        logs = lines("runs/whole", name), [without_later(line) for line in lines(run, name)]
        assert close(*logs), name
    assert [line["step"] for line in logs[1]] == list(range(1, 13))


def without_later(line):
    """A line of a log without what came later."""
    return {key: value for key, value in line.items() if key != "val/loss" and not key.startswith("train_sample/")}


def test_it_is_listed_replayed_and_protected(segtrain, home):
    answer = segtrain("runs", "runs")
    assert (answer.status, "interrupted" in answer.out) == (0, True), answer
    assert f"{STOP}/12" in answer.out.replace(" of ", "/")
    answer = zygote.call(["replay", "runs/interrupted", "step=3", PLUGIN])
    assert answer.returncode == 0, answer
    assert "recorded   loss 1.72255, gradient norm 51.99, lr 0.00212\n" in answer.stdout
    assert "position   5  p1  window [12, 8, 34, 50, 1]" in answer.stdout
    other = zygote.call([*COMMANDS["interrupted"], "optimizer.lr=0.1"])
    assert other.returncode == 1
    assert "optimizer.lr: 0.0025 in the run, 0.1 asked for" in other.stderr


# ------------------------------------------------------------------------------------------------ the checkpoint


def test_evaluate_gives_the_recorded_scores(home):
    answer = zygote.call(COMMANDS["evaluate"])
    assert answer.returncode == 0, answer
    found, expected = (
        json.loads(path.read_text()) for path in (Path("evaluated/evaluation.json"), home / "runs/abn/evaluation.json")
    )
    assert found["confusion_matrix"] == expected["confusion_matrix"]
    assert found["miou"] == expected["miou"]
    for result in (found, expected):  # the code's commit and versions
        result["protocol"].pop("code", None)
    assert found["protocol"].pop("selected_on", None) is None  # came later, of best.pt alone
    assert found == expected


def test_the_checkpoint_gives_the_recorded_logits_and_labels(home):
    import segtrain
    from segtrain.models import BACKBONES, build_model

    recorded = np.load("runs/abn/answers.npz")
    image = np.asarray(Image.open("water/val/images/p0.png"))
    segtrain.compose(PLUGIN)  # imports it
    assert "small" in BACKBONES
    model = build_model("small", num_classes=2, output_stride=16, norm="abn", head_channels=8)
    model.load_state_dict(checkpoint("runs/abn/last.pt")["model"])
    torch.set_num_threads(1)
    with torch.inference_mode():
        logits = model.eval()(torch.from_numpy(image.transpose(2, 0, 1) / 255).float()[None], upsample=False)
    tolerance = 1e-6 if SAME_MACHINE else ELSEWHERE
    np.testing.assert_allclose(logits.numpy(), recorded["logits"], rtol=tolerance, atol=tolerance)
    answer = segtrain.load("runs/abn/last.pt", device="cpu").predict(image)
    np.testing.assert_array_equal(answer, recorded["train_ids"])
    assert (answer.dtype, answer.shape) == (np.uint8, (48, 64))


# ------------------------------------------------------------------------------------------------ plugins


@pytest.mark.parametrize(
    ("plugin", "words"),
    [
        ("my_backbone", [*COMMANDS["data"], "model=plain", "model.backbone_options={width: 8}"]),
        ("my_dataset", ["dataset=ponds", "model.backbone=small"]),
        ("my_loss", [*COMMANDS["data"], "loss=easy_less", "loss.options={gamma: 3}", "model.backbone=small"]),
    ],
)
def test_plugins_as_users_have_written_them(home, ponds, plugin, words):
    """These files never change, so their imports must stay possible."""
    more = [word for word in ponds if plugin == "my_dataset" or not word.startswith("dataset.root=")]
    files = f"plugins=[plugins/{plugin}.py,plugins/my_small_backbone.py]"
    answer = zygote.call(["train", files, *more, *words, "model.backend=aten", "run=run"])
    assert answer.returncode == 0, answer
    assert checkpoint("run/last.pt")["step"] == 2


# ------------------------------------------------------------------------------------------------ the command line


# Options that came later, each with the value that behaves as before.
ADDED = {
    "model": ["keep: exact", "frozen: []", "frozen_norm: false", "in_channels: 3"],
    "dataset": [
        "value_range: null",
        "exif: auto",
        "ignore_values: []",
        "format: masks",
        "order: last",
        "unlabelled: null",
        "columns: null",
        "channels: null",
    ],
    "trainer": ["auto_fit: false", "memory_budget: null", "cuda_graphs: false"],
    "logging": ["train_sample: 64"],
    "inference": ["precision: fp32", "batch_size: null", "compile: false"],
}
OF_A_COMMAND = (
    "taxonomy: none", "taxonomy_rest: void", "engine: null", "fetch: null\noutput: null",
    "overwrite: false\nin_memory: null",
    "sort: written\nseeds: grouped\noutput: null",  # runs
)  # fmt: skip
OF_ONE_DATASET = dict.fromkeys(ADDED["dataset"], "  name: folder\n")


def without_added(composed: str) -> str:
    """What is composed, as it was before the options of ADDED: each line of them is removed once."""
    composed = composed.replace("\n  exif: ignore\n", "\n  exif: auto\n")  # of a checkpoint from before the option
    for group, lines in ADDED.items():
        for line in lines:
            head, found, rest = composed.partition(f"\n{group}:\n")
            due = found and OF_ONE_DATASET.get(line, "") in rest.partition("\n\n")[0]
            assert not due or f"\n  {line}\n" in rest, line
            composed = head + found + rest.replace(f"\n  {line}\n", "\n", 1)
    for line in OF_A_COMMAND:
        composed = composed.replace(f"\n{line}\n", "\n", 1)
    return composed


@pytest.mark.parametrize("path", sorted((FOLDER / "composed").glob("*.yaml")), ids=lambda path: path.stem)
def test_what_is_composed(segtrain, monkeypatch, path):
    """--cfg job of every recipe, of every command, and of every choice of every group, byte for byte."""
    monkeypatch.chdir(FOLDER)
    command, _, expected = path.read_text().partition("\n")
    answer = segtrain(*command.removeprefix("# ").split(" "), "--cfg", "job")
    assert (answer.status, without_added(answer.out), answer.err) == (0, expected, "")


def test_every_recipe_and_choice_is_among_them():
    listed = "".join(path.read_text().partition("\n")[0] + " " for path in (FOLDER / "composed").iterdir())
    for path in (ROOT / "configs").glob("*/*.yaml"):
        assert f" {path.parent.name}={path.stem} " in listed, path


@pytest.mark.parametrize(("command", "options"), json.loads((FOLDER / "options.json").read_text()).items())
def test_no_option_is_lost_and_no_default_changes(segtrain, command, options):
    """The defaults are those of the options themselves; --help shows what the files of a plain command make of them."""
    text = list(option_lines(VERBS[command].schema, {}))
    listed = {line.split("=")[0] for line in segtrain(command, "--help").out.splitlines() if line.startswith("  ")}
    assert {line.split("=")[0] for line in text if not line.startswith("   ")} <= listed
    for option in options:
        shown, _, dataset = option.partition(" [") if option.endswith("]") and " [" in option else (option, "", "")
        wanted = [line for line in text if line.startswith(f"  {shown} ") and (not dataset or f"[{dataset}" in line)]
        assert len(wanted) == 1, option


# ------------------------------------------------------------------------------------------------ names

ABN = (
    "ABN BatchNormAct InPlaceABN InPlaceABNSync RecomputedABN abn active_group describe_backend inplace_abn "
    "inplace_abn_sync install_as_inplace_abn recomputed_outputs set_active_group use_backend __version__ "
    "functions modules sync"
)
NAMES = {
    "segtrain": "train evaluate load compose __version__",
    "segtrain.abn": ABN,
    "segtrain.abn.convert": "to_inplace to_batch_norm fold Conversion",
    "segtrain.abn.functions": "abn inplace_abn inplace_abn_sync",
    "segtrain.abn.modules": "ABN InPlaceABN InPlaceABNSync",
    "segtrain.abn.sync": "active_group set_active_group",
    "segtrain.cli": "main",
    "segtrain.config": "DatasetConfig DATASET_CONFIGS",
    "segtrain.data.datasets": "DATASETS",
    "segtrain.data.labels": "LabelTable",
    "segtrain.data.sample": "DataSet Files by_stem Sample",
    "segtrain.losses": "LOSSES Loss build_loss",
    "segtrain.metrics": "PLAIN Rules Scores",
    "segtrain.models": "BACKBONES HEADS Classifier Segmenter build_model build_classifier",
    "segtrain.models.blocks": "Norm conv IdentityResidualBlock",
}


@pytest.mark.parametrize("module", NAMES)
def test_public_names(module):
    found = importlib.import_module(module)
    assert [name for name in NAMES[module].split() if not hasattr(found, name)] == []


def test_public_parts():
    from segtrain.data.datasets import DATASETS
    from segtrain.losses import LOSSES
    from segtrain.models import BACKBONES, HEADS

    for parts, names in (
        (BACKBONES, "resnet18 resnet34 resnet50 resnet101 resnext50 resnext101 resnext152 resnext50_32x4d "
                    "resnext101_32x8d wider_resnet38 wider_resnet38_pooled densenet264"),
        (HEADS, "deeplabv3 deeplabv3_torchvision deeplabv3plus"),
        (LOSSES, "cross_entropy bootstrapped max_pooling focal dice lovasz"),
        (DATASETS, "streets cityscapes vistas kitti cocostuff folder"),
    ):  # fmt: skip
        assert set(names.split()) <= set(parts)
