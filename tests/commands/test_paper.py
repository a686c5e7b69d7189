"""`segtrain runs table=paper`: measured scores beside published ones."""

import json
from dataclasses import asdict

import pytest
import yaml

from segtrain.commands.paper import paper_table
from segtrain.commands.runs import runs
from segtrain.config import RunsConfig
from tests.helpers.recipes import ROWS, composed
from tests.helpers.runs import refused


def finished(root, name, recipe, miou=0.7701, processes=4, accumulation=1, change=None, score=None, state="finished"):
    """The small files of a run of a recipe, as training leaves them."""
    folder = root / name
    folder.mkdir(parents=True)
    config = asdict(composed(recipe)) | {"name": name}
    for key, value in (change or {}).items():
        group, _, option = key.partition(".")
        config[group] = config[group] | {option: value}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "environment.json").write_text(json.dumps([{"processes": processes, "accumulation": accumulation}]))
    (folder / "state.json").write_text(json.dumps({"state": state, "step": 99, "max_steps": 100, "reason": ""}))
    usual = {"name": "whole", "scales": [1.0], "flip": False, "tile": None}
    result = {
        "dataset": "cityscapes", "split": "val", "inference": usual, "checkpoint": str(folder / "last.pt"),
        "step": 100, "miou": miou,
        "protocol": {"weights": "raw", "warnings": []},
    }  # fmt: skip
    if state == "finished":
        (folder / "evaluation.json").write_text(json.dumps(result | (score or {})))
    return folder


def told(root, recipe):
    return [line for line in paper_table(root) if line.recipe == recipe]


INPLACE = "cityscapes_resnext101_inplace_16x672"  # 77.04 %


def test_the_table_without_runs_has_every_row(segtrain, tmp_path):
    (tmp_path / "runs").mkdir()
    answer = segtrain("runs", "table=paper")
    assert answer.status == 0, answer.err
    for row in ROWS:
        (line,) = [line for line in answer.out.splitlines() if row["recipe"] in line.split()]
        assert line.split()[-3:] == [f"{row['miou']:.2f}", "not", "run"]
    assert answer.out.index("Table 2") < answer.out.index("Table 3\n") < answer.out.index("Table 4\n")
    assert "0 of 58 rows are measured in runs, 0 of them in the published way" in answer.out
    refused(segtrain("runs", "table=papr"), "table must be paper or null, got papr; did you mean paper?")


def test_measured_stands_beside_published(segtrain, tmp_path):
    root = tmp_path / "runs"
    finished(
        root,
        "any_name",
        INPLACE,
        change={"dataset.root": "/data", "loader.workers": 3, "model.weights": "/w/resnext101_ipabn_lr_512.pth.tar"},
    )
    finished(root, "short", "cityscapes_resnext101", 0.7758)
    finished(root, "toy", "toy")
    finished(root, "at_work", "cityscapes_wider_resnet38", state="stopped")
    answer = segtrain("runs", "table=paper")
    assert answer.status == 0, answer.err
    lines = [line.split() for line in answer.out.splitlines()]
    assert next(line for line in lines if INPLACE in line)[-3:] == ["77.04", "77.01", "-0.03"]
    assert next(line for line in lines if "cityscapes_resnext101_sync_16x672" in line)[-3:] == [
        "77.58",
        "77.58",
        "+0.00",
    ]
    (line,) = told(root, "cityscapes_wider_resnet38_sync_class_uniform_12x872")
    assert (line.measured, line.notes) == (None, ("stopped at step 99",))
    assert "2 of 58 rows are measured in runs, 2 of them in the published way" in answer.out
    assert runs(RunsConfig(str(root), "paper")) == []


