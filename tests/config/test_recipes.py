"""Every recipe of configs/experiment composes, builds, trains a step, and states what the paper published."""

import json
import math
import re
from dataclasses import asdict
from functools import cache
from pathlib import Path

import pytest
import torch

from segtrain.config import ModelConfig, classifies, flatten
from segtrain.data.labels import read_json_table
from segtrain.data.loader import Batch
from segtrain.data.registry import label_table
from segtrain.distributed.group import World
from segtrain.engine.learner import Learner
from segtrain.engine.optim import learning_rate
from segtrain.engine.parallel import smallest_micro_batch
from segtrain.losses import build_loss
from segtrain.models import from_config
from segtrain.tasks.classification import ImageCrossEntropy
from segtrain.weights.published import known_by_name
from tests.helpers.recipes import RECIPES, ROWS, composed, header
from tests.helpers.runs import refused, small_run

EPOCHS = {"cityscapes": (360, 2975), "cocostuff": (30, 40_000), "vistas": (90, 18_000)}
NORMS = {
    "std": "batch_norm",
    "inplace": "inplace_abn",
    "sync": "inplace_abn_sync",
    "sync_class_uniform": "inplace_abn_sync",
}


def parts(row):
    """cityscapes_wider_resnet38_sync_12x872 -> backbone, setting, batch, crop"""
    found = re.fullmatch(rf"{row['dataset']}_([a-z]+_?[a-z]*\d+)_([a-z_]+)_(\d+)x(\d+)", row["recipe"])
    assert found, row
    return found[1], found[2], int(found[3]), int(found[4])


# ------------------------------------------------------------------------------------------------ what they say


def test_the_published_tables_are_complete():
    """The figures of Tables 3 and 4, and which of them the paper prints in bold as the best."""
    assert sorted(row["miou"] for row in ROWS if row["table"] == 3) == [
        20.30, 22.44, 22.63, 22.96, 23.35, 24.10, 24.91, 25.11, 74.42, 75.80, 75.82, 77.04, 77.58, 77.75, 78.06, 78.31,
    ]  # fmt: skip
    assert [row["miou"] for row in ROWS if row["table"] == 4] == [78.49, 78.45, 79.02, 79.16, 79.40, 53.12]
    assert len({row["recipe"] for row in ROWS}) == len(ROWS)
    imagenet = [row for row in read_json_table("paper")["rows"] if row["dataset"] == "imagenet" and row["table"] != 1]
    for row in imagenet:  # as the published files say
        said = ", ".join(
            f"{one:.2f}/{five:.2f} ({name})"
            for (one, five), name in zip(
                row["top1_top5"].values(), ("224 centre", "224 10-crop", "320 centre"), strict=True
            )
        )
        files = [file["published"] for file in read_json_table("weights")["files"] if file["data"] == ["imagenet"]]
        assert f"top-1/top-5 %: {said}" in files, row
    assert len(imagenet) == 9
    known = {file["name"] for file in read_json_table("weights")["files"]}
    assert len({row["weights"] for row in imagenet} & known) == 9


@pytest.mark.parametrize("recipe", sorted({r["recipe"] for r in read_json_table("paper")["rows"] if "top1_top5" in r}))
def test_an_imagenet_recipe_is_the_published_one(recipe):
    """Batch, learning rate, schedule and norm of the official experiments/*.json, and the figures in the header."""
    rows = [row for row in read_json_table("paper")["rows"] if row["recipe"] == recipe]
    config, text = composed(recipe), header(recipe)
    for row in rows:
        if "activation" not in row or row["activation"] == config.model.activation:
            for (top1, top5), name in zip(
                row["top1_top5"].values(), ("224 centre", "10 crops", "320 centre"), strict=True
            ):
                assert f"{top1:.2f}/{top5:.2f} % ({name})" in text
        else:  # Table 1's other half
            exchanged = ", ".join(f"{top1:.2f}/{top5:.2f}" for top1, top5 in row["top1_top5"].values())
            assert f"`segtrain evaluate activation={row['activation']}`: {exchanged} %" in text
    steps = config.trainer.steps(1281167)
    assert f"90 epochs are {steps} steps" in text
    assert "Not measured here" in text
    resnet = "_resnet" in recipe and "wider" not in recipe
    batch = 512 if resnet or recipe == "imagenet_resnext101" else 256
    rate = 0.2 if resnet else 0.1
    assert (config.trainer.batch_size, config.trainer.epochs, config.optimizer.lr) == (batch, 90, rate)
    assert (config.optimizer.nesterov, config.optimizer.momentum, config.optimizer.weight_decay) == (True, 0.9, 1e-4)
    assert config.optimizer.decay_norm_and_bias
    first, third, last = (learning_rate(config.optimizer, config.schedule, 0, share) for share in (0, 0.34, 0.9999999))
    if recipe == "imagenet_wider_resnet38":
        assert (first, last) == (0.1, pytest.approx(1e-6, rel=0.02))
    else:
        assert (first, third, last) == pytest.approx((rate, rate / 10, rate / 100))
    norm = "batch_norm" if "_std" in recipe else "inplace_abn_sync" if "_sync" in recipe else "inplace_abn"
    assert (config.model.norm, config.model.head, config.model.output_stride) == (norm, "classifier", 32)
    assert config.model.backbone.removesuffix("_pooled") in recipe


