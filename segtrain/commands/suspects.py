"""`segtrain suspects`: labels that the network of a run contradicts most surely."""

import csv
import heapq
import io
from contextlib import closing
from itertools import count
from pathlib import Path
from typing import NamedTuple

import numpy as np

from segtrain.commands.replay import config_of_run
from segtrain.config import SuspectsConfig, TrainConfig
from segtrain.console import Progress, say
from segtrain.data.labels import LabelTable
from segtrain.data.loader import EvaluationItem, evaluation_samples
from segtrain.data.registry import label_table, split_samples, training_mixture
from segtrain.data.sample import Sample
from segtrain.errors import DataError
from segtrain.files import write_atomically
from segtrain.scoring import figures
from segtrain.scoring.batches import Given, predictions
from segtrain.scoring.contradictions import Contradiction, contradictions
from segtrain.scoring.predictor import load_predictor

COLUMNS = ("file", "x", "y", "w", "h", "label", "predicted", "confidence", "area")
AROUND, HEIGHT = 24, 160  # pixels around a region on the sheet, and the height of its panels


class Suspect(NamedTuple):
    """A region with its image, and image, labels and prediction around it, side by side, RGB uint8."""

    file: str
    found: Contradiction
    panel: np.ndarray


def suspects(config: SuspectsConfig) -> Path:
    """Write suspects.csv and suspects.png: the regions whose labels last.pt contradicts most. Returns the CSV file.

    DataError if the folder holds no run, or the data are not there.
    """
    folder = Path(config.run or "")
    trained = config_of_run(folder, config.root)
    samples = chosen_samples(trained, config.split)
    table = label_table(trained.dataset)
    predictor = load_predictor(folder / "last.pt", config.device)
    say(f"examining   the labels of {len(samples)} images of {trained.dataset.name} {config.split or 'train and val'}")
    kept: list[tuple[float, int, Suspect]] = []  # a heap, the least suspicious first
    order, progress, regions = count(0, -1), Progress("predicting", len(samples)), 0
    with closing(evaluation_samples(samples, table, 0)) as items:
        given = (Given(item, str(item.sample.image), item.image) for item in items)
        answers = predictions(predictor, given, trained.inference, probability=True)
        for number, (item, answer) in enumerate(answers, 1):
            assert answer.probability is not None
            for found in contradictions(item.target, answer.train_ids, answer.probability, table.num_classes):
                regions += 1
                if len(kept) == config.top and found.suspicion <= kept[0][0]:
                    continue
                panel = surroundings(item, answer.train_ids, found, predictor.table)
                entry = (found.suspicion, next(order), Suspect(file_of(item.sample, trained), found, panel))
                (heapq.heappushpop if len(kept) == config.top else heapq.heappush)(kept, entry)
            progress.show(number)
    ranked = [suspect for _, _, suspect in sorted(kept, key=lambda entry: entry[:2], reverse=True)]
    output = Path(config.output or folder / "suspects")
    if ranked:
        width = max(one.panel.shape[1] for one in ranked)
        panels = [padded(one.panel, width) for one in ranked]
        texts = [suspect_caption(number, one, table.names) for number, one in enumerate(ranked, 1)]
        named = [figures.captioned(panel, text) for panel, text in zip(panels, texts, strict=True)]
        figures.write_png(output / "suspects.png", figures.grid(named, 2))
    write_atomically(output / "suspects.csv", suspects_csv(ranked, table.names))
    say(f"suspects    {len(ranked)} of {regions} regions, the most suspicious first")
    say(str(output / "suspects.csv"))
    return output / "suspects.csv"


def chosen_samples(trained: TrainConfig, split: str | None) -> list[Sample]:
    """The labelled samples of a split, or of training and validation together, each image once."""
    if split is None:
        some = [*training_mixture(trained.dataset).samples, *split_samples(trained.dataset, trained.dataset.val_split)]
    else:
        some = split_samples(trained.dataset, split)
    samples = list({sample.image: sample for sample in some if sample.label is not None}.values())
    if not samples:
        raise DataError(f"the split {split!r} has no labels to examine")
    return samples


def file_of(sample: Sample, trained: TrainConfig) -> str:
    """The path of a sample's image, below the folder of the data if it is there."""
    root = trained.dataset.folder()
    return sample.image.relative_to(root).as_posix() if sample.image.is_relative_to(root) else str(sample.image)


def surroundings(item: EvaluationItem, prediction: np.ndarray, found: Contradiction, table: LabelTable) -> np.ndarray:
    """Image, labels and prediction around a region, side by side."""
    rows = slice(max(0, found.y - AROUND), found.y + found.h + AROUND)
    columns = slice(max(0, found.x - AROUND), found.x + found.w + AROUND)
    return figures.triple(
        item.image[rows, columns], item.target[rows, columns], prediction[rows, columns], table, HEIGHT
    )


def padded(panel: np.ndarray, width: int) -> np.ndarray:
    full = np.full((panel.shape[0], width, 3), 255, np.uint8)
    full[:, : panel.shape[1]] = panel
    return full


def suspect_caption(number: int, one: Suspect, names: list[str]) -> str:
    found = one.found
    words = f"{names[found.label]}, predicted {names[found.predicted]} {100 * found.confidence:.0f} %"
    return f"{number}  {words}  {Path(one.file).name}"


def suspects_csv(ranked: list[Suspect], names: list[str]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for one in ranked:
        box, found = one.found[:4], one.found
        writer.writerow(
            (one.file, *box, names[found.label], names[found.predicted], f"{found.confidence:.4f}", found.area)
        )
    return text.getvalue().encode("utf-8", "surrogateescape")
