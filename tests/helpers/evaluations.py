"""Evaluation folders as `segtrain evaluate` writes them, of random labels and predictions, without a network."""

import numpy as np
import yaml

from segtrain.data.labels import LabelTable
from segtrain.data.rules import PLAIN
from segtrain.scoring.image_counts import ImageCounts
from segtrain.scoring.report import Evaluation, summarise
from segtrain.scoring.scores import Scores

TABLE = LabelTable(
    [{"id": i, "name": n, "color": [40 * i, 90, 200 - 30 * i], "train_id": i} for i, n in
     enumerate(["road", "a|b <i>", "sky"])], "a test",
)  # fmt: skip


def evaluation_folder(
    folder, wrong=0.2, seed=0, images=30, rules=PLAIN, table=TABLE, names=None, labels=0, size=(12, 16), step=7,
    outside=0.0,
):  # fmt: skip
    """Write an evaluation in which that fraction of the pixels is predicted as a random class.

    labels: seed of the label images; seed: of the predictions. outside: fraction of the pixels that is predicted as an
    id of no class. Returns the folder.
    """
    names = names or [f"image {number:03d}" for number in range(images)]
    scores, collected = Scores(table, rules), ImageCounts(table.num_classes)
    for number, name in enumerate(names):
        truth, own = np.random.default_rng([labels, number]), np.random.default_rng([7, seed, number])
        ids = np.sort(truth.integers(0, 3, size).astype(np.uint8), 0)
        errors = own.random(size) < min(1, wrong * own.gamma(2) / 2)
        predicted = np.where(errors, own.integers(0, 3, size), ids).astype(np.uint8)
        predicted[own.random(size) < outside] = 9
        collected.add(name, ids.shape, scores.add(ids, predicted), scores.class_of)
    identities = [f"/{name}" for name in names]
    by_image = collected.in_order(names, identities, table.names, rules, {"dataset": "mine", "split": "val"})
    described = {"dataset": "mine", "split": "val", "inference": {"name": "whole"}, "checkpoint": "last.pt"}
    result = summarise(scores, None) | described | {"step": step, "protocol": {"weights": "raw"}}
    Evaluation(result, confusion=scores.evaluated(), images=by_image).write(folder)
    return folder


def seed_runs(folder, name, wrong, count, config):
    """Run folders of one recipe with the seeds 0, 1, ...; config: of the training."""
    made = []
    for seed in range(count):
        run = evaluation_folder(folder / f"{name}{seed}", wrong + 0.01 * seed, seed)
        options = config | {"trainer": config["trainer"] | {"seed": seed}, "name": f"{name}{seed}"}
        (run / "config.yaml").write_text(yaml.safe_dump(options))
        made.append(run)
    return made
