"""Several datasets in one run: taxonomies, order, labels of several classes, and training from an earlier run."""

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from segtrain.config import IGNORE_INDEX, AugmentationConfig, KittiConfig, LossConfig, MixtureConfig
from segtrain.data.augment import Augmentation
from segtrain.data.label_files import read_label
from segtrain.data.labels import LabelTable, published_table, read_json_table
from segtrain.data.loader import TrainingData
from segtrain.data.order import turn
from segtrain.data.registry import dataset_spec, label_table, split_samples, training_mixture
from segtrain.data.scenes.layouts import write_scenes
from segtrain.data.taxonomy import MappedTable, taxonomy
from segtrain.errors import DataError, UsageError
from segtrain.losses import build_loss
from tests.helpers.losses import step_loss
from tests.helpers.samples import read_sample


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    for layout in ("vistas", "kitti", "cityscapes"):
        write_scenes(folder / layout, layout, {"train": 3, "val": 2}, 0, (256, 512), workers=1)
    return folder


def mixture(roots, target="kitti", **parts):
    given = {name: {"root": str(roots / name), **options} for name, options in parts.items()}
    return MixtureConfig(name="mixture", target=target, parts=given)


AUGMENT = Augmentation(AugmentationConfig())
BOTH = {"kitti": {"split": "trainval"}, "vistas": {"taxonomy": "vistas_to_cityscapes"}}


def test_vistas_is_told_in_cityscapes_classes(roots):
    config = mixture(roots, **BOTH)
    mixed = training_mixture(config)
    assert label_table(config).names == published_table("cityscapes").names
    assert len({sample.name for sample in mixed.samples}) == len(mixed.samples) == 6
    rows = {row["id"]: row["train_id"] for row in read_json_table("vistas_to_cityscapes")["mapping"]}
    for sample in mixed.samples:
        target = read_sample(sample, label_table(config))[1]
        stored = read_label(sample.label)
        if sample.name.startswith("vistas/"):
            expected = np.vectorize(rows.get)(stored)
            assert (target == expected).all()
        else:
            assert (target == published_table("cityscapes").encode(stored, Path())).all()
    assert dataset_spec(config).rules.source.startswith("KITTI")
    assert split_samples(config, "val") == split_samples(KittiConfig(name="kitti", root=str(roots / "kitti")), "val")


@pytest.mark.parametrize(
    "column", ["recommended", "mseg_cityscapes19", "robustnet", "strict_uda", "unicore", "rvc2022"]
)
def test_published_columns(column):
    vistas, cityscapes = published_table("vistas_v1.2"), published_table("cityscapes")
    mapping = taxonomy(vistas, cityscapes, "vistas_to_cityscapes", column)
    assert set(mapping) == {row["name"] for row in vistas.rows}
    assert mapping["construction--flat--road"] == (0,)
    if column in ("recommended", "mseg_cityscapes19", "unicore"):
        assert mapping["construction--flat--bike-lane"] == (0,)
    if column in ("robustnet", "rvc2022"):
        assert mapping["construction--flat--bike-lane"] == ()
    assert mapping["void--unlabeled"] == ()


def test_other_columns_and_files_are_named():
    vistas, cityscapes = published_table("vistas_v1.2"), published_table("cityscapes")
    with pytest.raises(UsageError, match="column=mine is not in vistas_to_cityscapes: choose recommended, mseg"):
        taxonomy(vistas, cityscapes, "vistas_to_cityscapes", "mine")
    with pytest.raises(UsageError, match="neither published"):
        taxonomy(vistas, cityscapes, "nowhere.yaml", "recommended")
    with pytest.raises(UsageError, match=r"animal--bird, .* are not in the cityscapes label table: set taxonomy"):
        taxonomy(vistas, cityscapes, None, "recommended")
    assert taxonomy(cityscapes, cityscapes, None, "recommended")["road"] == (0,)
    v2 = published_table("vistas_v2.0")
    assert taxonomy(v2, cityscapes, "vistas_v2.0_to_cityscapes", "recommended")["construction--flat--road"] == (0,)


def written(tmp_path, changes, names=None):
    """A user's taxonomy from Cityscapes to itself, with changes."""
    names = names or published_table("cityscapes").names
    lines = {name: name for name in names} | changes
    path = tmp_path / "mine.yaml"
    path.write_text(json.dumps(lines))  # JSON is YAML
    return str(path)


