"""Whole pictures: the tree, the published augmentation, the published views, accuracies, and the one training loop."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import functional as tv

from segtrain.config import AugmentationConfig, ImageNetConfig, InferenceConfig
from segtrain.data.classify.images import (
    COMPONENTS,
    Pictures,
    RandomView,
    TrainingPictures,
    batches_of,
    list_pictures,
    views,
)
from segtrain.errors import DataError
from segtrain.models import build_classifier
from segtrain.models.preprocess import normalise_images
from segtrain.tasks.classification import Answer, PictureCrossEntropy, accuracies, identities
from segtrain.tasks.evaluation import restored
from tests.helpers.checkout import TINY, environment
from tests.helpers.runs import small_run

CENTER = InferenceConfig(resize=256, crop=224)
TEN = InferenceConfig(resize=256, crop=224, crops="ten")


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Six classes of coloured pictures: four of each in train, three in val, of several sizes and kinds of file."""
    root = tmp_path_factory.mktemp("imagenet")
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 3)):
        for number in range(6):
            folder = root / split / f"n{number:08d}"
            folder.mkdir(parents=True)
            for i in range(count):
                colour = np.array([40 * number, 255 - 40 * number, 90 * (number % 3)])
                size = (40 + 9 * i, 60 - 5 * i, 3)
                picture = np.clip(colour + rng.integers(-25, 26, size), 0, 255).astype(np.uint8)
                name = f"{folder.name}_{i}.JPEG" if split == "train" else f"ILSVRC2012_val_{number}{i}.JPEG"
                Image.fromarray(picture).save(folder / name, "PNG" if i == 2 else "JPEG", quality=95)
    return root


def words(tree, *more):
    """A training of seconds."""
    return [
        "dataset=imagenet", f"dataset.root={tree}", f"plugins=[{TINY}]", "model.backbone=tiny", "model.head=classifier",
        "model.output_stride=16", "loss=cross_entropy", "augmentation=imagenet", "augmentation.crop_size=[32,32]",
        "inference=center224", "inference.resize=36", "inference.crop=32", "optimizer.lr=0.1", "trainer.batch_size=12",
        "trainer.epochs=null", "trainer.max_steps=6", "trainer.validate_every=3", "trainer.save_every=3",
        "schedule=constant", "loader.workers=0", "logging.every=1", "logging.pictures=3", "device=cpu", *more,
    ]  # fmt: skip


def noise(height, width, seed=0):
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


# ---------------------------------------------------------------------------------------------------- the tree


def test_classes_are_the_sorted_folders(tree):
    found = list_pictures(ImageNetConfig("imagenet", str(tree)), "train")
    assert found.classes == [f"n{n:08d}" for n in range(6)]
    assert len(found) == 24
    assert found.targets.tolist() == [n for n in range(6) for _ in range(4)]
    assert all(name.startswith(found.classes[target]) for name, target in zip(found.names, found.targets, strict=True))
    assert len(set(found.first(6).targets.tolist())) > 3


def test_a_flat_validation_folder_is_recognised(tree, tmp_path, segtrain):
    (tmp_path / "flat" / "val").mkdir(parents=True)
    (tmp_path / "flat" / "train").symlink_to(tree / "train")
    for i in range(3):
        Image.new("RGB", (40, 40)).save(tmp_path / "flat" / "val" / f"ILSVRC2012_val_{i:08d}.JPEG")
    answer = segtrain("train", *words(tmp_path / "flat"))
    assert answer.status == 1
    for part in ("holds 3 pictures that are in no folder of a class", "valprep.sh | bash", f"cd {tmp_path / 'flat'}"):
        assert part in answer.err


def test_classes_without_pictures_are_named(tree, tmp_path):
    for number in range(4):
        (tmp_path / "val" / f"n0000000{number}").mkdir(parents=True)
    (tmp_path / "val" / "n00000009").symlink_to(tree / "val" / "n00000000")
    with pytest.raises(DataError, match=r"4 of the 5 classes in .*val have no pictures .n00000000, n0000"):
        list_pictures(ImageNetConfig("imagenet", str(tmp_path)), "val")


