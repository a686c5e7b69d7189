"""`segtrain score`: score label PNGs made by any program, by the dataset's own rules."""

import bisect
import fnmatch
import os
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from segtrain.config import IGNORE_INDEX, DatasetConfig, ScoreConfig
from segtrain.console import Progress, say
from segtrain.data.bands import read_channels
from segtrain.data.images import orientation_of, read_bytes, read_header
from segtrain.data.label_files import read_label
from segtrain.data.labels import LabelTable
from segtrain.data.orientation import AS_STORED, tag_to_apply
from segtrain.data.registry import dataset_spec, identities, is_mixture, label_table, labelled_samples
from segtrain.data.sample import DatasetSpec, Sample, read_labels
from segtrain.errors import DataError, UsageError
from segtrain.scoring import figures
from segtrain.scoring.image_counts import ImageCounts
from segtrain.scoring.report import CONFUSION, Evaluation, print_table, protocol, summarise
from segtrain.scoring.scores import Scores
from segtrain.threads import threaded_map


def score(config: ScoreConfig) -> dict[str, Any]:
    """Score the predictions, print the table and write evaluation.json. Returns its content, fractions."""
    if config.predictions is None:
        raise UsageError("predictions is not set: give predictions=FOLDER with one label PNG per image")
    data = config.dataset
    if is_mixture(data):
        raise UsageError(f"dataset={data.name} has no labels of its own to score against: name one of its datasets")
    dataset, table = dataset_spec(data), label_table(data)
    split = config.split or dataset.scored
    samples = labelled_samples(data, split)
    answers = find_answers(Path(config.predictions), [dataset.answer(sample.name) for sample in samples])
    warnings = orientation_warnings(data, samples)
    encoding = config.predictions_encoding or dataset.encoding
    say(f"scoring     {len(samples)} predictions ({encoding}) in {config.predictions}")
    say(f"against     {data.name} {split}, by the rules of {dataset.rules.source}")
    encodings = known_encodings(table, dataset)
    expect_encoding(encoding, encodings, data.name)
    counted, images = Scores(table, dataset.rules, config.boundary), ImageCounts(table.num_classes)
    pairs = list(zip(samples, answers, strict=True))
    progress = Progress("scoring", len(pairs))
    for number, (ids, predicted, instances) in enumerate(threaded_map(partial(read_pair, table), pairs), 1):
        own = counted.add(ids, predicted, instances, encodings[encoding].to_id)
        images.add(samples[number - 1].name, ids.shape, own, counted.class_of)
        progress.show(number)
    found = np.flatnonzero(counted.pixels.sum(0)).tolist()
    refuse_wrong_encoding(counted, encodings, encoding, found)
    strange = [value for value in found if value not in encodings[encoding].values]
    if strange:
        pixels = int(counted.pixels[:, strange].sum())
        warnings.append(f"{pixels} pixels were predicted as {strange[:8]}, which are no {encoding} of {data.name}; "
                        f"on labelled pixels {counted.rules.ignored_prediction}")  # fmt: skip
    counted.translate(encodings[encoding].to_id)
    how = {"predictions": str(config.predictions), "predictions_encoding": encoding}
    result = summarise(counted, None) | {"dataset": data.name, "split": split}
    result["protocol"] = protocol(counted, data, split, samples, warnings, how)
    print_table(result)
    confusion = counted.evaluated()
    by_image = images.in_order(
        (sample.name for sample in samples), identities(data, samples), table.names, dataset.rules,
        {"dataset": data.name, "split": split},
    )  # fmt: skip
    evaluation = Evaluation(result, {}, {CONFUSION: figures.confusion(confusion, table)}, confusion, images=by_image)
    say(str(evaluation.write(Path(config.output or "segtrain-out/score"))))
    return result


# -------------------------------------------------------------------------------------------------------- the files


def find_answers(folder: Path, patterns: list[str]) -> list[Path]:
    """Find the one file below `folder` for each glob of a file name, which may name folders too.

    DataError, naming examples, if a pattern has no file or several.
    """
    if not folder.is_dir():
        raise UsageError(f"predictions={folder}: no such folder; give the one that holds your label images")
    files = sorted(
        (name, Path(place, name)) for place, _, names in os.walk(folder) for name in names if not name.startswith("._")
    )
    names = [name for name, _ in files]
    found: list[Path] = []
    missing: list[str] = []
    for pattern in patterns:
        inner, _, pattern_name = pattern.rpartition("/")
        start = re.split(r"[*?\[]", pattern_name)[0]
        first = bisect.bisect_left(names, start)
        several = []
        for name, path in files[first:]:
            if not name.startswith(start):
                break
            if fnmatch.fnmatchcase(name, pattern_name) and path.parent.as_posix().endswith(inner):
                several.append(path)
        if len(several) > 1:
            shown = ", ".join(str(path) for path in several[:3])
            raise DataError(
                f"{len(several)} files answer for {pattern}: {shown}; give a folder with the label images only "
                "(of segtrain predict: OUTPUT/labels)"
            )
        if several:
            found.append(several[0])
        else:
            missing.append(pattern)
    if missing:
        raise DataError(
            f"{len(missing)} of {len(patterns)} predictions are missing below {folder}: {', '.join(missing[:3])}"
            f"{', ...' if len(missing) > 3 else ''}; {len(files)} files are there"
        )
    return found