def test_a_users_taxonomy_may_say_several_or_nothing(tmp_path):
    table = published_table("cityscapes")
    path = written(tmp_path, {"car": ["car", "truck", "bus"], "rider": None, "truck": ["bus", "truck", "car"]})
    mapping = taxonomy(table, table, path, "recommended")
    groups = []
    mapped = MappedTable(table, table, mapping, groups, "mine")
    assert groups == [(13, 14, 15)]
    ids = np.array([[26, 27, 25, 7, 0]], np.uint8)  # car, truck, rider, road, unlabeled
    assert mapped.encode(ids, Path()).tolist() == [[19, 19, IGNORE_INDEX, 0, IGNORE_INDEX]]
    assert mapped.to_ids(ids).tolist() == [[0, 0, 0, 7, 0]]
    with pytest.raises(DataError, match="label id 99"):
        mapped.encode(np.full((1, 1), 99, np.uint8), Path())
    larger = published_table("vistas_v1.2")  # 50 is an id of the target, but not of the source
    with pytest.raises(DataError, match="label id 50"):
        MappedTable(table, larger, {}, [], "mine").encode(np.full((1, 1), 50, np.uint8), Path())


@pytest.mark.parametrize(
    ("changes", "names", "words"),
    [
        ({"raod": "road"}, None, "'raod' is not in the cityscapes label table; did you mean road"),
        ({"road": "street"}, None, "'street' is not in the cityscapes label table"),
        ({}, ["road", "car"], "does not map sidewalk, building"),
    ],
)
def test_wrong_taxonomies(tmp_path, changes, names, words):
    table = published_table("cityscapes")
    with pytest.raises(DataError, match=words):
        taxonomy(table, table, written(tmp_path, changes, names), "recommended")
    (tmp_path / "list.yaml").write_text("- road\n")
    with pytest.raises(DataError, match="expected lines"):
        taxonomy(table, table, str(tmp_path / "list.yaml"), "recommended")


def test_published_taxonomies_fit_their_source_and_target_only():
    vistas, cityscapes = published_table("vistas_v1.2"), published_table("cityscapes")
    for source, target, words in (
        (cityscapes, cityscapes, "has 34"), (published_table("vistas_v2.0"), cityscapes, "has 124"),
        (vistas, published_table("cocostuff"), "has no sidewalk"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=words):
            taxonomy(source, target, "vistas_to_cityscapes", "recommended")
    rows = list(reversed([dict(row) for row in cityscapes.rows]))
    for row in rows:
        row["train_id"] = IGNORE_INDEX if row["train_id"] == IGNORE_INDEX else 18 - row["train_id"]
    backwards = LabelTable(rows, "backwards")
    assert taxonomy(vistas, backwards, "vistas_to_cityscapes", "recommended")["construction--flat--road"] == (18,)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["check", "split=val"], "of a mixture each part has its own"),
        (["score", "predictions=x"], "name one of its datasets"),
        (["submit", "predictions=x"], "no server to submit to"),
    ],
)
def test_commands_that_a_mixture_cannot_serve(roots, segtrain, command, words):
    answer = segtrain(
        *command, "dataset=mixture", "dataset.target=kitti", f"dataset.parts.kitti.root={roots / 'kitti'}"
    )
    assert answer.status == 2
    assert words in answer.err


def test_a_folder_instead_of_options(roots):
    with pytest.raises(UsageError, match=r"dataset\.parts\.kitti=/data is not possible: give options"):
        training_mixture(MixtureConfig(name="mixture", target="kitti", parts={"kitti": "/data"}))


def test_every_part_is_checked_by_its_own_table(roots, segtrain, tmp_path):
    shutil.copytree(roots / "vistas", tmp_path / "shifted")
    for path in (tmp_path / "shifted" / "training" / "labels").iterdir():
        Image.fromarray(read_label(path) + 1).save(path)
    data = ["dataset=mixture", "dataset.target=kitti", f"dataset.parts.kitti.root={roots / 'kitti'}",
            "dataset.parts.vistas.taxonomy=vistas_to_cityscapes"]  # fmt: skip
    assert segtrain("check", *data, f"dataset.parts.vistas.root={roots / 'vistas'}").status == 0
    for command in (["check"], ["train", *SMALL]):
        answer = segtrain(*command, *data, "dataset.parts.vistas.root=shifted")
        assert answer.status == 1
        assert "one too high" in answer.err