def test_a_tree_that_is_not_there_or_disagrees(tree, tmp_path, segtrain):
    answer = segtrain("train", *words(tmp_path / "nowhere"))
    assert answer.status == 1
    assert "n01440764/n01440764_10026.JPEG" in answer.err
    assert "image-net.org" in answer.err
    (tmp_path / "other" / "val" / "n99999999").mkdir(parents=True)
    Image.new("RGB", (40, 40)).save(tmp_path / "other" / "val" / "n99999999" / "a.JPEG")
    (tmp_path / "other" / "train").symlink_to(tree / "train")
    answer = segtrain("train", *words(tmp_path / "other"))
    assert answer.status == 1
    assert "n99999999 on one side only" in answer.err


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("model.head=deeplabv3", ["model.head=deeplabv3", "model.head=classifier"]),
        ("loss=bootstrapped", ["loss.name=bootstrapped", "loss=cross_entropy"]),
        ("augmentation=paper", ["augmentation.name=segmentation", "augmentation=imagenet"]),
        ("inference=whole", ["inference=whole", "center224, tencrop or center320"]),
        ("augmentation.scale=[0.5,2]", ["augmentation.scale", "does not read it"]),
        ("inference.flip=true", ["inference.flip", "for pixels"]),
        ("inference.crop=64", ["inference.crop=64", "at most inference.resize"]),
        ("dataset=streets", ["model.head=classifier", "whole pictures"]),
    ],
)
def test_combinations_that_cannot_work_are_refused(tree, segtrain, word, told):
    chosen = [w for w in words(tree) if not (word.startswith(("inference=", "dataset=")) and w.startswith("inference"))]
    answer = segtrain("train", *chosen, word)
    assert answer.status == 2, answer.err
    for part in told:
        assert part in answer.err


@pytest.mark.parametrize("verb", ["score", "submit"])
def test_commands_about_pixels_refuse_whole_pictures(segtrain, tree, verb):
    answer = segtrain(verb, "dataset=imagenet", f"dataset.root={tree}", "predictions=x")
    assert answer.status == 2
    assert "dataset=imagenet" in answer.err


def test_check_reads_every_picture_and_compares_the_splits(segtrain, tree, tmp_path):
    call = ["check", "dataset=imagenet", "output=o"]
    answer = segtrain(*call, f"dataset.root={tree}")
    assert answer.status == 0, answer.err
    report = json.loads(Path("o/report.json").read_text())
    assert (report["ok"], len(report["classes"]), report["findings"]) == (True, 6, [])
    assert [report["splits"][name]["images"] for name in ("train", "val")] == [24, 18]
    bad = tmp_path / "bad"
    shutil.copytree(tree, bad)
    (bad / "val" / "n00000000").rename(bad / "val" / "n00000077")
    for number in range(6):
        path = bad / "train" / "n00000001" / f"broken{number}.JPEG"
        path.write_bytes((bad / "train" / "n00000001" / "n00000001_0.JPEG").read_bytes()[:400])
    answer = segtrain(*call, f"dataset.root={bad}")
    assert answer.status == 1
    report = json.loads(Path("o/report.json").read_text())
    assert [(found["severity"], found["kind"]) for found in report["findings"]] == [
        ("error", "unreadable"), ("error", "classes"),
    ]  # fmt: skip
    assert "train: 6 of 30 pictures cannot be read: " in answer.out
    assert "broken4.JPEG" in answer.out and "broken5.JPEG" not in answer.out
    assert "n00000077" in answer.out
    assert segtrain(*call, f"dataset.root={bad}", "split=val").status == 0  # of itself it is whole
    (bad / "val" / "n00000078").mkdir()
    answer = segtrain(*call, f"dataset.root={bad}", "split=val")
    assert (answer.status, "1 of the 7 classes in" in answer.err) == (1, True)


def test_check_compares_the_published_classes_with_the_published_counts(segtrain, tree, tmp_path):
    for number in range(1000):
        (tmp_path / "val").mkdir(exist_ok=True)
        (tmp_path / "val" / f"n{number:08d}").symlink_to(tree / "val" / "n00000000")
    answer = segtrain("check", "dataset=imagenet", f"dataset.root={tmp_path}", "split=val", "output=o")
    assert answer.status == 1
    assert "val: 3000 pictures, published are 50000" in answer.err


# ---------------------------------------------------------------------------------------------------- augmentation


