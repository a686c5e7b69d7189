"""From files to batches: data sets, start-up checks, augmentation, order."""

import os
import shutil

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn.functional import interpolate

from segtrain.config import IGNORE_INDEX, AugmentationConfig, CityscapesConfig, FolderConfig, KittiConfig, StreetsConfig
from segtrain.data.augment import Augmentation, draw_span, resize_window
from segtrain.data.cache import Decoded
from segtrain.data.dataset import label_table, split_samples
from segtrain.data.labels import published_table, read_json_table
from segtrain.data.loader import TrainingData, evaluation_samples, read_pixels, training_batches
from segtrain.data.order import MicroBatches
from segtrain.data.sample import Sample
from segtrain.data.sampling import class_index, random_pixel
from segtrain.data.scenes.layouts import write_scenes
from segtrain.data.verify.files import FileFacts, check_samples
from segtrain.errors import DataError, UsageError
from tests.helpers.samples import read_sample

# ------------------------------------------------------------------------------------------------ data sets


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


def picture(path, value=0, size=(6, 4)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full(size, value, np.uint8)).save(path)


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
    with pytest.raises(DataError, match=r"2 of 3 images have no label picture: .*a/1\.png"):
        split_samples(folder_config(tmp_path, "a/*.png", "b/*.png"), "train")
    with pytest.raises(DataError, match=r"2 of 3 labels have no image picture: .*a/1\.png"):
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
    assert split_samples(config, "train") == [Sample("i/x y", tmp_path / "i/x y.png", tmp_path / "l/z.png")]
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


# ------------------------------------------------------------------------------------------------ start-up checks


@pytest.fixture
def pairs(tmp_path):
    samples = []
    for i in range(3):
        picture(tmp_path / f"i{i}.png", 50)
        picture(tmp_path / f"l{i}.png", 7)
        samples.append(Sample(str(i), tmp_path / f"i{i}.png", tmp_path / f"l{i}.png"))
    return samples


def check(samples, tmp_path):
    return check_samples(samples, published_table("cityscapes"), tmp_path / "cache", lambda text: None)


def test_good_files_pass_and_the_largest_size_is_told(pairs, tmp_path):
    picture(pairs[1].image, size=(9, 5))
    picture(pairs[1].label, 7, size=(9, 5))
    assert check(pairs, tmp_path) == (9, 5)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda p: p.image.write_bytes(p.image.read_bytes()[:-20]), r"i1\.png cannot be read.*truncated"),
        (lambda p: p.label.write_bytes(p.label.read_bytes()[:30]), r"l1\.png cannot be read"),
        (lambda p: p.label.write_bytes(flip_byte(p.label.read_bytes(), -20)), r"l1\.png cannot be read.*checksum"),
        (lambda p: p.image.write_text("text"), r"i1\.png cannot be read"),
        (lambda p: p.image.unlink(), r"i1\.png cannot be read.*no such file"),
        (lambda p: picture(p.label, 7, (6, 5)), r"i1\.png is 4x6 but its label .*l1\.png is 5x6"),
        (lambda p: picture(p.label, 40), r"l1\.png: label id 40"),
        (lambda p: Image.new("RGB", (4, 6)).save(p.label), r"l1\.png is a RGB colour picture"),
    ],
)
def test_damage_is_named(pairs, tmp_path, damage, words):
    check(pairs, tmp_path)  # remembered as good, until it changes
    damage(pairs[1])
    with pytest.raises(DataError, match=words):
        check(pairs, tmp_path)


def flip_byte(data, place):
    changed = bytearray(data)
    changed[place] ^= 0xFF
    return bytes(changed)


def test_a_truncated_jpeg_is_named(tmp_path):
    path = tmp_path / "x.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 90, 3)).astype(np.uint8)).save(path)
    check([Sample("x", path, None)], tmp_path)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(DataError, match=r"x\.jpg cannot be read.*end of the JPEG"):
        check([Sample("x", path, None)], tmp_path)


def test_many_errors_are_counted_and_some_shown(pairs, tmp_path):
    for sample in pairs:
        picture(sample.label, 99)
    with pytest.raises(DataError, match="3 of 3 samples cannot be used"):
        check(pairs, tmp_path)


def test_a_second_check_reads_no_file(pairs, tmp_path, monkeypatch):
    check(pairs, tmp_path)

    def no_reading(path):
        raise AssertionError(f"{path} was read again")

    monkeypatch.setattr("segtrain.data.verify.files.examine_file", no_reading)
    monkeypatch.setattr("segtrain.data.verify.files.read_label", no_reading)
    assert check(pairs, tmp_path) == (6, 4)


