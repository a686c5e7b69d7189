"""The files of a split, and how a user's own folder is described."""

import numpy as np
import pytest

from segtrain.config import IGNORE_INDEX, CityscapesConfig, FolderConfig, KittiConfig, StreetsConfig
from segtrain.data.labels import read_json_table
from segtrain.data.registry import label_table, split_samples
from segtrain.data.sample import Sample
from segtrain.data.scenes.layouts import write_scenes
from segtrain.data.sets.folder import match_patterns
from segtrain.errors import DataError, UsageError
from tests.helpers.samples import picture, read_sample


def test_cityscapes_layout(scenes):
    config = CityscapesConfig(name="cityscapes", root=str(scenes))
    samples = split_samples(config, "train")
    assert len(samples) == 6
    assert samples[0].name == "streets_000000_000019"
    image, target = read_sample(samples[0], label_table(config))
    assert image.shape == (256, 512, 3)
    assert set(np.unique(target)) <= {*range(19), IGNORE_INDEX}
    with pytest.raises(DataError, match="no split 'vall'.*there is night, train, val"):
        split_samples(config, "vall")


def test_streets_draw_themselves_and_take_the_first(tmp_path, scenes):
    config = StreetsConfig(name="streets", root=str(scenes), scenes=4, val_scenes=2, night_scenes=1)
    assert len(split_samples(config, "train")) == 4
    assert len(split_samples(config, "night")) == 1
    with pytest.raises(DataError, match="seed"):
        split_samples(StreetsConfig(name="streets", root=str(scenes), seed=5), "train")


def test_kitti_layout_and_published_splits(tmp_path):
    names = [f"{i:06d}_10.png" for i in range(200)]
    for folder in ("training/image_2", "training/semantic", "testing/image_2"):
        (tmp_path / folder).mkdir(parents=True)
        for name in names:
            (tmp_path / folder / name).touch()
    config = KittiConfig(name="kitti", root=str(tmp_path))
    val = {sample.name for sample in split_samples(config, "val")}
    train = {sample.name for sample in split_samples(config, "train")}
    assert val == {f"{i:06d}_10" for i in read_json_table("kitti_splits")["mseg_150_50"]}
    assert (len(val), len(train), len(val & train)) == (50, 150, 0)
    assert len(split_samples(config, "trainval")) == 200
    assert split_samples(config, "test")[0].label is None
    other = KittiConfig(name="kitti", root=str(tmp_path), val_list="nvidia_sdcnet_cv0")
    assert len(split_samples(other, "val")) == 21
    with pytest.raises(UsageError, match="mseg_150_50, nvidia_sdcnet_cv0"):
        split_samples(KittiConfig(name="kitti", root=str(tmp_path), val_list="mine"), "val")


def test_kitti_scenes_train_ids(tmp_path):
    write_scenes(tmp_path / "k", "kitti", {"train": 3, "val": 1}, 0, (256, 512), workers=1)
    config = KittiConfig(name="kitti", root=str(tmp_path / "k"))
    for sample in split_samples(config, "trainval"):
        image, target = read_sample(sample, label_table(config))
        assert image.shape[:2] == target.shape
        assert (target < 19).mean() > 0.5


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (CityscapesConfig(name="cityscapes", root="nowhere"), r"gtFine.*labelIds[\s\S]*www.cityscapes-dataset.com"),
        (KittiConfig(name="kitti", root="nowhere"), r"image_2[\s\S]*www.cvlibs.net"),
        (FolderConfig(name="folder", root="nowhere"), r"dataset.splits.train"),
    ],
)
def test_missing_data_names_the_tree_and_the_source(config, words):
    with pytest.raises(DataError, match=words):
        split_samples(config, "train")


def folder_config(root, images, labels, **options):
    entry = {"images": images} | ({"labels": labels} if labels else {})
    return FolderConfig(name="folder", root=str(root), splits={"train": entry}, **options)