def test_windows_are_within_the_limits_and_as_torchvision_draws_them():
    """Area and log aspect of accepted windows: the distributions of torchvision's RandomResizedCrop."""
    ours, theirs = [], []
    view, rng = RandomView(AugmentationConfig(name="imagenet")), np.random.default_rng(0)
    torch.manual_seed(0)
    picture = Image.new("RGB", (300, 200))
    for _ in range(4000):
        top, left, height, width, _ = view.draw(200, 300, rng)
        assert 0 <= top <= 200 - height
        assert 0 <= left <= 300 - width
        ours.append((height * width / 60000, math.log(width / height), top / 200, left / 300))
        i, j, h, w = transforms.RandomResizedCrop.get_params(picture, [0.08, 1.0], [3 / 4, 4 / 3])
        theirs.append((h * w / 60000, math.log(w / h), i / 200, j / 300))
    mine, other = np.array(ours), np.array(theirs)
    quantiles = np.linspace(0.05, 0.95, 10)
    for column in range(4):
        found, wanted = (np.quantile(one[:, column], quantiles) for one in (mine, other))
        assert np.abs(found - wanted).max() < 0.03


def test_a_picture_that_no_window_fits_is_cut_in_the_middle():
    view = RandomView(AugmentationConfig(name="imagenet", area=[0.99, 1.0], flip=0))
    assert view.draw(30, 300, np.random.default_rng(0)) == (0, 130, 30, 40, False)
    assert view.draw(300, 30, np.random.default_rng(0)) == (130, 0, 40, 30, False)


def test_colours_change_as_published():
    """Against torchvision's factors on float pictures, in the order that was drawn, where nothing would be clipped."""
    view = RandomView(AugmentationConfig(name="imagenet", color=0.4))
    image = (100 + 20 * np.random.default_rng(1).random((8, 9, 3))).astype(np.float32)
    orders = set()
    for seed in range(12):
        rng, same = np.random.default_rng(seed), np.random.default_rng(seed)
        found = view.recolored(image, rng)
        expected = torch.from_numpy(image).permute(2, 0, 1) / 255
        order = same.permutation(3).tolist()
        orders.add(tuple(order))
        for change in order:
            adjust = (tv.adjust_brightness, tv.adjust_saturation, tv.adjust_contrast)[change]
            expected = adjust(expected, same.uniform(0.6, 1.4))
        assert np.allclose(found / 255, expected.permute(1, 2, 0), atol=2e-4)  # torchvision's grey is 0.2989, ...
    assert len(orders) > 3


def test_light_shifts_all_pixels_along_the_components():
    assert np.allclose(COMPONENTS @ COMPONENTS.T, np.eye(3), atol=2e-3)
    view = RandomView(AugmentationConfig(name="imagenet", lighting=0.1))
    rng = np.random.default_rng(0)
    shifts = np.array([view.lit(np.zeros((1, 1, 3), np.float32), rng)[0, 0] for _ in range(4000)]) / 255
    wanted = COMPONENTS @ np.diag((0.1 * np.array([0.2175, 0.0188, 0.0045])) ** 2) @ COMPONENTS.T
    assert np.abs(np.cov(shifts.T) - wanted).max() < 2e-5
    assert np.abs(shifts.mean(0)).max() < 1e-3


def test_a_sample_is_a_function_of_seed_and_position(tree):
    pictures = list_pictures(ImageNetConfig("imagenet", str(tree)), "train")
    options = AugmentationConfig(name="imagenet", crop_size=[32, 48], color=0.4, lighting=0.1)
    first, again, other = (TrainingPictures(pictures, options, seed) for seed in (0, 0, 1))
    image, target, name, position, window = first[7]
    assert image.shape == (32, 48, 3)
    assert image.dtype == np.float32
    assert target.shape == ()
    assert name.startswith(pictures.classes[int(target)])
    assert (position, len(window)) == (7, 5)
    assert np.array_equal(image, again[7][0])
    assert [first[p][2] for p in range(24)] != [other[p][2] for p in range(24)]
    assert sorted(first[p][2] for p in range(24)) == sorted(pictures.names)  # an epoch shows each once


# ---------------------------------------------------------------------------------------------------- views and scores


