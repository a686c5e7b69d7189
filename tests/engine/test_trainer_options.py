"""The options of the trainer: length, precision, averaged weights, what is recorded, what is refused."""

import itertools
import json
import math
import types
from pathlib import Path

import pytest
import torch
import yaml

from segtrain.engine import state as train_state
from tests.helpers.runs import black_box, refused, same, state

# ------------------------------------------------------------------------------------------------ length


def test_lengths_on_the_command_line_are_instead_of_the_recipes(segtrain):
    for word, expected in (("trainer.max_steps=7", (7, None, None)), ("trainer.epochs=2", (None, 2, None)),
                           ("trainer.hours=0.5", (None, None, 0.5))):  # fmt: skip
        composed = yaml.safe_load(segtrain("train", "experiment=toy", word, "--cfg", "job").out)["trainer"]
        assert (composed["max_steps"], composed["epochs"], composed["hours"]) == expected


def test_hours_end_a_training_by_the_clock(segtrain, words, monkeypatch):
    """The clock advances 0.1 s each time the run reads it, so that the test does not depend on the machine."""
    clock = itertools.count()
    monkeypatch.setattr(train_state, "time", types.SimpleNamespace(monotonic=lambda: next(clock) / 10))
    words = [word for word in words if not word.startswith(("trainer.max_steps", "trainer.epochs"))]
    answer = segtrain("train", *words, "run=r", f"trainer.hours={4 / 3600}")
    assert answer.status == 0, answer
    last = state("r/last.pt")
    assert last["elapsed"] >= 4
    assert last["step"] == len(black_box("r")) >= 1
    assert "hours in steps" in answer.out
    assert "is finished" in segtrain("train", *words, "run=r", f"trainer.hours={4 / 3600}").out
    rates = [line["lr"] for line in black_box("r")]
    assert rates == sorted(rates, reverse=True)


def test_patience_ends_a_training_early(segtrain, words):
    options = [
        *words,
        "run=r",
        "trainer.max_steps=40",
        "trainer.validate_every=1",
        "trainer.patience=2",
        "optimizer.lr=1e-9",
    ]
    answer = segtrain("train", *options)
    assert answer.status == 0, answer
    assert "ending early: 2 validations no better" in answer.out
    last = state("r/last.pt")
    assert last["step"] == last["best"]["step"] + 2 < 40
    again = segtrain("train", *options).out
    assert "is finished" in again and "More steps" in again
    answer = segtrain("train", *options, "trainer.max_steps=80")  # a longer training goes on after the early end
    assert answer.status == 0 and "ending early" in answer.out, answer
    longer = state("r/last.pt")
    assert longer["best"]["since"] == 2 and longer["step"] == max(last["step"] + 2, longer["best"]["step"] + 2)
    assert "is finished" in segtrain("train", *options, "trainer.max_steps=80").out


def test_a_run_with_patience_hands_over_its_best_weights(segtrain, words):
    options = [*words, "run=r", "trainer.max_steps=40", "trainer.validate_every=1", "optimizer.lr=1e-9"]
    answer = segtrain("train", *options, "trainer.patience=2")
    assert answer.status == 0 and "run= takes best.pt" in answer.out, answer
    last, best = state("r/last.pt")["step"], state("r/best.pt")["step"]
    assert best == last - 2
    more = [word for word in words if word.startswith("plugins=")]
    for choice, step, said in (
        ([], best, "the default of a run with trainer.patience"), (["checkpoint=best"], best, "selected on val"),
        (["checkpoint=last"], last, f"best.pt is of step {best}"),
    ):  # fmt: skip
        answer = segtrain("evaluate", "run=r", *choice, *more, "device=cpu", "loader.workers=0")
        assert answer.status == 0 and said in answer.out, answer
        result = json.loads(Path(answer.out.splitlines()[-1]).read_text())
        assert result["step"] == step and Path(result["checkpoint"]).name == ("last.pt" if step == last else "best.pt")
        assert result["protocol"].get("selected_on") == ("val" if step == best else None)
    assert len(list(Path("r/evaluations").iterdir())) == 2  # one does not replace the other
    Path("r/config.yaml").unlink()
    assert f"last.pt, step {last}" in segtrain("predict", "run=r", "input=mine/val/images", *more).out
    refused(segtrain("evaluate", "run=r", "checkpoint=r/best.pt"), "checkpoint=last or checkpoint=best")
    refused(segtrain("evaluate", "checkpoint=best"), "add run=FOLDER, or write checkpoint=./best")
    refused(segtrain("evaluate", "run=elsewhere", "checkpoint=best"), "no checkpoint file elsewhere/best.pt")


# ------------------------------------------------------------------------------------------------ what is recorded


def test_overfit_trains_and_validates_on_the_same_few(segtrain, words):
    answer = segtrain("train", *words, "run=r", "trainer.overfit=2")
    assert answer.status == 0, answer
    assert {s["name"] for line in black_box("r") for s in line["samples"]} == {"p0", "p1"}
    result = json.loads(Path("r/evaluation.json").read_text())
    assert (result["images"], result["split"]) == (2, "train")