@pytest.mark.parametrize(
    ("note", "how"),
    [
        ("optimizer.lr=0.1 (recipe: 0.0025)", {"change": {"optimizer.lr": 0.1}}),
        ("trainer.max_steps=100 (recipe: null)", {"change": {"trainer.max_steps": 100}}),
        ("model.weights=none (recipe: resnext101_ipabn_lr_512.pth.tar)", {"change": {"model.weights": "none"}}),
        ("normalisation over 16 crops, not 4", {"processes": 1}),
        ("inference.flip=True", {"score": {"inference": {"scales": [1.0], "flip": True, "tile": None}}}),
        ("inference.longest_side=2048", {"score": {"inference": {"scales": [1.0], "longest_side": 2048}}}),
        ("split night, not val", {"score": {"split": "night"}}),
        ("best.pt, not last.pt", {"score": {"checkpoint": "x/best.pt"}}),
        ("averaged weights", {"score": {"protocol": {"weights": "averaged"}}}),
        ("4 images of 500", {"score": {"protocol": {"warnings": ["4 images of 500"]}}}),
    ],
)
def test_what_is_not_as_published_is_named(tmp_path, note, how):
    finished(tmp_path, "run", INPLACE, **how)
    (line,) = told(tmp_path, INPLACE)
    assert line.notes == (note,)
    assert line.measured == pytest.approx((77.01,))


def test_one_card_that_accumulates_is_as_published_and_sync_always(tmp_path):
    finished(tmp_path, "one", INPLACE, processes=1, accumulation=4)
    finished(tmp_path, "sync", "cityscapes_resnext101_sync_16x672", processes=1)
    assert [
        line.notes for recipe in (INPLACE, "cityscapes_resnext101_sync_16x672") for line in told(tmp_path, recipe)
    ] == [(), ()]


def test_of_several_scores_the_one_closest_to_the_paper_is_taken(tmp_path):
    folder = finished(tmp_path, "run", INPLACE, change={"inference.flip": True}, score={"inference": {"flip": True}})
    score = json.loads((folder / "evaluation.json").read_text())
    again = folder / "evaluations" / "cityscapes-val-whole"
    again.mkdir(parents=True)
    (again / "evaluation.json").write_text(json.dumps(score | {"miou": 0.5, "inference": {"flip": False}}))
    (line,) = told(tmp_path, INPLACE)
    assert (line.measured, line.notes) == ((50.0,), ())


def test_imagenet_has_a_line_for_each_protocol(tmp_path):
    folder = finished(tmp_path, "run", INPLACE)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump(config | {"experiment": "imagenet_resnext101"}))
    (folder / "evaluation.json").unlink()
    lines = told(tmp_path, "imagenet_resnext101")
    assert [(line.protocol, line.published) for line in lines] == [
        ("center224", (78.08, 93.79)), ("tencrop", (79.52, 94.66)), ("center320", (79.38, 94.67)),
    ]  # fmt: skip
    assert {line.notes for line in lines} == {("not evaluated in this way",)}


@pytest.mark.parametrize(
    ("notes", "name", "changed"),
    [
        ((), "center224", {}),
        (("inference.resize=320",), "center224", {"resize": 320}),
        (("inference.crop=224",), "center320", {"crop": 224}),
        (("inference.crops=center",), "tencrop", {"crops": "center"}),
    ],
)
def test_an_imagenet_score_is_compared_with_the_protocol_of_its_name(tmp_path, notes, name, changed):
    how = {"center224": (256, 224, "center"), "tencrop": (256, 224, "ten"), "center320": (320, 320, "center")}[name]
    inference = {"name": name, **dict(zip(("resize", "crop", "crops"), how, strict=True))} | changed
    score = {"dataset": "imagenet", "inference": inference, "top1": 0.78, "top5": 0.93}
    finished(tmp_path, "run", "imagenet_resnext101", score=score)
    (line,) = [line for line in told(tmp_path, "imagenet_resnext101") if line.measured is not None]
    assert (line.protocol, line.measured, line.notes) == (name, pytest.approx((78.0, 93.0)), notes)
