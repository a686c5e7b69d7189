"""Runs as a user starts them: train, interrupt, resume, evaluate, predict, and everything that can go wrong."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from segtrain.weights import checkpoint
from tests.helpers import zygote
from tests.helpers.checkout import TINY, environment
from tests.helpers.runs import refused, same, small_run, state

RUN_FILES = {
    "best.pt", "blackbox", "config.yaml", "confusion.png", "environment.json", "evaluation.json", "last.pt", ".lock",
    "metrics.jsonl", "pictures", "state.json", "step_0000002.pt", "step_0000004.pt", "summary.txt", "tensorboard",
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(scenes, tmp_path_factory):
    """The folder of a finished small run; read only."""
    folder = tmp_path_factory.mktemp("finished")
    result = zygote.call(["train", *small_run(scenes, "run=run")], folder)
    assert result.returncode == 0, result.stderr
    (folder / "output.txt").write_text(result.stdout)
    return folder / "run"


# ------------------------------------------------------------------------------------------------ a run


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
    assert "6 of the 6 pictures were in this checkpoint's training" in answer.out
    card = json.loads(Path("o/evaluation.json").read_text())["protocol"]
    assert len(card["warnings"]) == 1
    assert len(card["checkpoint_sha256"]) == 64


def test_two_processes_count_what_one_does(finished, tmp_path):
    """Three pictures on two ranks: none twice, none left out."""
    command = ["-m", "segtrain", "evaluate", f"run={finished}", "device=cpu", "loader.workers=0", "boundary=true"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    one_thread = {**environment(), "OMP_NUM_THREADS": "1"}  # as torchrun has it
    results = []
    for launcher, output in (([], "one"), (torchrun, "two")):
        call = [sys.executable, *launcher, *command, f"output={output}"]
        done = subprocess.run(call, env=one_thread, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("mIoU over") + done.stdout.count("\nmIoU") == 1, done.stdout
        results.append(json.loads((tmp_path / output / "evaluation.json").read_text()))
    one, two = results
    assert two["protocol"].pop("processes") == 2
    assert one["protocol"].pop("processes") == 1
    assert two["confusion_matrix"] == one["confusion_matrix"]
    assert two["protocol"] == one["protocol"]
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
        (["input=."], ["no pictures"]),
        ([], ["input is not set"]),
    ],
)
def test_predict_needs_pictures(finished, segtrain, arguments, words):
    refused(segtrain("predict", f"run={finished}", "device=cpu", *arguments), *words)


# ------------------------------------------------------------------------------------------------ stop and go on


def start(scenes, *more):
    """A training process that runs long enough to be interrupted."""
    return zygote.start(["train", *small_run(scenes, "trainer.max_steps=6", "run=cut", *more)], {})


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGKILL, -9)],
    ids=["INT", "TERM", "KILL"],
)
def test_an_interrupted_run_goes_on_and_equals_the_uninterrupted_one(scenes, segtrain, number, status):
    words = ["trainer.max_steps=6", "trainer.validate_every=3", "loader.workers=1"]
    assert segtrain("train", *small_run(scenes, *words, "run=whole")).status == 0
    process = start(scenes, *words[1:])
    for line in process.stdout:
        if line.startswith("step 3/"):
            while not Path("cut/step_0000002.pt").exists():  # it is written beside the training
                time.sleep(0.02)
            os.killpg(process.pid, number)  # as a terminal does it, loader processes included
            break
    out, err = process.communicate(timeout=120)
    assert process.returncode == status, out + err
    assert "Traceback" not in err
    cut = state("cut/last.pt")
    assert 2 <= cut["step"] < 6
    if number != signal.SIGKILL:
        assert "the same command goes on" in err
    answer = segtrain("train", *small_run(scenes, *words, "run=cut"))
    assert answer.status == 0, answer
    assert f"going on at step {cut['step']}" in answer.out
    first, second = state("whole/last.pt"), state("cut/last.pt")
    for key in ("model", "optimizer", "step", "best"):
        assert same(first[key], second[key]), key
    results = [json.loads(Path(f, "evaluation.json").read_text()) for f in ("whole", "cut")]
    assert results[0]["per_class"] == results[1]["per_class"]
    steps = [json.loads(line)["step"] for line in Path("cut/metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 3, 4, 5, 6, 6]


def test_dropout_resumes_exactly(scenes, segtrain):
    """Dropout draws from torch's own generator, which is a function of the step here."""
    words = [f"plugins=[{TINY}]", "model.backbone=tiny", "model.backbone_options={dropout:0.5}"]
    one, two = small_run(scenes, *words, "trainer.max_steps=2"), small_run(scenes, *words, "trainer.max_steps=2")
    assert segtrain("train", *one, "run=whole").status == 0
    process = zygote.call(["-c", PROGRAM_STOPPING_AFTER_ONE_STEP, *two, "run=cut"])
    assert process.returncode == 75, process.stderr
    assert segtrain("train", *two, "run=cut").status == 0
    assert same(state("whole/last.pt")["model"], state("cut/last.pt")["model"])