def orientation_warnings(data: DatasetConfig, samples: list[Sample]) -> list[str]:
    """What to know of images with an EXIF orientation that their labels do not follow. DataError by dataset.exif."""
    if not hasattr(data, "exif"):
        return []
    left = 0
    for sample in samples:
        if sample.image == sample.label or sample.label is None or not sample.image.is_file():
            continue
        tag = orientation_of(read_bytes(sample.image), sample.image)
        if tag != AS_STORED:
            stored = (
                read_header(sample.image)
                if sample.channels is None
                else read_channels(sample.image, sample.channels).shape
            )
            sizes = stored[:2], read_header(sample.label)[:2]
            left += tag_to_apply(tag, sample.exif, *sizes, sample.image) == AS_STORED
    if not left:
        return []
    text = (
        f"{left} images have an EXIF orientation that their labels do not follow (dataset.exif={samples[0].exif}), but "
        "the answers of segtrain predict do: the predictions must lie as the labels do"
    )
    say(f"warning     {text}")
    return [text]


def read_pair(table: LabelTable, pair: tuple[Sample, Path]) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Read label ids and predicted values, both uint8 (H, W), and instances. DataError if their sizes differ."""
    sample, answer = pair
    _, ids, instances = read_labels(sample, table)
    predicted = read_label(answer)
    if predicted.shape != ids.shape:
        (height, width), (h, w) = ids.shape, predicted.shape
        raise DataError(
            f"{answer} is {w}x{h}, its label {sample.label} is {width}x{height} (width x height): predictions are "
            "scored at the label's size; resize them with the nearest pixel, or predict at full size"
        )
    return ids, predicted, instances


# -------------------------------------------------------------------------------------------------- what pixels mean


class Encoding(NamedTuple):
    """to_id: uint8 (256,), pixel value -> label id. values: those that are allowed."""

    to_id: np.ndarray
    values: frozenset[int]


def known_encodings(table: LabelTable, dataset: DatasetSpec) -> dict[str, Encoding]:
    """Encodings by name. They map other values to an id that is no class."""
    outside = next(iter(table.ignored_ids), None)
    if outside is None:
        outside = next(label for label in range(255, -1, -1) if label not in table.ids)

    def encoding(to_id: dict[int, int]) -> Encoding:
        lut = np.full(256, outside, np.uint8)
        for value, label in to_id.items():
            lut[value] = label
        return Encoding(lut, frozenset(to_id))

    result = {name: encoding(dict(to_id)) for name, to_id in dataset.encodings(table).items()}
    if "train_ids" in result:
        result["train_ids"] = result["train_ids"]._replace(values=result["train_ids"].values | {IGNORE_INDEX})
    return result


def expect_encoding(name: str, encodings: Mapping[str, Encoding], dataset: str) -> None:
    """UsageError for an encoding that the dataset does not have."""
    if name not in encodings:
        raise UsageError(
            f"predictions_encoding={name}: {dataset} has no such encoding; choose {' or '.join(encodings)}"
        )


def refuse_wrong_encoding(counted: Scores, encodings: dict[str, Encoding], chosen: str, found: list[int]) -> None:
    """DataError if the values fit another encoding, in which far more pixels are right.

    found: the values that occur.
    """
    accuracy = {name: agreement(counted, encoding.to_id) for name, encoding in encodings.items()}
    for name, encoding in encodings.items():
        if name != chosen and encoding.values.issuperset(found) and accuracy[name] > max(0.3, 3 * accuracy[chosen]):
            raise DataError(
                f"these predictions look like {name}, not {chosen}: read as {name} {100 * accuracy[name]:.1f} % of the "
                f"labelled pixels are right, as {chosen} {100 * accuracy[chosen]:.1f} %. "
                f"Set predictions_encoding={name}"
            )


def agreement(counted: Scores, to_id: np.ndarray) -> float:
    """Fraction of the labelled pixels whose class is predicted."""
    labels = counted.class_of[:, None]
    right = (labels == counted.class_of[to_id][None, :]) & (labels != IGNORE_INDEX)
    total = counted.pixels[counted.class_of != IGNORE_INDEX].sum()
    return float(counted.pixels[right].sum() / total) if total else 0.0