# ------------------------------------------------------------------------------------------------ turns


def test_parts_have_their_turns_by_weight_and_every_picture_comes_equally_often(roots):
    config = mixture(roots, kitti={"split": "trainval", "weight": 1}, vistas=BOTH["vistas"] | {"weight": 3})
    mixed = training_mixture(config)
    assert mixed.weights == [(3, 1.0), (3, 3.0)]
    data = TrainingData(
        mixed.samples, label_table(config), Augmentation(AugmentationConfig()), 0, weights=mixed.weights
    )
    order = [data.order(position) for position in range(2000)]
    parts = Counter(mixed.samples[number].name.split("/")[0] for number in order)
    assert parts == {"kitti": 500, "vistas": 1500}
    counts = Counter(order)
    assert {counts[number] for number in range(3)} == {166, 167}
    assert {counts[number] for number in range(3, 6)} == {500}
    assert [data.order(position) for position in (1999, 3, 700)] == [order[1999], order[3], order[700]]  # in any order
    other = TrainingData(
        mixed.samples, label_table(config), Augmentation(AugmentationConfig()), 1, weights=mixed.weights
    )
    assert [other.order(position) for position in range(100)] != order[:100]


def test_a_turn_knows_how_many_there_were_before():
    weights, seen = (0.3, 1.7, 5.0), Counter()
    for position in range(3000):
        part, before = turn(weights, 4, position)
        assert before == seen[part]
        seen[part] += 1
    assert [seen[part] for part in range(3)] == [129, 729, 2142]


def test_a_part_of_weight_0_lends_its_classes_only(roots):
    config = mixture(roots, kitti={"weight": 0}, vistas=BOTH["vistas"] | {"weight": 1})
    mixed = training_mixture(config)
    assert {sample.name.split("/")[0] for sample in mixed.samples} == {"vistas"}
    assert all(picture.startswith("vistas/") for picture in mixed.identities)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target": "vistas", "kitti": {}}, "dataset.target=vistas is none of the parts"),
        ({"kitti": {"rot": "x"}}, r"no option dataset\.parts\.kitti\.rot; did you mean root\? Available: dataset"),
        ({"kitti": {}, "kity": {}}, "kity is not a dataset"),
        ({"kitti": {"weight": -1}}, "weight=-1"),
        ({"kitti": {"weight": "abc"}}, "weight=abc"),
        ({"kitti": {"weight": float("nan")}}, "weight=nan"),
        ({"kitti": {"weight": float("inf")}}, "weight=inf"),
        ({"kitti": {"val_list": 3}}, r"parts\.kitti\.val_list=3 is not possible: published list"),
        ({"kitti": {"cache": "decoded"}}, r"no option dataset\.parts\.kitti\.cache"),
        ({"kitti": {"taxonomy": "vistas_to_cityscapes"}},
         r"66 labels of vistas_v1\.2, but the cityscapes label table has 34"),
        ({"kitti": {"weight": 0}}, "all weights are 0"),
        ({"kitti": {"weight": 1}, "cityscapes": {}}, "only kitti has a weight"),
        ({"kitti": {"weight": 1}, "cityscapes": {"weight": 1e-6}}, "less than 1 of 1000"),
    ],
)  # fmt: skip
def test_wrong_mixtures(roots, options, words):
    with pytest.raises(UsageError, match=words):
        training_mixture(mixture(roots, **options))


def test_the_same_data_twice_with_another_column(roots):
    parts = {"kitti": {}, "a": BOTH["vistas"] | {"dataset": "vistas"}, "b": {"dataset": "vistas", "column": "robustnet",
             "taxonomy": "vistas_to_cityscapes"}}  # fmt: skip
    for name in ("a", "b"):
        parts[name]["root"] = str(roots / "vistas")
    mixed = training_mixture(mixture(roots, **parts))
    assert {sample.name.split("/")[0] for sample in mixed.samples} == {"kitti", "a", "b"}


# ------------------------------------------------------------------------------------------------ the loss


