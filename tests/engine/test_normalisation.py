"""A training from a file of weights normalises images as the file's were, unless others are given."""

import json
from pathlib import Path

import yaml

from tests.helpers.runs import same, state

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.2, 0.3]
IMAGENET = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
GIVEN = [f"model.mean={MEAN}".replace(" ", ""), f"model.std={STD}".replace(" ", "")]


def stored(run):
    model = state(f"{run}/last.pt")["config"]["model"]
    return model["mean"], model["std"]


def test_the_files_normalisation_is_taken_unless_another_is_given(segtrain, words):
    words = [*words, "model.backbone=resnet18", "model.norm=abn", "trainer.max_steps=2", "trainer.validate_every=2"]
    assert segtrain("train", *words, *GIVEN, "run=first").status == 0
    begun = [*words, "model.weights=first/last.pt"]
    answer = segtrain("train", *begun, "run=second")
    assert answer.status == 0, answer
    assert f"normalised  as the images of first/last.pt: model.mean={MEAN} model.std={STD}" in answer.out
    assert stored("second") == (MEAN, STD)
    assert yaml.safe_load(Path("second/config.yaml").read_text())["model"]["std"] == STD
    typed = segtrain("train", *begun, *GIVEN, "run=typed")
    assert typed.status == 0 and "normalised" not in typed.out
    assert same(state("second/last.pt")["model"], state("typed/last.pt")["model"])  # the network has seen the same
    answer = segtrain("evaluate", "run=second", "device=cpu", "loader.workers=0", plugin(words))
    paths = "second/evaluation.json", answer.out.split()[-1]
    assert len({json.loads(Path(path).read_text())["miou"] for path in paths}) == 1

    kept = segtrain("train", *begun, "run=kept", f"model.mean={IMAGENET[0]}".replace(" ", ""))
    assert "its images were normalised differently: add model.mean=[0.4, 0.5, 0.6]" in kept.out
    assert stored("kept") == IMAGENET
    assert not same(state("kept/last.pt")["model"], state("typed/last.pt")["model"])


def plugin(words):
    return next(word for word in words if word.startswith("plugins="))


def test_such_a_run_resumes_as_it_was(segtrain, words):
    words = [*words, "model.backbone=resnet18", "model.norm=abn", "trainer.max_steps=2", "trainer.validate_every=2"]
    assert segtrain("train", *words, *GIVEN, "run=first").status == 0
    begun = [*words, "model.weights=first/last.pt", "schedule=constant"]
    assert segtrain("train", *begun, "trainer.max_steps=3", "run=whole").status == 0
    assert segtrain("train", *begun, "run=parts").status == 0
    assert "is finished" in segtrain("train", *begun, "run=parts").out
    Path("first/last.pt").unlink()  # a resumed run does not need it
    answer = segtrain("train", *begun, "run=parts", "trainer.max_steps=3")
    assert answer.status == 0 and "going on at step 2" in answer.out, answer
    assert same(state("parts/last.pt")["model"], state("whole/last.pt")["model"])
    assert stored("parts") == (MEAN, STD)


def test_a_run_that_began_before_keeps_its_own(segtrain, words):
    """Stored with ImageNet's figures although its weights' are others: it goes on with ImageNet's."""
    words = [*words, "model.backbone=resnet18", "model.norm=abn", "trainer.max_steps=2", "trainer.validate_every=2"]
    assert segtrain("train", *words, *GIVEN, "run=first").status == 0
    begun = [*words, "model.weights=first/last.pt", "run=old"]
    typed = [f"model.mean={IMAGENET[0]}".replace(" ", ""), f"model.std={IMAGENET[1]}".replace(" ", "")]
    assert segtrain("train", *begun, *typed).status == 0
    answer = segtrain("train", *begun, "trainer.max_steps=3")
    assert answer.status == 0, answer
    assert (state("old/last.pt")["step"], stored("old")) == (3, IMAGENET)
