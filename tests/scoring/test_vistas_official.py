"""The inference of the official Vistas script, its outputs, and published files of weights as checkpoint=."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from segtrain.config import InferenceConfig, ModelConfig
from segtrain.data.labels import LabelTable, published_table
from segtrain.data.scenes.layouts import write_scenes
from segtrain.errors import UsageError
from segtrain.models import build_model
from segtrain.scoring import inference as module
from segtrain.scoring.inference import fitted, segment
from segtrain.scoring.predictor import Predictor
from segtrain.weights import network_file
from segtrain.weights.files import read_weights
from segtrain.weights.matching import norm_layers
from segtrain.weights.published import known_files
from tests.helpers.networks import hollow, meta, shapes
from tests.helpers.runs import refused

NAME = "wide_resnet38_deeplab_vistas.pth.tar"
MEAN, STD = [0.41738699, 0.45732192, 0.46886091], [0.25685097, 0.26509955, 0.29067996]


def noise(*size, seed=0):
    """uint8 noise in patches of 3 pixels, so that filters matter and classes have areas."""
    coarse = np.random.default_rng(seed).integers(0, 256, (-(-size[0] // 3), -(-size[1] // 3), 3), np.uint8)
    return coarse.repeat(3, 0).repeat(3, 1)[: size[0], : size[1]]


class Cells(nn.Module):
    """(1, 3, H, W) -> logits (1, C, H / 8, W / 8), as peaked as those of a trained network."""

    def __init__(self, classes=5):
        super().__init__()
        torch.manual_seed(classes)
        self.conv = nn.Conv2d(3, classes, 11, 8, 5)
        self.conv.weight.data *= 6

    def forward(self, x, upsample=False):
        assert not upsample
        return self.conv(x)


def predictor(network, classes=5, **options):
    rows = [{"name": f"c{i}", "id": 3 * i, "color": [i, 2 * i, 3 * i], "train_id": i} for i in range(classes)]
    return Predictor(network.eval(), LabelTable(rows, "the test"), ModelConfig(**options), torch.device("cpu"))


# ---------------------------------------------------------------------------------------------------- preprocessing


@pytest.mark.parametrize(
    ("size", "expected"),  # width, height
    [
        ((1920, 1080), (2048, 1152)),
        ((1242, 375), (2048, 618)),  # 618.35...
        ((1080, 1920), (1152, 2048)),  # portrait: whole, nothing is cut
        ((3264, 2448), (2048, 1536)),  # larger
        ((100, 30), (2048, 614)),  # much smaller: 614.4
        ((2048, 999), (2048, 999)),
        ((7000, 3), (2048, 1)),  # 0.87..., kept
        ((49, 7), (2047, 292)),  # 2048 / 49 * 49 is 2047.9999... in floating point, which the script cuts too
    ],
)
def test_sizes_worked_by_hand(size, expected):
    image = noise(size[1], size[0])
    found = fitted(image, 2048)
    assert (found.shape[1], found.shape[0]) == expected
    assert (found == np.asarray(Image.fromarray(image).resize(expected, Image.BILINEAR))).all()


def script(network, image, scales, flip, longest, mean, std):
    """The official script's inference with mean fusion, in plain PIL and torch, in float64."""
    picture = Image.fromarray(image)
    scale = longest / max(picture.size)
    seen = picture.resize((int(picture.width * scale), int(picture.height * scale)), Image.BILINEAR)
    x = torch.tensor(np.array(seen)).permute(2, 0, 1).double() / 255
    x = ((x - torch.tensor(mean).double()[:, None, None]) / torch.tensor(std).double()[:, None, None])[None]
    height, width = x.shape[2:]
    views = []
    for scale in scales:
        of_scale = x
        if scale != 1:
            size = (round(height * scale), round(width * scale))
            of_scale = F.interpolate(x, size, mode="bilinear", align_corners=False)
        for mirrored in (False, True) if flip else (False,):
            logits = network(of_scale.flip(3) if mirrored else of_scale)
            logits = F.interpolate(logits, (height, width), mode="bilinear", align_corners=False)
            views.append(F.softmax(logits.flip(3) if mirrored else logits, 1)[0])
    return torch.stack(views).mean(0)


