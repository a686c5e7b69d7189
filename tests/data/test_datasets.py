"""The published datasets in their own layouts: files, label encodings, versions, and what is refused."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from segtrain.config import IGNORE_INDEX, CityscapesConfig, CocoStuffConfig, KittiConfig, VistasConfig
from segtrain.data.label_files import read_instances, read_label
from segtrain.data.labels import published_table, read_json_table
from segtrain.data.registry import label_table, labelled_samples, split_samples
from segtrain.data.sample import read_labels
from segtrain.data.scenes.layouts import write_scenes
from segtrain.errors import DataError, UsageError
from tests.helpers.samples import read_sample


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """drawn("vistas"): scenes in that layout. Read only."""
    folders = {}

    def draw(layout):
        if layout not in folders:
            folders[layout] = tmp_path_factory.mktemp(layout) / layout
            write_scenes(folders[layout], layout, {"train": 3, "val": 8, "night": 1}, 0, (256, 512), workers=1)
        return folders[layout]

    return draw


@pytest.fixture
def copy(drawn, tmp_path):
    """copy("vistas"): the same, to be changed."""
    return lambda layout: shutil.copytree(drawn(layout), tmp_path / "copy")


def save(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values)).save(path)


# ------------------------------------------------------------------------------------------------ Cityscapes


def test_cityscapes_coarse_and_joined_splits(copy):
    root = copy("cityscapes")
    for path in sorted((root / "gtFine").rglob("*_gtFine_*")):
        to = root / "gtCoarse" / path.relative_to(root / "gtFine").with_name(path.name.replace("gtFine", "gtCoarse"))
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, to)
    shutil.copytree(root / "leftImg8bit" / "val", root / "leftImg8bit" / "train_extra")
    shutil.copytree(root / "gtCoarse" / "val", root / "gtCoarse" / "train_extra")
    for path in [*root.glob("*/train_extra/*/*.png")]:
        path.rename(path.with_name(path.name.replace("streets_", "troisdorf_")))
    config = CityscapesConfig(name="cityscapes", root=str(root))
    assert len(split_samples(config, "train_extra")) == 8
    coarse = split_samples(config, "coarse_train")
    assert "gtCoarse" in str(coarse[0].label)
    assert "gtCoarse" in str(coarse[0].instances)
    assert "gtFine" in str(split_samples(config, "train")[0].label)
    with pytest.raises(DataError, match="3 images are in more than one of these splits"):
        split_samples(config, "train+coarse_train")
    with pytest.raises(DataError, match=r"train\+val: 3 images are in more than one"):  # scenes count from 0
        split_samples(config, "trainval")
    joined = split_samples(config, "train+train_extra")
    assert len(joined) == 11
    assert {("gtFine" if "gtFine" in str(sample.label) else "gtCoarse") for sample in joined} == {"gtFine", "gtCoarse"}


def test_cityscapes_converted_labels_are_read_and_said(copy, capsys):
    root = copy("cityscapes")
    config = CityscapesConfig(name="cityscapes", root=str(root))
    plain = [read_labels(sample, label_table(config))[:2] for sample in split_samples(config, "val")]
    lut = np.full(256, IGNORE_INDEX, np.uint8)
    lut[published_table("cityscapes").ids] = np.arange(19)
    for path in root.rglob("*_labelIds.png"):
        save(path.with_name(path.name.replace("labelIds", "labelTrainIds")), lut[read_label(path)])
        path.unlink()
    moved = root.with_name("moved")  # what was found in a folder is remembered
    root.rename(moved)
    config = CityscapesConfig(name="cityscapes", root=str(moved))
    table = label_table(config)
    assert "labelTrainIds.png only" in capsys.readouterr().out
    for sample, (target, ids) in zip(split_samples(config, "val"), plain, strict=True):
        found, found_ids, _ = read_labels(sample, table)
        assert (found == target).all()
        assert (found_ids[target != IGNORE_INDEX] == ids[target != IGNORE_INDEX]).all()


def test_labels_can_be_scored_without_pictures(copy):
    root = copy("cityscapes")
    shutil.rmtree(root / "leftImg8bit")
    samples = labelled_samples(CityscapesConfig(name="cityscapes", root=str(root)), "val")
    assert len(samples) == 8
    assert read_instances(samples[0].instances).dtype == np.uint16


# ------------------------------------------------------------------------------------------------ Vistas


def test_vistas_v1_2(drawn):
    config = VistasConfig(name="vistas", root=str(drawn("vistas")))
    table = label_table(config)
    assert table.num_classes == 65
    assert table.ignored_ids == [65]
    assert table.names[63:] == ["void--car-mount", "void--ego-vehicle"]
    samples = split_samples(config, "val")
    assert {sample.name[0] for sample in samples} >= {"-", "_"}
    for sample in samples:
        image, target = read_sample(sample, table)
        assert image.shape[:2] == target.shape
        ids = read_label(sample.label)  # palette PNGs, read as indices
        assert (read_instances(sample.instances) // 256 == ids).all()
        assert (target == np.where(ids == 65, IGNORE_INDEX, ids)).all()
    assert split_samples(config, "test")[0].label is None


def v2_tree(root, labels):
    """The zip of v2.0 with one image and the labels of both versions."""
    for version, values in labels.items():
        config = [{"name": row["name"], "readable": row["readable"], "instances": row["has_instances"],
                   "evaluate": not row["ignore_in_eval"], "color": row["color"]}
                  for row in read_json_table(f"vistas_{version}")]  # fmt: skip
        root.mkdir(exist_ok=True)
        (root / f"config_{version}.json").write_text(json.dumps({"labels": config}))
        save(root / "training" / version / "labels" / "-key.png", np.array([values], np.uint8))
    save(root / "training" / "images" / "-key.jpg", np.zeros((1, 3, 3), np.uint8))
    return root


def test_vistas_v2_0_holds_both_versions(tmp_path):
    root = v2_tree(tmp_path / "v2", {"v1.2": [13, 65, 0], "v2.0": [2, 123, 0]})
    for version, classes, expected in (
        ("v1.2", 65, [13, IGNORE_INDEX, 0]),
        ("v2.0", 116, [IGNORE_INDEX, IGNORE_INDEX, 0]),
    ):
        config = VistasConfig(name="vistas", root=str(root), version=version)
        table = label_table(config)
        assert table.num_classes == classes
        assert read_sample(split_samples(config, "train")[0], table)[1].tolist() == [expected]
    assert label_table(VistasConfig(name="vistas", root=str(root), version="v2.0")).names == [
        row["name"] for row in read_json_table("vistas_v2.0") if not row["ignore_in_eval"]
    ]


def test_vistas_order_is_the_folders_own_and_versions_are_told_apart(tmp_path):
    root = v2_tree(tmp_path / "v2", {"v2.0": [0, 1, 2]})
    content = json.loads((root / "config_v2.0.json").read_text())
    content["labels"][0], content["labels"][1] = content["labels"][1], content["labels"][0]
    (root / "config_v2.0.json").write_text(json.dumps(content))
    config = VistasConfig(name="vistas", root=str(root), version="v2.0")
    assert label_table(config).names[:2] == ["animal--ground-animal", "animal--bird"]
    (root / "config_v2.0.json").rename(root / "config.json")
    with pytest.raises(DataError, match=r"124 labels of Vistas v2\.0.*set dataset\.version=v2\.0"):
        label_table(VistasConfig(name="vistas", root=str(root)))
    content["labels"][0]["name"] = "animal--unicorn"
    (root / "config.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="animal--unicorn"):
        label_table(config)
    (root / "config.json").write_text("{")
    with pytest.raises(DataError, match="unpack the zip again"):
        label_table(config)
    (root / "config.json").unlink()
    with pytest.raises(DataError, match="come with the data"):
        label_table(config)


# ------------------------------------------------------------------------------------------------ COCO-Stuff


def coco(root, **options):
    return CocoStuffConfig(name="cocostuff", root=str(root), **options)


def test_cocostuff_164k(drawn):
    config = coco(drawn("cocostuff"))
    table = label_table(config)
    assert (table.num_classes, len(table.ignored_ids)) == (171, 12)
    assert (table.names[0], table.names[170]) == ("person", "wood")
    grey = 0
    for sample in split_samples(config, "val"):
        image, target = read_sample(sample, table)
        assert image.shape == (*target.shape, 3)
        with Image.open(sample.image) as picture:
            grey += picture.mode == "L"
    assert grey


def test_stuff91_ignores_things_or_makes_them_one_class(drawn):
    root = drawn("cocostuff")
    values = np.array([[0, 181, 91, 255, 79]], np.uint8)  # person, wood, banner, unlabeled, hair drier
    for options, expected, classes in (({}, [IGNORE_INDEX, 90, 0, IGNORE_INDEX, IGNORE_INDEX], 91),
                                       ({"other": "class"}, [91, 90, 0, IGNORE_INDEX, 91], 92)):  # fmt: skip
        table = label_table(coco(root, classes="stuff91", **options))
        assert table.num_classes == classes
        assert table.encode(values, root).tolist() == [expected]
        assert (table.encode(table.decode(np.arange(classes, dtype=np.uint8)[None]), root) == np.arange(classes)).all()
    with pytest.raises(UsageError, match=r"dataset\.other=class.*stuff91"):
        coco(root, other="class").check()


def test_cocos_own_stuff_maps_serve_stuff91_only(tmp_path):
    save(tmp_path / "images" / "val2017" / "000000000139.jpg", np.zeros((1, 4, 3), np.uint8))
    label = Image.fromarray(np.array([[0, 92, 182, 183]], np.uint8)).convert("P")
    label.putdata([0, 92, 182, 183])
    (tmp_path / "annotations" / "stuff_val2017_pixelmaps").mkdir(parents=True)
    label.save(tmp_path / "annotations" / "stuff_val2017_pixelmaps" / "000000000139.png")
    for other, expected in (("ignore", [IGNORE_INDEX, 0, 90, IGNORE_INDEX]), ("class", [IGNORE_INDEX, 0, 90, 91])):
        config = coco(tmp_path, classes="stuff91", other=other)
        assert read_sample(split_samples(config, "val")[0], label_table(config))[1].tolist() == [expected]
    with pytest.raises(UsageError, match="all things are one class.*stuffthingmaps_trainval2017.zip"):
        label_table(coco(tmp_path))


def test_cocostuff_10k(tmp_path):
    for name, values in (("COCO_train2014_000000000009", [0, 1, 182]), ("COCO_train2014_000000000025", [92, 1, 0])):
        save(tmp_path / "images" / f"{name}.jpg", np.zeros((1, 3, 3), np.uint8))
        (tmp_path / "annotations").mkdir(exist_ok=True)
        savemat(tmp_path / "annotations" / f"{name}.mat", {"S": np.array([values], np.uint16), "names": np.zeros(3)})
    (tmp_path / "imageLists").mkdir()
    (tmp_path / "imageLists" / "train.txt").write_text("COCO_train2014_000000000009\n")
    (tmp_path / "imageLists" / "test.txt").write_text("COCO_train2014_000000000025\n")
    config = coco(tmp_path)
    table = label_table(config)
    (train,), (val,) = split_samples(config, "train"), split_samples(config, "val")
    assert read_sample(train, table)[1].tolist() == [[IGNORE_INDEX, 0, 170]]
    target, ids, _ = read_labels(val, table)
    assert target.tolist() == [[table.names.index("banner"), 0, IGNORE_INDEX]]
    assert ids.tolist() == [[91, 0, 255]]
    (tmp_path / "annotations" / "COCO_train2014_000000000025.mat").write_bytes(b"not matlab")
    with pytest.raises(DataError, match="cannot be read"):
        read_labels(val, table)


def test_the_challenge_split_takes_its_lists_from_both_folders(copy):
    root = copy("cocostuff")
    config = coco(root, split="challenge2017", classes="stuff91")
    with pytest.raises(
        DataError, match=r"deprecated-challenge2017/train-ids\.txt.*stuff_annotations_trainval2017\.zip"
    ):
        split_samples(config, "train")
    lists = root / "annotations" / "deprecated-challenge2017"
    lists.mkdir()
    (lists / "train-ids.txt").write_text("0\n2\n500001\n")
    (lists / "val-ids.txt").write_text("1\n")
    assert [s.name for s in split_samples(config, "train")] == ["000000000000", "000000000002", "000000500001"]
    assert [s.name for s in split_samples(config, "val")] == ["000000000001"]


# ------------------------------------------------------------------------------------------------ all of them


def test_tables_are_complete():
    counts = {"cityscapes": 19, "vistas_v1.2": 65, "vistas_v2.0": 116, "cocostuff": 171}
    assert {name: published_table(name).num_classes for name in counts} == counts
    assert published_table("cityscapes", "kitti").rows[26]["avg_instance_size"] == 3669.255859
    for version, count in (("v1.2", 37), ("v2.0", 33)):  # by name, as the official script looks them up
        sizes = [row["avg_instance_size"] for row in published_table(f"vistas_{version}", "vistas").rows]
        assert sum(size is not None for size in sizes) == count


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (VistasConfig(name="vistas", root="nowhere"), r"config_v2\.0\.json[\s\S]*www\.mapillary\.com"),
        (coco("nowhere"), r"annotations[\s\S]*github\.com/nightrome/cocostuff"),
        (KittiConfig(name="kitti", root="nowhere"), r"data_semantics\.zip"),
    ],
)
def test_missing_data_names_the_tree_and_the_source(config, words):
    with pytest.raises(DataError, match=words):
        split_samples(config, "train")


@pytest.mark.parametrize("layout", ["kitti", "vistas", "cocostuff"])
def test_a_perfect_answer_scores_one(drawn, segtrain, tmp_path, layout):
    """By `segtrain score`, with the labels themselves as predictions."""
    root = drawn(layout)
    labels = {"kitti": "training/semantic", "vistas": "validation/labels", "cocostuff": "annotations/val2017"}[layout]
    answer = segtrain(
        "score", f"predictions={root / labels}", f"dataset={layout}", f"dataset.root={root}", "output=out"
    )
    assert answer.status == 0, answer.err
    result = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert result["miou"] == result["pixel_accuracy"] == result["category_miou"] == 1
    assert result["iiou"] == (None if layout == "cocostuff" else 1)
