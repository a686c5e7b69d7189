"""A network's classes mapped to a dataset's: probabilities are added up before the arg-max."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import segtrain
from segtrain.config import InferenceConfig
from segtrain.data.class_mapping import ClassMapping, class_mapping, fitting, require_same_labels
from segtrain.data.labels import LabelTable, published_table, read_json_table
from segtrain.data.scenes.layouts import write_scenes
from segtrain.errors import DataError, UsageError
from segtrain.scoring.inference import segment
from segtrain.weights import checkpoint
from tests.helpers.checkout import TINY
from tests.helpers.runs import refused

VISTAS, CITYSCAPES = published_table("vistas_v1.2"), published_table("cityscapes")
SIX = ("mseg_cityscapes19", "mseg_wilddash19", "robustnet", "strict_uda", "unicore", "rvc2022")


def simple(names, first=0):
    return LabelTable(
        [{"id": i + first, "name": name, "color": [i, i, i], "train_id": i} for i, name in enumerate(names)], "a test"
    )


def mapped(sources, rest, drop):
    return ClassMapping(simple([f"t{i}" for i in range(len(sources))]), list("abcdef"), sources, rest, drop, "test")


# ---------------------------------------------------------------------------------------------------- the arg-max


def test_a_pixel_worked_by_hand():
    """Probabilities 0.30, 0.25, 0.25, 0.20: alone the first is the greatest, added up the second and third are."""
    logits = torch.tensor([0.30, 0.25, 0.25, 0.20]).log().view(1, 4, 1, 1)

    def best(sources, rest, drop=False):
        made = ClassMapping(simple("xy"), list("abcd"), sources, rest, drop, "test")
        found = segment(lambda x: logits, torch.zeros(1, 3, 1, 1), InferenceConfig(), True, made)
        return int(found.train_ids.item()), round(found.probability.item(), 6)

    assert segment(lambda x: logits, torch.zeros(1, 3, 1, 1), InferenceConfig()).train_ids == 0
    assert best(((0,), (1, 2)), (3,)) == (1, 0.5)
    assert best(((3,), (0,)), (1, 2)) == (255, 0.5)  # those without a counterpart are one class
    assert best(((3,), (0,)), (1, 2), drop=True) == (1, 0.3)
    assert best(((), (3,)), (0, 1, 2), drop=True) == (1, 0.2)  # a class without sources is never chosen
    assert best(((0,), ()), (1, 2, 3)) == (255, 0.7)


def cells(x):
    """Logits of 6 classes in independent cells of 8 x 8 pixels, so that tiles see what the whole image sees."""
    weight = 2 * torch.randn(6, 3, 1, 1, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(x.dtype)
    padded = F.pad(x, (0, -x.shape[3] % 8, 0, -x.shape[2] % 8))
    return F.conv2d(F.avg_pool2d(padded, 8), weight)


@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        InferenceConfig(),
        InferenceConfig(flip=True),
        InferenceConfig(scales=[0.5, 1.0, 1.5]),
        InferenceConfig(scales=[0.75, 1.25], flip=True, tile=[64, 32], overlap=0.5),
        InferenceConfig(tile=[32, 64]),
    ],
)
def test_every_inference_against_numpy(options, drop):
    sources, rest = ((4, 0), (), (1,)), (2, 3, 5)
    patches = torch.randn(1, 3, 12, 16, generator=torch.Generator().manual_seed(5))
    image = F.interpolate(patches, (96, 128))
    expected = np.zeros((6, 96, 128))
    for scale in options.scales:
        for mirrored in (False, True)[: 1 + options.flip]:
            size = [round(scale * extent) for extent in image.shape[2:]]
            seen = F.interpolate(image.double(), size, mode="bilinear", align_corners=False)
            logits = cells(seen.flip(3)).flip(3) if mirrored else cells(seen)
            logits = F.interpolate(logits, (96, 128), mode="bilinear", align_corners=False)[0].numpy()
            powers = np.exp(logits - logits.max(0))
            expected += powers / powers.sum(0) / len(options.scales) / (1 + options.flip)
    sums = np.stack([expected[0] + expected[4], expected[1], expected[2] + expected[3] + expected[5]])
    scores, numbers = (sums[:2], np.array([0, 2])) if drop else (sums, np.array([0, 2, 255]))
    found = segment(cells, image, options, True, mapped(sources, rest, drop))
    wanted, order = numbers[scores.argmax(0)], np.sort(scores, 0)
    ties = order[-1] - order[-2] < 1e-5
    assert ((found.train_ids == wanted) | ties).all() and ties.mean() < 0.01
    assert len(np.unique(wanted)) == len(numbers)
    np.testing.assert_allclose(found.probability, order[-1], atol=1e-5)


def test_the_identity_changes_nothing():
    image = torch.randn(1, 3, 50, 70, generator=torch.Generator().manual_seed(5))
    same = mapped(tuple((i,) for i in range(6)), (), False)
    for options in (InferenceConfig(), InferenceConfig(flip=True, scales=[0.5, 1.0])):
        plain, through = (segment(cells, image, options, True, mapping) for mapping in (None, same))
        assert (plain.train_ids != through.train_ids).mean() < 1e-3
        np.testing.assert_allclose(plain.probability, through.probability, atol=1e-6)


# ---------------------------------------------------------------------------------------------------- the mappings


def test_every_published_column_is_the_tables_own():
    rows = read_json_table("vistas_to_cityscapes")["mapping"]
    assert fitting(VISTAS, CITYSCAPES) == ["vistas_to_cityscapes", *(f"vistas_to_cityscapes:{one}" for one in SIX)]
    stored = LabelTable.from_dict(VISTAS.as_dict())  # as in a checkpoint
    for column in (None, *SIX):
        found = class_mapping(stored, CITYSCAPES, f"vistas_to_cityscapes{':' if column else ''}{column or ''}", "void")
        goals = {row["name"]: row["sources"][column] if column else row["train_id"] for row in rows}
        assert [
            {VISTAS.names[i] for i in some} for some in found.sources
        ] == [{name for name in VISTAS.names if goals[name] == train_id} for train_id in range(19)]  # fmt: skip
        assert [VISTAS.names[i] for i in found.rest] == [name for name in VISTAS.names if goals[name] == 255]
    assert class_mapping(stored, CITYSCAPES, "none", "void") is None
    assert fitting(CITYSCAPES, VISTAS) == []


def test_a_file_of_ones_own(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("cat: animal\ndog: animal\ntree: plant\nfog: null\n")
    network = simple(["cat", "fog", "dog", "tree"])
    found = class_mapping(network, simple(["plant", "rock", "animal"]), str(path), "void")
    assert (found.sources, found.rest, found.never, found.has_void) == (((3,), (), (0, 2)), (1,), ["rock"], True)
    text = "\n".join(found.lines())
    assert "3 of the network's 4 classes added up to 2 of the 3" in text and "never predicted" in text and "fog" in text
    alone = class_mapping(network, None, str(path), "drop")  # the names in the file are the classes
    assert (alone.target.names, alone.target.ids.tolist(), alone.has_void) == (["animal", "plant"], [0, 1], False)
    path.write_text("cat: road\ndog: sky\ntree: null\nfog: null\n")  # names of Cityscapes, with its ids
    assert class_mapping(network, None, str(path), "void").target.names == CITYSCAPES.names


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("cat: [plant, animal]\ndog: plant\ntree: null\nfog: null", "to several classes"),
        ("cat: null\ndog: null\ntree: null\nfog: null", "maps no class"),
        ("cat: plant", "does not map fog, dog, tree"),
        ("cat: plants\ndog: null\ntree: null\nfog: null", "did you mean plant?"),
    ],
)
def test_files_that_cannot_be(tmp_path, text, words):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(DataError, match=words.replace("?", r"\?")):
        class_mapping(simple(["cat", "fog", "dog", "tree"]), simple(["plant", "rock", "animal"]), str(path), "void")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("vistas_to_city", "did you mean vistas_to_cityscapes"),
        ("vistas_to_cityscapes:robust", "choose recommended, mseg_cityscapes19"),
        ("vistas_v2.0_to_cityscapes", "maps the 124 labels of vistas_v2.0"),
    ],
)
def test_names_that_cannot_be(name, words):
    with pytest.raises(UsageError, match=words):
        class_mapping(VISTAS, CITYSCAPES, name, "void")


# ---------------------------------------------------------------------------------------------------- the commands


@pytest.fixture
def network(segtrain, tmp_path):
    """A checkpoint with the 65 classes of Vistas, whose classifier predicts several of them."""
    write_scenes(tmp_path / "vistas", "vistas", {"train": 1, "val": 1, "night": 0}, 0, (256, 512), workers=1)
    answer = segtrain(
        "train", "run=v", "dataset=vistas", "dataset.root=vistas", f"plugins=[{TINY}]", "model.backbone=tiny",
        "model.output_stride=16", "model.head_channels=8", "augmentation.crop_size=[64,96]", "trainer.batch_size=2",
        "trainer.epochs=null", "trainer.max_steps=1", "loader.workers=0", "device=cpu", "loss=cross_entropy",
        "model.norm=abn",
    )  # fmt: skip
    assert answer.status == 0, answer.err
    content = checkpoint.load(Path("v/last.pt"))
    content["model"]["cls.weight"].normal_(0, 2, generator=torch.Generator().manual_seed(3))
    checkpoint.save(Path("v/last.pt"), content)
    write_scenes(tmp_path / "kitti", "kitti", {"train": 1, "val": 2, "night": 0}, 0, (256, 512), workers=1)
    return [f"plugins=[{TINY}]", "device=cpu"]


def test_the_refusal_names_what_scores_and_the_score_is_that_of_numpy(segtrain, network):
    call = ["evaluate", "v/last.pt", "dataset=kitti", "dataset.root=kitti", "split=trainval", *network]
    answer = refused(segtrain(*call), "predicts 65 classes", "kitti has 19", *(f"cityscapes:{one}" for one in SIX))
    offered = [line.strip() for line in answer.err.splitlines() if line.strip().startswith("taxonomy=vistas")]
    assert len(offered) == 7
    alone = segtrain_load("v/last.pt")
    for word, rest in ((offered[0], "void"), (offered[3], "drop")):
        answer = segtrain(*call, word, f"taxonomy_rest={rest}", "inference.flip=true")
        assert answer.status == 0, answer.err
        assert f"(taxonomy_rest={rest})" in answer.out
        result = json.loads(Path(answer.out.splitlines()[-1]).read_text())
        card = result["protocol"]["taxonomy"]
        assert (card["name"], card["rest"]) == (word.partition("=")[2], rest)
        confusion = np.zeros((19, 20), np.int64)
        for path in sorted(Path("kitti/training/image_2").glob("*.png")):
            label = np.asarray(Image.open(str(path).replace("image_2", "semantic")))
            predicted = by_hand(alone, np.asarray(Image.open(path)), card)
            for train_id, label_id in enumerate(CITYSCAPES.ids):
                confusion[train_id] += np.bincount(predicted[label == label_id], minlength=20)
        hits = np.diagonal(confusion)
        union = confusion.sum(1) + confusion[:, :19].sum(0) - hits
        iou = hits[union > 0] / union[union > 0]
        assert (confusion[:, 19].sum() > 0) == (rest == "void")
        assert result["miou"] == pytest.approx(iou.mean(), abs=1e-4)
        assert result["pixel_accuracy"] == pytest.approx(hits.sum() / confusion.sum(), abs=1e-4)
        assert hits.sum() > 0 and (confusion[:, :19].sum(0) > 0).sum() >= 4


def segtrain_load(path, **options):
    return segtrain.load(path, device="cpu", **options)


@torch.no_grad()
def by_hand(predictor, image, card):
    """uint8 (H, W): train ids of Cityscapes, 19 for void, by the names on the protocol card, with flip."""
    mean, std = (np.array(some) for some in (predictor.options.mean, predictor.options.std))
    x = torch.tensor(((image / 255 - mean) / std).transpose(2, 0, 1)[None], dtype=torch.float32)
    total = 0
    for mirrored in (False, True):
        logits = predictor.network(x.flip(3) if mirrored else x, upsample=False)
        logits = F.interpolate(logits.flip(3) if mirrored else logits, image.shape[:2], mode="bilinear")[0].double()
        total = total + logits.softmax(0).numpy()
    sums = np.full((20, *image.shape[:2]), -1.0)
    for train_id, name in enumerate(CITYSCAPES.names):
        for source in card["sources"][name]:
            sums[train_id] = np.maximum(sums[train_id], 0) + total[VISTAS.names.index(source)]
    if card["rest"] == "void":
        sums[19] = sum(total[VISTAS.names.index(source)] for source in card["without_counterpart"])
    return sums.argmax(0)


def test_predict_submit_and_load_map_alike(segtrain, network):
    mapping = ["taxonomy=vistas_to_cityscapes:strict_uda", *network]
    answer = segtrain("predict", "run=v", "input=kitti/testing/image_2", "outputs=[labels,raw]", "output=p", *mapping)
    assert answer.status == 0 and "holds the ids of the cityscapes label table" in answer.out, answer
    answer = segtrain("submit", "run=v", "dataset=kitti", "dataset.root=kitti", "output=s", *mapping)
    assert answer.status == 0 and "taxonomy    vistas_to_cityscapes:strict_uda: " in answer.out, answer
    loaded = segtrain_load("v/last.pt", taxonomy="vistas_to_cityscapes:strict_uda")
    for path in sorted(Path("kitti/testing/image_2").glob("*.png")):
        raw, ids = (np.asarray(Image.open(f"p/{kind}/{path.name}")) for kind in ("raw", "labels"))
        assert (loaded.predict(np.asarray(Image.open(path))) == raw).all()
        assert (raw == 255).any() and (ids[raw == 255] == 0).all()  # 0: unlabeled
        assert (CITYSCAPES.encode_values(ids) == raw).all()
        sent = next(Path("s").glob(f"labels-*/{path.name}"))
        assert (np.asarray(Image.open(sent)) == ids).all()
    words = ("dataset=kitti", "dataset.root=kitti", "taxonomy=vistas_to_cityscapes")
    refused(segtrain("submit", "predictions=p/labels", *words), "holds classes, not probabilities")
    refused(segtrain("evaluate", "v/last.pt", "taxonomy_rest=drop", *network), "there is nothing to map")
    assert loaded.table.names == CITYSCAPES.names


def test_void_is_a_miss_where_the_benchmark_drops_it(segtrain, network):
    """Vistas' script drops pixels that were predicted as no class: with a taxonomy, only what is sure would score."""
    lines = [f"{name}: {name if name.endswith('sky') else 'null'}" for name in VISTAS.names]
    Path("sky.yaml").write_text("\n".join(lines))
    answer = segtrain("evaluate", "v/last.pt", "taxonomy=sky.yaml", *network)
    assert answer.status == 0, answer.err
    result = json.loads(Path(answer.out.splitlines()[-1]).read_text())
    assert result["protocol"]["ignored_predictions"].endswith("is a miss of its class")
    assert len(result["protocol"]["taxonomy"]["sha256"]) == 64
    loaded, hits, labelled = segtrain_load("v/last.pt", taxonomy=str(Path("sky.yaml"))), 0, 0
    path = next(Path("vistas/validation/images").glob("*"))
    label = VISTAS.encode_values(np.asarray(Image.open(next(Path("vistas/validation").glob("**/labels/*.png")))))
    predicted = VISTAS.names.index("nature--sky")
    hits += ((label == predicted) & (loaded_prediction(loaded, path, VISTAS) == predicted)).sum()
    labelled += (label < 65).sum()
    assert result["pixel_accuracy"] == pytest.approx(hits / labelled, abs=1e-9)


def loaded_prediction(loaded, path, table):
    """Train ids of `table`, whose class names are those of the loaded network's taxonomy."""
    lut = np.full(256, 255)
    lut[: len(loaded.table.names)] = [table.names.index(name) for name in loaded.table.names]
    return lut[loaded.predict(np.asarray(Image.open(path)))]


def test_the_sentence_says_whether_only_the_order_differs():
    there = simple(["cat", "dog", "void"])
    for here, words in (
        (
            ["cat", "void", "dog"],
            r"predicts the classes of dataset=folder in another order .* 1: dog there, void here\)",
        ),
        (["cat", "cow"], r"predicts 3 classes \(cat, dog, void\), dataset=folder has 2 \(cat, cow\): take"),
        (["a", "b", "c", "d", "e"], r"dataset=folder has 5 \(a, b, c, d, \.\.\.\): take"),
    ):
        with pytest.raises(UsageError, match=words):
            require_same_labels(there, simple(here), Path("a.pt"), "folder")
    require_same_labels(there, simple(there.names, 5), Path("a.pt"), "folder")