def back(plane, image):
    return np.asarray(Image.fromarray(plane).resize((image.shape[1], image.shape[0]), Image.NEAREST))


def agrees(found, probabilities, image):
    """Assert equal classes, except for ties within rounding, and probabilities to 1e-5."""
    probability, classes = probabilities.max(0)
    expected = back(classes.numpy().astype(np.uint8), image)
    second = back(probabilities.topk(2, 0).values[1].numpy().astype(np.float32), image)
    best = back(probability.numpy().astype(np.float32), image)
    assert found.train_ids.dtype == np.uint8 and found.train_ids.shape == image.shape[:2]
    assert (best - second)[found.train_ids != expected].max(initial=0) < 1e-5
    assert len(np.unique(expected)) >= 3
    if found.probability is not None:
        assert np.abs(found.probability - best).max() < 1e-5


@pytest.mark.parametrize(
    ("size", "longest", "scales", "flip"),
    [
        ((17, 120), 2048, [1.0], True),  # as published, but for the network
        ((90, 61), 203, [1.0], False),  # portrait; enlarged, to no multiple of the stride
        ((331, 450), 128, [0.7, 1.0, 1.2], True),  # reduced
        ((64, 96), 150, [0.5], False),
        ((50, 50), 77, [0.7, 1.3], False),
    ],
)
@torch.no_grad()
def test_the_whole_way_is_the_scripts(size, longest, scales, flip):
    network, image = Cells(), noise(*size, seed=longest)
    options = InferenceConfig(name="vistas_official", scales=scales, flip=flip, longest_side=longest)
    found = predictor(network, mean=MEAN, std=STD).segment(image, options, probability=True)
    agrees(found, script(Cells().double(), image, scales, flip, longest, MEAN, STD), image)
    assert (predictor(network, mean=MEAN, std=STD).predict(image, options) == found.train_ids).all()


# ---------------------------------------------------------------------------------------------------- probabilities


@pytest.mark.parametrize(
    "options",
    [
        InferenceConfig(),
        InferenceConfig(flip=True),
        InferenceConfig(name="tiled", tile=[64, 96]),
        InferenceConfig(name="multiscale", scales=[0.7, 1.0, 1.2], flip=True),
    ],
    ids=["whole", "flip", "tiled", "multiscale"],
)
@torch.no_grad()
def test_probabilities_of_every_inference(monkeypatch, options):
    """The maximum of the views' mean softmax, computed in strips; to request it changes no class."""
    network, image = Cells(7), noise(130, 203, seed=5)
    whole = torch.from_numpy(image.transpose(2, 0, 1).copy())[None]
    monkeypatch.setattr(module, "STRIP", 7 * 9 * 203)
    heights = []

    def strip(logits, size, top, bottom, *rest, real=module.enlarged):
        heights.append(bottom - top)
        return real(logits, size, top, bottom, *rest)

    monkeypatch.setattr(module, "enlarged", strip)

    def normalised(x):
        return network(x.float() / 127.5 - 1)

    found = segment(normalised, whole, options, probability=True)
    assert max(heights) == 9 and sum(heights) == 130 * len(options.scales) * (2 if options.flip else 1)
    views = [module.view(normalised, whole, s, m, options)[0]
             for s in options.scales for m in ((False, True) if options.flip else (False,))]  # fmt: skip
    full = [F.interpolate(v.double()[None], (130, 203), mode="bilinear")[0].softmax(0) for v in views]
    agrees(found, torch.stack(full).mean(0), image)
    alone = segment(normalised, whole, options)
    assert alone.probability is None and (alone.train_ids == found.train_ids).all()