PROGRAM_STOPPING_AFTER_ONE_STEP = """
import os, signal, sys
from segtrain import cli
from segtrain.engine import learner
step = learner.Learner.step
def once(*arguments):
    os.kill(os.getpid(), signal.SIGTERM)
    return step(*arguments)
learner.Learner.step = once
cli.main(["train", *sys.argv[1:]])
"""


def test_restart_moves_the_old_run_aside(finished, scenes, segtrain):
    words = small_run(scenes, "trainer.max_steps=1", "run=r")
    segtrain("train", *words)
    old = Path("r/last.pt").read_bytes()
    answer = segtrain("train", *words, "restart=true")
    assert answer.status == 0
    assert "moved the old run to r.old-1" in answer.out
    assert Path("r.old-1/last.pt").read_bytes() == old


def test_more_steps_go_on_and_other_options_are_refused(scenes, segtrain, folder_data):
    root, overrides = folder_data
    assert segtrain("train", *overrides, "run=r").status == 0
    before = Path("r/last.pt").read_bytes()
    changed = segtrain("train", *overrides, "run=r", "optimizer.lr=0.5", "trainer.seed=9")
    refused(
        changed, "optimizer.lr: 0.0025 in the run, 0.5 asked for", "trainer.seed: 0 in the run, 9", "name=", status=1
    )
    assert Path("r/last.pt").read_bytes() == before
    longer = segtrain("train", *overrides, "run=r", "trainer.max_steps=3", "loader.workers=1")
    assert longer.status == 0
    assert "going on at step 2" in longer.out
    refused(segtrain("train", *overrides, "run=r", "trainer.max_steps=2"), "trainer.max_steps", status=1)


# ------------------------------------------------------------------------------------------------ own photographs


def test_a_folder_of_ones_own_trains_by_configuration(folder_data, segtrain):
    root, overrides = folder_data
    # So few steps on four pictures end anywhere from 0.36 to 0.91, by the seed.
    longer = [
        "trainer.max_steps=60",
        "trainer.batch_size=8",
        "optimizer.lr=0.02",
        "loss=cross_entropy",
        "trainer.seed=4",
    ]
    answer = segtrain("train", *overrides, "name=mine", *longer)
    assert answer.status == 0, answer
    result = json.loads(Path("runs/mine/evaluation.json").read_text())
    assert set(result["per_class"]) == {"water", "land"}
    assert result["miou"] > 0.6
    predicted = segtrain("predict", "run=runs/mine", f"input={root / 'val/images'}", "output=o", "device=cpu")
    assert predicted.status == 0
    assert set(np.unique(np.asarray(Image.open("o/labels/p0.png")))) <= {0, 7}
    # the checkpoint knows the data set: no data options needed
    assert segtrain("evaluate", "run=runs/mine", "device=cpu", "loader.workers=0").status == 0


@pytest.mark.parametrize(
    ("damage", "words", "status"),
    [
        (lambda r: (r / "train/labels/p1.png").unlink(), ["1 of 4 images have no label", "p1.png"], 1),
        (lambda r: (r / "train/images/p1.png").unlink(), ["1 of 4 labels have no image", "p1.png"], 1),
        (lambda r: Image.new("L", (9, 9)).save(r / "val/labels/p1.png"), ["64x48", "9x9", "p1.png"], 1),
        (lambda r: Image.new("L", (64, 48), 5).save(r / "train/labels/p2.png"), ["p2.png: label id 5", "0, 7, 9"], 1),
        (lambda r: Image.new("RGB", (64, 48)).save(r / "train/labels/p2.png"), ["p2.png is a RGB"], 1),
        (lambda r: cut_short(r / "train/images/p3.png"), ["p3.png cannot be read", "truncated"], 1),
        (lambda r: [p.unlink() for p in (r / "val").rglob("*.png")], ["split 'val'", "empty"], 1),
        (lambda r: (r / "classes.csv").unlink(), ["cannot read the class table"], 1),
    ],
)
def test_bad_data_stops_before_the_first_step(folder_data, segtrain, damage, words, status):
    root, overrides = folder_data
    damage(root)
    refused(segtrain("train", *overrides), *words, status=status)
    assert not Path("runs").exists()


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-40])