@pytest.mark.parametrize("size", [(300, 200), (180, 333), (256, 256), (231, 517)])
def test_views_are_torchvisions(size):
    image = noise(*size)
    picture = Image.fromarray(image)
    shrunk = transforms.Resize(256)(picture)
    assert np.array_equal(views(image, CENTER)[0], np.asarray(transforms.CenterCrop(224)(shrunk)))
    theirs = {np.asarray(one).tobytes() for one in transforms.TenCrop(224)(shrunk)}
    assert {one.tobytes() for one in views(image, TEN)} == theirs
    assert views(image, InferenceConfig(resize=320, crop=320)).shape == (1, 320, 320, 3)


def test_accuracies_of_a_hand_worked_case(tree):
    some = list_pictures(ImageNetConfig("imagenet", str(tree)), "val")
    answers = [
        Answer([0, 1], np.array([0, 0]), np.array([[0, 1, 2, 3, 4], [5, 4, 3, 2, 1]])),  # right; not among five
        Answer([3, 4], np.array([1, 1]), np.array([[2, 3, 4, 5, 1], [0, 1, 2, 3, 4]])),  # fifth; second
    ]
    result, panels = accuracies(iter(answers), some, 4, CENTER, 2)
    assert (result["top1"], result["top5"], result["images"]) == (0.25, 0.75, 4)
    assert result["per_class_top1"] == {"n00000000": 0.5, "n00000001": 0.0} | {f"n{n:08d}": None for n in range(2, 6)}
    assert len(panels) == 2


def test_the_loss_is_cross_entropy():
    logits, target = torch.randn(5, 7), torch.tensor([0, 1, 2, 6, 6])
    loss = PictureCrossEntropy(0.1)
    wanted = torch.nn.functional.cross_entropy(logits, target, label_smoothing=0.1)
    assert torch.allclose(loss(logits, target).sum() / loss.count(target), wanted)
    assert loss.count(target) == 5


def test_pictures_are_known_in_other_folders(tree):
    some = list_pictures(ImageNetConfig("imagenet", str(tree)), "val")
    published = [f"a/ILSVRC2012_val_{n:08d}.JPEG" for n in range(2)]
    here, there = (Pictures(Path(folder), ["a"], published, [0, 0]) for folder in ("x/val", "y/all"))
    assert identities(here) == identities(there)
    own = [name.replace("ILSVRC2012_val", "a") for name in some.names]
    train, val = (Pictures(tree / split, some.classes, own, some.targets.tolist()) for split in ("train", "val"))
    assert not set(identities(train)) & set(identities(val))


# ---------------------------------------------------------------------------------------------------- the loop