@pytest.mark.parametrize("row", ROWS, ids=[row["recipe"] for row in ROWS])
def test_a_recipe_is_its_row_of_the_paper(row):
    backbone, setting, batch, crop = parts(row)
    epochs, pictures = EPOCHS[row["dataset"]]
    config, text = composed(row["recipe"]), header(row["recipe"])
    steps = config.trainer.steps(pictures)
    for said in (
        f"Table {row['table']}, {row['row'].partition(',')[0]} on", f"{row['miou']:.2f} % mIoU on val",
        "single scale, no flip; 4 x Titan Xp", f"{row['crops_per_card']} crops on each",
        f"{epochs} epochs are {steps} steps", "Not measured here",
    ):  # fmt: skip
        assert said in text, text
    assert abs(steps * batch - epochs * pictures) <= batch / 2
    assert ("run 4 processes" in text) == (not NORMS[setting].endswith("_sync"))  # whose statistics are of a card
    wanted = {
        "dataset.name": row["dataset"], "dataset.train_split": "train", "dataset.val_split": row["split"],
        "model.backbone": backbone, "model.norm": NORMS[setting], "model.activation": "leaky_relu",
        "model.negative_slope": 0.01, "model.output_stride": 8, "model.head": "deeplabv3", "model.head_channels": 256,
        "loss.name": "bootstrapped", "loss.hardest": 0.25, "optimizer.name": "sgd", "optimizer.momentum": 0.9,
        "optimizer.nesterov": False, "optimizer.weight_decay": 1e-4, "optimizer.decay_norm_and_bias": True,
        "optimizer.lr": 0.0035 if row["dataset"] == "vistas" else 0.0025, "schedule.name": "poly",
        "schedule.power": 0.9, "schedule.warmup_steps": 0, "augmentation.crop_size": [crop, crop],
        "augmentation.scale": [0.7, 2.0], "augmentation.flip": 0.5, "augmentation.color": 0.0,
        "sampling.class_uniform": float("uniform" in setting), "trainer.batch_size": batch, "trainer.epochs": epochs,
        "trainer.precision": "fp32", "inference.scales": [1.0], "inference.flip": False, "inference.tile": None,
    }  # fmt: skip
    if row["dataset"] == "cocostuff":
        wanted |= {"dataset.classes": "stuff91", "dataset.split": "challenge2017"}
    options = flatten(asdict(config))
    assert {key: options[key] for key in wanted} == wanted
    known = known_by_name(Path(config.model.weights))
    assert known is not None and known["backbone"] == backbone and known["data"] == ["imagenet"]
    if backbone == "resnext101":  # the one network whose weights were published with each kind of norm
        assert {"std": "stdbn", "inplace": "ipabn_", "sync": "ipabn-sync"}[setting] in known["name"]


def test_short_names_are_the_best_rows():
    pairs = {}
    for row in ROWS:
        pairs.setdefault(f"{row['dataset']}_{parts(row)[0]}", []).append(row)
    assert {"cityscapes_resnext101", "cityscapes_wider_resnet38", "cocostuff_resnext101", "cocostuff_wider_resnet38",
            "vistas_wider_resnet38"} <= pairs.keys()  # fmt: skip
    for short, rows in pairs.items():
        best = max(rows, key=lambda row: row["miou"])
        assert [row.get("also") for row in rows if row is not best] == [None] * (len(rows) - 1)
        assert best["also"] == short
        assert f"{best['miou']:.2f} %" in header(short)
        one, other = asdict(composed(short)), asdict(composed(best["recipe"]))
        assert one | {"experiment": None, "name": None} == other | {"experiment": None, "name": None}


def test_the_other_recipes():
    named = {name for row in ROWS for name in (row["recipe"], row.get("also"))}
    assert {name for name in RECIPES if name not in named and not name.startswith("imagenet_")} == {
        "toy", "streets_resnet18", "cocostuff_resnext101_all171", "cocostuff_wider_resnet38_all171",
        "cityscapes_kitti_wider_resnet38", "kitti_wider_resnet38_nvidia",
    }  # fmt: skip
    for name in ("cocostuff_resnext101_all171", "cocostuff_wider_resnet38_all171"):
        assert (composed(name).dataset.classes, composed(name).dataset.split) == ("all171", "full")
        assert f"30 epochs are {composed(name).trainer.steps(118_287)} steps" in header(name)
    assert "69.56 % class IoU" in (text := header("cityscapes_kitti_wider_resnet38")) and "ensemble of five" in text
    nvidia = composed("kitti_wider_resnet38_nvidia")
    assert f"90 epochs are {nvidia.trainer.steps(179)} steps" in header("kitti_wider_resnet38_nvidia")
    assert "72.83 %" in header("kitti_wider_resnet38_nvidia")
    begins = known_by_name(Path(nvidia.model.weights))
    assert (begins["head"], begins["activation"]) == (nvidia.model.head, nvidia.model.activation)


