"""inference.* may change on resume: best.pt and the best score never mix validations of two protocols."""

import json
from pathlib import Path

import pytest
import torch

from segtrain import compose
from segtrain.engine.run_reader import read_run
from tests.helpers.checkout import TINY
from tests.helpers.runs import small_run


def validations(run):
    lines = map(json.loads, Path(run, "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["val/miou"] for line in lines if "val/miou" in line}


def raise_scores(run):
    """Make the scores of the validations so far unreachable."""
    lines = list(map(json.loads, Path(run, "metrics.jsonl").read_text().splitlines()))
    for line in lines:
        if "val/miou" in line:
            line["val/miou"] = 0.99
    Path(run, "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for path in Path(run).glob("*.pt"):
        saved = torch.load(path, weights_only=True)
        saved["best"]["miou"] = 0.99
        torch.save(saved, path)


@pytest.fixture
def words(scenes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = [word for word in small_run(scenes) if not word.startswith(("trainer.max_steps", "trainer.validate_every"))]
    return [*own, "run=r", f"plugins=[{TINY}]", "model.backbone=tiny", "trainer.overfit=1"]


def test_the_best_score_begins_anew_with_another_inference(segtrain, words):
    words += ["trainer.validate_every=2"]
    assert segtrain("train", *words, "trainer.max_steps=4").status == 0
    raise_scores("r")
    same = segtrain("train", *words, "trainer.max_steps=6")
    assert same.status == 0 and "chosen among" not in same.out
    assert torch.load("r/last.pt", weights_only=True)["best"]["miou"] == 0.99

    words += ["inference.flip=true"]
    answer = segtrain("train", *words, "trainer.max_steps=8")
    assert answer.status == 0, answer.err
    assert "inference.flip=true instead of false" in answer.out
    assert "best.pt is chosen among the validations from here on" in answer.out
    last, best = (torch.load(f"r/{name}.pt", weights_only=True) for name in ("last", "best"))
    assert last["best"] == {"miou": validations("r")[8], "step": 8, "since": 0}
    assert best["step"] == 8 and best["config"]["inference"]["flip"] is True  # best.pt says how it was chosen
    shown = read_run(Path("r"))
    assert (shown.best, shown.best_step) == (validations("r")[8], 8)

    answer = segtrain("train", *words, "trainer.max_steps=10")  # the same again: nothing begins anew
    assert answer.status == 0 and "chosen among" not in answer.out
    assert read_run(Path("r")).best == max(validations("r")[step] for step in (8, 10))


def test_a_run_that_has_ended_early_does_not_go_on_for_it(segtrain, words):
    words += ["trainer.validate_every=1", "trainer.patience=1", "optimizer.lr=1e-9", "trainer.max_steps=50"]
    assert segtrain("train", *words).status == 0
    ended = torch.load("r/last.pt", weights_only=True)["step"]
    assert ended < 50
    answer = segtrain("train", *words, "inference.flip=true")
    assert answer.status == 0 and "is finished" in answer.out, answer
    assert torch.load("r/last.pt", weights_only=True)["step"] == ended


def test_runs_that_were_named_by_their_inference_are_found_by_it():
    assert compose("experiment=toy", "inference.flip=true").name == "toy-inference.flip=true"
    assert compose("experiment=toy", "inference=multiscale").name == "toy-inference=multiscale"
    assert compose("experiment=toy", "loader.workers=0").name == "toy"