@pytest.mark.parametrize(
    ("images", "labels", "pattern", "other", "names"),
    [
        ("a/x.png", "b/x.png", "a/*.png", "b/*.png", ["x"]),
        ("x_rgb.png", "x_lab.png", "*_rgb.png", "*_lab.png", ["x"]),
        ("i/city/x.jpg", "l/city/x.png", "i/**/*.jpg", "l/**/*.png", ["city/x"]),
        ("i/c1/x.png", "l/c1/x.png", "i/*/*.png", "l/*/*.png", ["c1/x"]),
        ("a[1]/x.png", "b/x.png", "a[1]/*.png", "b/*.png", ["x"]),
        ("a b/(1) x.png", "l,1/(1) x.png", "a b/*.png", "l,1/*.png", ["(1) x"]),
    ],
)
def test_patterns_pair_by_what_the_stars_stand_for(tmp_path, images, labels, pattern, other, names):
    picture(tmp_path / images)
    picture(tmp_path / labels)
    samples = split_samples(folder_config(tmp_path, pattern, other), "train")
    assert [sample.name for sample in samples] == names
    assert samples[0].image == tmp_path / images
    assert samples[0].label == tmp_path / labels


def test_images_without_label_and_the_reverse(tmp_path):
    for i in range(3):
        picture(tmp_path / f"a/{i}.png")
    picture(tmp_path / "b/0.png")
    with pytest.raises(DataError, match=r"2 of 3 images have no label: .*a/1\.png"):
        split_samples(folder_config(tmp_path, "a/*.png", "b/*.png"), "train")
    with pytest.raises(DataError, match=r"2 of 3 labels have no image: .*a/1\.png"):
        split_samples(folder_config(tmp_path, "b/*.png", "a/*.png"), "train")


def test_empty_split_and_ambiguous_patterns(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(DataError, match="is empty"):
        split_samples(folder_config(tmp_path, "a/*.png", "b/*.png"), "train")
    with pytest.raises(UsageError, match="same number of"):
        split_samples(folder_config(tmp_path, "a/*.png", "*/*.png"), "train")


def test_lists_of_pairs(tmp_path):
    picture(tmp_path / "i/x y.png")
    picture(tmp_path / "l/z.png")
    (tmp_path / "list.txt").write_text("# image, label\ni/x y.png, l/z.png\n\n")
    config = FolderConfig(name="folder", root=str(tmp_path), splits={"train": {"pairs": "list.txt"}})
    paths = tmp_path / "i/x y.png", tmp_path / "l/z.png"
    assert split_samples(config, "train") == [Sample("i/x y", *paths, exif="auto")]
    for text, words in (
        ("i/x.png\n", "line 1: expected 'image,label'"),
        ("i/no.png,l/z.png\n", r"line 1: no such file .*no\.png"),
        ("i/x y.png,l/z.png\ni/x y.png,l/z.png\n", "line 2.*same name"),
    ):
        (tmp_path / "list.txt").write_text(text)
        with pytest.raises(DataError, match=words):
            split_samples(config, "train")


def test_folder_needs_its_options(tmp_path):
    with pytest.raises(UsageError, match=r"dataset\.root is not set"):
        split_samples(FolderConfig(name="folder"), "train")
    with pytest.raises(UsageError, match=r"dataset\.classes is not set"):
        label_table(FolderConfig(name="folder", root=str(tmp_path)))


@pytest.mark.parametrize(
    "line",
    [
        "i/x.png,l/x.png", "/i/x.png /l/x.png", "i/x.png\tl/x.png # a note", '"i/x.png","l/x.png"', "i/x.png;l/x.png",
        "i/a #3, b.png,l/a #3, b.png", '"i/a #3, b.png", "l/a #3, b.png"', "i/a #3, b.png\tl/a #3, b.png",
        "# i/y.png,l/y.png\ni/x.png,l/x.png", "image,label\ni/x.png,l/x.png", "\ufeffi/x.png,l/x.png\r\n",
    ],
)  # fmt: skip
def test_lines_of_a_list_of_pairs(tmp_path, line):
    for name in ("i/x.png", "l/x.png", "i/a #3, b.png", "l/a #3, b.png"):
        picture(tmp_path / name)
    (tmp_path / "list.txt").write_text(line)
    config = FolderConfig(name="folder", root=str(tmp_path), splits={"train": {"pairs": "list.txt"}})
    (sample,) = split_samples(config, "train")
    name = "a #3, b.png" if "#3" in line else "x.png"
    assert (sample.image, sample.label) == (tmp_path / "i" / name, tmp_path / "l" / name)


def test_files_of_file_managers_are_no_images(tmp_path):
    for name in ("i/x.png", "i/y.JPG", "l/x.png", "l/y.png", "i/.DS_Store", "i/Thumbs.db", "i/._x.png", "l/._x.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = match_patterns(tmp_path, "i/*", "l/*.png", "dataset.splits.train")
    assert sorted(sample.image.name for sample in found.samples()) == ["x.png", "y.JPG"]