def test_it_trains_is_judged_resumes_and_is_evaluated(tree, segtrain):
    answer = segtrain("train", *words(tree, "run=whole"))
    assert answer.status == 0, answer.err
    assert "top-1" in answer.out
    assert "6 steps of 12 pictures of [32, 32]" in answer.out
    lines = [json.loads(line) for line in Path("whole/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "val/top1" in line] == [3, 6]
    result = json.loads(Path("whole/evaluation.json").read_text())
    assert result["images"] == 18
    assert result["top5"] >= result["top1"]
    assert list(Path("whole/pictures").iterdir())
    # Stopped after three steps and gone on with: the same bits.
    segtrain("train", *words(tree, "run=cut", "trainer.max_steps=3"))
    segtrain("train", *words(tree, "run=cut"))
    whole, cut = (torch.load(f"{run}/last.pt", weights_only=True) for run in ("whole", "cut"))
    assert all(torch.equal(tensor, cut["model"][key]) for key, tensor in whole["model"].items())
    # The command gives the validation's figures, and the activation can be exchanged.
    answer = segtrain("evaluate", "run=whole", f"plugins=[{TINY}]", "loader.workers=0", "device=cpu")
    assert answer.status == 0, answer.err
    path = Path(answer.out.splitlines()[-1])
    again = json.loads(path.read_text())
    assert (again["top1"], again["top5"], again["per_class_top1"]) == tuple(
        result[key] for key in ("top1", "top5", "per_class_top1")
    )
    ten = ["inference=tencrop", "inference.resize=36", "inference.crop=32"]
    answer = segtrain("evaluate", "run=whole", f"plugins=[{TINY}]", *ten, "device=cpu", "loader.workers=0")
    assert "inference tencrop" in answer.out
    answer = segtrain(
        "evaluate", "run=whole", f"plugins=[{TINY}]", "activation=identity", "device=cpu", "loader.workers=0"
    )
    assert "identity, where leaky_relu was trained with" in answer.out
    answer = segtrain("evaluate", "run=whole", f"plugins=[{TINY}]", "activation=relu", "device=cpu", "loader.workers=0")
    assert answer.status == 0, answer.err
    assert "relu, where leaky_relu was trained with; norm abn, as inplace_abn but for the inverse" in answer.out
    answer = segtrain("predict", "run=whole", f"plugins=[{TINY}]", f"input={tree / 'val'}", "device=cpu")
    assert answer.status == 2
    assert "names whole pictures" in answer.err
    answer = segtrain("replay", "run=whole", "step=2", f"plugins=[{TINY}]")
    assert answer.status == 0, answer.err
    assert "class n0000000" in answer.out
    answer = segtrain("runs", "root=.")
    assert "whole" in answer.out


def test_the_result_is_what_segmentation_begins_with(tree, scenes, segtrain):
    chosen = [word for word in words(tree) if not word.startswith(("plugins", "model.backbone"))]
    answer = segtrain("train", *chosen, "model=resnet18", "model.head=classifier", "run=body", "trainer.max_steps=1")
    assert answer.status == 0, answer.err
    answer = segtrain("train", *small_run(scenes, "model.weights=body/last.pt", "trainer.max_steps=1", "run=pixels"))
    assert answer.status == 0, answer.err
    assert "(100 %)" in answer.out
    assert "2 not taken: classes of whole pictures" in answer.out
    assert "normalised otherwise" not in answer.out
    more = ["model.weights=body/last.pt", "trainer.max_steps=1", "run=others", "model.mean=[0.4,0.4,0.4]"]
    answer = segtrain("train", *small_run(scenes, *more))
    assert "pictures were normalised otherwise: add model.mean=[0.485, 0.456, 0.406] model.std=[0.229, " in answer.out
    # The wrong task is told of before any option that came with the checkpoint.
    for more in ([], ["inference=whole"]):
        answer = segtrain("evaluate", "body/last.pt", "dataset=cityscapes", *more)
        assert answer.status == 2
        assert answer.err.startswith("segtrain: body/last.pt names whole pictures (model.head=classifier): ")
    for more in ([], ["inference=center224"]):
        answer = segtrain("evaluate", "run=pixels", "dataset=imagenet", *more)
        assert answer.status == 2
        assert answer.err.startswith("segtrain: pixels/last.pt labels pixels (model.head=deeplabv3), dataset=imagenet ")
        assert "leave dataset= out" in answer.err


def test_a_published_classifier_is_evaluated_as_downloaded(tree, segtrain, monkeypatch):
    """In the official layout; the published figures of the file that it passes for stand beside what was measured."""
    from segtrain.weights import transfer as weights

    for folder in (tree / "val").iterdir():  # a picture of each class
        (Path("one") / "val" / folder.name).mkdir(parents=True)
        picture = sorted(folder.iterdir())[0]
        (Path("one") / "val" / folder.name / picture.name).symlink_to(picture)
    torch.manual_seed(0)
    network = build_classifier("resnet18", 6)
    torch.save({"state_dict": {f"module.{key}": value for key, value in network.state_dict().items()}}, "a.pth.tar")
    known = next(dict(row) for row in weights.known_files() if row["name"] == "resnet50_ipabn-sync_lr_512")
    monkeypatch.setattr(weights, "known_by_hash", lambda md5, sha256: known)
    call = [
        "evaluate",
        "checkpoint=a.pth.tar",
        "dataset=imagenet",
        f"dataset.root={tree}",
        "device=cpu",
        "loader.workers=0",
    ]
    answer = segtrain(*call, "inference=tencrop")
    assert answer.status == 0, answer.err
    assert "top-1 77.04 %, top-5 93.57 %  ResNet-50, InPlace-ABN sync, batch 512 (official README)" in answer.out
    result = json.loads(Path(answer.out.splitlines()[-1]).read_text())
    assert answer.out.splitlines()[-1] == "segtrain-out/evaluate/a.pth.tar/imagenet-val-tencrop/evaluation.json"
    assert result["inference"]["name"] == "tencrop"
    assert result["protocol"]["published"]["top1"] == 77.04
    warning = "18 pictures, but imagenet val has 50000 as published: the figure is not comparable with published ones"
    assert f"warning         {warning}" in answer.out
    assert result["protocol"]["warnings"] == [warning]
    assert result["protocol"]["images"] == {"expected": 18, "seen": 18, "published": 50000}
    Path("one/train").symlink_to("val")
    on_train = segtrain(*call[:-3], "dataset.root=one", *call[-2:], "inference=center224", "split=train")
    assert "6 pictures, but imagenet train has 1281167" in on_train.out, on_train
    assert "published  " not in on_train.out  # for it is of another split
    batch = next(batches_of(list_pictures(ImageNetConfig("imagenet", "one"), "val"), list(range(6)), TEN, 6, 0))
    with torch.no_grad():
        images = normalise_images(batch.images.flatten(0, 1), [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
        wanted = network.eval()(images).view(6, 10, 6).mean(1).argmax(1)
    assert result["top1"] == int((wanted == batch.targets).sum()) / 6
    other = segtrain(*call, "inference=tencrop", "inference.resize=40", "inference.crop=32")
    assert "published  " not in other.out  # for it is another protocol
    (Path("two") / "val" / "a").mkdir(parents=True)
    Image.new("RGB", (40, 40)).save("two/val/a/a.JPEG")
    answer = segtrain(*call[:-1], "dataset.root=two")
    assert answer.status == 1
    assert "has 1 folders of classes" in answer.err


@torch.no_grad()
def test_an_exchanged_activation_leaves_in_place_layers_as_they_were():
    """Of one that In-Place ABN has too: against the network with it, |weight| + eps and all."""
    torch.manual_seed(0)
    network = build_classifier("resnet18", 6)
    for name, tensor in network.named_parameters():
        if tensor.dim() == 1:
            tensor.copy_(torch.randn_like(tensor) / (1 if name.endswith("bias") else 2))
    torch.save({"state_dict": {f"module.{key}": value for key, value in network.state_dict().items()}}, "a.pth.tar")
    images = torch.randn(2, 3, 64, 64)
    for activation in ("elu", "identity"):
        wanted = build_classifier("resnet18", 6, activation=activation)
        wanted.load_state_dict(network.state_dict())
        found, options, _ = restored(Path("a.pth.tar"), torch.device("cpu"), activation=activation)
        assert (options.norm, options.scale, options.activation) == ("abn", "abs", activation)
        assert torch.allclose(found(images), wanted.eval()(images), rtol=1e-4, atol=1e-5)
    found = restored(Path("a.pth.tar"), torch.device("cpu"), activation="relu")[0]
    plain = build_classifier("resnet18", 6, norm="abn", activation="relu")
    plain.load_state_dict(network.state_dict())
    assert torch.allclose(found(images), plain.eval()(images), rtol=1e-4, atol=1e-5)


def test_it_learns(tree, segtrain):
    answer = segtrain("train", *words(tree, "trainer.max_steps=40", "trainer.validate_every=40", "run=r"))
    assert answer.status == 0, answer.err
    losses = [json.loads(line).get("train/loss") for line in Path("r/metrics.jsonl").read_text().splitlines()]
    losses = [loss for loss in losses if loss is not None]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])


@pytest.mark.slow
def test_two_processes_count_each_picture_once(tree):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "segtrain"]
    command = [*torchrun, "train", *words(tree, "trainer.max_steps=2", "trainer.validate_every=2", "run=two")]
    done = subprocess.run(command, env=environment() | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(Path("two/evaluation.json").read_text())["images"] == 18


def test_a_damaged_picture_is_named(tree, tmp_path):
    folder = tmp_path / "train" / "n0"
    folder.mkdir(parents=True)
    (folder / "a.JPEG").write_bytes(b"\xff\xd8 half a picture")
    data = TrainingPictures(list_pictures(ImageNetConfig("imagenet", str(tmp_path)), "train"), AugmentationConfig(), 0)
    assert isinstance(data[0], DataError)
    assert "a.JPEG" in str(data[0])