@pytest.mark.parametrize("hardest", [1.0, 0.4])
def test_a_group_costs_the_sum_of_its_probabilities(hardest):
    torch.manual_seed(0)
    groups = [(1, 3), (0, 2, 4)]
    logits = torch.randn(2, 5, 6, 7, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, 7, (2, 12, 14))
    target[0, :2] = IGNORE_INDEX
    loss = step_loss(build_loss(LossConfig("bootstrapped", hardest), 5, groups), logits, target)
    (gradient,) = torch.autograd.grad(loss, logits)

    p = F.interpolate(logits, size=(12, 14), mode="bilinear").softmax(1)
    members = [(k,) for k in range(5)] + groups
    each = torch.stack([-p[:, list(group)].sum(1).log() for group in members], 1)  # (N, 7, H, W)
    every = each.gather(1, target.where(target != IGNORE_INDEX, 0)[:, None])[:, 0]
    chosen = []
    for losses, labels in zip(every, target, strict=True):
        known = losses[labels != IGNORE_INDEX]
        chosen.append(known.topk(int(np.ceil(len(known) * hardest))).values)
    expected = torch.cat(chosen).mean()
    (wanted,) = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, wanted, rtol=1e-9, atol=1e-12)


def test_a_group_of_hopeless_classes_has_a_finite_gradient():
    logits = torch.tensor([500.0, -500.0, -499.0]).view(1, 3, 1, 1).requires_grad_()
    loss = step_loss(build_loss(LossConfig(), 3, [(1, 2)]), logits, torch.full((1, 1, 1), 3))
    (gradient,) = torch.autograd.grad(loss, logits)
    share = torch.tensor([-500.0, -499.0]).softmax(0)
    torch.testing.assert_close(gradient.flatten(), torch.cat([torch.ones(1), -share]))


# ------------------------------------------------------------------------------------------------ as a user does it


SMALL = ["model.output_stride=16", "model.head_channels=8", "augmentation.crop_size=[64,96]", "trainer.batch_size=2",
         "trainer.epochs=null", "trainer.max_steps=2", "loader.workers=0", "device=cpu"]  # fmt: skip


def test_the_chain_from_vistas_to_kitti(roots, segtrain, tmp_path):
    """Train on Vistas mapped to Cityscapes' classes, validate on KITTI, then fine-tune on KITTI."""
    path = written(tmp_path, {"car": ["car", "truck"]})
    answer = segtrain(
        "train", "dataset=mixture", "dataset.target=kitti", f"dataset.parts.kitti.root={roots / 'kitti'}",
        "dataset.parts.kitti.weight=1", f"dataset.parts.kitti.taxonomy={path}",
        f"dataset.parts.vistas={{root:{roots / 'vistas'},taxonomy:vistas_to_cityscapes,weight:1}}", "run=first",
        "sampling=class_uniform", "sampling.class_uniform=0.5", *SMALL,
    )  # fmt: skip
    assert answer.status == 0, answer.err
    assert "part       vistas train: 3 images" in answer.out
    assert "1 to several" in answer.out
    result = json.loads((tmp_path / "first" / "evaluation.json").read_text())
    assert result["protocol"]["rules"].startswith("KITTI")
    again = segtrain("evaluate", "run=first", "device=cpu", "output=again")
    assert again.status == 0, again.err
    assert json.loads((tmp_path / "again" / "evaluation.json").read_text())["miou"] == result["miou"]
    tuned = segtrain("train", "dataset=kitti", f"dataset.root={roots / 'kitti'}", "model.weights=first/last.pt",
                     "run=second", "optimizer.lr=1e-9", *SMALL)  # fmt: skip
    assert tuned.status == 0, tuned.err
    assert "initial weights first/last.pt" in tuned.out
    first, second = (torch.load(tmp_path / run / "last.pt", weights_only=True)["model"] for run in ("first", "second"))
    torch.testing.assert_close(first["cls.weight"], second["cls.weight"], rtol=0, atol=1e-5)
    trained_on_val = segtrain("evaluate", "run=first", "device=cpu", "output=o", "dataset=kitti",
                              f"dataset.root={roots / 'kitti'}", "split=train")  # fmt: skip
    assert "were in this checkpoint's training" in trained_on_val.out


def test_weights_of_other_classes_begin_with_a_new_classifier_and_say_so(roots, segtrain, folder_data, tmp_path):
    _, overrides = folder_data
    assert segtrain("train", *overrides, "run=first").status == 0
    weights = "model.weights=first/last.pt"
    answer = segtrain("train", "dataset=kitti", f"dataset.root={roots / 'kitti'}", weights, *SMALL)
    assert answer.status == 0, answer.err
    assert "2 classes in the file, 19 here: 0 rows of the classifier taken, 19 start anew (road, " in answer.out