def test_averaged_weights_are_validated_evaluated_and_said(segtrain, words):
    answer = segtrain("train", *words, "run=r", "trainer.ema_decay=0.5")
    assert answer.status == 0, answer
    assert "averaged weights 0.5" in answer.out
    last = state("r/last.pt")
    assert not same(last["ema"], last["model"])
    own = json.loads(Path("r/evaluation.json").read_text())
    assert own["protocol"]["weights"] == "averaged"
    found = {}
    for choice in ("ema", "raw"):
        evaluated = segtrain("evaluate", "run=r", "device=cpu", f"checkpoint_weights={choice}", f"output={choice}")
        assert evaluated.status == 0, evaluated
        assert ("averaged weights" if choice == "ema" else "raw weights") in evaluated.out
        found[choice] = json.loads(Path(choice, "evaluation.json").read_text())
    assert found["ema"]["per_class"] == own["per_class"]
    assert found["raw"]["confusion_matrix"] != own["confusion_matrix"]
    Path("plain").mkdir()
    assert segtrain("train", *words, "run=plain").status == 0
    refused(segtrain("evaluate", "run=plain", "device=cpu", "checkpoint_weights=ema"), "no averaged weights")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_and_keeps_float32_weights(segtrain, words, precision):
    answer = segtrain("train", *words, "run=r", f"trainer.precision={precision}", "trainer.max_steps=2")
    assert answer.status == 0, answer
    assert precision in answer.out
    assert {t.dtype for t in state("r/last.pt")["model"].values()} <= {torch.float32, torch.int64}
    assert all(math.isfinite(line["loss"]) for line in black_box("r"))


def test_deterministic_says_so_and_is_given_back(segtrain, words):
    assert (
        "deterministic" in segtrain("train", *words, "run=r", "trainer.deterministic=true", "trainer.max_steps=1").out
    )
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_recorded_rate_is_the_steps_own(segtrain, words):
    """Also if a step is checked only after the next one."""
    assert segtrain("train", *words, "run=r", "logging.every=100", "trainer.save_every=100").status == 0
    expected = [0.0025 * (1 - step / 6) ** 0.9 for step in range(6)]
    assert [line["lr"] for line in black_box("r")] == pytest.approx(expected)


def test_other_parts_are_other_statistics_and_that_is_said(segtrain, words):
    assert segtrain("train", *words, "run=r", "trainer.max_steps=2").status == 0
    answer = segtrain("train", *words, "run=r", "trainer.max_steps=3", "trainer.accumulation=2")
    assert answer.status == 0, answer
    assert "norms see 2 crops at a time from here on, and saw 4 before" in answer.out


def test_what_is_recorded_of_the_machine(segtrain, words):
    segtrain("train", *words, "run=r", "trainer.max_steps=1")
    segtrain("train", *words, "run=r", "trainer.max_steps=2")
    first, second = json.loads(Path("r/environment.json").read_text())
    assert first["torch"] == torch.__version__
    assert first["seed"] == 0
    assert set(first["git"]) == {"segtrain", "here"}
    assert second["processes"] == 1
    assert "mIoU" in Path("r/summary.txt").read_text()
    assert json.loads(Path("r/state.json").read_text())["state"] == "finished"


# ------------------------------------------------------------------------------------------------ impossible options


@pytest.mark.parametrize(
    ("overrides", "words_"),
    [
        (["trainer.precision=int8"], ["trainer.precision must be one of fp32, bf16, fp16, got int8"]),
        (["trainer.accumulation=0"], ["trainer.accumulation must be at least 1, got 0"]),
        (["trainer.max_steps=3", "trainer.hours=1"], ["trainer.max_steps=3", "trainer.hours=1"]),
        (["trainer.ema_decay=1"], ["trainer.ema_decay must be greater than 0 and less than 1 or null, got 1"]),
        (["trainer.parallel=tensor"], ["trainer.parallel must be one of ddp, fsdp, got tensor"]),
        (["trainer.parallel=fsdp", "trainer.ema_decay=0.9"], ["trainer.ema_decay=0.9", "trainer.parallel=ddp"]),
        (["trainer.parallel=fsdp", "trainer.precision=fp16"], ["trainer.precision=fp16"]),
        (["trainer.sync_group=some"], ["trainer.sync_group=some", "all, node"]),
        (["trainer.on_bad_step=cry"], ["stop, skip"]),
        (["trainer.spike_factor=0.5"], ["trainer.spike_factor=0.5"]),
        (["trainer.batch_size=4", "trainer.accumulation=3"], ["trainer.batch_size=4", "trainer.accumulation=3", "6"]),
        (["trainer.batch_size=4", "trainer.accumulation=5"], ["need an image each"]),
        (["loader.prefetch=0"], ["loader.prefetch must be at least 1, got 0"]),
    ],
)
def test_options_that_cannot_be(segtrain, words, overrides, words_):
    plain = [word for word in words if not word.startswith(("trainer.max_steps", "trainer.epochs"))]
    length = [] if any("max_steps" in word for word in overrides) else ["trainer.max_steps=2"]
    refused(segtrain("train", *plain, *length, *overrides), *words_)
    assert not Path("runs").exists()


def test_groups_of_statistics_are_refused_where_there_are_none(segtrain, words):
    refused(segtrain("train", *words, "trainer.sync_group=node"), "trainer.sync_group=node", "inplace_abn_sync")


def test_loss_select_over_the_batch_is_refused_with_several(words, segtrain):
    refused(segtrain("train", *words, "loss=bootstrapped", "loss.select=batch", "trainer.accumulation=2"),
            "loss.select=batch", "trainer.accumulation=2", "loss.select=image")  # fmt: skip
