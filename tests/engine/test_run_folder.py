"""Whose a run folder is, what a kill has left undone in it, and side files that are not what they should be."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from segtrain import compose
from segtrain.config import TrainerConfig
from segtrain.engine.run import Run
from segtrain.engine.run_folder import repair, require_own
from segtrain.engine.state import TrainState
from segtrain.errors import DataError
from segtrain.weights import checkpoint
from tests.helpers.checkout import TINY
from tests.helpers.runs import black_box, refused, same, small_run, state

# ------------------------------------------------------------------------------------------------ foreign folders

PHOTOS = {"a.jpg": "", "sub/b.png": ""}
OTHERS = {  # what other programs leave, some of it under our names
    "photos": PHOTOS,
    "one photo in a folder": {"pictures/a.jpg": ""},
    "another program's run": {"config.yaml": "lr: 1\n", "last.pt": "weights", "best.pt": "weights", "log.txt": ""},
    "a configuration": {"config.yaml": "trainer: {max_steps: 3}\n"},
    "a checkpoint among photos": {"last.pt": "weights", **PHOTOS},
    "a state of another program": {"state.json": "{}", "notes.md": ""},
    "no mapping": {"config.yaml": "- 1\n", "state.json": "{}"},
}


def made(files, folder="foreign"):
    for name, text in files.items():
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


@pytest.mark.parametrize("files", OTHERS.values(), ids=OTHERS)
def test_a_folder_that_holds_no_run_is_refused(files):
    made(files)
    with pytest.raises(DataError, match="foreign is not empty and holds no run .* give another run=FOLDER or name="):
        require_own(Path("foreign"))


@pytest.mark.parametrize("words", [["run=foreign"], ["run=foreign", "restart=true"]])
def test_nothing_in_it_is_touched(segtrain, words):
    from tests.helpers.checkout import TINY

    before = made(PHOTOS | {"requeue": "mine", ".hidden.tmp": "mine", "evaluation.json": "mine"})
    options = ["experiment=toy", f"plugins=[{TINY}]", "model.backbone=tiny", "dataset.scenes=2", "dataset.val_scenes=2"]
    refused(segtrain("train", *options, *words), "holds no run", "it is left alone", status=1)
    assert {path: path.read_bytes() for path in Path("foreign").rglob("*") if path.is_file()} == before
    assert not list(Path().glob("foreign.old*"))


@pytest.mark.parametrize("name", ["..", ".", "a/../../b", "/data", "a//b"])
def test_a_name_stays_in_its_folder(segtrain, name):
    refused(segtrain("train", "experiment=toy", f"name={name}"), "name")


def test_what_a_run_leaves_at_any_time_is_its_own(finished, tmp_path):
    require_own(Path("missing"))
    for files in (
        {}, {"requeue": ""}, {".last.pt.1.tmp": ""}, {".lock": ""}, {".lock": "", "config.yaml": "half"},
        {".lock": "", "config.yaml": "a: 1", "pictures/val_1.png": ""}, {"last.pt": "copied alone"},
    ):  # fmt: skip
        shutil.rmtree("own", ignore_errors=True)
        Path("own").mkdir()
        made(files, "own")
        require_own(Path("own"))
    shutil.copytree(finished, "whole")
    made(PHOTOS, "whole")  # what the user put beside it
    require_own(Path("whole"))
    for path in (*Path("whole").glob("*.pt"), Path("whole/.lock")):
        path.unlink(missing_ok=True)
    require_own(Path("whole"))  # state.json is there
    Path("file").write_text("")
    with pytest.raises(DataError, match="file is a file, not the folder of a run"):
        require_own(Path("file"))


# ------------------------------------------------------------------------------------------------ repair


@pytest.fixture
def _short_contents(monkeypatch):
    """Contents of these tests are a step; tests/weights/test_schema.py says what a checkpoint holds."""
    monkeypatch.setattr(checkpoint, "wrong_content", lambda content: ())


def at(step, validated, best):
    options = TrainerConfig(max_steps=100)
    return TrainState(options, 10, "miou", {"step": step, "validated": validated, "best": {"miou": 0.5, "step": best}})


def folder_of(**steps):
    """Checkpoints by the names of their files, each with a step."""
    Path("pictures").mkdir()
    for name, step in steps.items():
        checkpoint.save(Path(f"{name}.pt"), {"step": step, "of": step})


def steps_here():
    return {path.stem: checkpoint.load(path)["step"] for path in Path().glob("*.pt")}


@pytest.mark.usefixtures("_short_contents")
def test_links_that_a_kill_has_left_out_are_made():
    folder_of(last=8, best=4, step_0000004=4)
    repair(Path(), Path("last.pt"), at(8, 8, 8))
    assert steps_here() == {"last": 8, "best": 8, "step_0000004": 4, "step_0000008": 8}
    assert Path("last.pt").samefile("best.pt")


@pytest.mark.usefixtures("_short_contents")
def test_a_lost_best_is_found_among_the_kept_ones_or_is_missed(capsys):
    folder_of(last=8, step_0000004=4)
    repair(Path(), Path("last.pt"), at(8, 8, 4))
    assert steps_here()["best"] == 4 and "lost" not in capsys.readouterr().out
    Path("best.pt").write_bytes(b"damaged")
    Path("step_0000004.pt").unlink()
    repair(Path(), Path("last.pt"), at(8, 8, 4))
    assert "best.pt of step 4 is lost; it is written again at the first better validation" in capsys.readouterr().out


@pytest.mark.usefixtures("_short_contents")
def test_a_damaged_last_is_replaced_by_the_one_that_is_used_instead():
    folder_of(step_0000004=4, best=2)
    Path("last.pt").write_bytes(b"")
    source, content = checkpoint.newest_file(Path())
    repair(Path(), source, at(content["step"], 4, 2))
    assert steps_here() == {"last": 4, "best": 2, "step_0000004": 4}


def test_the_same_content_is_left_as_it_is_and_pictures_of_later_steps_go():
    folder_of(last=4, best=4, step_0000004=4)
    for number in (2, 4, 6):
        Path(f"pictures/val_{number:07d}.png").touch()
    Path("pictures/val_mine.png").touch()
    before = {path: path.stat().st_ino for path in Path().glob("*.pt")}
    repair(Path(), Path("last.pt"), at(4, 4, 4))
    assert {path: path.stat().st_ino for path in Path().glob("*.pt")} == before
    assert sorted(path.name for path in Path("pictures").iterdir()) == [
        "val_0000002.png", "val_0000004.png", "val_mine.png"]  # fmt: skip


def test_a_run_that_was_killed_after_its_scores_is_finished_by_the_next_start(segtrain, words):
    assert segtrain("train", *words, "run=r").status == 0
    for path in (Path("r/summary.txt"), Path("r/best.pt"), Path("r/step_0000006.pt")):
        path.unlink()
    Path("r/state.json").write_text('{"state": "running", "step": 4, "max_steps": 6, "heartbeat": 1.0}')
    Path("r/.last.pt.77.tmp").touch()
    before = Path("r/evaluation.json").read_bytes()
    answer = segtrain("train", *words, "run=r")
    assert answer.status == 0 and "is finished (6 steps)" in answer.out
    status = json.loads(Path("r/state.json").read_text())
    assert (status["state"], status["step"], status["max_steps"]) == ("finished", 6, 6)
    assert "mIoU" in Path("r/summary.txt").read_text() and "training      6 steps" in Path("r/summary.txt").read_text()
    assert Path("r/evaluation.json").read_bytes() == before
    assert state("r/best.pt")["step"] == state("r/last.pt")["best"]["step"] or "best.pt of step" in answer.out
    assert Path("r/step_0000006.pt").samefile("r/last.pt") and not Path("r/.last.pt.77.tmp").exists()


def test_scores_of_a_shorter_training_go_with_their_table(segtrain, words, monkeypatch):
    from segtrain.engine.learner import Learner

    assert segtrain("train", *words, "run=r", "trainer.max_steps=2").status == 0

    def stop(*arguments):
        raise RuntimeError("stopped here")

    monkeypatch.setattr(Learner, "step", stop)
    with pytest.raises(RuntimeError):
        segtrain("train", *words, "run=r")
    assert not [name for name in ("evaluation.json", "summary.txt", "confusion.png") if Path("r", name).exists()]


# ------------------------------------------------------------------------------------------------ side files

GARBAGE = {"empty": b"", "binary": b"\xff\xfe\x00\x80", "foreign": b'{"a": [1]}', "list": b"[1, 2]", "cut": b'{"a": '}


@pytest.mark.parametrize(
    "garbage",
    [pytest.param(text, id=name, marks=[pytest.mark.slow] * (name != "binary")) for name, text in GARBAGE.items()],
)
def test_side_files_never_block_a_resume(segtrain, words, garbage):
    """Healed or set aside, and said; weights as of a run that had whole ones."""
    words = [*words, "schedule=constant"]
    assert segtrain("train", *words, "run=r", "trainer.max_steps=3").status == 0
    names = ("environment.json", "evaluation.json", "state.json", "metrics.jsonl", "blackbox/rank0.jsonl")
    for name in names:
        Path("r", name).write_bytes(garbage)
    Path("r/blackbox/rankX.jsonl").write_bytes(garbage)
    answer = segtrain("train", *words, "run=r", "trainer.max_steps=6")
    assert answer.status == 0, answer
    assert "going on at step 3" in answer.out
    if garbage not in (GARBAGE["list"],):
        assert "damaged    r/environment.json" in answer.out
        assert Path("r/environment.json.damaged-1").read_bytes() == garbage
    assert json.loads(Path("r/state.json").read_text())["state"] == "finished"
    assert [line["step"] for line in black_box("r")] == [4, 5, 6]
    assert segtrain("train", *words, "run=whole", "trainer.max_steps=6").status == 0
    assert same(state("r/last.pt")["model"], state("whole/last.pt")["model"])


def test_a_finished_run_with_garbage_is_scored_again(segtrain, words):
    assert segtrain("train", *words, "run=r", "trainer.max_steps=2").status == 0
    before = Path("r/evaluation.json").read_bytes()
    Path("r/evaluation.json").write_bytes(b"garbage")
    answer = segtrain("train", *words, "run=r", "trainer.max_steps=2")
    assert answer.status == 0 and "evaluation.json is no JSON: set aside as evaluation.json.damaged-1" in answer.out
    assert json.loads(Path("r/evaluation.json").read_text())["miou"] == json.loads(before)["miou"]


# ------------------------------------------------------------------------------------------------ several processes


@pytest.mark.parametrize("steps", [[4, 4], [4, 0], [0, 4]])
def test_processes_that_find_different_checkpoints_are_refused(steps):
    """As on machines with disks of their own: they would train on different steps."""
    run = Run(compose("experiment=toy", "run=r"), SimpleNamespace(all_gather=lambda step: steps))
    if steps[0] == steps[1]:
        run.require_same_step(steps[0])
        return
    with pytest.raises(DataError, match=r"different checkpoints in r \(steps \[\d, \d\]\): give run=FOLDER on a disk"):
        run.require_same_step(steps[0])


def test_a_training_asks_whether_all_processes_go_on_from_the_same_step(segtrain, scenes, monkeypatch):
    asked = []
    monkeypatch.setattr(Run, "require_same_step", lambda self, step: asked.append(step))
    for steps in (1, 2):
        words = [word for word in small_run(scenes) if not word.startswith("trainer.max_steps")]
        tiny = [f"plugins=[{TINY}]", "model.backbone=tiny"]
        answer = segtrain("train", *words, *tiny, f"trainer.max_steps={steps}", "run=r")
        assert answer.status == 0, answer.err
    assert asked == [0, 1]
