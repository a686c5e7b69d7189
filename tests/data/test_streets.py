"""Street scenes: the same labels everywhere, no short cut by position or colour, files like the real datasets'."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from segtrain.data.labels import read_json_table
from segtrain.data.scenes import canvas as street_canvas
from segtrain.data.scenes import draw as streets
from segtrain.data.scenes import furniture, ground, outlines, people, vehicles
from segtrain.data.scenes import layouts as street_layouts
from segtrain.data.scenes import surfaces as street_surfaces
from segtrain.data.scenes.layouts import write_scenes
from segtrain.errors import DataError, UsageError

EVALUATED = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)  # Cityscapes ids by train id
TRAIN_IDS = np.full(256, 255, np.uint8)
TRAIN_IDS[list(EVALUATED)] = np.arange(19)
WITH_INSTANCES = (24, 25, 26, 27, 28, 31, 32, 33)
ID_SCENES = (
    ("train", 0, (256, 512)),
    ("train", 1, (256, 512)),
    ("val", 0, (256, 512)),
    ("val", 0, (512, 1024)),
    ("night", 0, (256, 512)),
)
LABELS_SHA256 = "fd4741c663dde542e35710be56e568f07d376811fd00f13167c7e285ef4bf58e"


class Scenes:
    """Scenes 0 .. number - 1 of a split: images uint8 (N, H, W, 3), label and train ids uint8 (N, H, W)."""

    def __init__(self, split, number):
        self.scenes = [streets.draw(0, split, index) for index in range(number)]
        self.images = np.stack([scene.image for scene in self.scenes])
        self.label_ids = np.stack([scene.label_ids for scene in self.scenes])
        self.train_ids = TRAIN_IDS[self.label_ids]


@pytest.fixture(scope="module")
def train():
    return Scenes("train", 60)


@pytest.fixture(scope="module")
def val():
    return Scenes("val", 60)


def miou(predicted, truth):
    """Mean over the classes that occur in either, of true positives / (true + false positives + false negatives)."""
    valid = truth < 19
    cells = truth[valid].astype(np.int64) * 19 + predicted[valid]
    matrix = np.bincount(cells, minlength=361).reshape(19, 19)
    union = matrix.sum(0) + matrix.sum(1) - matrix.diagonal()
    return (matrix.diagonal()[union > 0] / union[union > 0]).mean()


def labels_digest():
    digest = hashlib.sha256()
    for split, index, size in ID_SCENES:
        scene = streets.draw(0, split, index, size)
        digest.update(scene.label_ids.tobytes())
        digest.update(scene.instance_ids.astype("<u2").tobytes())
    return digest.hexdigest()


def test_labels_are_those_recorded():
    assert labels_digest() == LABELS_SHA256, "labels changed: raise streets.VERSION and record the new digest"


def test_labels_are_the_same_in_another_process():
    code = "from tests.data.test_streets import labels_digest; print(labels_digest())"
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    command = [sys.executable, "-c", code]
    root = Path(__file__).parents[2]
    found = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == LABELS_SHA256


def test_a_change_of_colours_leaves_the_labels_alone(monkeypatch):
    def other_tone(tex, names):
        return street_canvas.tone(tex, names) + tex.normal(0, 9, 3).astype(np.float32)

    before = streets.draw(0, "train", 3)
    for module in (streets, ground, street_surfaces, people, furniture, vehicles):
        monkeypatch.setattr(module, "tone", other_tone)
    after = streets.draw(0, "train", 3)
    assert (before.instance_ids == after.instance_ids).all()
    assert (before.image != after.image).any()


def test_scenes_differ_by_seed_split_and_index():
    drawn = [streets.draw(*key).label_ids for key in ((0, "val", 0), (1, "val", 0), (0, "train", 0), (0, "val", 1))]
    assert len({labels.tobytes() for labels in drawn}) == 4


@pytest.mark.parametrize("size", [(256, 512), (384, 768)])
def test_shapes_types_and_instances(size):
    for index in range(4):
        scene = streets.draw(5, "train", index, size)
        assert scene.image.shape == (*size, 3) and scene.image.dtype == np.uint8
        assert scene.label_ids.shape == size and scene.label_ids.dtype == np.uint8 and scene.label_ids.max() <= 33
        assert scene.instance_ids.shape == size and scene.instance_ids.dtype == np.uint16
        single = scene.instance_ids >= 1000
        assert (scene.instance_ids[single] // 1000 == scene.label_ids[single]).all()
        assert (scene.instance_ids[~single] == scene.label_ids[~single]).all()
        assert (single == np.isin(scene.label_ids, WITH_INSTANCES)).all()


def test_larger_scenes_show_the_same_street():
    small, large = streets.draw(0, "val", 2), streets.draw(0, "val", 2, (512, 1024))
    assert (small.label_ids == large.label_ids[1::2, 1::2]).mean() > 0.95


def test_every_class_occurs_in_the_validation_scenes(val):
    for label in EVALUATED:
        here = val.label_ids == label
        assert here.any(axis=(1, 2)).mean() > 0.2, f"label {label} is in too few scenes"
        assert here.mean() > 0.003, f"label {label} has too few pixels to be learned"


def test_things_are_at_least_two_pixels_wide(val):
    camera = street_canvas.Camera(focal=400, height=2, horizon=100, centre=200, bend=0)
    for x in np.linspace(-3, 3, 41):
        canvas = street_canvas.Canvas(camera, (256, 512), np.random.default_rng(0), night=False)
        thin = outlines.Part(outlines.box(-0.01, 0, 0.01, 3), np.zeros(3, np.float32))
        outlines.paint_parts(canvas, [thin], float(x), 60.0, street_canvas.POLE)
        assert (canvas.ids == street_canvas.POLE).sum(axis=1).max() == 2
    poles = np.pad(val.label_ids == street_canvas.POLE, ((0, 0), (0, 0), (1, 1)))
    lone = poles[..., 1:-1] & ~poles[..., :-2] & ~poles[..., 2:]
    assert lone.sum() < 0.02 * poles.sum()  # what is left of poles behind other things


def test_position_alone_does_not_give_the_classes_away(train, val):
    votes = np.stack([(train.train_ids == label).sum(axis=0) for label in range(19)])
    score = miou(np.broadcast_to(votes.argmax(axis=0), val.train_ids.shape), val.train_ids)
    print(f"position prior: mIoU {score:.4f}")
    assert score <= 0.20


def test_colour_and_position_do_not_give_the_classes_away(train, val):
    """Hidden layers of 96 over (R, G, B, x, y) of single pixels reach about 0.18.

    Three times the width and five times the steps reach 0.16: they only learn these 60 scenes by heart.
    """
    torch.manual_seed(0)
    rng = np.random.default_rng(0)

    def pixels(scenes, count):
        scene, row, column = rng.integers(0, (len(scenes.images), 256, 512), (count, 3)).T
        place = np.stack([row / 128 - 1, column / 256 - 1], axis=1)
        features = np.concatenate([scenes.images[scene, row, column] / 127.5 - 1, place], axis=1)
        return torch.from_numpy(features).float(), torch.from_numpy(scenes.train_ids[scene, row, column]).long()

    net = nn.Sequential(
        nn.Linear(5, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 19)
    )
    steps = 400
    optimizer = torch.optim.AdamW(net.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
    for _ in range(steps):
        features, target = pixels(train, 4096)
        loss = nn.functional.cross_entropy(net(features), target, ignore_index=255)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    features, target = pixels(val, 300_000)
    with torch.no_grad():
        score = miou(net(features).argmax(dim=1).numpy(), target.numpy())
    print(f"colour and position: mIoU {score:.4f}")
    assert score <= 0.27


def test_night_is_darker(val):
    night = np.mean([streets.draw(0, "night", index).image.mean() for index in range(8)])
    assert night < 0.6 * val.images[:20].mean()


# Files


def files(root):
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())


def read(path):
    return cv2.imread(str(path), cv2.IMREAD_UNCHANGED)


def test_cityscapes_layout(tmp_path):
    told = []
    drawn = write_scenes(
        tmp_path, scenes={"train": 2, "val": 1, "night": 1}, seed=7, workers=1, progress=lambda *now: told.append(now)
    )
    assert drawn == 4 and told == [(done, 4) for done in range(5)]
    expected = ["scenes.json"]
    for split, number in (("train", 2), ("val", 1), ("night", 1)):
        for index in range(number):
            stem = f"{split}/streets/streets_{index:06d}_000019"
            expected += [f"leftImg8bit/{stem}_leftImg8bit.png"]
            expected += [f"gtFine/{stem}_gtFine_{content}.png" for content in ("labelIds", "instanceIds")]
    assert files(tmp_path) == sorted(expected)
    manifest = json.loads((tmp_path / "scenes.json").read_text())
    assert manifest == {
        "version": streets.VERSION,
        "seed": 7,
        "size": [256, 512],
        "layout": "cityscapes",
        "scenes": {"train": 2, "val": 1, "night": 1},
    }
    scene = streets.draw(7, "train", 1)
    stem = "train/streets/streets_000001_000019"
    image = Image.open(tmp_path / f"leftImg8bit/{stem}_leftImg8bit.png")
    labels = Image.open(tmp_path / f"gtFine/{stem}_gtFine_labelIds.png")
    assert image.mode == "RGB" and (np.array(image) == scene.image).all()
    assert labels.mode == "L" and (np.array(labels) == scene.label_ids).all()
    instances = read(tmp_path / f"gtFine/{stem}_gtFine_instanceIds.png")
    assert instances.dtype == np.uint16 and (instances == scene.instance_ids).all()


def test_kitti_layout(tmp_path):
    write_scenes(tmp_path, "kitti", {"train": 3, "val": 1, "night": 1}, workers=1)
    contents = ("image_2", "instance", "semantic")
    expected = [f"training/{content}/{index:06d}_10.png" for content in contents for index in range(3)]
    assert files(tmp_path) == sorted([*expected, "testing/image_2/000000_10.png", "scenes.json"])
    sizes = set()
    for index in range(3):
        scene = streets.draw(0, "train", index, (320, 640))
        image, instances, labels = (read(tmp_path / f"training/{content}/{index:06d}_10.png") for content in contents)
        height, width = labels.shape
        sizes.add((height, width))
        top, left = (320 - height) // 2, (640 - width) // 2
        box = np.s_[top : top + height, left : left + width]
        assert (image[..., ::-1] == scene.image[box]).all()
        assert labels.dtype == np.uint8 and (labels == scene.label_ids[box]).all()
        assert instances.dtype == np.uint16 and (instances // 256 == labels).all()
        single = scene.instance_ids[box] >= 1000
        assert ((instances % 256 > 0) == single).all()
        assert (instances[single] % 256 == scene.instance_ids[box][single] % 1000 + 1).all()
    assert sizes == {(188, 621), (188, 620), (185, 613)}


def test_vistas_layout(tmp_path):
    write_scenes(tmp_path, "vistas", {"train": 6, "val": 1, "night": 1}, workers=1)
    config = json.loads((tmp_path / "config.json").read_text())
    assert len(config["labels"]) == 66 and config["folder_structure"] == "{split}/{content}/{key:.{22}}.{ext}"
    assert set(config["labels"][0]) == {"name", "readable", "instances", "evaluate", "color"}
    names = [label["name"] for label in config["labels"]]
    keys = [street_layouts.vistas_key(street_layouts.Job(0, "train", index, (256, 512))) for index in range(6)]
    assert all(len(key) == 22 for key in keys) and {"-", "_"} <= {key[0] for key in keys}
    expected = ["config.json", "scenes.json"]
    for folder, folder_keys in (
        ("training", keys),
        ("validation", [street_layouts.vistas_key(street_layouts.Job(0, "val", 0, (256, 512)))]),
    ):
        for key in folder_keys:
            expected += [f"{folder}/images/{key}.jpg", f"{folder}/labels/{key}.png", f"{folder}/instances/{key}.png"]
    testing = street_layouts.vistas_key(street_layouts.Job(0, "night", 0, (256, 512)))
    assert files(tmp_path) == sorted([*expected, f"testing/images/{testing}.jpg"])
    for index, key in enumerate(keys):
        scene = streets.draw(0, "train", index)
        labels = Image.open(tmp_path / f"training/labels/{key}.png")
        palette = labels.getpalette() or []
        assert labels.mode == "P" and len(palette) == 768
        assert palette[: 66 * 3] == [value for label in config["labels"] for value in label["color"]]
        lut = np.array([names.index(street_layouts.VISTAS_NAMES.get(i, "void--unlabeled")) for i in range(34)])
        assert (np.array(labels) == lut[scene.label_ids]).all()
        instances = read(tmp_path / f"training/instances/{key}.png")
        single = scene.instance_ids >= 1000
        assert instances.dtype == np.uint16 and (instances // 256 == np.array(labels)).all()
        assert (instances[single] % 256 == scene.instance_ids[single] % 1000).all()
        image = np.array(Image.open(tmp_path / f"training/images/{key}.jpg"))
        assert image.shape == scene.image.shape and np.abs(image.astype(int) - scene.image).mean() < 6


def test_imagenet_layout(tmp_path):
    """A window for each class of each scene, which shows little else."""
    write_scenes(tmp_path / "r", "imagenet", {"train": 4, "val": 1, "night": 1}, workers=1)
    names = ["building", "car", "road", "sky", "tree"]
    assert sorted(path.name for path in (tmp_path / "r" / "train").iterdir()) == names
    assert sorted(path.name for path in (tmp_path / "r").iterdir()) == ["scenes.json", "train", "val"]
    sizes, blue = set(), {name: [] for name in names}
    for name in names:
        for path in sorted((tmp_path / "r" / "train" / name).iterdir()):
            picture = np.asarray(Image.open(path)).astype(int)
            sizes.add(picture.shape)
            blue[name].append(picture[..., 2].mean() - picture[..., 0].mean())
    assert sizes == {(64, 64, 3), (64, 96, 3)}
    assert len(blue["car"]) == 4
    assert np.mean(blue["sky"]) > np.mean(blue["tree"])


def test_cocostuff_layout(tmp_path):
    write_scenes(tmp_path, "cocostuff", {"train": 8, "val": 1}, workers=1)
    stems = [f"train2017/{index:012d}" for index in range(8)] + ["val2017/000000500000"]
    expected = [f"images/{stem}.jpg" for stem in stems] + [f"annotations/{stem}.png" for stem in stems]
    assert files(tmp_path) == sorted([*expected, "scenes.json"])
    rows = {row["name"]: row["pixelmap_value"] for row in read_json_table("cocostuff")}
    lut = np.array([rows[street_layouts.COCOSTUFF_NAMES.get(label, "unlabeled")] for label in range(34)])
    for index, stem in enumerate(stems[:8]):
        labels = Image.open(tmp_path / f"annotations/{stem}.png")
        assert labels.mode == "L" and (np.array(labels) == lut[streets.draw(0, "train", index).label_ids]).all()
        assert Image.open(tmp_path / f"images/{stem}.jpg").mode == ("L" if index == 7 else "RGB")


def test_more_scenes_are_added_and_deleted_files_come_back(tmp_path):
    assert write_scenes(tmp_path, scenes={"train": 1}, workers=1) == 1
    assert write_scenes(tmp_path, scenes={"train": 2, "val": 1}, workers=1) == 2
    assert write_scenes(tmp_path, scenes={"train": 1}, workers=1) == 0
    assert json.loads((tmp_path / "scenes.json").read_text())["scenes"] == {"train": 2, "val": 1}
    label = tmp_path / "gtFine/train/streets/streets_000001_000019_gtFine_labelIds.png"
    before = label.read_bytes()
    label.unlink()
    assert write_scenes(tmp_path, scenes={"train": 2}, workers=1) == 1
    assert label.read_bytes() == before


def test_an_interruption_leaves_whole_files_and_the_next_call_goes_on(tmp_path, monkeypatch):
    encode = street_layouts._png
    calls = []

    def interrupted(pixels):
        calls.append(pixels)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return encode(pixels)

    monkeypatch.setattr(street_layouts, "_png", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_scenes(tmp_path, scenes={"train": 3}, workers=1)
    assert json.loads((tmp_path / "scenes.json").read_text())["scenes"] == {}
    assert all(path.endswith((".png", ".json")) for path in files(tmp_path))
    assert all(read(path) is not None for path in tmp_path.rglob("*.png"))
    monkeypatch.setattr(street_layouts, "_png", encode)
    assert write_scenes(tmp_path, scenes={"train": 3}, workers=1) == 2


def test_a_full_disk_leaves_no_half_file(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    write_scenes(tmp_path, scenes={"train": 1}, workers=1)
    before = files(tmp_path)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_scenes(tmp_path, scenes={"train": 2}, workers=1)
    assert files(tmp_path) == before


def test_several_processes_write_the_same_files(tmp_path):
    write_scenes(tmp_path / "one", scenes={"train": 3}, workers=1)
    assert write_scenes(tmp_path / "two", scenes={"train": 3}, workers=2) == 3
    assert files(tmp_path / "one") == files(tmp_path / "two")
    for name in files(tmp_path / "one"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"seed": 1}, "seed=0.*seed=1"),
        ({"size": (512, 1024)}, r"size=\[256, 512\].*size=\[512, 1024\]"),
        ({"layout": "kitti"}, "layout=cityscapes.*layout=kitti"),
    ],
)
def test_a_folder_of_other_scenes_is_refused(tmp_path, changed, said):
    write_scenes(tmp_path, scenes={"train": 0}, workers=1)
    before = (tmp_path / "scenes.json").read_bytes()
    with pytest.raises(DataError, match=f"{said}.*output=FOLDER.*dataset.root=FOLDER"):
        write_scenes(tmp_path, **{"scenes": {"train": 1}, "workers": 1, **changed})
    assert (tmp_path / "scenes.json").read_bytes() == before


def test_a_folder_of_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match=r"no readable scenes.json.*output=FOLDER"):
        write_scenes(tmp_path, scenes={"train": 1}, workers=1)
    assert files(tmp_path) == ["thesis.txt"]


def test_what_cannot_be_drawn_is_refused(tmp_path):
    with pytest.raises(UsageError, match="width = 2 x height"):
        write_scenes(tmp_path, size=(256, 500), workers=1)
    with pytest.raises(UsageError, match="cityscapes, kitti, vistas, cocostuff"):
        write_scenes(tmp_path, "camvid", workers=1)
