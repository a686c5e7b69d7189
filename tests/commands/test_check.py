"""`segtrain check`: what it finds and reports, and that good data pass."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from segtrain.config import CocoStuffConfig
from segtrain.data.label_files import read_label
from segtrain.data.labels import published_table
from segtrain.data.registry import DATASETS, label_table
from segtrain.data.scenes.layouts import MANIFEST, write_scenes
from segtrain.data.verify.label_mistakes import find_mistakes

LABELS = {"cityscapes": "*_labelIds.png", "kitti": "training/semantic/*.png", "vistas": "*/labels/*.png",
          "cocostuff": "annotations/*/*.png"}  # fmt: skip


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    folders = {}
    for layout in LABELS:
        folders[layout] = tmp_path_factory.mktemp("check") / layout
        write_scenes(folders[layout], layout, {"train": 4, "val": 2}, 0, (256, 512), workers=1)
    return folders


@pytest.fixture
def copy(originals, tmp_path):
    return lambda layout: shutil.copytree(originals[layout], tmp_path / layout)


@pytest.fixture
def check(segtrain, tmp_path):
    """check("kitti", root) -> (answer, report.json)"""

    def run(layout, root, *more):
        answer = segtrain("check", f"dataset={layout}", f"dataset.root={root}", "output=out", *more)
        return answer, json.loads((tmp_path / "out" / "report.json").read_text())

    return run


def change_labels(root, layout, change):
    for path in sorted(root.rglob(LABELS[layout])):
        with Image.open(path) as picture:
            palette = picture.getpalette() if picture.mode == "P" else None
        changed = change(read_label(path))
        picture = changed if isinstance(changed, Image.Image) else Image.fromarray(changed)
        if palette and picture.mode == "L":
            picture.putpalette(palette)
        picture.save(path)


@pytest.mark.parametrize("layout", list(LABELS))
def test_good_data_passes(originals, check, tmp_path, layout):
    before = {path: path.stat().st_mtime_ns for path in originals[layout].rglob("*")}
    answer, report = check(layout, originals[layout])
    assert answer.status == 0, answer.err
    assert report["ok"]
    assert all(finding["severity"] == "note" for finding in report["findings"])
    assert answer.out.splitlines()[-1] == "out/report.json"
    assert "nothing was found" in answer.out
    with Image.open(tmp_path / "out" / "contact.png") as sheet:
        assert sheet.size[0] > 1000
    train = report["splits"]["train"]
    assert train["images"] == train["labels"]
    assert sum(size["pictures"] for size in train["sizes"]) == train["images"]
    assert {path: path.stat().st_mtime_ns for path in originals[layout].rglob("*")} == before  # nothing beside the data


def to_train_ids(ids):
    lut = np.full(256, 255, np.uint8)
    lut[published_table("cityscapes").ids] = np.arange(19)
    return lut[ids]


def in_color(ids):
    table = published_table("cityscapes")
    lut = np.zeros((256, 3), np.uint8)
    lut[table.ids] = table.colors
    return Image.fromarray(lut[ids])


@pytest.mark.parametrize(
    ("layout", "change", "kind", "words"),
    [
        ("cityscapes", to_train_ids, "train ids", "these are train ids, not label ids"),
        ("kitti", to_train_ids, "train ids", "these are train ids, not label ids"),
        ("cityscapes", lambda ids: ids + 1, "shifted by one", "one too high"),
        ("cityscapes", lambda ids: ids - 1, "shifted by one", "one too low"),
        ("vistas", lambda ids: ids + 1, "shifted by one", "one too high"),
        ("vistas", lambda ids: ids - 1, "shifted by one", "one too low"),
        ("cocostuff", lambda ids: ids + 1, "shifted by one", "one too high"),
        ("cocostuff", lambda ids: (ids > 100).astype(np.uint8) * 255, "0/255 masks", "0 and 255 only"),
        ("cityscapes", lambda ids: (ids == 26).astype(np.uint8) * 255, "0/255 masks", "value // 255"),
        ("cityscapes", in_color, "colours", "shows the classes' colours"),
        ("cityscapes", lambda ids: in_color(ids).resize((99, 99), 2).resize((512, 256), 2), "colours", "interpolated"),
        ("cityscapes", lambda ids: np.zeros_like(ids), "void only", "ignored ids only"),
        ("kitti", lambda ids: np.where(ids == 7, 77, ids).astype(np.uint8), "unknown ids", "label id 77"),
        ("cityscapes", lambda ids: np.ascontiguousarray(ids.T), "swapped size", "height and width are swapped"),
        ("cityscapes", lambda ids: ids[:100], "sizes", "512x100"),
        ("cityscapes", lambda ids: ids.astype(np.uint16) * 1000, "16 bits", "looks like an instance map"),
        ("vistas", lambda ids: np.where(ids == 13, 100, ids).astype(np.uint8), "Vistas v2.0", "dataset.version=v2.0"),
    ],
)  # fmt: skip
def test_mistakes_are_named_with_their_remedy(copy, check, layout, change, kind, words):
    root = copy(layout)
    change_labels(root, layout, change)
    answer, report = check(layout, root)
    assert answer.status == 1
    found = [finding for finding in report["findings"] if finding["severity"] == "error"]
    assert found[0]["kind"] == kind, found
    assert words in answer.out
    assert words in answer.err
    assert not report["ok"]


@pytest.mark.parametrize(("files", "more"), [(1, ""), (3, " (and 2 more like this, see bad_files in report.json)")])
def test_an_unknown_id_is_named_with_its_file(copy, check, files, more):
    root = copy("kitti")
    paths = sorted(root.rglob(LABELS["kitti"]))[:files]
    for path in paths:
        ids = read_label(path)
        ids[0, 0] = 77
        Image.fromarray(ids).save(path)
    answer, report = check("kitti", root, "split=trainval")
    words = "label id 77 (1 pixel) is not in the cityscapes label table, which has 0 to 33"
    unknown = [f"{path}: {words}" for path in paths]
    assert f"trainval: {unknown[0]}; correct the image, or add the id to the table" in answer.err
    assert answer.err.rstrip().endswith(f"means nothing){more}")
    listed = report["splits"]["trainval"]["bad_files"]["unknown ids"]
    assert [text.partition(";")[0] for text in listed] == unknown


def test_a_palette_turned_to_grey(copy, check):
    root = copy("vistas")
    for path in root.rglob(LABELS["vistas"]):
        with Image.open(path) as picture:
            grey = picture.convert("RGB").convert("L")
        grey.save(path)
    answer, report = check("vistas", root)
    assert answer.status == 1
    assert "grey colours" in {finding["kind"] for finding in report["findings"]}


@pytest.mark.parametrize(("layout", "from_", "to"), [("cityscapes", 1000, 256), ("kitti", 256, 1000)])
def test_instances_of_the_other_data_set(copy, check, layout, from_, to):
    root = copy(layout)
    for path in [*root.rglob("*_instanceIds.png"), *root.rglob("instance/*.png")]:
        with Image.open(path) as picture:
            values = np.asarray(picture).astype(np.int64)
        single = values > 255
        Image.fromarray(np.where(single, values // from_ * to + values % from_, values).astype(np.uint16)).save(path)
    answer, report = check(layout, root)
    assert answer.status == 1
    assert report["findings"][0]["kind"] == "instances"
    assert f"(id * {to} + k)" in answer.err


@pytest.mark.parametrize(
    ("damage", "kind"),
    [
        (lambda image, label: image.unlink(), "pairs"),
        (lambda image, label: label.unlink(), "pairs"),
        (lambda image, label: image.write_bytes(image.read_bytes()[:-50]), "unreadable"),
        (lambda image, label: label.write_text("text"), "unreadable"),
        (lambda image, label: image.write_text("text"), "unreadable"),
    ],
)
def test_damaged_and_missing_files(copy, check, damage, kind):
    root = copy("cityscapes")
    image = min((root / "leftImg8bit" / "train").rglob("*.png"))
    damage(image, Path(str(image).replace("leftImg8bit", "gtFine").replace("_gtFine.png", "_gtFine_labelIds.png")))
    answer, report = check("cityscapes", root)
    assert answer.status == 1
    assert kind in {finding["kind"] for finding in report["findings"]}
    assert image.name.removesuffix("_leftImg8bit.png") in answer.out


def test_counts_are_compared_with_the_published_ones(copy, check):
    root = copy("cityscapes")
    (root / MANIFEST).unlink()
    answer, report = check("cityscapes", root)
    assert answer.status == 1  # a score on 2 of 500 pictures is no score
    assert "val: 2 images, published are 500" in answer.err
    severities = {finding["text"]: finding["severity"] for finding in report["findings"]}
    assert severities["train: 4 images, published are 2975"] == "note"
    answer, report = check("cityscapes", root, "split=train")
    assert answer.status == 0


def test_a_second_check_reads_no_label(copy, check, monkeypatch):
    root = copy("cocostuff")
    check("cocostuff", root)
    for read in ("read_label", "read_bytes"):
        name = f"segtrain.data.verify.file_facts.{read}"
        monkeypatch.setattr(name, lambda path: pytest.fail(f"{path} was read again"))
    answer, _ = check("cocostuff", root)
    assert answer.status == 0


def test_no_pictures_at_all(tmp_path, check):
    (tmp_path / "empty").mkdir()
    answer, report = check("cocostuff", tmp_path / "empty")
    assert answer.status == 1
    assert "no images at all" in answer.err


@pytest.mark.parametrize("name", ["cityscapes", "vistas_v1.2", "vistas_v2.0", "cocostuff"])
def test_no_mistake_is_found_in_what_the_tables_allow(name):
    """Every histogram over the ids of a table that includes the common classes is good."""
    table = published_table(name)
    if name == "cocostuff":
        table = label_table(CocoStuffConfig(name=name, root="nowhere"))
    rng = np.random.default_rng(0)
    for _ in range(100):
        histogram = np.zeros(256, np.int64)
        ids = rng.choice(table.ids, rng.integers(2, len(table.ids)), replace=False)
        histogram[ids] = rng.integers(1, 10**6, len(ids))
        histogram[table.ignored_ids[-1]] = 1000
        for word in ("road", "vegetation", "construction--flat--road", "nature--sky"):
            if word in table.names and name != "cocostuff":
                histogram[table.stored_value(word)] = 10**6
        dataset = name.split("_")[0]
        assert [
            f for f in find_mistakes(histogram, table, DATASETS[dataset].expected, 100) if f.severity == "error"
        ] == []


# ------------------------------------------------------------------------------------------------ own data


def test_an_own_data_set_is_guessed_checked_and_trained(folder_data, segtrain, tmp_path):
    root, _ = folder_data
    (root / "classes.csv").unlink()
    answer = segtrain("check", "dataset=folder", f"dataset.root={root}", "write_config=mine.yaml")
    assert answer.status == 0, answer.err
    assert answer.out.splitlines()[-1] == "mine.yaml"
    text = (tmp_path / "mine.yaml").read_text()
    assert "images: train/images/*.png" in text
    assert "labels: val/labels/*.png" in text
    table = (tmp_path / "mine_classes.csv").read_text()
    assert table.splitlines() == ["id,name,color,ignore", "0,class 0,,", "7,class 7,,", "9,class 9,,"]
    (tmp_path / "mine_classes.csv").write_text(table.replace("9,class 9,,", "9,void,,true"))
    assert segtrain("check", "dataset=mine.yaml").status == 0
    shown = segtrain("train", "dataset=mine.yaml", "--cfg", "job")
    assert shown.status == 0, shown.err
    assert "mine_classes.csv" in shown.out
    answer = segtrain(
        "train", "dataset=mine.yaml", "augmentation.crop_size=[32,48]", "model.output_stride=16",
        "model.head_channels=8", "trainer.batch_size=2", "trainer.epochs=null", "trainer.max_steps=1",
        "loader.workers=0", "device=cpu", "run=own",
    )  # fmt: skip
    assert answer.status == 0, answer.err


def test_label_pictures_are_told_apart_and_cities_joined(originals, segtrain, tmp_path):
    root = shutil.copytree(originals["cityscapes"], tmp_path / "towns")
    for kind in ("leftImg8bit", "gtFine"):
        shutil.copytree(root / kind / "train" / "streets", root / kind / "train" / "other")
    answer = segtrain("check", "dataset=folder", f"dataset.root={root}", "write_config=towns.yaml")
    assert answer.status == 0, answer.err
    text = (tmp_path / "towns.yaml").read_text()
    assert "images: leftImg8bit/train/*/*_leftImg8bit.png" in text
    assert "labels: gtFine/train/*/*_gtFine_labelIds.png" in text
    assert "labels: gtFine/val/streets/*_gtFine_labelIds.png" in text


@pytest.mark.parametrize(("splits", "source"), [(["all"], "train"), (["train", "test"], "test")])
def test_a_guess_says_which_images_validate(segtrain, tmp_path, splits, source):
    for split in splits:
        for i in range(2):
            noise(tmp_path / "data" / split / "images" / f"{i}.png")
            label(tmp_path / "data" / split / "masks" / f"{i}.png")
    answer = segtrain("check", "dataset=folder", "dataset.root=data", "write_config=a.yaml")
    assert answer.status == 0, answer.err
    assert f"note: no split for validation was found: val is the same images as {source}; give others" in answer.out
    text = Path("a.yaml").read_text()
    assert "&id" not in text and "*id" not in text  # YAML's references, which few people know
    made = yaml.safe_load(text)["splits"]
    assert made["val"] == made[source]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["dataset=cityscapes", "dataset.root=mine", "write_config=a.yaml"], "write_config is for dataset=folder"),
        (["dataset=folder", "write_config=a.yaml"], "dataset.root is not set"),
        (["dataset=folder", "dataset.root=mine", "write_config=a.txt"], "a .yaml file"),
        (["dataset=folder", "dataset.root=mine", "write_config=mine/a.yaml"], "inside the data"),
        (["dataset=folder", "dataset.root=nowhere", "write_config=a.yaml"], "no such folder"),
        (["dataset=nothing.yaml"], "no such file"),
        (["dataset=bad.yaml"], "bad.yaml: name must be one of streets, "),
        (["dataset=bad.yaml"], "folder, imagenet, mixture, got pictures"),
        (["dataset=stray.yaml"], "stray.yaml"),
        ([], "dataset"),
    ],
)
def test_wrong_options(folder_data, segtrain, tmp_path, words, message):
    (tmp_path / "bad.yaml").write_text("name: pictures\n")
    (tmp_path / "stray.yaml").write_text("name: folder\nrooot: here\n")
    answer = segtrain("check", *words)
    assert answer.status == 2
    assert message in answer.err


def noise(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3)).astype(np.uint8)).save(path)


def label(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.arange(4, dtype=np.uint8).repeat(256).reshape(32, 32)).save(path)


@pytest.mark.parametrize("layout", ["masks beside", "words", "jpg and png", "depths", "a damaged label"])
def test_odd_folders_are_guessed_so_that_they_read_back(tmp_path, segtrain, layout):
    root = tmp_path / "odd one"
    for i in range(4):
        if layout == "words":
            name = ("cat_a", "dog_b", "cow_c", "big_fish")[i]
            noise(root / f"{name}.jpg")
            label(root / f"{name}_mask.png")
        if layout == "masks beside":
            noise(root / f"a{i}.png")
            label(root / f"a{i}_mask.png")
        if layout in ("jpg and png", "a damaged label"):
            noise(root / "images" / f"x{i}.{'jpg' if i % 2 and layout == 'jpg and png' else 'png'}")
            label(root / "masks" / f"x{i}.png")
        if layout == "depths":
            for inner in ("aa", "bb/deep", "cc"):
                noise(root / "img" / inner / f"{inner[:2]}{i}.jpg")
                label(root / "lab" / inner / f"{inner[:2]}{i}.png")
    answer = segtrain("check", "dataset=folder", f"dataset.root={root}", "write_config=odd.yaml")
    assert answer.status == 0, answer.err
    if layout == "a damaged label":
        (root / "masks" / "x2.png").write_bytes((root / "masks" / "x2.png").read_bytes()[:40])
        again = segtrain("check", "dataset=folder", f"dataset.root={root}", "write_config=odd.yaml")
        assert again.status == 0, again.err
        assert "x2.png cannot be read" in again.out
        return
    answer = segtrain("check", "dataset=odd.yaml", "output=out")
    assert answer.status == 0, answer.err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["splits"]["train"]["images"] == (12 if layout == "depths" else 4)


def test_missing_instance_maps_are_found(copy, check):
    root = copy("kitti")
    min((root / "training" / "instance").iterdir()).unlink()
    answer, report = check("kitti", root)
    assert answer.status == 1
    assert "1 labels have no instance map" in answer.err
    assert len([finding for finding in report["findings"] if finding["severity"] == "error"]) == 1


def test_photographs_without_labels_are_refused(tmp_path, segtrain):
    (tmp_path / "photos").mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3)).astype(np.uint8)
    Image.fromarray(noise).save(tmp_path / "photos" / "a.jpg")
    answer = segtrain("check", "dataset=folder", f"dataset.root={tmp_path / 'photos'}", "write_config=a.yaml")
    assert answer.status == 1
    assert "1 photographs and 0 images with one of few values" in answer.err