def test_bases_are_no_recipes(segtrain):
    refused(segtrain("train", "experiment=cityscapes_resnext10"), "did you mean experiment=cityscapes_resnext101")
    listed = segtrain("train", "experiment=nothing").err
    assert "base" not in listed
    for words in (["train", "experiment=base/paper", "--cfg", "job"], ["train", "experiment='base/paper'"],
                  ["verify-resume", "experiment=base/paper"], ["train", "-m", "experiment=toy,base/paper"],
                  ):  # fmt: skip
        answer = refused(segtrain(*words), "experiment=base/paper does not exist. Available: ")
        assert answer.err.partition(" Available: ")[1:] == listed.partition(" Available: ")[1:] != ("", "")
    assert "base" not in segtrain("--complete", "train", "experiment=").out


# ------------------------------------------------------------------------------------------------ what they build

# One recipe for each step that is another one at toy size.
QUICK = ("toy", "streets_resnet18", "imagenet_resnet34_sync")
LARGE = (
    "cityscapes_resnext101_std_16x512", "cityscapes_resnext101_inplace_16x672", "cityscapes_resnext101_sync_16x672",
    "cityscapes_resnext152_sync_12x680", "cityscapes_wider_resnet38_std_20x512",
    "cityscapes_wider_resnet38_inplace_20x640", "cityscapes_wider_resnet38_sync_20x640", "kitti_wider_resnet38_nvidia",
    *sorted(name for name in RECIPES if name.startswith("imagenet_") and name not in QUICK),
)  # fmt: skip


@cache
def distinct(recipe):
    """Network, loss and optimizer, without sizes, rates and lengths, which do not decide whether a step works."""
    config = composed(recipe)
    model = asdict(config.model) | {"weights": "none", "pooling_size": None}
    return json.dumps([model, asdict(config.loss), asdict(config.optimizer) | {"lr": 0}], sort_keys=True)


@cache
def size_on_meta(key):
    model = json.loads(key)[0]
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in from_config(ModelConfig(**model), 19).parameters())


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_composes_builds_and_can_be_divided(recipe):
    config = composed(recipe)
    assert config.name == config.experiment == recipe
    assert size_on_meta(distinct(recipe)) > 1e7
    cards = 1 if recipe in QUICK[:2] else 8 if recipe == "kitti_wider_resnet38_nvidia" else 4
    assert (
        smallest_micro_batch(config, World(0, cards), build_loss(config.loss, 19)) * cards == config.trainer.batch_size
    )


def test_every_distinct_recipe_is_stepped():
    assert {distinct(recipe) for recipe in RECIPES} == {distinct(recipe) for recipe in (*QUICK, *LARGE)}


@pytest.mark.parametrize("recipe", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in LARGE)])
def test_one_step(recipe):
    config = composed(recipe)
    torch.manual_seed(0)
    if classifies(config.dataset):
        classes, loss, targets = 1000, ImageCrossEntropy(0.0), torch.tensor([3, 997])
    else:
        classes = label_table(config.dataset).num_classes
        loss, targets = build_loss(config.loss, classes), torch.randint(0, classes, (2, 64, 64), dtype=torch.uint8)
    network = from_config(config.model, classes)
    learner = Learner(network, loss, config, World(), torch.device("cpu"))
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    outcome = learner.step([Batch(images, targets, ["a", "b"], [0, 1], [])], loss.count(targets), 0, 0.0)
    assert math.log(classes) / 2 < outcome.loss < 8 * math.log(classes)  # random labels; the hardest pixels only
    assert 0 < outcome.norm < math.inf and outcome.lr == config.optimizer.lr
    after = network.state_dict()
    assert all(tensor.isfinite().all() for tensor in after.values())
    unchanged = [name for name in before if torch.equal(before[name], after[name]) and "global_pooling" not in name]
    assert not unchanged


# ------------------------------------------------------------------------------------------------ their weights


def test_without_its_weights_a_recipe_stops_with_their_row_and_none_insists(segtrain, scenes):
    words = ["train", "experiment=cityscapes_resnext101", *small_run(scenes)[3:], f"dataset.root={scenes}"]
    answer = segtrain(*words)
    refused(answer, "no weights file weights/resnext101_ipabn-sync_lr_256.pth.tar", "model.weights=none")
    assert "0a85a21847b15e5a242e17bf3b753849" in answer.err and "drive.google.com" in answer.err
    answer = segtrain("train", "experiment=cityscapes_wider_resnet38_sync_12x872", "device=cpu")  # nor are there data
    refused(answer, "no weights file weights/wide_resnet38_ipabn_lr_256.pth.tar", "1c085ab70b789cc1d6c1594f7a761007")
    answer = segtrain(*words, "model.weights=none", "model.backbone=resnet18", "trainer.max_steps=1")
    assert answer.status == 0, answer.err
    assert "initial weights random" in answer.out