# ---------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"overlap": 0.5}, r"inference\.overlap=0.5.*inference\.tile"),
        ({"longest_side": 31}, r"inference\.longest_side must be at least 32 or null, got 31"),
    ],
)
def test_options_that_cannot_be(options, words):
    with pytest.raises(UsageError, match=words):
        InferenceConfig(**options).check()


# ---------------------------------------------------------------------------------------------------- files as they are


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "vistas"
    write_scenes(root, "vistas", {"train": 1, "val": 2, "night": 1}, 0, (256, 512), workers=1)
    return root


@pytest.fixture(scope="module")
def network(data):
    """A DeepLabV3 of 65 classes with a small backbone, whose predictions vary like those of a trained network."""
    torch.manual_seed(0)
    made = build_model("resnet18", num_classes=65, head_channels=16, norm="abn")
    for layer in norm_layers(made).values():
        nn.init.uniform_(layer.weight, -1.5, 1.5)
        nn.init.uniform_(layer.bias, -0.5, 0.5)
    made.eval()
    with torch.no_grad():
        path = next((data / "validation" / "images").iterdir())
        seen = torch.from_numpy(fitted(np.asarray(Image.open(path)), 128)).permute(2, 0, 1)[None] / 127.5 - 1
        logits = made(seen, upsample=False)
        made.cls.weight /= logits.std((0, 2, 3)).view(-1, 1, 1, 1) / 2
        made.cls.bias -= made(seen, upsample=False).mean((0, 2, 3))
    return made


@pytest.fixture
def published(network, tmp_path, monkeypatch):
    """The file as downloaded: in the published layout, and recognised by its md5."""
    state = {k: t for k, t in network.state_dict().items() if not k.endswith("num_batches_tracked")}
    parts = {part: {k.removeprefix(f"{part}."): t for k, t in state.items() if k.startswith(f"{part}.")}
             for part in ("body", "head", "cls")}  # fmt: skip
    path = tmp_path / NAME
    torch.save({"state_dict": parts}, path, _use_new_zipfile_serialization=False)  # as of 2018
    known = next(one for one in known_files() if one["file"] == NAME)
    monkeypatch.setitem(known, "md5", hashlib.md5(path.read_bytes()).hexdigest())
    return path


SMALL = ("inference=vistas_official", "inference.longest_side=128", "device=cpu")