# ------------------------------------------------------------------------------------------------ augmentation


def coded(height=60, width=80):
    """A picture whose pixels say where they come from, and a label with the same boundary as the picture."""
    image = np.zeros((height, width, 3), np.uint8)
    image[:, width // 2 :] = 200
    target = np.where(image[..., 0] > 100, 1, 0).astype(np.uint8)
    return image, target


def augmentation(**options):
    return Augmentation(AugmentationConfig(**{"crop_size": [48, 48], "scale": [0.5, 2.0], **options}))


def test_same_seed_same_sample_other_seed_other_sample():
    augment = augmentation()
    image, target = coded()
    first = augment(image, target, (0, 5))
    for _ in range(3):  # whatever came in between
        augment(image, target, (0, 6))
    again = augment(image, target, (0, 5))
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    different = [augment(image, target, (0, i)) for i in range(20)]
    assert len({(a.tobytes(), b.tobytes()) for a, b in different}) > 15


def test_transforms_draw_independently():
    """Flip and scale must not go together, as they do with the library's own seeding."""
    augment = augmentation(crop_size=[32, 32], scale=[0.5, 1.5])
    image = np.zeros((32, 32, 3), np.uint8)
    image[:, :16] = 255
    image[0] = 10
    flips, small = [], []
    for i in range(300):
        _, target = augment(image, image[..., 0] // 255, (1, i))
        columns = np.where(target == 1)[1]
        padded = (target == IGNORE_INDEX).any()
        small.append(padded)
        centre = np.where(target != IGNORE_INDEX)[1].mean()
        flips.append(columns.mean() > centre if len(columns) else False)
    assert abs(np.corrcoef(flips, small)[0, 1]) < 0.2
    assert 0.35 < np.mean(flips) < 0.65


def test_padding_is_ignored_and_no_new_labels_appear():
    image, target = coded(20, 20)
    target[:] = 3
    target[:, 10:] = 9
    for i in range(30):
        out, label = augmentation(crop_size=[64, 64], scale=[0.5, 1.5])(image, target, (0, i))
        assert out.shape == (64, 64, 3)
        assert set(np.unique(label)) <= {3, 9, IGNORE_INDEX}
        assert (label == IGNORE_INDEX).any()


def test_image_and_label_stay_aligned():
    """The boundary in the label stays within half a pixel of the boundary in the picture."""
    image, target = coded(64, 96)
    shifts = []
    for i in range(60):
        out, label = augmentation(crop_size=[32, 48], scale=[0.5, 2.0], flip=0.0)(image, target, (0, i))
        row, labels = out[16, :, 0].astype(float), label[16]
        if {0, 1} <= set(labels) and IGNORE_INDEX not in labels:
            edge = (200 - row).sum() / 200  # sub-pixel place of the step
            shifts.append(edge - (labels == 0).sum())
    assert len(shifts) > 10
    assert abs(np.mean(shifts)) < 0.12
    assert np.abs(shifts).max() <= 0.51


def test_no_augmentation_is_a_plain_crop():
    image, target = coded(48, 48)
    out, label = augmentation(scale=[1.0, 1.0], flip=0.0)(image, target, (0, 0))
    assert (out == image).all()
    assert (label == target).all()


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.integers(20, 90), st.integers(20, 90), st.floats(0.4, 2.5), st.integers(0, 10**6))
def test_the_window_is_that_of_a_float_resize(height, width, scale, seed):
    """Image within a grey level of torch's bilinear resize of the window, labels torch's nearest-exact but at ties."""
    rng = np.random.default_rng(seed)
    image = cv2.resize(rng.integers(0, 256, (12, 12, 3)).astype(np.uint8), (width, height))
    labels = rng.integers(0, 9, (height, width)).astype(np.uint8)
    crop = [40, 48]
    rows, columns = (draw_span((height, width)[a], crop[a], scale, np.random.default_rng(seed), None) for a in (0, 1))
    window = np.s_[rows.start : rows.start + rows.length, columns.start : columns.start + columns.length]
    found = resize_window(image[window], rows, columns, crop, cv2.INTER_LINEAR, (1, 2, 3))
    target = resize_window(labels[window], rows, columns, crop, cv2.INTER_NEAREST_EXACT, IGNORE_INDEX)
    inside = np.s_[rows.place : rows.place + rows.size, columns.place : columns.place + columns.size]
    expected = interpolate(torch.from_numpy(image[window]).permute(2, 0, 1)[None].double(), (rows.size, columns.size),
                           mode="bilinear")[0].permute(1, 2, 0).numpy()  # fmt: skip
    assert np.abs(found[inside] - expected).max() <= 1
    exact = interpolate(torch.from_numpy(labels[window])[None, None].double(), (rows.size, columns.size),
                        mode="nearest-exact")[0, 0].numpy()  # fmt: skip

    def tied(span):
        at = (np.arange(span.size) + 0.5) * span.length / span.size
        return np.abs(at - np.round(at)) < 1e-6

    free = ~tied(rows)[:, None] & ~tied(columns)[None, :]
    assert (target[inside] == exact)[free].all()
    outside = np.ones(crop, bool)
    outside[inside] = False
    assert (target[outside] == IGNORE_INDEX).all()
    assert (found[outside] == (1, 2, 3)).all()


def test_a_window_contains_its_focus_and_lies_anywhere_around_it():
    rng = np.random.default_rng(0)
    starts = set()
    for _ in range(500):
        extent, crop = int(rng.integers(10, 100)), int(rng.integers(5, 120))
        focus = int(rng.integers(extent))
        span = draw_span(extent, crop, rng.uniform(0.5, 2), rng, focus)
        assert 0 <= span.start <= focus < span.start + span.length <= extent
        assert 0 <= span.place <= span.place + span.size <= crop
        starts.add(draw_span(100, 20, 1, rng, 50).start)
    assert starts == set(range(31, 51))


def test_colours_are_changed_and_labels_are_not():
    image, target = coded(48, 48)
    image[:, :, 1] = 120
    plain = augmentation(scale=[1.0, 1.0], flip=0.0)(image, target, (0, 0))
    augment = augmentation(scale=[1.0, 1.0], flip=0.0, color=0.4)
    changed = [augment(image, target, (0, i)) for i in (0, 1, 0)]
    assert all((label == plain[1]).all() for _, label in changed)
    assert (changed[0][0] == changed[2][0]).all()
    assert not (changed[0][0] == changed[1][0]).all()
    assert not (changed[0][0] == plain[0]).all()


# ------------------------------------------------------------------------------------------------ class-uniform


def rare(tmp_path):
    """Ten pictures of class 0 (road), one of which has a corner of class 18 (bicycle)."""
    samples = []
    for i in range(10):
        picture(tmp_path / f"i{i}.png", 50, size=(64, 96))
        label = np.full((64, 96), 7, np.uint8)
        if i == 4:
            label[:2, :3] = 33
        Image.fromarray(label).save(tmp_path / f"l{i}.png")
        samples.append(Sample(str(i), tmp_path / f"i{i}.png", tmp_path / f"l{i}.png"))
    return samples


def test_classes_are_drawn_uniformly_and_shown(tmp_path):
    samples, table = rare(tmp_path), published_table("cityscapes")
    index = class_index(samples, table, FileFacts(tmp_path / "cache", samples))
    assert index.classes == [0, 18]
    assert [len(index.pictures[k]) for k in (0, 18)] == [10, 1]
    for share, least, most in ((1.0, 0.4, 0.6), (0.5, 0.15, 0.4), (0.0, 0.0, 0.1)):
        data = TrainingData(samples, table, augmentation(crop_size=[32, 32], scale=[0.8, 1.2]), 0, index=index,
                            class_uniform=share)  # fmt: skip
        items = [data[position] for position in range(200)]
        shown = np.mean([(target == 18).any() for _, target, *_ in items])
        assert least <= shown <= most
        again = [data[position] for position in range(200)]
        assert all((a[1] == b[1]).all() for a, b in zip(items, again, strict=True))


def test_the_index_is_kept_and_read_by_nobody_twice(tmp_path, monkeypatch):
    samples, table = rare(tmp_path), published_table("cityscapes")
    class_index(samples, table, FileFacts(tmp_path / "cache", samples))
    monkeypatch.setattr("segtrain.data.verify.files.read_label", lambda path: pytest.fail("read again"))
    class_index(samples, table, FileFacts(tmp_path / "cache", samples))


def test_a_pixel_of_a_class_is_uniform():
    target = np.zeros((4, 5), np.uint8)
    target[1, 2] = target[3, 4] = 6
    rng = np.random.default_rng(0)
    found = [random_pixel(target, 6, rng) for _ in range(200)]
    assert set(found) == {(1, 2), (3, 4)}
    assert 60 < found.count((1, 2)) < 140
    assert random_pixel(target, 9, rng) is None


# ------------------------------------------------------------------------------------------------ decoded cache


def cached(tmp_path, samples):
    told = []
    decoded = Decoded(tmp_path / "cache" / "decoded")
    decoded.build(samples, FileFacts(tmp_path / "cache", samples), told.append)
    return decoded, told


def test_the_cache_gives_the_same_pixels_and_notices_changes(tmp_path):
    samples = rare(tmp_path)
    decoded, told = cached(tmp_path, samples)
    assert "0.00 GB will be written" in told[0]
    for sample in samples:
        for found, expected in zip(decoded(sample), read_pixels(sample), strict=True):
            assert isinstance(found, np.memmap)
            assert (found == expected).all()
    assert cached(tmp_path, samples)[1] == [f"cache      {tmp_path}/cache/decoded: all pictures are decoded already"]
    picture(samples[3].image, 99, size=(64, 96))
    os.utime(samples[3].image, ns=(1, 1))
    assert (decoded(samples[3])[0] == 99).all()


def test_training_data_is_the_same_with_the_cache(scenes, tmp_path):
    plain = training_data(scenes)
    decoded, _ = cached(tmp_path, plain.samples)
    fast = TrainingData(plain.samples, plain.table, plain.augmentation, plain.seed, decoded)
    assert steps(fast, 0, 2, workers=2) == steps(plain, 0, 2, workers=0)


def test_class_uniform_sampling_reads_the_cache_too(tmp_path):
    samples, table = rare(tmp_path), published_table("cityscapes")
    index = class_index(samples, table, FileFacts(tmp_path / "cache", samples))
    both = [TrainingData(samples, table, augmentation(), 0, read, index, 1.0)
            for read in (read_pixels, cached(tmp_path, samples)[0])]  # fmt: skip
    for position in range(20):
        (first, second, *_), (again, labels, *_) = (data[position] for data in both)
        assert (first == again).all()
        assert (second == labels).all()


def test_a_cache_that_does_not_fit_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10**9))
    with pytest.raises(UsageError, match=r"dataset\.cache=decoded needs .*dataset\.cache_dir"):
        cached(tmp_path, rare(tmp_path))


