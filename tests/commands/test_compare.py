"""`segtrain compare`: its verdicts, its files, what it refuses, and the seeds of a recipe."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from scipy import stats

from segtrain.commands.compare import recipe_of
from segtrain.commands.compare_picture import tick_of
from segtrain.config import TrainConfig
from segtrain.data.labels import LabelTable
from segtrain.data.rules import PLAIN, VISTAS
from segtrain.scoring.evaluation_file import read_evaluation
from segtrain.scoring.seeds import difference_of_means, seed_spread, seeds_needed
from tests.helpers.evaluations import TABLE, evaluation_folder, seed_runs
from tests.helpers.runs import refused


def test_a_better_one_is_named(segtrain, tmp_path):
    a, b = evaluation_folder(tmp_path / "a (1)", 0.4), evaluation_folder(tmp_path / "b, c", 0.1, seed=1)
    answer = segtrain("compare", a, b)
    assert answer.status == 0, answer
    assert answer.out.splitlines()[-1] == "segtrain-out/compare/compare.json"
    assert "B - A: B is better: mIoU +" in answer.out and "2000 resamples, seed 0" in answer.out
    found = json.loads(Path("segtrain-out/compare/compare.json").read_text())
    one, two = (json.loads((folder / "evaluation.json").read_text()) for folder in (a, b))
    pair = found["pairs"][0]
    assert pair["miou"]["value"] == pytest.approx(two["miou"] - one["miou"], rel=1e-12)
    assert 0 < pair["miou"]["low"] < pair["miou"]["value"] < pair["miou"]["high"] and pair["better"] == "B"
    for name, value in pair["per_class"].items():
        assert value["value"] == pytest.approx(two["per_class"][name] - one["per_class"][name], rel=1e-12)
    assert [one["input"] for one in found["inputs"]] == [str(a), str(b)]
    assert found["inputs"][0]["miou"]["value"] == pytest.approx(one["miou"], rel=1e-12)
    text = Path("segtrain-out/compare/compare.md").read_text()
    assert "**B - A: B is better: mIoU +" in text and "| a\\|b <i> |" in text
    assert len({line.count(" | ") for line in text.splitlines() if line.startswith("| a\\|b")}) == 1
    with Image.open("segtrain-out/compare/compare.png") as image:
        assert image.size == (1000, 58 + 22 * 4 + 34) and len(image.getcolors(1 << 16)) > 4


def test_the_first_one_may_be_better_and_few_images_are_marked(segtrain, tmp_path):
    a, b = (evaluation_folder(tmp_path / name, wrong, seed, images=9) for seed, (name, wrong) in
            enumerate((("a", 0.05), ("b", 0.8))))  # fmt: skip
    answer = segtrain("compare", a, b)
    assert answer.status == 0 and "B - A: A is better: mIoU -" in answer.out, answer
    found = json.loads(Path("segtrain-out/compare/compare.json").read_text())
    assert found["pairs"][0]["better"] == "A" and found["few_images"] == ["road", "a|b <i>", "sky"]
    rows = [line for line in answer.out.splitlines() if line.startswith(("road", "a|b", "sky"))]
    assert len(rows) == 3 and all(row.endswith("A better (few images)") for row in rows), rows
    ten = [evaluation_folder(tmp_path / name, wrong, images=10) for name, wrong in (("c", 0.05), ("d", 0.8))]
    assert "few images" not in segtrain("compare", *ten).out


@pytest.mark.parametrize("rules", [PLAIN, VISTAS])
def test_predictions_outside_the_classes_count_by_the_rules(segtrain, tmp_path, rules):
    runs = [evaluation_folder(tmp_path / name, 0.3, seed, rules=rules, outside=0.2) for seed, name in enumerate("ab")]
    answer = segtrain("compare", *runs)
    assert answer.status == 0, answer
    one, two = (json.loads((run / "evaluation.json").read_text())["miou"] for run in runs)
    found = json.loads(Path("segtrain-out/compare/compare.json").read_text())
    assert [each["miou"]["value"] for each in found["inputs"]] == pytest.approx([one, two], rel=1e-12)
    assert found["pairs"][0]["miou"]["value"] == pytest.approx(two - one, rel=1e-9)


@given(st.floats(1e-3, 1.05))
@example(0.81)
def test_ticks_of_the_picture_are_two_to_five(reach):
    step = tick_of(reach)
    assert 2 <= reach / step <= 5 and f"{step:.0e}"[0] in "125"


def test_the_files_are_the_same_every_time(segtrain, tmp_path):
    inputs = [evaluation_folder(tmp_path / name, wrong, seed) for seed, (name, wrong) in
              enumerate((("a", 0.3), ("b", 0.3), ("c", 0.28)))]  # fmt: skip
    for output in ("1", "2"):
        answer = segtrain("compare", *inputs, f"output={tmp_path / output}")
        assert answer.status == 0 and "C - A: " in answer.out and "C - B" not in answer.out
    for name in ("compare.json", "compare.md", "compare.png"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_no_difference_is_said_plainly_and_is_no_failure(segtrain, tmp_path):
    a, b = (evaluation_folder(tmp_path / name, 0.3, seed) for seed, name in enumerate("ab"))
    answer = segtrain("compare", a, b / "evaluation.json")
    assert answer.status == 0 and "B - A: no difference: mIoU " in answer.out, answer
    same = evaluation_folder(tmp_path / "c", 0.3, 0)
    answer = segtrain("compare", a, same)
    assert answer.status == 0
    assert "B - A: no difference: both have the same counts in each of the 30 images" in answer.out
    assert json.loads(Path("segtrain-out/compare/compare.json").read_text())["pairs"][0]["identical_counts"]
    one, two = (evaluation_folder(tmp_path / f"one{seed}", 0.3, seed, images=1) for seed in (0, 1))
    answer = segtrain("compare", one, two)
    assert answer.status == 0 and "B - A: no interval: 1 image cannot show a spread" in answer.out, answer


OTHER_NAMES = LabelTable([{**row, "name": row["name"].upper()} for row in TABLE.rows], "a test")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"images": 29}, "other images: 30 of mine val and 29 of mine val; only in the first: /image 029"),
        ({"names": [f"photo {i}" for i in range(30)]}, "only in the second: /photo 0, /photo 1, /photo 10, ..."),
        ({"rules": VISTAS}, "other rules: predicted ids outside the classes: 'miss' and 'dropped'"),
        (
            {"rules": PLAIN._replace(absent="ground truth")},
            "other rules: classes left out of the mean: 'union' and 'ground truth'",
        ),
        ({"labels": 1}, "other labels of 30 of 30 images: image 000, image 001, image 002"),
        ({"size": (12, 17)}, "other sizes of 30 of 30 images"),
        ({"table": OTHER_NAMES}, "other classes: 3 and 3; only in the first: a|b <i>, road, sky; only in the second"),
    ],
)
def test_what_cannot_be_compared(segtrain, tmp_path, change, text):
    a, b = evaluation_folder(tmp_path / "a"), evaluation_folder(tmp_path / "b", seed=1, **change)
    refused(segtrain("compare", a, b), f"{a} (A) and {b} (B) cannot be compared:", text, status=1)
    assert not Path("segtrain-out").exists()


def test_the_order_of_the_images_does_not_matter(segtrain, tmp_path):
    names = [f"image {number:03d}" for number in range(30)]
    a, b = evaluation_folder(tmp_path / "a"), evaluation_folder(tmp_path / "b", seed=1)
    segtrain("compare", a, b, "output=straight")
    with np.load(b / "images.npz") as file:
        arrays = {name: file[name] for name in file.files}
    number = 29 - arrays["image"]
    order = np.argsort(number, kind="stable")
    for name in ("truth", "prediction", "pixels"):
        arrays[name] = arrays[name][order]
    packed = [np.frombuffer("".join(f"{text}\0" for text in texts).encode(), np.uint8) for texts in
              (names[::-1], [f"/{name}" for name in names[::-1]])]  # fmt: skip
    arrays |= {"image": number[order], "sizes": arrays["sizes"][::-1], "names": packed[0], "identities": packed[1]}
    np.savez_compressed(b / "images.npz", **arrays)
    assert segtrain("compare", a, b, "output=turned").status == 0
    assert Path("straight/compare.json").read_bytes() == Path("turned/compare.json").read_bytes()


def test_inputs_that_are_no_evaluations(segtrain, tmp_path):
    a, b = evaluation_folder(tmp_path / "a"), evaluation_folder(tmp_path / "b", seed=1)
    refused(segtrain("compare", a), "inputs=", "give two or more runs or evaluations")
    refused(segtrain("compare", a, tmp_path / "none"), "none: no such file or folder")
    refused(segtrain("compare", a, b, a / "evaluation.json"), "are the same evaluation")
    (b / "images.npz").rename(tmp_path / "images.npz")
    refused(segtrain("compare", a, b), "images.npz is missing", "`segtrain evaluate` writes it", status=1)
    (b / "images.npz").write_bytes((a / "images.npz").read_bytes())
    refused(segtrain("compare", a, b), "images.npz is not of evaluation.json beside it", status=1)
    (b / "evaluation.json").write_text('{"top1": 1}')
    refused(segtrain("compare", a, b), "is of an image classification", status=1)
    (b / "evaluation.json").write_text("[]")
    refused(segtrain("compare", a, b), "is no evaluation", status=1)
    (b / "evaluation.json").unlink()
    (b / "config.yaml").write_text("")
    evaluation_folder(b / "evaluations" / "x")
    refused(segtrain("compare", a, b), "(the run is not finished)", f"there is {b / 'evaluations' / 'x'}", status=1)


def test_seeds_of_two_recipes(segtrain, tmp_path):
    config = asdict(TrainConfig())
    first = seed_runs(tmp_path, "a", 0.4, 3, config)
    second = seed_runs(tmp_path, "b", 0.2, 2, config | {"optimizer": config["optimizer"] | {"lr": 0.5}})
    answer = segtrain("compare", *first, *second)
    assert answer.status == 0, answer
    found = json.loads(Path("segtrain-out/compare/compare.json").read_text())
    scores = [json.loads((run / "evaluation.json").read_text())["miou"] for run in [*first, *second]]
    assert [one["letters"] for one in found["recipes"]] == [["A", "B", "C"], ["D", "E"]]
    assert found["recipes"][0]["mean"] == pytest.approx(np.mean(scores[:3]))
    assert found["recipes"][0]["deviation"] == pytest.approx(np.std(scores[:3], ddof=1))
    pair = found["recipe_differences"][0]
    welch = stats.ttest_ind(scores[3:], scores[:3], equal_var=False).confidence_interval()
    assert (pair["low"], pair["high"]) == pytest.approx(tuple(welch))
    assert "A, B, C: 3 seeds of one recipe: mean mIoU " in answer.out
    assert "seeds of each recipe to see a difference of 0.25 points: " in answer.out
    assert [one["seed"] for one in found["inputs"]] == [0, 1, 2, 0, 1]


@pytest.mark.parametrize(
    "change",
    [
        {"inference": {"name": "whole", "flip": True}}, {"step": 8}, {"protocol": {"weights": "averaged"}},
        {"protocol": {"weights": "raw", "taxonomy": {"name": "own"}}},
        {"protocol": {"weights": "raw", "selected_on": "val"}},
    ],
    ids=["inference", "step", "weights", "taxonomy", "selected_on"],
)  # fmt: skip
def test_seeds_that_were_scored_otherwise_are_no_recipe(tmp_path, change):
    runs = seed_runs(tmp_path, "a", 0.4, 3, asdict(TrainConfig()))
    result = json.loads((runs[1] / "evaluation.json").read_text())
    (runs[1] / "evaluation.json").write_text(json.dumps(result | change))
    recipes = [recipe_of(read_evaluation(run)) for run in runs]
    assert [one.seed for one in recipes] == [0, 1, 2]
    assert recipes[0].options == recipes[2].options != recipes[1].options


def test_needed_seeds_are_those_of_power_tables():
    """Cohen, Statistical Power Analysis (1988), table 2.4.1: 80 % at a two-sided 5 %."""
    assert [seeds_needed(1.0, d) for d in (0.2, 0.5, 0.8, 1.0)] == [394, 64, 26, 17]
    assert seeds_needed(0.0, 0.1) == 2 and seeds_needed(1.0, 1e-4) is None and seeds_needed(1.0, 1000.0) == 2
    spread = seed_spread([0.70, 0.72])
    assert (spread.mean, spread.deviation) == pytest.approx((0.71, 0.0141421), rel=1e-5)
    assert spread.high - spread.mean == pytest.approx(12.7062 * 0.01, rel=1e-5)
    assert difference_of_means([1.0, 1.0], [2.0, 2.0]) == (1.0, 1.0, 1.0)
