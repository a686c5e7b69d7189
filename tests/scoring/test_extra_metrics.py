"""Metrics of plugins: METRICS, a dict of functions of the confusion matrix."""

import json
from pathlib import Path

import numpy as np
import pytest

from segtrain.data.labels import published_table
from segtrain.data.rules import CITYSCAPES, VISTAS
from segtrain.errors import UsageError
from segtrain.metrics import METRICS
from segtrain.scoring.accuracies import Accuracies
from segtrain.scoring.extra_metrics import apply_metrics, metric_lines, metric_scalars
from segtrain.scoring.report import summarise
from segtrain.scoring.scores import Scores
from tests.helpers import zygote
from tests.helpers.checkout import ROOT, TINY
from tests.helpers.own_parts import FOLDER

PLUGIN = FOLDER / "my_metric.py"
OFFICIAL = ROOT / "tests" / "fixtures" / "official_scores"


@pytest.fixture
def metrics(monkeypatch):
    """An empty METRICS for a test."""
    monkeypatch.setattr("segtrain.scoring.extra_metrics.METRICS", found := {})
    monkeypatch.setattr("segtrain.scoring.accuracies.METRICS", found)
    return found


def counted(rules):
    """Cityscapes pixels: 3 of class 0, one of them predicted as class 1, one as an id outside the classes; 1 void."""
    table = published_table("cityscapes", "cityscapes")
    scores = Scores(table, rules)
    road, pavement = table.ids[:2]
    scores.add(np.array([[road] * 3 + [0]], np.uint8), np.array([[road, pavement, 255, road]], np.uint8))
    return scores


def test_no_metric_leaves_the_result_as_it_is(metrics):
    assert METRICS == {}  # the package has none of its own
    assert apply_metrics(np.ones((2, 3), np.int64)) == {}
    assert "metrics" not in summarise(counted(CITYSCAPES), None)
    assert metric_lines({}) == [] and metric_scalars({}) == {}


@pytest.mark.parametrize(("rules", "outside"), [(CITYSCAPES, 1), (VISTAS, 0)])
def test_a_metric_gets_the_confusion_matrix_of_the_rules(metrics, rules, outside):
    given = []
    metrics["first_row"] = lambda confusion: given.append(confusion) or {"hits": confusion[0, 0], "none": np.nan}
    metrics["a"] = lambda confusion: np.float32(0.5)
    result = summarise(counted(rules), None)
    (matrix,) = given
    assert (matrix.dtype, matrix.shape) == (np.int64, (19, 20))
    assert (matrix[0, 0], matrix[0, 1], matrix[0, -1], matrix.sum()) == (1, 1, outside, 2 + outside)
    assert result["metrics"] == {"first_row": {"hits": 1.0, "none": None}, "a": 0.5}
    assert json.loads(json.dumps(result["metrics"])) == result["metrics"]
    assert metric_lines(result) == ["first_row hits  1", "first_row none  -", "a               0.5"]
    assert metric_scalars(result) == {"val/first_row/hits": 1.0, "val/first_row/none": None, "val/a": 0.5}


def test_a_metric_may_write_into_its_matrix(metrics):
    metrics["greedy"] = lambda confusion: confusion.fill(0) or 0
    scores = counted(CITYSCAPES)
    assert summarise(scores, None)["miou"] == pytest.approx(1 / 6)
    metrics["next"] = lambda confusion: confusion.sum()
    assert apply_metrics(scores.evaluated())["metrics"]["next"] == 3


@pytest.mark.parametrize(
    ("name", "metric", "words"),
    [
        ("bad", lambda confusion: "much", ["METRICS['bad'] fails: ValueError", "a number or a dict of numbers"]),
        ("bad", lambda confusion: confusion[99], ["METRICS['bad'] fails: IndexError", r"int64 \(2, 3\)"]),
        ("bad", lambda: 1, ["METRICS['bad'] fails: TypeError", "takes the confusion matrix"]),
        ("miou", lambda confusion: 1, ["METRICS['miou'] has the name of a built-in score", "another name"]),
    ],
)
def test_a_metric_that_fails_is_named(metrics, name, metric, words):
    metrics[name] = metric
    for word in words:
        with pytest.raises(UsageError, match=word.replace("[", r"\[").replace("]", r"\]")):
            apply_metrics(np.zeros((2, 3), np.int64))


def test_accuracies_count_the_confusion_of_classes_where_a_metric_reads_it(metrics):
    assert Accuracies(["a", "b", "c"]).confusion is None
    metrics["count"] = lambda confusion: {f"{i}{j}": confusion[i, j] for i, j in np.argwhere(confusion)}
    accuracies = Accuracies(["a", "b", "c"])
    accuracies.add(np.array([0, 0, 2]), np.array([[0, 1], [1, 0], [2, 0]]))
    accuracies.add(np.array([0]), np.array([[1, 2]]))
    result = accuracies.result()
    assert result["metrics"] == {"count": {"00": 1, "01": 2, "22": 1}}
    assert (result["top1"], result["top5"], result["images"]) == (0.5, 0.75, 4)
    assert result["per_class_top1"] == {"a": 1 / 3, "b": None, "c": 1.0}


# ------------------------------------------------------------------------------------------------ the example


def dice(matrix):
    """The example's definition, class by class."""
    matrix = np.array(matrix)
    found = {}
    for k in range(len(matrix)):
        hits, total = matrix[k, k], matrix[k].sum() + matrix[:, k].sum()
        if total:
            found[k] = 2 * hits / total
    return {"mean": pytest.approx(np.mean(list(found.values()))), "worst": pytest.approx(min(found.values()))}


def checked(folder, printed):
    """Check the example's metric in evaluation.json of `folder` and in the table."""
    result = json.loads((Path(folder) / "evaluation.json").read_text())
    assert result["metrics"] == {"dice": dice(result["confusion_matrix"])}
    for name, value in result["metrics"]["dice"].items():
        assert f"dice {name:<9}  {value:.4g}\n" in printed
    return result["metrics"]["dice"]


def test_the_example_is_scored():
    words = [f"predictions={OFFICIAL / 'kitti/results'}", "dataset=kitti", f"dataset.root={OFFICIAL / 'kitti'}"]
    answer = zygote.call(["score", *words, f"plugins=[{PLUGIN}]", "output=o"])
    assert answer.returncode == 0, answer
    checked("o", answer.stdout)
    assert zygote.call(["score", *words, "output=without"]).returncode == 0
    assert "metrics" not in json.loads(Path("without/evaluation.json").read_text())


def test_the_example_is_validated_logged_and_evaluated(folder_data):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    plugins = f"plugins=[{PLUGIN},{TINY}]"
    answer = zygote.call(["train", *folder_data[1], plugins, "model.backbone=tiny", "run=r"])
    assert answer.returncode == 0, answer
    values = checked("r", answer.stdout)
    assert "dice worst" in Path("r/summary.txt").read_text()
    logged = [json.loads(line) for line in Path("r/metrics.jsonl").read_text().splitlines()]
    (line,) = [line for line in logged if "val/miou" in line]
    assert {name: line[f"val/dice/{name}"] for name in values} == values
    events = EventAccumulator("r/tensorboard")
    events.Reload()
    for name, value in values.items():
        assert events.Scalars(f"val/dice/{name}")[-1].value == pytest.approx(value)
    again = zygote.call(["evaluate", "r/last.pt", plugins, "output=o", "device=cpu", "loader.workers=0"])
    assert again.returncode == 0, again
    assert checked("o", again.stdout) == values
