"""Image classification: what is refused, accuracies, and the training loop that it shares with segmentation."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from segtrain.config import ImageNetConfig, InferenceConfig, ModelConfig
from segtrain.data.classify.loader import batches_of
from segtrain.data.classify.samples import ClassImages
from segtrain.data.registry import list_images
from segtrain.data.sets.imagenet import identity
from segtrain.models import build_classifier
from segtrain.models.preprocess import normalise_images
from segtrain.scoring.predictor import load_network
from segtrain.tasks.classification import ClassificationEvaluator, ImageCrossEntropy, TopK
from tests.helpers.checkout import TINY, environment
from tests.helpers.runs import small_run, state

CENTER = InferenceConfig(resize=256, crop=224)
TEN = InferenceConfig(resize=256, crop=224, crops="ten")


def words(root, *more):
    """Overrides for a training of a few seconds."""
    return [
        "dataset=imagenet", f"dataset.root={root}", f"plugins=[{TINY}]", "model.backbone=tiny", "model.head=classifier",
        "model.output_stride=16", "loss=cross_entropy", "augmentation=imagenet", "augmentation.crop_size=[32,32]",
        "inference=center224", "inference.resize=36", "inference.crop=32", "optimizer.lr=0.1", "trainer.batch_size=12",
        "trainer.epochs=null", "trainer.max_steps=6", "trainer.validate_every=3", "trainer.save_every=3",
        "schedule=constant", "loader.workers=0", "logging.every=1", "logging.pictures=3", "device=cpu", *more,
    ]  # fmt: skip


# ---------------------------------------------------------------------------------------------------- refusals


def test_a_flat_validation_folder_is_recognised(class_images, tmp_path, segtrain):
    (tmp_path / "flat" / "val").mkdir(parents=True)
    (tmp_path / "flat" / "train").symlink_to(class_images / "train")
    for i in range(3):
        Image.new("RGB", (40, 40)).save(tmp_path / "flat" / "val" / f"ILSVRC2012_val_{i:08d}.JPEG")
    answer = segtrain("train", *words(tmp_path / "flat"))
    assert answer.status == 1
    for part in ("holds 3 images outside the folders of the classes", "valprep.sh | bash", f"cd {tmp_path / 'flat'}"):
        assert part in answer.err


def test_a_tree_that_is_not_there_or_disagrees(class_images, tmp_path, segtrain):
    answer = segtrain("train", *words(tmp_path / "nowhere"))
    assert answer.status == 1
    assert "n01440764/n01440764_10026.JPEG" in answer.err
    assert "image-net.org" in answer.err
    (tmp_path / "other" / "val" / "n99999999").mkdir(parents=True)
    Image.new("RGB", (40, 40)).save(tmp_path / "other" / "val" / "n99999999" / "a.JPEG")
    (tmp_path / "other" / "train").symlink_to(class_images / "train")
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
        ("inference.flip=true", ["inference.flip", "for segmentation"]),
        ("inference.crop=64", ["inference.crop=64", "at most inference.resize"]),
        ("dataset=streets", ["model.head=classifier", "image classification"]),
    ],
)
def test_combinations_that_cannot_work_are_refused(class_images, segtrain, word, told):
    chosen = [
        w
        for w in words(class_images)
        if not (word.startswith(("inference=", "dataset=")) and w.startswith("inference"))
    ]
    answer = segtrain("train", *chosen, word)
    assert answer.status == 2, answer.err
    for part in told:
        assert part in answer.err


@pytest.mark.parametrize("verb", ["score", "submit"])
def test_commands_about_pixels_refuse_whole_pictures(segtrain, class_images, verb):
    answer = segtrain(verb, "dataset=imagenet", f"dataset.root={class_images}", "predictions=x")
    assert answer.status == 2
    assert "dataset=imagenet" in answer.err


# ---------------------------------------------------------------------------------------------------- scores


def test_accuracies_of_a_hand_worked_case(class_images):
    some = list_images(ImageNetConfig("imagenet", str(class_images)), "val")
    answers = [
        TopK([0, 1], np.array([0, 0]), np.array([[0, 1, 2, 3, 4], [5, 4, 3, 2, 1]])),  # right; not among five
        TopK([3, 4], np.array([1, 1]), np.array([[2, 3, 4, 5, 1], [0, 1, 2, 3, 4]])),  # fifth; second
    ]
    evaluator = ClassificationEvaluator(ImageNetConfig("imagenet"), "val", some, ModelConfig(), CENTER)
    evaluator.batch_size = 2
    counts, panels = evaluator.count(iter(answers), 4, 2)
    result = counts.result()
    assert (result["top1"], result["top5"], result["images"]) == (0.25, 0.75, 4)
    assert result["per_class_top1"] == {"n00000000": 0.5, "n00000001": 0.0} | {f"n{n:08d}": None for n in range(2, 6)}
    assert len(panels) == 2


def test_the_loss_is_cross_entropy():
    logits, target = torch.randn(5, 7), torch.tensor([0, 1, 2, 6, 6])
    loss = ImageCrossEntropy(0.1)
    wanted = torch.nn.functional.cross_entropy(logits, target, label_smoothing=0.1)
    assert torch.allclose(loss(logits, target).sum() / loss.count(target), wanted)
    assert loss.count(target) == 5


def test_pictures_are_known_in_other_folders(class_images):
    some = list_images(ImageNetConfig("imagenet", str(class_images)), "val")
    published = [f"a/ILSVRC2012_val_{n:08d}.JPEG" for n in range(2)]
    here, there = (ClassImages(Path(folder), ["a"], published, [0, 0]) for folder in ("x/val", "y/all"))
    assert identity(here) == identity(there)
    own = [name.replace("ILSVRC2012_val", "a") for name in some.names]
    train, val = (
        ClassImages(class_images / split, some.classes, own, some.targets.tolist()) for split in ("train", "val")
    )
    assert not set(identity(train)) & set(identity(val))


# ---------------------------------------------------------------------------------------------------- the loop


def test_it_trains_is_judged_resumes_and_is_evaluated(class_images, segtrain):
    answer = segtrain("train", *words(class_images, "run=whole"))
    assert answer.status == 0, answer.err
    assert "top-1" in answer.out
    assert "6 steps of 12 images of [32, 32]" in answer.out
    lines = [json.loads(line) for line in Path("whole/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "val/top1" in line] == [3, 6]
    result = json.loads(Path("whole/evaluation.json").read_text())
    assert result["images"] == 18
    assert result["top5"] >= result["top1"]
    assert list(Path("whole/pictures").iterdir())
    # Stopped after three steps and gone on with: the same bits.
    segtrain("train", *words(class_images, "run=cut", "trainer.max_steps=3"))
    segtrain("train", *words(class_images, "run=cut"))
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
    answer = segtrain("predict", "run=whole", f"plugins=[{TINY}]", f"input={class_images / 'val'}", "device=cpu")
    assert answer.status == 2
    assert "classifies images" in answer.err
    answer = segtrain("replay", "run=whole", "step=2", f"plugins=[{TINY}]")
    assert answer.status == 0, answer.err
    assert "class n0000000" in answer.out
    answer = segtrain("runs", "root=.")
    assert "whole" in answer.out


def test_the_result_is_what_segmentation_begins_with(class_images, scenes, segtrain):
    chosen = [word for word in words(class_images) if not word.startswith(("plugins", "model.backbone"))]
    answer = segtrain("train", *chosen, "model=resnet18", "model.head=classifier", "run=body", "trainer.max_steps=1")
    assert answer.status == 0, answer.err
    answer = segtrain("train", *small_run(scenes, "model.weights=body/last.pt", "trainer.max_steps=1", "run=pixels"))
    assert answer.status == 0, answer.err
    assert "(100 %)" in answer.out
    assert "2 not taken: classifier of images" in answer.out
    assert "normalised differently" not in answer.out
    more = ["model.weights=body/last.pt", "trainer.max_steps=1", "run=others", "model.mean=[0.4,0.4,0.4]"]
    answer = segtrain("train", *small_run(scenes, *more))
    assert (
        "its images were normalised differently: add model.mean=[0.485, 0.456, 0.406] model.std=[0.229, " in answer.out
    )
    assert state("others/last.pt")["config"]["model"]["mean"] == [0.4, 0.4, 0.4]
    # The wrong task is reported before any option of the checkpoint.
    for more in ([], ["inference=whole"]):
        answer = segtrain("evaluate", "body/last.pt", "dataset=cityscapes", *more)
        assert answer.status == 2
        assert answer.err.startswith("segtrain: body/last.pt classifies images (model.head=classifier): ")
    for more in ([], ["inference=center224"]):
        answer = segtrain("evaluate", "run=pixels", "dataset=imagenet", *more)
        assert answer.status == 2
        assert answer.err.startswith("segtrain: pixels/last.pt labels pixels (model.head=deeplabv3), dataset=imagenet ")
        assert "leave dataset= out" in answer.err


def test_a_published_classifier_is_evaluated_as_downloaded(class_images, segtrain, monkeypatch):
    """In the official layout; the published figures of the file that it imitates are printed beside measured ones."""
    from segtrain.weights import files
    from segtrain.weights.published import known_files

    for folder in (class_images / "val").iterdir():  # a picture of each class
        (Path("one") / "val" / folder.name).mkdir(parents=True)
        picture = sorted(folder.iterdir())[0]
        (Path("one") / "val" / folder.name / picture.name).symlink_to(picture)
    torch.manual_seed(0)
    network = build_classifier("resnet18", 6)
    torch.save({"state_dict": {f"module.{key}": value for key, value in network.state_dict().items()}}, "a.pth.tar")
    known = next(dict(row) for row in known_files() if row["name"] == "resnet50_ipabn-sync_lr_512")
    monkeypatch.setattr(files, "known_by_hash", lambda md5, sha256: known)
    call = [
        "evaluate",
        "checkpoint=a.pth.tar",
        "dataset=imagenet",
        f"dataset.root={class_images}",
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
    warning = "18 images, but imagenet val has 50000 as published: the figure is not comparable with published ones"
    assert f"warning         {warning}" in answer.out
    assert result["protocol"]["warnings"] == [warning]
    assert result["protocol"]["images"] == {"expected": 18, "seen": 18, "published": 50000}
    Path("one/train").symlink_to("val")
    on_train = segtrain(*call[:-3], "dataset.root=one", *call[-2:], "inference=center224", "split=train")
    assert "6 images, but imagenet train has 1281167" in on_train.out, on_train
    assert "published  " not in on_train.out  # for it is of another split
    batch = next(batches_of(list_images(ImageNetConfig("imagenet", "one"), "val"), list(range(6)), TEN, 6, 0))
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
    """Against the same network with an activation that In-Place ABN has too, with its scale |weight| + eps."""
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
        found, options, _, _ = load_network(Path("a.pth.tar"), torch.device("cpu"), activation=activation)
        assert (options.norm, options.scale, options.activation) == ("abn", "abs", activation)
        assert torch.allclose(found(images), wanted.eval()(images), rtol=1e-4, atol=1e-5)
    found = load_network(Path("a.pth.tar"), torch.device("cpu"), activation="relu")[0]
    plain = build_classifier("resnet18", 6, norm="abn", activation="relu")
    plain.load_state_dict(network.state_dict())
    assert torch.allclose(found(images), plain.eval()(images), rtol=1e-4, atol=1e-5)


def test_it_learns(class_images, segtrain):
    answer = segtrain("train", *words(class_images, "trainer.max_steps=40", "trainer.validate_every=40", "run=r"))
    assert answer.status == 0, answer.err
    losses = [json.loads(line).get("train/loss") for line in Path("r/metrics.jsonl").read_text().splitlines()]
    losses = [loss for loss in losses if loss is not None]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])


@pytest.mark.slow
def test_two_processes_count_each_picture_once(class_images):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "segtrain"]
    command = [*torchrun, "train", *words(class_images, "trainer.max_steps=2", "trainer.validate_every=2", "run=two")]
    done = subprocess.run(command, env=environment() | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(Path("two/evaluation.json").read_text())["images"] == 18