def files(folder):
    """The images of a folder of predictions."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))


@torch.no_grad()
def test_the_published_file_is_evaluated_as_downloaded(segtrain, published, data, network, monkeypatch, tmp_path):
    read = []
    monkeypatch.setattr(network_file, "read_weights", lambda path, real=read_weights: read.append(path) or real(path))
    small = [*SMALL, "loader.workers=0", "pictures=0", "position_prior=false"]
    call = ["evaluate", NAME, "dataset=vistas", f"dataset.root={data}", *small]
    done = segtrain(*call)
    assert done.status == 0, done.err
    assert len(read) == 1
    assert done.out.count("tensors matched (100 %)") == 1
    assert "not for commercial use: weights wide_resnet38_deeplab_vistas.pth.tar (CC BY-NC-SA 4.0)" in done.out
    (line,) = [line for line in done.out.splitlines() if line.startswith("published ")]
    for word in ("53.42 %", "test data", "scale 1 with flip", "53.37", "53.12 %", "val, single scale, no flip",
                 "measured above: vistas val, inference vistas_official (scale 1, with flip, longest side 128)",
                 ):  # fmt: skip
        assert word in line
    result = json.loads((tmp_path / done.out.splitlines()[-1]).read_text())
    assert line.startswith(f"published       {result['protocol']['published']}; ")
    assert result["inference"]["longest_side"] == 128 and result["step"] == 0
    assert result["protocol"]["checkpoint_sha256"] == hashlib.sha256(published.read_bytes()).hexdigest()

    right = counted = 0
    images = sorted((data / "validation" / "images").iterdir())
    for path in images:
        image = np.asarray(Image.open(path))
        target = np.asarray(Image.open(data / "validation" / "labels" / f"{path.stem}.png"))
        found = script(lambda x: network(x.float(), upsample=False).double(), image, [1.0], True, 128, MEAN, STD)
        ids = back(found.argmax(0).numpy().astype(np.uint8), image)
        right += int((ids == target)[target < 65].sum())
        counted += int((target < 65).sum())
        assert len(np.unique(ids)) >= 3
    assert len(images) == 2
    assert result["pixel_accuracy"] == pytest.approx(right / counted, abs=2e-3)

    known = next(one for one in known_files() if one["file"] == NAME)
    monkeypatch.setitem(known, "md5", "0" * 32)  # another file of that name
    done = segtrain(*call)
    assert done.status == 0 and "published wide_resnet38_deeplab_vistas but not its hash" in done.out
    assert "how its images were normalised: ImageNet's are taken, model.mean=[0.485, 0.456, 0.406]" in done.out
    assert not [line for line in done.out.splitlines() if line.startswith("published ")]
    assert "published" not in json.loads((tmp_path / done.out.splitlines()[-1]).read_text())["protocol"]


@torch.no_grad()
def test_predict_info_submit_and_a_run_of_the_published_file(segtrain, published, data, network, tmp_path):
    photos = data / "validation" / "images"
    call = ["predict", f"input={photos}", *SMALL, "outputs=[palette,raw,prob,labels,color]"]
    done = segtrain(*call, f"checkpoint={published}", "output=a")
    assert done.status == 0, done.err
    assert "raw/ holds train ids" in done.out and "tensors matched (100 %)" in done.out
    table = published_table("vistas_v1.2")
    names = sorted(path.stem for path in photos.iterdir())
    assert files(tmp_path / "a") == [f"{kind}/{name}.png" for kind in ("color", "labels", "palette", "prob", "raw")
                                     for name in names]  # fmt: skip
    for name in names:
        image = np.asarray(Image.open(photos / f"{name}.jpg"))
        found = script(lambda x: network(x.float(), upsample=False).double(), image, [1.0], True, 128, MEAN, STD)
        opened = {kind: Image.open(tmp_path / "a" / kind / f"{name}.png")
                  for kind in ("palette", "raw", "prob", "labels", "color")}  # fmt: skip
        assert [picture.mode for picture in opened.values()] == ["P", "L", "L", "L", "RGB"]
        pixels = {kind: np.asarray(picture) for kind, picture in opened.items()}
        assert (pixels["raw"] == back(found.argmax(0).numpy().astype(np.uint8), image)).mean() > 0.999
        level = back((found.amax(0) * 255).numpy().astype(np.uint8), image)
        assert np.abs(pixels["prob"].astype(int) - level).max() <= 1 and pixels["prob"].mean() < 254
        assert (pixels["palette"] == pixels["raw"]).all()
        assert opened["palette"].getpalette()[: 3 * 65] == table.colors.ravel().tolist()
        assert (np.asarray(opened["palette"].convert("RGB")) == pixels["color"]).all()
        assert (pixels["labels"] == table.ids[pixels["raw"]]).all()

    # The same through a checkpoint of a run, which knows where it comes from too.
    assert segtrain("convert", NAME, "output=run.pt", "form=run").status == 0
    assert segtrain(*call, "checkpoint=run.pt", "output=b").status == 0
    assert all(
        (tmp_path / "a" / one).read_bytes() == (tmp_path / "b" / one).read_bytes() for one in files(tmp_path / "a")
    )
    for path in (published, "run.pt"):
        told = segtrain("info", f"checkpoint={path}")
        assert told.status == 0 and "model   resnet18 + deeplabv3, norm inplace_abn" in told.out
        assert "data    vistas, classes: animal--bird" in told.out
        assert "published  wide_resnet38_deeplab_vistas: mIoU 53.42 %" in told.out and "nan" not in told.out

    sent = segtrain("submit", NAME, "dataset=vistas", f"dataset.root={data}", *SMALL)
    assert sent.status == 0 and "verified    1 answers" in sent.out, sent


def test_default_outputs_and_wrong_ones(segtrain, published, data):
    photo = next((data / "validation" / "images").iterdir())
    call = ["predict", f"input={photo}", f"checkpoint={published}", "inference=vistas_official", "device=cpu"]
    refused(
        segtrain(*call, "outputs=[colour]"),
        "outputs must be one or more of labels, color",
        "palette, raw, prob, probabilities, got ['colour']; did you mean color?",
    )
    refused(segtrain(*call, "outputs=[]"), "outputs=[]")
    refused(segtrain(*call, "inference.overlap=0.5"), "inference.overlap=0.5")
    assert segtrain(*call, "inference.longest_side=64", "output=o").status == 0
    assert files(Path("o")) == [f"{kind}/{photo.stem}.png" for kind in ("color", "labels", "overlay")]


def test_files_that_are_no_network_of_a_run(segtrain, published, data, tmp_path):
    torch.save(hollow(shapes("resnet18")), "imagenet.pth")
    torch.save({"a.weight": torch.zeros(1)}, "strange.pth")
    verbs = (["evaluate", "dataset=kitti"], ["predict", f"input={data}"], ["submit", "dataset=kitti"], ["info"])
    for verb in verbs:
        if verb[0] in ("evaluate", "predict"):
            refused(segtrain(*verb, "checkpoint=imagenet.pth"), "classifies images")
        neither = "strange.pth is neither a checkpoint that segtrain wrote nor a file of weights that it knows"
        words = (neither, "the names of no known layout (a.weight")
        refused(segtrain(*verb, "checkpoint=strange.pth"), *words, status=1)
        away = refused(segtrain(*verb, f"checkpoint=away/{NAME}"), f"no checkpoint file away/{NAME}")
        for word in ("913f78486a34aa1577a7cd295e8a33bb", "github.com/mapillary/inplace_abn#", "drive.google.com"):
            assert (word in away.err) == (word[:3] != "913")  # here it is the test's file that is known
    root = tmp_path / "streets"
    write_scenes(root, "cityscapes", {"train": 1, "val": 1}, 0, (256, 512), workers=1)
    done = segtrain("evaluate", NAME, "dataset=cityscapes", f"dataset.root={root}", "inference=whole", "device=cpu")
    refused(done, "predicts 65 classes", "dataset=cityscapes has 19")


def test_the_vistas_network_is_the_published_one(monkeypatch, tmp_path):
    """The file is recognised as this network of 135,827,073 parameters, on the meta device."""
    ours = meta(build_model, "wider_resnet38", num_classes=65)
    torch.save({"state_dict": hollow(ours)}, NAME)
    known = next(one for one in known_files() if one["file"] == NAME)
    monkeypatch.setitem(known, "md5", hashlib.md5((tmp_path / NAME).read_bytes()).hexdigest())
    monkeypatch.setattr(network_file, "from_config", lambda options, classes: ours)
    content = network_file.run_content(Path(NAME))
    options = content["config"]["model"]
    assert sum(t.numel() for k, t in content["model"].items() if ".running_" not in k and "num_" not in k) == 135827073
    assert (options["backbone"], options["head"], options["head_channels"]) == ("wider_resnet38", "deeplabv3", 256)
    assert (options["norm"], options["scale"], options["pooling_size"]) == ("inplace_abn", "abs", [672, 672])
    assert (options["output_stride"], options["mean"], options["std"]) == (8, MEAN, STD)
    assert content["config"]["dataset"]["name"] == "vistas" and content["known"] == "wide_resnet38_deeplab_vistas"
    assert content["provenance"]["data"].keys() == {"imagenet", "vistas"}

    monkeypatch.setitem(known, "md5", "0" * 32)  # the same network, written anew
    again = network_file.run_content(Path(NAME))
    assert again["config"]["model"] == options and again["known"] is None
    assert "the published wide_resnet38_deeplab_vistas's are taken, model.mean=[0.41738699" in again["report"]