# ------------------------------------------------------------------------------------------------ order


def training_data(scenes, seed=0):
    config = StreetsConfig(name="streets", root=str(scenes), scenes=6, val_scenes=3)
    samples = split_samples(config, "train")
    return TrainingData(samples, label_table(config), augmentation(), seed)


def steps(data, start, stop, workers):
    return [
        (batch.names, batch.images.contiguous().numpy().tobytes(), batch.targets.numpy().tobytes())
        for (batch,) in training_batches(data, MicroBatches(4, start, stop), workers, pin_memory=False)
    ]


def test_batches_depend_on_seed_and_step_only(scenes):
    data = training_data(scenes)
    alone = steps(data, 0, 5, workers=0)
    assert steps(data, 0, 5, workers=2) == alone
    assert steps(data, 3, 5, workers=1) == alone[3:]
    assert steps(training_data(scenes, seed=1), 0, 5, workers=0) != alone


@pytest.mark.parametrize(("size", "accumulation"), [(4, 1), (2, 2), (1, 4), (3, 1)])
def test_pixels_do_not_depend_on_how_many_processes_read_them(scenes, size, accumulation):
    """1x4 = 2x2 = 4x1, and three processes for a batch of four."""
    data = training_data(scenes)
    parts = [
        list(training_batches(data, MicroBatches(4, 1, 3, rank, size, accumulation), rank % 2, pin_memory=False))
        for rank in range(size)
    ]
    for step, (names, images, targets) in enumerate(steps(data, 1, 3, workers=0)):
        pieces = [parts[rank][step][part] for part in range(accumulation) for rank in range(size)]
        assert [name for piece in pieces for name in piece.names] == names
        assert b"".join(piece.images.contiguous().numpy().tobytes() for piece in pieces) == images
        assert b"".join(piece.targets.numpy().tobytes() for piece in pieces) == targets


def test_every_sample_comes_once_per_pass(scenes):
    names = [name for batch in steps(training_data(scenes), 0, 6, workers=0) for name in batch[0]]
    for i in range(0, 24, 6):
        assert len(set(names[i : i + 6])) == 6
    assert names[:6] != names[6:12]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_file_met_later_is_one_clear_error(scenes, tmp_path, workers):
    data = training_data(scenes)
    data.samples = [sample._replace(image=tmp_path / "gone.png") for sample in data.samples]
    with pytest.raises(DataError, match=r"^the batch of step 1: \S*gone\.png cannot be read") as caught:
        steps(data, 0, 1, workers)
    assert "Traceback" not in str(caught.value)
    with pytest.raises(DataError, match=r"gone\.png"):
        list(evaluation_samples(data.samples, data.table, workers))
