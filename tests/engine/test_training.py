"""A finished run as a user sees it: its folder, what it prints, evaluate, predict."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from segtrain.scoring.image_counts import read_image_counts
from tests.helpers.checkout import TINY
from tests.helpers.runs import Ranks, refused, small_run

# ------------------------------------------------------------------------------------------------ a run


RUN_FILES = {
    "best.pt", "blackbox", "config.yaml", "confusion.png", "environment.json", "evaluation.json", "images.npz",
    "last.pt", ".lock", "metrics.jsonl", "pictures", "state.json", "step_0000002.pt", "step_0000004.pt", "summary.txt",
    "tensorboard",
}  # fmt: skip


def test_what_a_run_leaves(finished):
    assert {path.name for path in finished.iterdir()} == RUN_FILES
    result = json.loads((finished / "evaluation.json").read_text())
    assert set(result["per_class"]) >= {"road", "sky", "bicycle"}
    known = [value for value in result["per_class"].values() if value is not None]
    assert result["miou"] == pytest.approx(sum(known) / len(known))
    assert 0 <= result["pixel_accuracy"] <= 1
    assert 0 < result["position_prior_miou"] < 1
    assert (result["images"], result["step"], result["split"]) == (3, 4, "val")
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 4]
    assert list((finished / "pictures").glob("val_*.png"))


def test_tensorboard_holds_scalars_and_pictures(finished):
    events = EventAccumulator(str(finished / "tensorboard"))
    events.Reload()
    assert {"train/loss", "train/lr", "val/miou", "val_iou/road"} <= set(events.Tags()["scalars"])
    assert set(events.Tags()["images"]) == {"val/image-target-prediction", "val/confusion"}
    assert [point.step for point in events.Scalars("train/loss")] == [1, 2, 3, 4]
    assert [point.value for point in events.Scalars("train/lr")] == pytest.approx(
        [0.0025 * (1 - step / 4) ** 0.9 for step in range(4)]
    )


def test_the_screen_says_what_was_chosen_and_how_it_goes(finished):
    output = (finished.parent / "output.txt").read_text()
    for text in ("device     CPU", "inplace_abn (kernels: ", "seed 0", "images/s", "left", "waiting for data",
                 "position prior", "mIoU", "best.pt", "tensorboard --logdir"):  # fmt: skip
        assert text in output


def test_a_finished_run_says_so(finished, scenes, segtrain):
    before = (finished / "last.pt").stat().st_mtime_ns
    answer = segtrain("train", *small_run(scenes, f"run={finished}"))
    assert answer.status == 0
    assert "is finished (4 steps)" in answer.out
    assert "IoU %" in answer.out
    assert (finished / "last.pt").stat().st_mtime_ns == before


def test_evaluate_gives_the_runs_own_number(finished, segtrain):
    answer = segtrain(
        "evaluate", f"checkpoint={finished / 'last.pt'}", "device=cpu", "output=again", "loader.workers=0"
    )
    assert answer.status == 0, answer
    assert answer.out.splitlines()[-1] == "again/evaluation.json"
    own, again = (json.loads((f / "evaluation.json").read_text()) for f in (finished, Path("again")))
    for key in ("miou", "pixel_accuracy", "per_class", "position_prior_miou", "images"):
        assert own[key] == again[key]


def test_evaluate_other_split_and_inference_goes_into_the_run(finished, segtrain):
    answer = segtrain(
        "evaluate", str(finished / "last.pt"), "split=night", "dataset.night_scenes=2", "inference=tiled",
        "inference.tile=[128,256]", "device=cpu", "position_prior=false",
    )  # fmt: skip
    assert answer.status == 0, answer
    path = finished / "evaluations" / "streets-night-tiled" / "evaluation.json"
    assert answer.out.splitlines()[-1] == str(path)
    result = json.loads(path.read_text())
    assert result["inference"]["tile"] == [128, 256]
    assert "position_prior_miou" not in result
    assert (path.parent / "predictions.png").exists()


def test_an_evaluation_with_another_activation_leaves_the_ordinary_one(finished, segtrain):
    words = ["device=cpu", "loader.workers=0", "position_prior=false"]
    answer = segtrain("evaluate", f"run={finished}", "activation=elu", *words)
    assert answer.out.splitlines()[-1] == str(finished / "evaluations" / "streets-val-whole-elu" / "evaluation.json")


def test_an_evaluation_with_other_inference_leaves_the_earlier_one(finished, segtrain, tmp_path):
    """As a user tries scales: each has a folder, and the same command writes into its own again."""
    finished, places = shutil.copytree(finished, tmp_path / "run"), []
    for scale in (1.0, 0.5, 0.75, 0.5, 1.0):
        answer = segtrain(
            "evaluate", f"run={finished}", f"inference.scales=[{scale}]", "device=cpu", "loader.workers=0"
        )
        assert answer.status == 0, answer
        places.append(Path(answer.out.splitlines()[-1]))
        assert json.loads(places[-1].read_text())["inference"]["scales"] == [scale]
        assert ("beside " in answer.out) == (scale != 1.0)
    assert places[0] == places[4] == finished / "evaluations" / "streets-val-whole" / "evaluation.json"
    assert places[1] == places[3] != places[2]
    assert [json.loads(place.read_text())["inference"]["scales"] for place in places[:3]] == [[1.0], [0.5], [0.75]]
    places[0].write_text("{}")
    answer = segtrain("evaluate", f"run={finished}", "inference.scales=[0.5]", "device=cpu", "loader.workers=0")
    assert answer.out.splitlines()[-1] == str(places[0])


def test_an_evaluation_of_the_other_weights_leaves_the_earlier_one(words, segtrain):
    assert segtrain("train", *words, "run=r", "trainer.max_steps=2", "trainer.ema_decay=0.9").status == 0
    places = []
    for weights in ("ema", "raw"):
        answer = segtrain("evaluate", "run=r", "device=cpu", f"checkpoint_weights={weights}", f"plugins=[{TINY}]")
        assert answer.status == 0, answer
        places.append(Path(answer.out.splitlines()[-1]))
    assert places[0] != places[1]
    assert [json.loads(place.read_text())["protocol"]["weights"] for place in places] == ["averaged", "raw"]


def test_evaluation_says_how_it_was_made(finished):
    result = json.loads((finished / "evaluation.json").read_text())
    card = result["protocol"]
    assert card["images"] == {"expected": 3, "seen": 3, "published": None}
    assert card["rules"].startswith("cityscapesScripts")
    assert card["warnings"] == []
    assert result["iiou"] is not None  # street scenes have instances
    assert len(result["confusion_matrix"]) == 19


def test_pictures_of_the_training_are_warned_of(finished, segtrain):
    answer = segtrain("evaluate", f"run={finished}", "split=train", "device=cpu", "output=o", "position_prior=false")
    assert answer.status == 0, answer
    assert "6 of the 6 images were in this checkpoint's training" in answer.out
    card = json.loads(Path("o/evaluation.json").read_text())["protocol"]
    assert len(card["warnings"]) == 1
    assert len(card["checkpoint_sha256"]) == 64


def test_two_processes_count_what_one_does(finished, tmp_path):
    """Three images on two ranks: each counts once."""
    command = ["evaluate", f"run={finished}", "device=cpu", "loader.workers=0", "boundary=true"]
    results = []
    for count, output in ((1, "one"), (2, "two")):
        out, _ = Ranks(count, *command, f"output={output}").ended()
        assert out.count("mIoU over") + out.count("\nmIoU") == 1, out
        results.append(json.loads((tmp_path / output / "evaluation.json").read_text()))
    one, two = results
    assert two["protocol"].pop("processes") == 2
    assert one["protocol"].pop("processes") == 1
    assert two["confusion_matrix"] == one["confusion_matrix"]
    assert two["protocol"] == one["protocol"]
    assert Path("two/images.npz").read_bytes() == Path("one/images.npz").read_bytes()
    assert read_image_counts(Path("two/images.npz")).evaluated().confusion().tolist() == one["confusion_matrix"]
    for key in ("miou", "iiou", "category_miou", "category_iiou", "boundary_miou", "position_prior_miou"):
        assert two[key] == pytest.approx(one[key], rel=1e-12)  # objects' weights are added up in another order


def test_evaluate_on_another_data_set(finished, segtrain, scenes, folder_data):
    answer = segtrain(
        "evaluate", f"run={finished}", "dataset=cityscapes", f"dataset.root={scenes}", "device=cpu", "output=o"
    )
    assert answer.status == 0, answer
    root, overrides = folder_data
    data = [word for word in overrides if word.startswith("dataset")]
    refused(segtrain("evaluate", f"run={finished}", *data, "device=cpu"), "predicts 19 classes", "water")


def test_python_api(finished):
    import segtrain

    image = np.zeros((50, 70, 3), np.uint8)
    prediction = segtrain.load(finished / "last.pt", device="cpu").predict(image)
    assert prediction.shape == (50, 70)
    assert prediction.dtype == np.uint8


def test_info(finished, segtrain):
    assert "cuda13" in segtrain("info").out
    answer = segtrain("info", f"checkpoint={finished / 'last.pt'}")
    assert "resnet18" in answer.out
    assert "road" in answer.out


# ------------------------------------------------------------------------------------------------ predict


def test_predict_writes_ids_colours_and_overlays_at_the_inputs_size(finished, segtrain, tmp_path):
    photos = tmp_path / "photos (1)"
    (photos / "sub").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, size in (("a.jpg", (50, 61)), ("a.png", (40, 30)), ("it's.png", (33, 35)), ("sub/ö.png", (20, 64))):
        Image.fromarray(rng.integers(0, 255, (*size, 3)).astype(np.uint8)).save(photos / name)
    Image.fromarray(np.zeros((30, 31), np.uint8)).save(photos / "grey.png")
    answer = segtrain("predict", f"run={finished}", f"input={photos}", "output=out", "device=cpu")
    assert answer.status == 0, answer
    assert answer.out.splitlines()[-1] == "out"
    expected = {
        "a_jpg.png": (61, 50),
        "a_png.png": (30, 40),
        "it's.png": (35, 33),
        "sub/ö.png": (64, 20),
        "grey.png": (31, 30),
    }
    for kind in ("labels", "color", "overlay"):
        found = {p.relative_to(f"out/{kind}").as_posix(): Image.open(p).size for p in Path("out", kind).rglob("*.png")}
        assert found == expected
    ids = np.asarray(Image.open("out/labels/a_jpg.png"))
    assert set(np.unique(ids)) <= {7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33}


def test_predict_goes_on_after_a_bad_picture(finished, segtrain, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/bad.png").write_text("no picture")
    Image.new("RGB", (40, 40)).save(tmp_path / "in/good.png")
    refused(segtrain("predict", f"run={finished}", "input=in", "output=out", "device=cpu"), "bad.png", status=1)
    assert Path("out/labels/good.png").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["input=nowhere"], ["input=nowhere", "no such file"]),
        (["input=."], ["the folder holds no images"]),
        ([], ["input is not set"]),
    ],
)
def test_predict_needs_pictures(finished, segtrain, arguments, words):
    refused(segtrain("predict", f"run={finished}", "device=cpu", *arguments), *words)
