"""`segtrain suspects`: labels that the network of a run contradicts most surely."""

import csv
import io
from collections.abc import Iterator
from contextlib import closing
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
from segtrain.scoring.contradictions import Contradiction, Ranking
from segtrain.scoring.inference import Prediction
from segtrain.scoring.predictor import Predictor, load_predictor

COLUMNS = ("file", "x", "y", "w", "h", "label", "predicted", "confidence", "area", "suspicion")
AROUND, HEIGHT = 24, 160  # pixels around a region on the sheet, and the height of its panels


class Suspect(NamedTuple):
    """A region, how suspicious it is, and the path of its image below the folder of the data."""

    file: str
    suspicion: float
    found: Contradiction


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
    ranking = Ranking(table.num_classes, config.top)
    for number, (item, answer) in enumerate(answers(samples, table, predictor, trained, "predicting")):
        assert answer.probability is not None and answer.of_asked is not None
        ranking.add(number, item.target, answer.train_ids, answer.probability, answer.of_asked)
    best = ranking.best()
    ranked = [Suspect(file_of(samples[image], trained), suspicion, found) for suspicion, image, found in best]
    output = Path(config.output or folder / "suspects")
    if ranked:
        shown: dict[int, list[int]] = {}  # image -> places in the list; each image is predicted once more
        for place, one in enumerate(best):
            shown.setdefault(one.image, []).append(place)
        again = answers([samples[image] for image in shown], table, predictor, trained, "drawing")
        panels: dict[int, np.ndarray] = {}
        for places, (item, answer) in zip(shown.values(), again, strict=True):
            for place in places:
                panels[place] = surroundings(item, answer.train_ids, best[place].found, predictor.table)
        width = max(panel.shape[1] for panel in panels.values())
        texts = [suspect_caption(number, one, table.names) for number, one in enumerate(ranked, 1)]
        named = [figures.captioned(padded(panels[place], width), text) for place, text in enumerate(texts)]
        figures.write_png(output / "suspects.png", figures.grid(named, 2))
    write_atomically(output / "suspects.csv", suspects_csv(ranked, table.names))
    say(f"suspects    {len(ranked)} of {ranking.regions} regions, the most suspicious first")
    say(str(output / "suspects.csv"))
    return output / "suspects.csv"


def answers(
    samples: list[Sample], table: LabelTable, predictor: Predictor, trained: TrainConfig, what: str
) -> Iterator[tuple[EvaluationItem, Prediction]]:
    """Samples, as they are evaluated, with the network's answer and its probabilities of the labels."""
    progress = Progress(what, len(samples))
    with closing(evaluation_samples(samples, table, 0)) as items:
        given = (Given(item, str(item.sample.image), item.image, asked=item.target) for item in items)
        found = predictions(predictor, given, trained.inference, probability=True)
        for number, (item, answer) in enumerate(found, 1):
            yield item, answer
            progress.show(number)


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
        found, classes = one.found, (names[one.found.label], names[one.found.predicted])
        writer.writerow((one.file, *found[:4], *classes, f"{found.confidence:.4f}", found.area, f"{one.suspicion:.4g}"))
    return text.getvalue().encode("utf-8", "surrogateescape")