def test_a_crop_that_nothing_can_fill(folder_data, segtrain):
    root, overrides = folder_data
    refused(segtrain("train", *overrides, "augmentation.crop_size=[64,96]"), "crop_size=[64, 96]", "[53, 71]")


def test_missing_data_folder(segtrain):
    answer = refused(
        segtrain("train", "dataset=cityscapes"), "datasets/cityscapes", "www.cityscapes-dataset.com", status=1
    )
    assert "gtFine" in answer.err


# ------------------------------------------------------------------------------------------------ bad checkpoints


class Danger:
    def __reduce__(self):
        return (os.system, ("touch hacked",))


def test_checkpoints_that_are_none(segtrain, finished):
    torch.save({"a": Danger()}, "danger.pt")
    torch.save({"state_dict": {}}, "other.pt")
    Path("text.pt").write_text("hello")
    Path("short.pt").write_bytes((finished / "last.pt").read_bytes()[:5000])
    Path("empty.pt").touch()
    for verb in (["evaluate"], ["predict", "input=."], ["info"]):
        refused(segtrain(*verb, "checkpoint=danger.pt"), "danger.pt", "never loaded", status=1)
        refused(segtrain(*verb, "checkpoint=other.pt"), "other.pt", "not a checkpoint", status=1)
        refused(segtrain(*verb, "checkpoint=short.pt"), "short.pt", "damaged or cut short", status=1)
        for name in ("text.pt", "empty.pt"):
            refused(segtrain(*verb, f"checkpoint={name}"), name, status=1)
        refused(segtrain(*verb, "checkpoint=no.pt"), "no checkpoint file no.pt")
    assert not Path("hacked").exists()
    refused(segtrain("evaluate"), "checkpoint=FILE or run=FOLDER")


def test_a_checkpoint_of_another_model(segtrain, finished):
    content = state(finished / "last.pt")
    content["config"]["model"]["backbone"] = "resnext50"
    torch.save(content, "other.pt")
    refused(
        segtrain("evaluate", "checkpoint=other.pt", "device=cpu"),
        "belongs to another model",
        "tensors missing",
        status=1,
    )


def test_a_torn_last_checkpoint_is_named(segtrain, finished, scenes):
    Path("r").mkdir()
    Path("r/last.pt").write_bytes((finished / "last.pt").read_bytes()[:-1000])
    refused(segtrain("train", *small_run(scenes, "run=r")), "r/last.pt", "damaged or cut short", status=1)


# ------------------------------------------------------------------------------------------------ bad disks


def test_a_full_disk_leaves_the_last_checkpoint_whole(scenes, segtrain):
    """The file size limit of a process stands for the full disk: writing fails half way."""
    assert segtrain("train", *small_run(scenes, "run=r", "trainer.max_steps=1")).status == 0
    before = Path("r/last.pt").read_bytes()
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2,) * 2)  # noqa: E731
    command = [sys.executable, "-m", "segtrain", "train", *small_run(scenes, "run=r", "trainer.max_steps=2")]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, preexec_fn=limit)
    assert result.returncode == 1
    assert "cannot write" in result.stderr
    assert "Traceback" not in result.stderr
    assert Path("r/last.pt").read_bytes() == before
    assert not list(Path("r").glob(".*tmp"))


def test_an_output_that_cannot_be_written(scenes, segtrain, finished):
    Path("file").touch()
    refused(segtrain("train", *small_run(scenes, "run=file/run")), "cannot write", "file", status=1)
    Image.new("RGB", (40, 40)).save("p.png")
    refused(
        segtrain("predict", f"run={finished}", "input=p.png", "output=file/o", "device=cpu"), "cannot write", status=1
    )


def test_atomic_writes_keep_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "c.pt"
    checkpoint.save(path, {"step": 1})

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("segtrain.files.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(path, {"step": 2})
    assert checkpoint.load(path)["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["c.pt"]


def test_a_diverged_run_stops_and_keeps_the_good_checkpoint(folder_data, segtrain):
    root, overrides = folder_data
    words = [*overrides, "run=r", "trainer.save_every=1", "trainer.max_steps=40", "optimizer.lr=1e30"]
    refused(segtrain("train", *words), "diverged", "optimizer.lr", status=1)
    if Path("r/last.pt").exists():
        assert all(value.isfinite().all() for value in state("r/last.pt")["model"].values())


def test_signals_are_given_back(folder_data, segtrain):
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    root, overrides = folder_data
    assert segtrain("train", *overrides).status == 0
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
